"""Training a DAC from sound, in three phases.

1. The autoencoder alone, without quantiser.
2. Every codebook from what its latents look like (`dac_model.start_quantisers`); no gradients.
3. All together, with commitment and codebook losses and quantiser dropout; with discriminators if asked for.

Left out: mixed precision, several GPUs, weight averaging. Every draw is a function of the seed and the step, so that
what a run needs to go on is its weights, its optimisers and the number of its step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .codec import Codec
from .codec_data import Crops, read_clips
from .dac_discriminator import Discriminators, discriminator_loss, generator_losses
from .dac_losses import ReconstructionLoss
from .dac_model import DacSizes, build_dac, quantise, start_quantisers
from .data.sound import SAMPLE_RATE
from .errors import CheckpointError, InputError, SirenError
from .train.schedule import learning_rate as scheduled
from .train.state import latest_state, locked, read_state, read_values, write_state
from .train.stop import StopSignals, TrainingStoppedError

MIN_SECONDS, MAX_SECONDS = 0.1, 60.0  # of a crop; the longest mel window is 0.128 s and reads a reflection at the ends

# The mel loss is the unit. DAC gives each of its 7 scales 15, the adversarial loss 1, the feature loss 2 and the
# commitment 0.25, but of latents that have a scale of their own; here they start with a variance of 1.
WEIGHTS = {"mel": 1.0, "wave": 5.0, "commitment": 0.02, "codebook": 0.1, "adversarial": 0.01, "feature": 0.02}
_MAX_NORM = 1.0  # of all gradients together
_DROPOUT = 0.5  # share of a batch that is decoded from a random number of codebooks, as in DAC
_FRAMES_PER_CODE = 20  # latent frames that a codebook is set from, for each of its codes
_ROWS = 500  # losses that are kept of a run
_KEEP = 2  # states; the one before is there in case the last is damaged


@dataclass
class Run:
    """What a step changes: weights, optimisers and the number of steps taken."""

    model: Any
    optimizer: torch.optim.Optimizer
    discriminators: Discriminators | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None
    step: int = 0


def train_dac(
    sources: Sequence[str | Path],
    out: str | Path,
    sizes: DacSizes | None = None,
    steps: int = 100_000,
    autoencoder_steps: int | None = None,
    batch_size: int = 16,
    seconds: float = 0.48,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    discriminator: bool = False,
    save_every: int = 1000,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train a DAC on the sounds of clip folders and write it to the folder `out`, as `Codec.save_pretrained` does.

    steps: of both trained phases together. autoencoder_steps: of the first of them, a quarter if None.
    seconds: length of a crop, rounded up to whole frames. All sounds are held in memory, 115 MB an hour.
    discriminator: with discriminators from the first quantised step on.
    save_every: after so many steps, and on SIGTERM or SIGINT, a state is saved in the folder OUT.training. Called again
        with the same arguments and sounds, training goes on from there and on a CPU ends with the same weights as if it
        had never stopped. That folder is no longer needed once `out` is there.

    Returns losses of at most 500 steps or so: rows with "step" (from 1), "phase" and each loss before its weight. The
    row of the phase "codebooks" has "left_over", see `start_quantisers`. Raises before anything is written ConfigError,
    InputError, DataError, MissingDependencyError, and CheckpointError if `out` holds something already, or if what was
    saved is damaged or of other settings; later SirenError if the loss is no longer finite, and TrainingStoppedError
    after a signal.
    """
    sizes = sizes or DacSizes()
    autoencoder_steps = max(1, steps // 4) if autoencoder_steps is None else autoencoder_steps
    _check_arguments(steps, autoencoder_steps, batch_size, seconds, learning_rate, seed, save_every)
    out = Path(out).expanduser().resolve()
    folder = out.with_name(f"{out.name}.training")
    if latest_state(folder) is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; choose another folder for the codec")
    run = _start(sizes, seed, device, discriminator)
    loss = ReconstructionLoss(SAMPLE_RATE).to(device)
    crop = -(-round(seconds * SAMPLE_RATE) // sizes.hop_length) * sizes.hop_length
    crops = Crops(read_clips(sources, progress), crop, seed)
    settings = {
        "sizes": asdict(sizes) | {"strides": list(sizes.strides)},
        "steps": steps,
        "autoencoder_steps": autoencoder_steps,
        "batch_size": batch_size,
        "crop": crop,
        "learning_rate": learning_rate,
        "seed": seed,
        "discriminator": discriminator,
        "sounds": crops.digest(),
    }
    off = not progress or not sys.stderr.isatty()
    with locked(folder), StopSignals() as stop:
        losses = _resume(folder, settings, run)
        with tqdm(total=steps, initial=run.step, desc="train codec", disable=off) as bar:
            while run.step < steps:
                quantised = run.step >= autoencoder_steps
                first, last = (autoencoder_steps, steps) if quantised else (0, autoencoder_steps)
                if run.step == autoencoder_steps:
                    left_over = begin_quantised(run, crops, seed)
                    losses.append({"step": run.step, "phase": "codebooks", "left_over": left_over})
                warmup = min(500, (last - first) // 10)
                rate = scheduled(run.step - first, learning_rate, last - first, warmup, floor=0.05)
                values = train_step(run, crops.batch(batch_size, run.step), loss, rate, seed, quantised)
                if run.step % -(-steps // _ROWS) == 0 or run.step in (first + 1, last):
                    row = {name: float(value) for name, value in values.items()}
                    losses.append({"step": run.step, "phase": "quantised" if quantised else "autoencoder"} | row)
                    bar.set_postfix(mel=f"{row['mel']:.3f}", refresh=False)
                bar.update()
                if run.step % save_every == 0 or run.step == steps or stop.received:
                    write_state(
                        folder, {"step": run.step, "settings": settings, "losses": losses}, *_tensors(run), _KEEP
                    )
                if stop.received and run.step < steps:
                    raise TrainingStoppedError(
                        stop.received, f"stopped after step {run.step} of {steps}; the same command goes on from there"
                    )
        Codec(run.model).to("cpu").save_pretrained(out)
    return losses


def train_step(
    run: Run, sound: Tensor, reconstruction: ReconstructionLoss, rate: float, seed: int, quantised: bool
) -> dict[str, Tensor]:
    """One update of the codec, and with `quantised` of its discriminators, by sound [B, 1, S].

    Returns the losses before their weights. Raises SirenError, the weights as they were, for a gradient that is not
    finite.
    """
    model, losses = run.model, dict[str, Tensor]()
    sound = sound.to(next(model.parameters()).device)
    latent = model.encoder(sound)
    if quantised:
        result = quantise(model, latent, dropout(len(sound), len(model.quantizer.quantizers), seed, run.step))
        latent = result["quantised"]
        losses = {"commitment": result["commitment"], "codebook": result["codebook"]}
    decoded = model.decoder(latent)
    sound = sound[..., : decoded.shape[-1]]  # odd strides end a little early
    losses |= reconstruction(sound, decoded)
    judged: dict[str, Tensor] = {}
    if quantised and run.discriminators is not None and run.discriminator_optimizer is not None:
        own = discriminator_loss(run.discriminators(sound), run.discriminators(decoded.detach()))
        _update(run.discriminator_optimizer, run.discriminators, own, rate, run.step)
        judged = {"discriminator": own}
        with torch.no_grad():
            real = run.discriminators(sound)
        losses |= generator_losses(real, run.discriminators(decoded))
    total = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
    _update(run.optimizer, model, total, rate, run.step)
    run.step += 1
    return {name: value.detach() for name, value in (losses | judged).items()}


def _update(optimizer: torch.optim.Optimizer, module: torch.nn.Module, loss: Tensor, rate: float, step: int) -> None:
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), _MAX_NORM)
    if not bool(torch.isfinite(norm)):
        raise SirenError(f"the gradient of step {step + 1} is not finite; lower learning_rate")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def dropout(batch_size: int, codebooks: int, seed: int, step: int) -> list[int]:
    """How many codebooks each sound of a batch is decoded from: all, but for a share a random number from 1 on."""
    rng = np.random.default_rng((seed, 1, step))
    some = int(batch_size * _DROPOUT)
    return [*map(int, rng.integers(1, codebooks + 1, some)), *[codebooks] * (batch_size - some)]


@torch.no_grad()
def begin_quantised(run: Run, crops: Crops, seed: int) -> float:
    """Phase 2, from latents of random crops; the optimiser starts anew. Returns what `start_quantisers` does."""
    model = run.model
    device = next(model.parameters()).device
    wanted = _FRAMES_PER_CODE * model.config.codebook_size
    batches: list[Tensor] = []
    while sum(map(len, batches)) < wanted:
        sound = crops.batch(8, len(batches), purpose=2).to(device)
        batches.append(model.encoder(sound).transpose(1, 2).flatten(0, 1))
    left_over = start_quantisers(model, torch.cat(batches)[:wanted], torch.Generator().manual_seed(seed))
    run.optimizer = _adamw(model)
    return left_over


def _check_arguments(
    steps: int,
    autoencoder_steps: int,
    batch_size: int,
    seconds: float,
    learning_rate: float,
    seed: int,
    save_every: int,
) -> None:
    counts = {
        "steps": steps,
        "autoencoder_steps": autoencoder_steps,
        "batch_size": batch_size,
        "save_every": save_every,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number above 0, not {value!r}")
    if autoencoder_steps >= steps:
        raise InputError(f"autoencoder_steps must be below steps, {steps}, not {autoencoder_steps}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")
    if not 0 < learning_rate < 1:
        raise InputError(f"learning_rate must be above 0 and below 1, not {learning_rate!r}")
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"seconds must be within {MIN_SECONDS}..{MAX_SECONDS}, not {seconds!r}")


def _start(sizes: DacSizes, seed: int, device: str | torch.device, discriminator: bool) -> Run:
    codec = Codec(build_dac(sizes, SAMPLE_RATE, torch.Generator().manual_seed(seed))).to(device)
    model = codec.model.requires_grad_(True)
    if not discriminator:
        return Run(model, _adamw(model))
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        discriminators = Discriminators()
    discriminators.to(device)
    return Run(model, _adamw(model), discriminators, _adamw(discriminators))


def _adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), betas=(0.8, 0.99), weight_decay=0.01)


