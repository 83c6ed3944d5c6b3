"""Text to sound: prompts through the text encoder, codes from the sampler, sound from the codec.

Left out: streaming sound; `siren.Session` streams codes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from .audio import Audio
from .codec import MAX_SECONDS, Codec
from .config import SirenConfig
from .errors import InputError, SamplingError
from .manifest import GENERATION, Manifest
from .prune import Pruning
from .rerank import Reward, best_first
from .sampler import Sampler
from .sampling import SamplingSettings, expand_seeds, renumber
from .text import PromptEncoder

MAX_BATCH = 64  # sequences decoded together; seeds make the result the same however they are grouped
MAX_CLIPS = 10_000  # of one prompt
_SAMPLED = 64  # values of a parameter that tell whether it changed


@torch.no_grad()
def generate(
    model: Any,
    prompts: str | Sequence[str],
    seconds: float | None = None,
    seed: int | Sequence[int] = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    num_return_sequences: int = 1,
    progress: bool = True,
    on_frame: Callable[[int, int], None] | None = None,
    codec: Codec | str | Path | None = None,
    encoder: PromptEncoder | str | Path | None = None,
    backend: str = "auto",
    weights: str = "bf16",
    threads: int | None = None,
    batch_size: int = MAX_BATCH,
    rerank: Reward | None = None,
    prune: Pruning | None = None,
) -> Audio:
    """One clip of `seconds` for each prompt, or `num_return_sequences` for each, those of one prompt side by side.

    `model` is a `siren.Siren`, whose sampler is made at the first call with `backend`, `weights` and `threads` and kept
    until its parameters change; or a `Manifest`, whose weights are read after all checks; or a `siren.Sampler`, which
    knows nothing of its checkpoint but the weights. (A change made through `parameter.data` is seen by a sample of 64
    values of each parameter: one that touches only other values is missed.) `codec` and `encoder` default to those the
    checkpoint carries or names. An integer seed s gives clip i the seed s + i, a list gives one for each clip. Up to
    `batch_size` clips (1 to 64) are decoded together; it sets speed and memory, never the sound. Where seconds,
    temperature, top_k, top_p or guidance_scale is None, it is what the checkpoint says of itself, or else 6 s, 1, 0, 1
    and 1: plain sampling. `rerank` scores the clips and puts those of each prompt in order, the best first: see
    rerank.py. `prune` begins more clips of each prompt and finishes the best num_return_sequences, which must be what
    it keeps, the best beginning first: see prune.py. Seeds are then those of its prefixes, so a clip is the one that
    its seed gives with num_return_sequences=prune.prefixes. `progress` shows a bar on stderr; on_frame(done, total) is
    called after each frame. Raises InputError before anything is sampled, SamplingError naming the clip (of a pruned
    one the prefix) if the logits are not finite.
    """
    check_whole("num_return_sequences", num_return_sequences, MAX_CLIPS)
    check_whole("batch_size", batch_size, MAX_BATCH)
    if rerank is not None and not callable(rerank):
        raise InputError(f"rerank must be a function, such as siren.align.rewards.load_reward gives, not {rerank!r}")
    if prune is not None and not isinstance(prune, Pruning):
        raise InputError(f"prune must be a siren.Pruning, not {prune!r}")
    given = {"seconds": seconds, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = fill_in(model, given | {"guidance_scale": guidance_scale})
    seconds = options.pop("seconds")
    SamplingSettings(**options)
    codec, encoder = find_codec(model, codec), find_encoder(model, encoder)
    frames = check_request(model.config, codec, encoder, prompts, seconds)
    begun, batch = num_return_sequences, batch_size
    if prune is not None:
        prune.check(codec, model.config.prompt_dim, frames, num_return_sequences, batch_size)
        begun, batch = prune.prefixes, batch_size // prune.prefixes * prune.prefixes
    texts = [prompts] if isinstance(prompts, str) else prompts
    seeds = expand_seeds(seed, len(texts) * begun).tolist()
    sampler = find_sampler(model, backend, weights, threads)

    prompt, mask = encoder(texts, model.config.max_prompt_len)
    prompt, mask = (t.repeat_interleave(begun, dim=0).cpu() for t in (prompt, mask))
    total = frames * -(-len(seeds) // batch)
    parts, left = [], []
    with _Progress(total, progress, on_frame) as tick:
        for first in range(0, len(seeds), batch):
            rows = slice(first, first + batch)
            session = sampler.start(
                prompt[rows],
                mask[rows],
                seed=seeds[rows],
                **options,
            )
            try:
                if prune is None:
                    session.step(frames, on_frame=tick)
                    left += seeds[rows]
                else:
                    rate = codec.sample_rate / codec.hop_length
                    kept = prune.sample(session, prompt[rows], mask[rows], frames, rate, tick)
                    left += [seeds[first + place] for place in kept]
            except SamplingError as error:  # it counts from the first clip of this batch
                raise SamplingError(renumber(str(error), range(first, first + MAX_BATCH))) from error
            parts.append((session.codes, session.logprobs))
    codes, logprobs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    waveform = codec.decode(codes.to(codec.device)).cpu()
    names = [text for text in texts for _ in range(num_return_sequences)]
    audio = Audio(waveform, codec.sample_rate, codes, logprobs, names, seeds=left)
    return audio if rerank is None else best_first(audio, num_return_sequences, rerank)


def fill_in(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with its None values filled in: from the model's checkpoint, or else from GENERATION."""
    known = GENERATION | dict(getattr(model, "generation", {}))
    return {name: known[name] if value is None else value for name, value in given.items()}


