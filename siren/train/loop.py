"""The training of one expert: updates, validation, states (paper, section 4.1, algorithm 1, eq. 6).

Bit for bit the same however often it is stopped: clips, crops, captions and dropout are functions of the seed and the
step (batches.py), and a state holds weights and optimiser exactly.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SirenError
from ..expert import Expert
from .batches import Batch, Batches, dropout_seed, prefetch
from .distributed import World, copied, reduce_gradients, take_over, whole
from .logs import Logs
from .optimizer import load_optimizer, make_optimizer, optimizer_tensors
from .schedule import learning_rate
from .settings import TrainSettings
from .state import latest_state, read_state, write_state
from .stop import StopSignals, TrainingStoppedError


class TrainingError(SirenError, RuntimeError):
    """A loss or gradient that is not a number; the message names the update and its clips."""


@dataclass(frozen=True)
class Job:
    """What all experts of a run share. `agreed` are the settings that a state must have been trained with."""

    settings: TrainSettings
    batches: Batches
    validation: Sequence[Callable[[], Batch]]
    total: int
    agreed: dict[str, Any]
    world: World


class PlainLoss(nn.Module):
    """What `ExpertLoss` computes, by the plain forward: batches of one shape make one graph for torch.compile."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor, sequence_mask: Tensor) -> Tensor:
        """As `ExpertLoss.forward`; every batch has both masks."""
        return self.expert.loss(codes, prompt, prompt_mask, sequence_mask) * sequence_mask.sum()


class ExpertLoss(nn.Module):
    """An expert whose forward is its loss, as DDP and FSDP2 want it."""

    def __init__(self, expert: Expert, **options: Any) -> None:
        super().__init__()
        self.expert, self.options = expert, options

    def forward(
        self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None, sequence_mask: Tensor | None
    ) -> Tensor:
        """Cross-entropy summed over the valid frames, float32 [codes_per_expert]."""
        return self.expert.loss_sums(codes, prompt, prompt_mask, sequence_mask, **self.options)


def train_expert(job: Job, expert: Expert, folder: Path, stop: StopSignals) -> None:
    """Train to the last update, from the latest state in `folder` if there is one, and save.

    Raises TrainingError for a loss that is not a number, CheckpointError for a state that is damaged or cannot be
    written, TrainingStoppedError after a signal. States saved before stay.
    """
    _Training(job, expert, folder, stop).run()


