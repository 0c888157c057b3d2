"""The table of operators in the README, made from the op table: `python -m benchmarks.op_table [README]` rewrites it."""

from __future__ import annotations

import sys
from pathlib import Path

from fheq.ops import Kind, Op, rows

BEGIN, END = "<!-- op table: begin -->", "<!-- op table: end -->"
README = Path(__file__).parent.parent / "README.md"
FIRST_OPSET = 7
INTERNAL = "fheq"  # the domain of nodes that only fheq makes
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
BECOMES = {
    Kind.CONSTANT: "known shapes and values: folded at import",
    Kind.MOVEMENT: "the same movement of integers; free",
    Kind.LINEAR: "integer weights and an accumulator, no table of their own",
    Kind.ELEMENTWISE: "of one encrypted tensor: fused with its neighbours into one table; of two: sums on a common scale, "
    "products and comparisons by tables",
    Kind.MAX: "a tree of tables for each maximum",
    Kind.COMPOSITE: "rewritten into the kinds above",
    Kind.CLIENT: "at the end of a model: evaluated after decryption; elsewhere by comparisons",
}


def table() -> str:
    """The table: one line per kind, operators by name."""
    kept = [row for row in rows() if row.domain != INTERNAL]
    lines = ["| kind | on encrypted data | operators |", "|---|---|---|"]
    for kind, becomes in BECOMES.items():
        lines.append(f"| {kind.value} | {becomes} | {_names([r for r in kept if r.kind is kind and not _quantizer(r)])} |")
    quantizers = _names([row for row in kept if _quantizer(row)])
    lines.append(f"| quantizer | read as the model's own scales, zero points and widths | {quantizers} |")
    return "\n".join(lines)


def _quantizer(row: Op) -> bool:
    return row.name in QUANTIZERS or row.domain in ("onnx.brevitas", "qonnx.custom_op.general")


def _names(kept: list[Op]) -> str:
    """Names with their domain, and with the first opset where that is not the first that is read at all."""
    first: dict[str, int] = {}
    for row in kept:
        name = f"{row.domain}.{row.name}" if row.domain else row.name
        first[name] = min(row.since, first.get(name, row.since))
    ordered = sorted(first, key=lambda name: ("." in name, name))
    return ", ".join(f"{name} ({first[name]}+)" if first[name] > FIRST_OPSET else name for name in ordered)


def updated(text: str) -> str:
    """A README's text with the table renewed."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"the README lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main(path: Path = README) -> None:
    """Rewrites the table in place."""
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
