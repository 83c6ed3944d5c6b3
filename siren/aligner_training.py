"""Training an aligner: sounds and captions of one clip are pulled together, those of different clips pushed apart.

    loss = (CE(s A T', own caption) + CE(s T A', own sound)) / 2

A and T [B, D] are the unit vectors of a batch's sounds and captions and s is a learned scale. Clips with the same
label, or captions that say the same, are no negatives of one another and are left out of the sums. Minutes on two CPU
cores for some thousand clips; no state is saved on the way. Left out: mixed precision, several GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .aligner import ENCODER, MAX_SECONDS, MIN_SECONDS, Aligner, AlignerConfig, AlignerModel
from .aligner_data import Pairs, disturb, drop_words, read_pairs, recode, windows
from .codec import Codec
from .data.sound import SAMPLE_RATE
from .errors import CheckpointError, DataError, InputError, SirenError
from .pretrained import move
from .text import PromptEncoder
from .train.schedule import learning_rate as scheduled

_FIRST_SCALE, _LARGEST_SCALE = 1 / 0.07, 100.0  # CLIP's
_WEIGHT_DECAY = 0.05
_MAX_NORM = 1.0
_CODED = 0.5  # share of the sounds that are the codec's, with one
_ORDER, _WINDOWS, _CODING = range(3)  # what random numbers are for


@dataclass(frozen=True)
class Retrieval:
    """How well held-out clips find one another, all of them compared with all.

    clips: how many. caption: share of sounds whose nearest caption is of their label; sound: share of captions whose
    nearest sound is. chance: of a random choice. own, other: mean similarity of pairs of the same label and of others.
    """

    clips: int
    caption: float
    sound: float
    chance: float
    own: float
    other: float

    def __str__(self) -> str:
        return (
            f"{self.clips} held-out clips: nearest caption of the same label {self.caption:.3f}, nearest sound "
            f"{self.sound:.3f} (chance {self.chance:.3f}); similarity {self.own:.3f}, of other labels {self.other:.3f}"
        )


def train_aligner(
    sources: Sequence[str | Path],
    out: str | Path,
    codec: str | Path | None = None,
    epochs: int = 25,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    val_fraction: float = 0.05,
    seed: int = 0,
    device: str | torch.device = "cpu",
    config: AlignerConfig | None = None,
    encoder: Any = None,
    progress: bool = True,
) -> tuple[Aligner, dict[str, Retrieval]]:
    """Train an aligner on the clips of clip folders and write it to the folder `out`.

    codec: a codec folder; half of the sounds are what it makes of them, as generated sounds will be.
    val_fraction: share of the clips that is held out, the same clips as in `siren train`.
    config: sizes, and the seconds that are heard of a sound. encoder: minilm if None.

    All sounds are held in memory, 115 MB an hour.

    The same arguments and sounds give the same aligner, on a CPU with as many threads bit for bit. Returns the aligner
    and how held-out clips are found: "sounds", with a codec also "codec", its version of the same; nothing if none is
    held out. Raises before anything is written InputError, DataError, MissingDependencyError, and CheckpointError if
    `out` holds something already; SirenError if the loss is no longer finite.
    """
    config = config or AlignerConfig()
    seconds = config.seconds
    _check_arguments(epochs, batch_size, learning_rate, seconds, val_fraction, seed)
    if config.sampling_rate != SAMPLE_RATE:
        raise InputError(f"sampling_rate must be {SAMPLE_RATE}, at which sounds are read, not {config.sampling_rate}")
    out = Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; choose another folder for the aligner")
    coder = None if codec is None else Codec.from_pretrained(codec, device)
    encoder = PromptEncoder.from_pretrained(ENCODER) if encoder is None else encoder
    if encoder.dim != config.text_dim:
        raise InputError(f"text_dim is {config.text_dim}; the encoder's token states are {encoder.dim} wide")
    pairs = read_pairs(sources, encoder, progress)
    training, validation = pairs.split(val_fraction)
    if len(training) < 2:
        raise DataError(f"{len(training)} clips are left to train on; an aligner needs 2 at least, better thousands")
    heard = list(pairs.sounds)
    if coder is not None:
        order = np.random.default_rng((seed, _CODING)).permutation(len(training))
        coded = training[order[: round(_CODED * len(training))]]
        for i, sound in zip(coded, recode([heard[i] for i in coded], coder, seconds, progress), strict=True):
            heard[i] = sound
    model = _start(config, seed, device)
    size = round(seconds * SAMPLE_RATE)
    fit(model, pairs, heard, training, size, epochs, batch_size, learning_rate, seed, progress)
    aligner = Aligner(model, encoder)
    scores = {}
    if len(validation):
        held_out = [pairs.sounds[i][:size] for i in validation]
        scores["sounds"] = retrieval(aligner, pairs, validation.tolist(), held_out)
        if coder is not None:
            made = recode(held_out, coder, seconds, progress)
            scores["codec"] = retrieval(aligner, pairs, validation.tolist(), made)
    aligner.to("cpu").save_pretrained(out)
    return aligner, scores


def fit(
    model: AlignerModel,
    pairs: Pairs,
    sounds: Sequence[np.ndarray],
    training: np.ndarray,
    size: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> list[float]:
    """Train a model in place on the clips `training`, windows of `size` samples of `sounds`; the loss of each update.

    An epoch has every clip once, but for those left over after the last whole batch, with one of its captions.
    """
    batch_size = min(batch_size, len(training))
    steps = len(training) // batch_size
    total = epochs * steps
    device = model.text.projection.weight.device
    log_scale = torch.nn.Parameter(torch.tensor(_FIRST_SCALE, device=device).log())
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": [*others, log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    losses: list[float] = []
    with tqdm(total=total, desc="train aligner", disable=not progress or not sys.stderr.isatty()) as bar:
        for step in range(total):
            epoch, place = divmod(step, steps)
            order = np.random.default_rng((seed, _ORDER, epoch)).permutation(len(training))
            clips = training[order[place * batch_size : (place + 1) * batch_size]].tolist()
            rng = np.random.default_rng((seed, _WINDOWS, step))
            texts = [pairs.captions[clip][int(rng.integers(len(pairs.captions[clip])))] for clip in clips]
            waves = disturb(windows([sounds[clip] for clip in clips], size, rng), rng)
            states, mask = pairs.token_states(texts)
            audio = model.audio(waves.to(device))
            text = model.text(states.to(device), drop_words(mask, rng).to(device))
            related = pairs.related(clips, texts).to(device)
            loss = contrastive_loss(audio, text, log_scale.exp().clamp(max=_LARGEST_SCALE), related)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), log_scale], _MAX_NORM)
            if not bool(torch.isfinite(norm)):
                raise SirenError(f"the gradient of update {step + 1} is not finite; lower learning_rate")
            for group in optimizer.param_groups:
                group["lr"] = scheduled(step, learning_rate, total, min(100, total // 10), floor=0.02)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    return losses


def contrastive_loss(audio: Tensor, text: Tensor, scale: Tensor, related: Tensor) -> Tensor:
    """The loss above, a scalar, of unit vectors audio and text [B, D]; row i of both is one clip.

    related: bool [B, B], symmetric; pairs of different clips for which it is true are left out.
    """
    logits = scale * audio @ text.T
    own = torch.arange(len(audio), device=audio.device)
    logits = logits.masked_fill(related & (own[:, None] != own), -torch.inf)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def retrieval(aligner: Aligner, pairs: Pairs, clips: Sequence[int], sounds: Sequence[np.ndarray]) -> Retrieval:
    """Compare the first captions of clips with their int16 sounds. Clips without a label, such as scenes, are left
    out, unless fewer than two have one: then each clip is a class of its own.
    """
    rows = [row for row, clip in enumerate(clips) if pairs.labels[clip] is not None]
    classes = [pairs.labels[clips[row]] for row in rows]
    if len(rows) < 2:
        rows = list(range(len(clips)))
        classes = [str(row) for row in rows]
    text = aligner.embed_text([pairs.texts[pairs.captions[clips[row]][0]] for row in rows])
    audio = aligner.embed_audio([sounds[row] / np.float32(32767) for row in rows], SAMPLE_RATE)
    similar = audio @ text.T
    same = np.array([[a == b for b in classes] for a in classes])
    everyone = np.arange(len(rows))
    return Retrieval(
        len(rows),
        float(same[everyone, similar.argmax(axis=1)].mean()),
        float(same[similar.argmax(axis=0), everyone].mean()),
        float(same.mean()),
        float(similar[same].mean()),
        float(similar[~same].mean()) if not same.all() else float("nan"),
    )


def _start(config: AlignerConfig, seed: int, device: str | torch.device) -> AlignerModel:
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        model = AlignerModel(config)
    move(model, device)
    return model


def _check_arguments(
    epochs: int, batch_size: int, learning_rate: float, seconds: float, val_fraction: float, seed: int
) -> None:
    for name, value, low in (("epochs", epochs, 1), ("batch_size", batch_size, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name} must be a whole number of at least {low}, not {value!r}")
    if not 0 < learning_rate <= 1:
        raise InputError(f"learning_rate must be above 0 and at most 1, not {learning_rate!r}")
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"seconds must be from {MIN_SECONDS:g} to {MAX_SECONDS:g}, not {seconds!r}")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, not {val_fraction!r}")
