"""One draw, and the noise of a frame's draws, against PyTorch: see case.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case
from decode_inputs import as_replayed, random_tensor, relative_error
from siren.kernels import gumbel_noise as noise_module
from siren.kernels import sample_heads as module
from siren.kernels.gumbel_noise import gumbel_noise, gumbel_noise_reference
from siren.kernels.sample_heads import sample_heads, sample_heads_reference
from torch import Tensor

SETTINGS = {"plain": (0, 1.0), "top-k 250": (250, 1.0), "top-p 0.9": (0, 0.9)}


def arguments_of(
    device: str, batch: int, top_k: int, top_p: float, small: bool, weights: str = "bf16"
) -> dict[str, Any]:
    K, V, d = (2, 11, 10) if small else (6, 1024, 1024)
    kind = torch.float32 if weights == "fp32" else torch.bfloat16
    head = random_tensor(device, V, d, seed=1) * d**-0.5
    return {
        "x": random_tensor(device, batch, d),
        "norm": random_tensor(device, d, seed=2),
        "head": (head * 127 / 6).round().to(torch.int8) if weights == "int8" else head.to(kind),
        "scale": random_tensor(device, V, seed=3).abs() if weights == "int8" else None,
        "noise": random_tensor(device, batch, V, seed=4),
        "forced": None,
        "tables": random_tensor(device, K, 3, V, d, seed=5).to(kind)[:, 1],
        "total": random_tensor(device, K, batch, d, seed=6),
        "start": random_tensor(device, K, batch, d, seed=7),
        "condition": random_tensor(device, K, batch, d, seed=8),
        "conditioning": "accumulated",
        "temperature": 0.9,
        "top_k": min(top_k, V),
        "top_p": top_p,
        "guidance": 1.0,
        "eps": 1e-5,
    }


def cases(device: str, small: bool) -> Iterator[Case]:
    for batch in (1, 3) if small else (1, 16, 64):
        for name, (top_k, top_p) in SETTINGS.items():
            arguments = arguments_of(device, batch, top_k, top_p, small)
            plain = {**arguments, "x": arguments["x"].bfloat16(), "norm": arguments["norm"].bfloat16()}
            states = 4 * arguments["total"].nbytes + arguments["tables"][:, 0].nbytes * batch
            yield Case(
                stem="sample_heads",
                label=f"{name}, batch {batch}",
                arms={
                    "eager": as_replayed(device, functools.partial(sample_heads_reference, **plain)),
                    "triton": as_replayed(device, functools.partial(sample_heads, **arguments)),
                },
                gate=functools.partial(gate, arguments),
                bytes=arguments["head"].nbytes + arguments["noise"].nbytes + states,
                flops=2 * batch * arguments["head"].numel(),
            )
        seeds, codes = torch.arange(batch, device=device), 11 if small else 1024
        yield Case(
            stem="sample_heads",
            label=f"noise, batch {batch}",
            arms={
                "eager": as_replayed(device, functools.partial(gumbel_noise_reference, seeds, seeds, 12, codes)),
                "triton": as_replayed(device, functools.partial(gumbel_noise, seeds, seeds, 12, codes)),
            },
            gate=functools.partial(gate_noise, seeds, codes),
            bytes=4 * batch * 12 * codes,
            flops=100 * batch * 12 * codes,  # ten rounds of Philox and two logarithms, roughly
        )


def gate(arguments: dict[str, Any]) -> None:
    """The logits' error against float64 is at most twice PyTorch's in bfloat16; the code is the one drawn from them."""
    copies = [{**arguments, "total": arguments["total"].clone()} for _ in range(3)]
    exact = sample_heads_reference(**{**copies[0], "x": arguments["x"].double()})[2]
    plain = {**copies[1], "x": arguments["x"].bfloat16(), "norm": arguments["norm"].bfloat16()}
    theirs = sample_heads_reference(**plain)[2]
    codes, _, logits = sample_heads(**copies[2])
    error, allowed = relative_error(logits, exact), relative_error(theirs, exact)
    assert error <= 2 * allowed, f"logits: error {error:.3g}, PyTorch's {allowed:.3g}"
    identity = torch.eye(logits.shape[1], device=logits.device)
    again = {**arguments, "x": logits, "norm": None, "head": identity, "total": arguments["total"].clone()}
    assert torch.equal(codes, sample_heads_reference(**again)[0]), "the code is not the one these logits give"


def gate_noise(seeds: Tensor, codes: int) -> None:
    ours, theirs = gumbel_noise(seeds, seeds, 12, codes), gumbel_noise_reference(seeds, seeds, 12, codes)
    assert relative_error(ours, theirs.double()) < 1e-7, "the noise is not the contract's"


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for weights in ("bf16", "int8", "fp32"):
        for batch in (1, 16):
            for name, (top_k, top_p) in {"plain": (0, 1.0), "top-k and top-p": (250, 0.9)}.items():
                arguments = arguments_of("meta", batch, top_k, top_p, False, weights)
                written = (
                    torch.empty(batch, dtype=torch.int64, device="meta"),
                    torch.empty(batch, device="meta"),
                    torch.empty(batch, 1024, device="meta"),
                    torch.empty(batch, dtype=torch.int32, device="meta"),
                )
                yield f"{weights}, {name}, batch {batch}", functools.partial(launch, arguments, written)
    seeds = torch.empty(3, dtype=torch.int64, device="meta")
    yield "noise", functools.partial(noise_module.launch, seeds, seeds, 12, 1024)


def launch(arguments: dict[str, Any], written: tuple[Tensor, ...]) -> None:
    module.launch(*arguments.values(), *written)