def check_whole(name: str, value: object, high: int) -> None:
    """Raise InputError unless `value` is a whole number from 1 to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InputError(f"{name} must be a whole number from 1 to {high}, not {value!r}")


def check_request(
    config: SirenConfig, codec: Codec, encoder: PromptEncoder, prompts: str | Sequence[str], seconds: float
) -> int:
    """The number of frames of a clip, once codec, encoder, prompts and length fit the model; else InputError.

    Needs no weights, so it can come before they are loaded.
    """
    if (codec.num_codebooks, codec.codebook_size) != (config.num_codebooks, config.codebook_size):
        raise InputError(
            f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size} codes and the model needs "
            f"{config.num_codebooks} of {config.codebook_size}: pass the codec the model was trained with"
        )
    if encoder.dim != config.prompt_dim:
        raise InputError(
            f"the prompt encoder {encoder.name!r} gives vectors of {encoder.dim} values and the model needs "
            f"{config.prompt_dim}: pass the encoder the model was trained with"
        )
    rate = codec.sample_rate / codec.hop_length  # frames a second
    shortest, longest = 1 / rate, min(config.max_seq_len / rate, MAX_SECONDS)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not shortest <= seconds <= longest:
        raise InputError(f"seconds must be a number from {shortest:g} to {longest:g} for this model, not {seconds!r}")
    encoder.tokenize(prompts, config.max_prompt_len)
    return round(float(seconds) * rate)


def find_codec(model: Any, codec: Codec | str | Path | None = None) -> Codec:
    """`codec` itself, the one of that folder or name, or the one that the checkpoint of `model` carries."""
    if isinstance(codec, Codec):
        return codec
    name = codec or (model.codec if isinstance(model, Manifest) else getattr(model, "codec_path", None))
    if name is None:
        raise InputError("this checkpoint carries no codec: pass one, a siren.Codec or a folder (--codec)")
    found: Codec = _kept(model, "codec", str(name), lambda: Codec.from_pretrained(name))
    return found


def find_encoder(model: Any, encoder: PromptEncoder | str | Path | None = None) -> PromptEncoder:
    """`encoder` itself, the one of that folder or name, or the one that the checkpoint of `model` names."""
    if isinstance(encoder, PromptEncoder):
        return encoder
    named = model.prompt_encoder if isinstance(model, Manifest) else getattr(model, "prompt_encoder_name", None)
    name = encoder or named
    if name is None:
        raise InputError(
            "this checkpoint names no prompt encoder: pass one, a siren.PromptEncoder, 'minilm' or a folder (--encoder)"
        )
    found: PromptEncoder = _kept(model, "encoder", str(name), lambda: PromptEncoder.from_pretrained(name))
    return found


def find_sampler(model: Any, backend: str = "auto", weights: str = "bf16", threads: int | None = None) -> Sampler:
    """The sampler of a model, made or kept from an earlier call."""
    if isinstance(model, Sampler):
        return model
    if isinstance(model, Manifest):
        return Sampler(model, backend, weights, threads)
    key = (backend, weights, threads, tuple(_fingerprint(parameter) for parameter in model.parameters()))
    found: Sampler = _kept(model, "sampler", key, lambda: Sampler(model, backend, weights, threads))
    return found


def _fingerprint(parameter: torch.Tensor) -> tuple[int, int, float]:
    """What differs once a parameter has changed and the sampler's copy is stale.

    An optimiser's step or load_state_dict changes the version, .to() the address, and `parameter.data.copy_()`, the
    usual way to swap in averaged weights, only the values.
    """
    flat = parameter.detach().reshape(-1)
    some = flat[:: max(1, -(-flat.numel() // _SAMPLED))]
    return parameter.data_ptr(), parameter._version, float(some.sum(dtype=torch.float64))


class _Kept:
    """What a model keeps between calls. It is left behind when the model is copied or pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parts: dict[str, tuple[object, Any]] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _kept(model: Any, part: str, key: object, make: Callable[[], Any]) -> Any:
    """The part made for this key, from the last call or anew."""
    kept = model.__dict__.setdefault("_kept_for_generate", _Kept())
    with kept.lock:
        if part not in kept.parts or kept.parts[part][0] != key:
            kept.parts.pop(part, None)  # the old one's memory is freed before the new one is made
            kept.parts[part] = (key, make())
        return kept.parts[part][1]


class _Progress:
    """A bar over all frames of all batches, and the caller's callback."""

    def __init__(self, total: int, shown: bool, on_frame: Callable[[int, int], None] | None) -> None:
        from tqdm.auto import tqdm

        self.total, self.done, self.on_frame = total, 0, on_frame
        self.bar = tqdm(total=total, unit="frame", desc="generating", disable=not shown)

    def __enter__(self) -> Callable[[int, int], None]:
        return self._tick

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _tick(self, _done: int, _total: int) -> None:
        self.done += 1
        self.bar.update()
        if self.on_frame is not None:
            self.on_frame(self.done, self.total)
