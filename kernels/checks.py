"""Checks of an operation's tensors before their addresses reach a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

FLOAT = (torch.float32,)
MATRIX = (torch.float32, torch.bfloat16, torch.int8)
TABLE = (torch.float32, torch.bfloat16)
WHOLE = (torch.int64,)


def check_tensor(
    sizes: dict[str, int],
    device: torch.device,
    name: str,
    tensor: torch.Tensor | None,
    dims: str,
    dtypes: Sequence[torch.dtype],
) -> None:
    """The tensor is contiguous, on the device, of one of the dtypes and of these dimensions; None passes.

    dims names them: "K R d", "L K 2*hidden d" or "1". A name seen for the first time takes its size from the tensor and
    goes into `sizes`; after that it must fit. Raises ValueError naming the tensor and what it should be.
    """
    if tensor is None:
        return
    names = dims.split()
    expected = []
    for dim, size in zip(names, tensor.shape if tensor.ndim == len(names) else [0] * len(names), strict=True):
        factor, _, symbol = dim.rpartition("*")
        number = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size // int(factor or 1))
        expected.append(number * int(factor or 1))
    if list(tensor.shape) != expected or tensor.dtype not in dtypes or not tensor.is_contiguous():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be contiguous {kinds} [{', '.join(names)}] = {expected}, "
            f"not {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}")


def check_weights(
    sizes: dict[str, int],
    device: torch.device,
    dims: Mapping[str, str],
    matrices: Sequence[str],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
) -> None:
    """Weights in the order of `dims`: matrices of one dtype, tables beside them, everything else float32. Int8
    matrices have a scale a row each, in the order of `matrices`; others have none."""
    if len(weights) != len(dims):
        raise ValueError(f"weights must be the {len(dims)} tensors {', '.join(dims)}, not {len(weights)}")
    named = dict(zip(dims, weights, strict=True))
    kinds = {named[name].dtype for name in matrices}
    for name, tensor in named.items():
        dtypes = MATRIX if name in matrices else TABLE if name == "tables" else FLOAT
        check_tensor(sizes, device, name, tensor, dims[name], dtypes)
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(matrices)} must have one dtype, not {', '.join(map(str, kinds))}")
    quantised = matrices if torch.int8 in kinds else ()
    if len(scales) != len(quantised):
        raise ValueError(f"scales must be one for each of {', '.join(quantised) or 'no matrices'}, not {len(scales)}")
    for name, scale in zip(quantised, scales, strict=True):
        check_tensor(sizes, device, f"the scale of {name}", scale, dims[name].rpartition(" ")[0], FLOAT)
