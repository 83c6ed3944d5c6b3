"""Where Triton's interpreter computes other numbers than a GPU, made to compute the same.

With TRITON_INTERPRET=1 Triton runs kernels in numpy, which knows no bfloat16: its bits travel as integers.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32; float32 operands are not rounded to tf32.

    Triton's interpreter takes the bits of bfloat16 operands for integers, so there they are widened first, which
    changes no product.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to the nearest, to even on a tie.

    A GPU does that; Triton's interpreter cuts the digits off that bfloat16 lacks, so there they are rounded first.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # NaN has no neighbours
    return x.to(dtype)
