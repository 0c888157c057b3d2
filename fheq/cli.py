"""The command line: `fheq check | quantize | compile | run | demo`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from fheq.errors import FheqError
from fheq.spec import DEFAULT_MODEL_BITS

OK, FAILED, INTERRUPTED = 0, 1, 130
N_BITS_KEYS = ("op_inputs", "op_weights", "model_inputs", "model_outputs")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, without the program's name; those of the process by default.

    Returns:
        0 when all is well, 1 when problems were found or an error occurred. A wrong usage exits with 2, as argparse does.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return args.command(args)
        except (FheqError, OSError) as error:
            return _failed(args, error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED


def _failed(args: argparse.Namespace, error: Exception) -> int:
    print(f"error: {_line(error)}", file=sys.stderr)
    if getattr(args, "json", False):
        print(json.dumps({"error": _line(error), "kind": type(error).__name__}))
    return FAILED


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Shows fheq's own warnings, in one line; those of libraries are for their developers."""
    if category.__module__.startswith("fheq."):
        print(f"warning: {_line(message)}", file=sys.stderr)


def _line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fheq", description="Quantize ONNX models and run them on encrypted data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = _command(commands, "check", "say what keeps a model from running on encrypted data")
    _model(check)
    quantize = _command(commands, "quantize", "calibrate and quantize a model")
    _quantization(quantize)
    quantize.add_argument("--report", action="store_true", help="show widths, ranges, tables and cost")
    quantize.add_argument("-o", "--output", type=_file, metavar="FILE", help="write the quantizers to a JSON file")
    quantize.add_argument(
        "--qdq", type=_file, metavar="FILE", help="write the quantized model, as ONNX with QuantizeLinear nodes"
    )
    compile_ = _command(commands, "compile", "compile a model to an encrypted circuit")
    _quantization(compile_)
    _errors(compile_)
    compile_.add_argument(
        "-o", "--output", type=_folder, metavar="DIR", help="write server.zip, client.zip and quantizers.json"
    )
    run = _command(commands, "run", "compare float, quantized and encrypted predictions")
    _quantization(run)
    _errors(run)
    run.add_argument("--samples", type=_count, default=3, metavar="N", help="samples to run (3)")
    run.add_argument("--execute", action="store_true", help="also run encrypted: compiles and makes keys")
    demo = _command(commands, "demo", "classify encrypted images of digits")
    demo.add_argument("--samples", type=_count, metavar="N", help="images to encrypt")
    demo.add_argument("--no-progress", action="store_true", help="show no progress bars")
    return parser


def _command(commands, name: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(command=lambda args: _run(name, args))
    return parser


def _run(name: str, args: argparse.Namespace) -> int:
    if name == "demo":
        from fheq.terminal.demo import main as demo

        samples = [] if args.samples is None else ["--samples", str(args.samples)]
        flags = [flag for flag, given in (("--json", args.json), ("--no-progress", args.no_progress)) if given]
        return demo([*samples, *flags])
    from fheq.terminal import commands

    return commands.COMMANDS[name](args)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    parser.add_argument("--dim", action="append", type=_dim, default=[], metavar="NAME=SIZE", help="size of a symbolic dim")


def _quantization(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help=".npz: the inputs' names, x_train, or in0, in1, ...")
    bits = f"bits ({DEFAULT_MODEL_BITS}), or op_inputs=4,op_weights=6[,model_inputs=...,model_outputs=...]"
    parser.add_argument("--n-bits", type=_n_bits, default=DEFAULT_MODEL_BITS, metavar="BITS", help=bits)
    parser.add_argument("--rounding", type=_rounding, metavar="BITS", help="bits of accumulators: 2 to 8, or auto")
    parser.add_argument("--exact", action="store_true", help="round exactly; approximately otherwise (much cheaper)")
    parser.add_argument("--qat", action="store_true", help="demand that the model's own quantizers reach every linear op")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def _errors(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--p-error", type=_probability, metavar="P", help="probability that one table fails (1e-5)")
    group.add_argument("--global-p-error", type=_probability, metavar="P", help="probability that any table of a run fails")


def _n_bits(text: str) -> int | dict[str, int]:
    if "=" not in text:
        return _integer(text)
    pairs = [part.partition("=") for part in text.split(",")]
    unknown = [key for key, _, _ in pairs if key not in N_BITS_KEYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown keys {unknown}; there are {', '.join(N_BITS_KEYS)}")
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"a key is there twice in {text!r}")
    return {key: _integer(value) for key, _, value in pairs}


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None


def _rounding(text: str) -> int | str:
    return text if text == "auto" else _integer(text)


def _dim(text: str) -> tuple[str, int]:
    name, given, size = text.partition("=")
    if not name or not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SIZE")
    return name, _integer(size)


def _file(text: str) -> str:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file")
    return text


def _folder(text: str) -> str:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; give a folder")
    return text


def _count(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