class _Training:
    def __init__(self, job: Job, expert: Expert, folder: Path, stop: StopSignals) -> None:
        settings, world = job.settings, job.world
        self.job, self.expert, self.folder, self.stop = job, expert.to(world.device).train(), folder, stop
        self.index = expert.start_codebook // expert.config.codes_per_expert
        attention, kernels = settings.paths(world.device)
        self.describe = (
            f"{world.size} x {world.device.type}, {settings.precision}, {attention} attention, kernels {kernels}"
        )
        options = {"checkpoint_activations": settings.checkpoint_activations, "attention": attention}
        loss = ExpertLoss(self.expert, **options, kernels=kernels)
        self.shared = world.size > 1 and settings.fsdp
        if self.shared:
            from .sharding import shard

            blocks = [*self.expert.spatial_blocks, *self.expert.factorized_blocks]
            shard(loss, blocks, "packed", world.device.type, world.size)
        self.plain: nn.Module = loss
        if settings.compile:
            self.plain = torch.compile(PlainLoss(self.expert), dynamic=False)  # type: ignore[assignment]
        self.module: nn.Module = copied(self.plain, world) if world.size > 1 and not self.shared else self.plain
        self.parameters = {name: p for name, p in self.expert.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(
            self.parameters, settings.learning_rate, settings.betas, settings.weight_decay, world.device, self.shared
        )
        self.step = 0
        self.saved = -1
        self.pending: list[tuple[float, Tensor, Tensor | None]] = []  # of updates that are not logged yet
        self.clock = time.perf_counter()

    def run(self) -> None:
        settings, world, total = self.job.settings, self.job.world, self.job.total
        self.load()
        logs = None
        if world.rank == 0:
            logs = Logs(self.folder, self.step, settings.tensorboard, settings.wandb, self.job.agreed)
        self.logs = logs
        quiet = world.rank > 0 or not settings.progress or not sys.stderr.isatty()
        self.bar = tqdm(initial=self.step, total=total, desc=f"expert {self.index}", unit="step", disable=quiet)
        if not quiet:
            count = sum(p.numel() for p in self.parameters.values())
            tqdm.write(
                f"expert {self.index}: {count / 1e6:.1f} M trainable parameters, {self.describe}", file=sys.stderr
            )
        often = 1 if world.device.type == "cpu" else settings.log_every
        micro_batches = self.micro_batches()
        try:
            while self.step < total:
                self.update(micro_batches)
                signal = world.largest(self.stop.received)
                last = self.step == total
                validate = last or _due(self.step, settings.val_every)
                save = last or signal or _due(self.step, settings.save_every)
                if save or validate or self.step % often == 0:
                    self.log()
                if signal:
                    self.save()  # first: whoever sent the signal may not wait for the validation
                if validate:
                    self.validate()
                if save:
                    self.save()
                if signal:
                    raise TrainingStoppedError(
                        signal, f"stopped at update {self.step} of {total}; the same command goes on from there"
                    )
        finally:
            micro_batches.close()
            self.bar.close()
            if logs is not None:
                logs.close()

    def micro_batches(self) -> Generator[Batch, None, None]:
        """This process's batches from here to the end."""
        job, world = self.job, self.job.world
        numbers = range(world.rank, job.batches.micro_batches, world.size)
        pin = world.device.type == "cuda"

        def make(step: int, number: int) -> Batch:
            batch = job.batches.batch(step, number)
            return batch.pin() if pin else batch

        jobs = (partial(make, step, number) for step in range(self.step, job.total) for number in numbers)
        return prefetch(jobs, job.settings.workers)

    def update(self, micro_batches: Iterator[Batch]) -> None:
        """One update of the weights."""
        job, settings, world = self.job, self.job.settings, self.job.world
        rate = learning_rate(self.step, settings.learning_rate, job.total, settings.warmup_steps, settings.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # FSDP2 averages over the processes where DDP sums.
        scale = (world.size if self.shared else 1) / (
            job.batches.frames(self.step) * self.expert.config.codes_per_expert
        )
        sums = []
        numbers = range(world.rank, job.batches.micro_batches, world.size)
        for number in numbers:
            batch = next(micro_batches).move(world.device)
            reduce_gradients(self.module, number == numbers[-1])
            if self.expert.config.dropout:
                self.seed(dropout_seed(settings.seed, self.index, self.step, number))
            with self.precision():
                losses = self.module(*batch.arguments())
            (losses.sum() * scale).backward()
            sums.append(losses.detach())
        norm = None
        if settings.grad_clip:
            norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), settings.grad_clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append((rate, torch.stack(sums), norm))
        self.step += 1

    def precision(self) -> Any:
        return torch.autocast(self.job.world.device.type, torch.bfloat16, self.job.settings.precision == "bf16")

    def seed(self, value: int) -> None:
        """Seed what dropout draws from. torch.manual_seed seeds all generators there are: 0.4 ms, this takes 1 us."""
        if self.job.world.device.type == "cuda":
            torch.cuda.manual_seed(value)
        else:
            torch.default_generator.manual_seed(value)

    def log(self) -> None:
        """Write the updates since the last time. Raises TrainingError at the first that is not a number."""
        job, world, count = self.job, self.job.world, len(self.pending)
        own = torch.stack([sums for _, sums, _ in self.pending]).double().cpu()  # waits for a GPU
        per_batch = own.new_zeros(count, own.shape[1], world.size, own.shape[2])
        per_batch[:, :, world.rank] = own
        per_batch = world.total(per_batch).flatten(1, 2)  # [updates, micro-batches, codes_per_expert]
        norms = [None if norm is None else float(norm) for _, _, norm in self.pending]
        seconds, self.clock = (time.perf_counter() - self.clock) / count, time.perf_counter()
        for i, ((rate, _, _), norm, sums) in enumerate(zip(self.pending, norms, per_batch, strict=True)):
            step = self.step - count + i
            self.check_finite(step, sums, norm)
            frames = job.batches.frames(step)
            losses = (sums.sum(0) / frames).tolist()
            record = {
                "step": step + 1,
                "epoch": round(job.batches.epoch(step + 1), 4),
                "loss": sum(losses) / len(losses),
            }
            record |= self.per_codebook("ce", losses) | {"learning_rate": rate}
            record |= ({} if norm is None else {"grad_norm": norm}) | {"frames": frames}
            record["frames_per_second"] = round(frames / max(seconds, 1e-9), 1)
            if self.logs is not None:
                self.logs.write(record)
        self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        self.bar.update(count)
        self.pending = []

    def check_finite(self, step: int, sums: Tensor, norm: float | None) -> None:
        where = f"update {step + 1} of expert {self.index}"
        kept = f"the last state, of update {self.saved}, is kept" if self.saved >= 0 else "there is no state yet"
        hint = "check these clips and their prompts, lower learning_rate, or use precision fp32"
        for number, row in enumerate(sums):
            if not bool(row.isfinite().all()):
                clips = ", ".join(self.job.batches.names(step, number))
                raise TrainingError(f"the loss of {where} is not a number; clips: {clips}. {hint}; {kept}")
        if norm is not None and not math.isfinite(norm):
            names = [self.job.batches.names(step, number) for number in range(len(sums))]
            clips = ", ".join(name for part in names for name in part)
            raise TrainingError(f"the gradient of {where} is not finite; clips: {clips}. {hint}; {kept}")

    def per_codebook(self, name: str, values: Sequence[float]) -> dict[str, float]:
        first = self.expert.start_codebook
        return {f"{name}_codebook_{first + i}": value for i, value in enumerate(values)}

    @torch.no_grad()
    def validate(self) -> None:
        """The mean loss over the frames of the validation clips, per codebook."""
        world, parts = self.job.world, self.job.validation
        if not parts:
            return
        self.expert.eval()
        totals = torch.zeros(self.expert.config.codes_per_expert + 1, dtype=torch.float64)
        # Every process computes as many batches, because a sharded forward is one of all; the surplus is not counted.
        for first in range(0, len(parts), world.size):
            number = first + world.rank
            batch = parts[min(number, len(parts) - 1)]()
            with self.precision():
                sums = self.plain(*batch.move(world.device).arguments())
            mask = batch.sequence_mask
            frames = batch.codes.shape[0] * batch.codes.shape[2] if mask is None else int(mask.sum())
            if number < len(parts):
                totals += torch.cat((sums.double().cpu(), torch.tensor([frames], dtype=torch.float64)))
        self.expert.train()
        *sums_, frames_ = world.total(totals).tolist()
        losses = [value / frames_ for value in sums_]
        record = {"step": self.step, "val_loss": sum(losses) / len(losses)} | self.per_codebook("val_ce", losses)
        if self.logs is not None:
            self.logs.write(record)
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Write a state, unless this update's is there already."""
        if self.saved == self.step:
            return
        model = {name: whole(tensor).cpu() for name, tensor in self.expert.state_dict().items()}
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        values = {
            "step": self.step,
            "total_steps": self.job.total,
            "start_codebook": self.expert.start_codebook,
            "settings": self.job.agreed,
            "torch": torch.__version__,
            "computed": self.describe,
        }
        world, settings = self.job.world, self.job.settings
        world.first_does(lambda: write_state(self.folder, values, model, optimizer, settings.keep))
        self.saved = self.step
        self.clock = time.perf_counter()

    def load(self) -> None:
        """Take over the latest state."""
        path = latest_state(self.folder)
        if path is None:
            return
        state = read_state(path)
        own = self.expert.state_dict()
        for name, target in own.items():
            take_over(target, state.model[name])
        load_optimizer(self.optimizer, self.parameters, state.optimizer)
        self.step = self.saved = int(state.values["step"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
