"""The residual decoders and draws of one frame, as small kernels and as one, against PyTorch: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case
from decode_inputs import as_replayed, in_bf16, relative_error, residual_arguments, weight_bytes
from siren.kernels import residual_frame as module
from siren.kernels import residual_persistent
from siren.kernels.gumbel_noise import gumbel_noise_reference
from siren.kernels.residual_frame import residual_frame, residual_frame_reference

SMALL = {"experts": 2, "blocks": 1, "heads": 2, "kv_heads": 1, "head_dim": 5, "hidden": 9, "entries": 11}


def cases(device: str, small: bool) -> Iterator[Case]:
    for batch in (1, 3) if small else (1, 8, 16, 64):
        for weights in ("bf16", "int8"):
            arguments = residual_arguments(device, weights, batch=batch, **(SMALL if small else {}))
            plain = in_bf16(arguments, list(module.WEIGHTS), module.MATRICES) | {"h": arguments["h"].bfloat16()}
            tables = arguments["weights"][list(module.WEIGHTS).index("tables")]
            codes = tables.shape[1]
            drawn = batch * codes * tables[:, 0, 0].nbytes
            yield Case(
                stem="residual_frame",
                label=f"{weights}, batch {batch}",
                arms={
                    "eager": as_replayed(device, functools.partial(residual_frame_reference, **plain)),
                    "triton": as_replayed(device, functools.partial(residual_frame, **arguments, persistent=False)),
                    "triton-persistent": as_replayed(
                        device, functools.partial(residual_frame, **arguments, persistent=True)
                    ),
                },
                gate=functools.partial(gate, arguments),
                # Each decoder's weights are counted once, though its codes read them one after another.
                bytes=weight_bytes(arguments) - tables.nbytes + drawn + 3 * arguments["h"].nbytes,
                flops=2 * batch * codes // len(tables) * sum(arguments["weights"][i].numel() for i in (1, 2, 4, 5)),
            )


def gate(arguments: dict[str, Any]) -> None:
    """With given codes, the logits' error against float64 is at most twice that of PyTorch in bfloat16. The
    persistent kernel is compared with the small ones, and its codes with its own logits."""
    heads = arguments["weights"][list(module.WEIGHTS).index("heads")]
    forced = torch.randint(heads.shape[1], (len(arguments["seeds"]), len(heads)), device=heads.device)
    given = {**arguments, "forced": forced}
    exact = residual_frame_reference(**{**given, "h": given["h"].double()})[3]
    theirs = residual_frame_reference(**{**given, "h": given["h"].bfloat16()})[3]
    error = relative_error(residual_frame(**given, persistent=False)[3], exact)
    allowed = relative_error(theirs, exact)
    assert error <= 2 * allowed, f"logits: error {error:.3g}, PyTorch's {allowed:.3g}"
    codes, _, _, logits = residual_frame(**arguments, persistent=True)
    again = residual_frame(**{**arguments, "forced": codes}, persistent=False)[3]
    error = relative_error(logits, again.double())
    assert error <= allowed, f"logits of the persistent kernel: error {error:.3g}, PyTorch's {allowed:.3g}"
    noise = gumbel_noise_reference(arguments["seeds"], arguments["frames"], len(heads), heads.shape[1])
    expected = (logits / arguments["temperature"] + noise).argmax(-1)
    assert torch.equal(codes, expected), "the persistent kernel's codes are not those its logits give"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """The small kernels of batch 16 take 32 rows and 16 of activations: tiles of both widths."""
    for weights in ("bf16", "int8", "fp32"):
        arguments = residual_arguments("meta", weights, batch=16)
        yield f"{weights}, batch 16", functools.partial(module.launch, **arguments)
        del arguments["forced"]
        yield f"{weights}, persistent", functools.partial(residual_persistent.launch, **arguments)
