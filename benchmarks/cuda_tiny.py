"""A tiny model on backend="cuda", two sequences, two frames: whether the engine runs at all, in seconds.

    python benchmarks/cuda_tiny.py [--short]                        on a GPU
    SIREN_CUDA_EMULATE=1 python benchmarks/cuda_tiny.py             the kernel's source on the CPU

Every weight type, with guidance and without, and the residual decoders alone; --short is what is left of that for
compute-sanitizer, under which everything is slow. The codes are compared with plain PyTorch's at the same precision,
which rounding may change here and there: how many differ is printed and not judged. Exit code 1 if the engine raises.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import siren

BATCH, FRAMES = 2, 2


def run(model: siren.Siren, weights: str, guidance: float, compared: bool) -> str:
    """Sample, and say in a line what came of it."""
    prompt = torch.randn(BATCH, 5, model.config.prompt_dim, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    found = siren.Sampler(model, backend="cuda", weights=weights).sample(
        prompt, frames=FRAMES, seed=3, guidance_scale=guidance
    )
    line = f"{weights}, guidance {guidance:g}: {FRAMES} frames in {time.perf_counter() - start:.2f} s"
    if not bool(torch.isfinite(found.logprobs).all()):
        raise siren.SamplingError(f"{line}: a log-probability is not finite")
    if compared:
        plain = siren.Sampler(model, backend="reference", weights=weights).sample(
            prompt, frames=FRAMES, seed=3, guidance_scale=guidance
        )
        line += f", {int((plain.codes != found.codes).sum())} of {plain.codes.numel()} codes differ from PyTorch's"
    return line


def run_residual(model: siren.Siren) -> str:
    """The residual decoders of one frame."""
    shape = (model.config.num_experts, BATCH, model.config.dim)
    h, start = torch.randn((2, *shape), generator=torch.Generator().manual_seed(2)).unbind(0)
    codes, plain = (
        siren.ResidualSampler(model, backend=backend)(h, start, seed=3)[0] for backend in ("cuda", "reference")
    )
    return f"residual decoders alone: {int((codes != plain).sum())} of {plain.numel()} codes differ from PyTorch's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="bf16 alone, compared with nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = siren.Siren(siren.SirenConfig.preset("tiny"))
    try:
        print(siren.Sampler(model, backend="cuda").describe(), flush=True)
        for weights in ("bf16",) if options.short else ("bf16", "int8", "fp8"):
            for guidance in (1.0, 3.0):
                print(run(model, weights, guidance, not options.short and weights != "fp8"), flush=True)
        if not options.short:
            print(run_residual(model), flush=True)
    except siren.SirenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
