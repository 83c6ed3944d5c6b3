"""One frame through all backbones against PyTorch: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from case import Case
from decode_inputs import as_replayed, backbone_arguments, in_bf16, relative_error, weight_bytes
from siren.kernels import backbone_step as module
from siren.kernels.backbone_step import backbone_step, backbone_step_reference

SMALL = {"experts": 2, "blocks": 1, "heads": 2, "kv_heads": 1, "head_dim": 5, "hidden": 9, "capacity": 4, "frame": 2}


def cases(device: str, small: bool) -> Iterator[Case]:
    for rows in (1, 3) if small else (1, 8, 16, 64):
        for weights in ("bf16", "int8"):
            arguments = backbone_arguments(device, weights, rows=rows, **(SMALL if small else {}))
            frames = int(arguments["frame"]) + 1
            plain = in_bf16(arguments, list(module.WEIGHTS), module.MATRICES)
            # The number itself: to read it from the device would wait for the device, and cannot be captured.
            plain |= {"inputs": arguments["inputs"].bfloat16(), "frame": frames - 1}
            past = arguments["keys"][..., :frames, :].numel() * arguments["keys"].itemsize
            prompts = arguments["prompt_keys"].nbytes
            yield Case(
                stem="backbone_step",
                label=f"{weights}, {rows} rows, frame {frames - 1}",
                arms={
                    "eager": as_replayed(device, functools.partial(backbone_step_reference, **plain)),
                    "triton": as_replayed(device, functools.partial(backbone_step, **arguments)),
                },
                gate=functools.partial(gate, arguments),
                bytes=weight_bytes(arguments) + 2 * (past + prompts) + 2 * arguments["inputs"].nbytes,
                flops=2 * rows * sum(arguments["weights"][i].numel() for i in (1, 3, 6, 7, 9, 10)),
            )


def gate(arguments: dict[str, Any]) -> None:
    """The error against float64 is at most twice that of PyTorch in bfloat16; int8: of the same weights' values."""
    exact = backbone_step_reference(**{**arguments, "inputs": arguments["inputs"].double()})
    theirs = backbone_step_reference(**{**arguments, "inputs": arguments["inputs"].bfloat16()})
    error, allowed = relative_error(backbone_step(**arguments), exact), relative_error(theirs, exact)
    assert error <= 2 * allowed, f"error {error:.3g}, PyTorch's {allowed:.3g}"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for weights in ("bf16", "int8", "fp32"):
        for rows in (1, 64):
            arguments = backbone_arguments("meta", weights, rows=rows, blocks=1)
            yield f"{weights}, {rows} rows", functools.partial(module.launch, **arguments)
