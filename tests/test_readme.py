"""The README: its examples run, and its table of operators is that of the op table."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.encrypted
def test_the_python_blocks_run_one_after_another(capsys):
    space: dict = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), space)
    assert "bootstraps" in capsys.readouterr().out


def test_the_first_example_has_ten_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 11  # ten, and `import fheq`


@pytest.mark.parametrize("line", [line for block in blocks("console") for line in block.splitlines()])
def test_the_commands_run(line, capsys, monkeypatch):
    from fheq.cli import main

    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line)
    assert program == "fheq"
    if arguments == ["demo"]:
        pytest.skip("the demo has tests of its own")
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_the_op_table_is_up_to_date(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    # a process of its own: other tests register rows
    subprocess.run([sys.executable, "-m", "benchmarks.op_table", str(copy)], check=True, cwd=ROOT)
    assert copy.read_text(encoding="utf-8") == README, "run: python -m benchmarks.op_table"


def test_every_option_of_spec_is_explained():
    from dataclasses import fields

    import fheq

    for field in fields(fheq.Spec):
        assert f"`{field.name}`" in README, field.name
