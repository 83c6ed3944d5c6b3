"""Rollouts: groups of sounds of one prompt each, their codes with log-probabilities, and the rewards of the sounds.

While a batch is decoded and scored by a thread, the sampler makes the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..errors import SirenError
from ..sampler import Sampler
from .prompts import Prompt, pad
from .rewards import RewardBatch


@dataclass(frozen=True)
class Rollouts:
    """G rollouts for each prompt, side by side, N in all, on the CPU.

    prompt [N, P, prompt_dim], prompt_mask [N, P]; codes int64 and logprobs float32 [N, num_codebooks, T]; rewards
    float64 [N], NaN where there is none; parts: each reward function's values. failures: (function, reason) -> count.
    seconds: spent on sampling, decoding and scoring, which overlap.
    """

    texts: list[str]
    prompt: Tensor
    prompt_mask: Tensor
    codes: Tensor
    logprobs: Tensor
    rewards: Tensor
    parts: dict[str, Tensor]
    failures: dict[str, int]
    seconds: dict[str, float] = field(compare=False)


def roll_out(
    sampler: Sampler,
    codec: Codec,
    reward: Callable[..., RewardBatch],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    frames: int,
    batch_size: int,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollouts:
    """Sample len(seeds) / len(prompts) rollouts of each prompt, up to `batch_size` at once, and have them scored.

    A batch that does not fit into memory is tried again in halves; one rollout that does not raises SirenError.
    """
    generations = len(seeds) // len(prompts)
    prompt, mask = pad(prompts, generations)
    texts = [p.text for p in prompts for _ in range(generations)]
    seconds = {"rollout": 0.0, "codec": 0.0, "reward": 0.0}
    sampled: list[tuple[Tensor, Tensor]] = []
    scores: list[Future[RewardBatch]] = []

    def score(rows: slice, codes: Tensor) -> RewardBatch:
        start = time.perf_counter()
        with torch.inference_mode():
            waves = codec.decode(codes.to(codec.device)).cpu()
        middle = time.perf_counter()
        result = reward(
            texts[rows],
            [wave.numpy() for wave in waves[:, 0]],
            sample_rate=codec.sample_rate,
            codes=codes.numpy(),
        )
        seconds["codec"] += middle - start
        seconds["reward"] += time.perf_counter() - middle
        return result

    with ThreadPoolExecutor(1, thread_name_prefix="siren-rewards") as pool:
        first = 0
        while first < len(seeds):
            rows = slice(first, first + batch_size)
            start = time.perf_counter()
            try:
                out = sampler.sample(
                    prompt[rows],
                    mask[rows],
                    frames,
                    seeds[rows],
                    temperature=temperature,
                    guidance_scale=guidance_scale,
                    top_k=top_k,
                    top_p=top_p,
                )
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, SirenError) or not _out_of_memory(error):
                    raise
                if batch_size == 1:
                    raise SirenError("a single rollout does not fit into memory: use shorter ones or less") from error
                batch_size = -(-batch_size // 2)
                continue
            seconds["rollout"] += time.perf_counter() - start
            sampled.append((out.codes, out.logprobs))
            scores.append(pool.submit(score, rows, out.codes))
            first += len(out.codes)
        results = [future.result() for future in scores]
    codes, logprobs = (torch.cat(tensors) for tensors in zip(*sampled, strict=True))
    rewards = torch.cat([torch.from_numpy(result.total) for result in results])
    parts = {name: torch.cat([torch.from_numpy(r.parts[name]) for r in results]) for name in results[0].parts}
    return Rollouts(texts, prompt, mask, codes, logprobs, rewards, parts, _sum_failures(results), seconds)


def _sum_failures(results: Sequence[RewardBatch]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for result in results:
        for name, reasons in result.failures.items():
            for reason, count in reasons.items():
                totals[f"{name}: {reason}"] = totals.get(f"{name}: {reason}", 0) + count
    return totals


def _out_of_memory(error: Any) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
