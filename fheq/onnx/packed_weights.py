"""Weights of few bits in blocks, as onnxruntime's MatMulNBitsQuantizer writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from fheq.errors import UnsupportedError
from fheq.graph import describe
from fheq.onnx.body import Body

BYTE = 8


def matmul_of_packed(body: Body) -> None:
    """MatMulNBits of com.microsoft: a product with weights `(N, blocks, bytes)`, the first of a byte in its lowest
    bits, with a scale and a zero point per block along K.

    Raises:
        UnsupportedError: weights in another order, zero points that are no integers, a width that does not divide a byte.
    """
    x, packed, scales, zeros, order, bias = body.inputs[:6]
    attrs: dict[str, Any] = {"bits": 4, **body.node.attrs}
    rows, columns, bits, size = (int(attrs[name]) for name in ("K", "N", "bits", "block_size"))
    fractional = bool(zeros) and body.types[zeros].dtype != np.uint8
    other = [what for what, there in (("g_idx", order), ("zero points that are no integers", fractional)) if there]
    other += [f"weights of {bits} bits"] if BYTE % bits else []
    if other:
        raise UnsupportedError(
            f"{describe(body.node)}: {', '.join(other)} are not supported; quantize without them, or in the format QDQ"
        )
    blocks = -(-rows // size)
    known = lambda *values: body.constant(np.array(values, np.int64))
    narrow = lambda name: body.write("Cast", name, to=TensorProto.UINT4) if bits == 4 else name

    def by_column(name: str, count: int) -> str:
        """Packed integers `(N, ...)` as `(count, N)`."""
        lone = body.write("Reshape", name, known(columns, -1, 1))
        shifted = body.write("BitShift", lone, body.constant(np.arange(0, BYTE, bits, dtype=np.uint8)), direction="RIGHT")
        parts = body.write("BitwiseAnd", shifted, body.constant(np.uint8(2**bits - 1)))
        flat = body.write("Reshape", parts, known(columns, -1))
        return narrow(body.write("Transpose", body.write("Slice", flat, known(0), known(count), known(1)), perm=(1, 0)))

    middle = np.full((blocks, columns), 2 ** (bits - 1), np.uint8)
    zero = by_column(zeros, blocks) if zeros else narrow(body.constant(middle))
    scale = body.write("Transpose", body.write("Reshape", scales, known(columns, blocks)), perm=(1, 0))
    weight = body.write("DequantizeLinear", by_column(packed, rows), scale, zero, axis=0, block_size=size)
    body.biased_product(x, weight, bias)


def gather_of_blocks(body: Body) -> None:
    """GatherBlockQuantized of com.microsoft: rows of a table with a scale and a zero point per block.

    Raises:
        UnsupportedError: integers of 4 bits that are packed as uint8.
    """
    table, indices, scales, zeros = body.inputs[:4]
    attrs: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": 128, "bits": 4, **body.node.attrs}
    if body.types[table].dtype == np.uint8 and attrs["bits"] < BYTE:
        raise UnsupportedError(f"{describe(body.node)}: its table is packed as uint8; store it as uint4")
    real = body.write("DequantizeLinear", table, scales, zeros, axis=attrs["quantize_axis"], block_size=attrs["block_size"])
    body.write("Gather", real, indices, axis=attrs["gather_axis"], out=body.node.outputs[0])