def _parts(run: Run) -> dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]:
    parts: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = {"codec": (run.model, run.optimizer)}
    if run.discriminators is not None and run.discriminator_optimizer is not None:
        parts["discriminators"] = (run.discriminators, run.discriminator_optimizer)
    return parts


def _tensors(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights as "codec/NAME", and of the optimisers "codec/exp_avg/NAME" and so on."""
    weights, moments = dict[str, Tensor](), dict[str, Tensor]()
    for part, (module, optimizer) in _parts(run).items():
        weights |= {f"{part}/{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            for key, tensor in optimizer.state.get(parameter, {}).items():
                moments[f"{part}/{key}/{name}"] = tensor.cpu()
    return weights, moments


def _resume(folder: Path, settings: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """Bring a run that has just started to where the latest state is; returns the losses so far."""
    path = latest_state(folder)
    if path is None:
        return []
    before = read_values(path).get("settings")
    if before != settings:
        names = [name for name in settings if not isinstance(before, dict) or before.get(name) != settings[name]]
        raise CheckpointError(f"{folder} is of a training with other {', '.join(names)}; delete it to start anew")
    state = read_state(path)
    for part, (module, optimizer) in _parts(run).items():
        device = next(module.parameters()).device
        module.load_state_dict({name: state.model[f"{part}/{name}"] for name in module.state_dict()})
        for name, parameter in module.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                tensor = state.optimizer.get(f"{part}/{key}/{name}")
                if tensor is not None:  # what has had no gradient yet has no moments
                    optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(device)
    run.step = state.values["step"]
    return list(state.values["losses"])
