"""The checks before a kernel: sizes are bound by name, and every mismatch says what was expected."""

from __future__ import annotations

import pytest
import torch
from siren.kernels.checks import FLOAT, check_tensor, check_weights

CPU = torch.device("cpu")


def test_sizes_are_bound_by_the_first_tensor() -> None:
    sizes: dict[str, int] = {}
    check_tensor(sizes, CPU, "a", torch.zeros(2, 6, 5), "K 2*hidden d", FLOAT)
    assert sizes == {"K": 2, "hidden": 3, "d": 5}
    check_tensor(sizes, CPU, "b", torch.zeros(3, 5), "hidden d", FLOAT)
    check_tensor(sizes, CPU, "c", None, "anything", FLOAT)
    check_tensor(sizes, CPU, "d", torch.zeros(1), "1", FLOAT)
    assert "1" not in sizes


@pytest.mark.parametrize(
    ("tensor", "dims", "message"),
    [
        (torch.zeros(2, 4), "K d", r"x must be contiguous float32 \[K, d\] = \[2, 5\], not torch.float32 \[2, 4\]"),
        (torch.zeros(10), "K d", r"x must be contiguous float32 \[K, d\] = \[2, 5\], not torch.float32 \[10\]"),
        (torch.zeros(7, 5), "2*odd d", r"\[2\*odd, d\] = \[6, 5\], not torch.float32 \[7, 5\]"),
        (torch.zeros(5, 2).T, "K d", r"strides \(1, 2\)"),
        (torch.zeros(2, 5).double(), "K d", r"not torch.float64"),
        (torch.zeros(2), "1", r"\[1\] = \[1\], not torch.float32 \[2\]"),
        (torch.zeros(2, 5, device="meta"), "K d", r"x must be on cpu, not on meta"),
    ],
)
def test_what_does_not_fit_is_named(tensor: torch.Tensor, dims: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor({"K": 2, "d": 5}, CPU, "x", tensor, dims, FLOAT)


def test_scales_belong_to_int8() -> None:
    dims = {"norm": "d", "matrix": "N d"}
    norm, matrix, scale = torch.zeros(3), torch.zeros(4, 3), torch.zeros(4)
    check_weights({}, CPU, dims, ("matrix",), [norm, matrix], [])
    check_weights({}, CPU, dims, ("matrix",), [norm, matrix.to(torch.int8)], [scale])
    with pytest.raises(ValueError, match="scales must be one for each of matrix, not 0"):
        check_weights({}, CPU, dims, ("matrix",), [norm, matrix.to(torch.int8)], [])
    with pytest.raises(ValueError, match=r"the scale of matrix must be contiguous float32 \[N\] = \[4\]"):
        check_weights({}, CPU, dims, ("matrix",), [norm, matrix.to(torch.int8)], [norm])
    with pytest.raises(ValueError, match="norm must be contiguous float32"):
        check_weights({}, CPU, dims, ("matrix",), [norm.bfloat16(), matrix], [])
