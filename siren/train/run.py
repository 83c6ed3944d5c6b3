"""`siren train`: the experts of a model, one or several, and the checkpoint that they make together.

RUN/run.json                  the settings that the result depends on, and what the checkpoint needs to know
RUN/codec/                    the codec, if there is one
RUN/expert_0/, expert_2/ ...  one folder for each expert, named after its first codebook: states, metrics.jsonl
RUN/checkpoint/               the model, as soon as all experts are trained
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..audio import write_files
from ..checkpoint import iter_tensors
from ..codec import Codec, DecodeEmbedding
from ..config import SirenConfig
from ..errors import InputError
from ..expert import Expert
from ..manifest import Manifest, check_prompt_encoder, read_manifest
from .assemble import RUN, assemble, expert_folder, read_run, unfinished
from .batches import Batches, Tokens, fixed_batches, usable, weight_seed
from .distributed import World, join
from .logs import check_loggers
from .loop import Job, train_expert
from .settings import TrainSettings, check_same, read_config
from .state import LOCK, latest_state, locked, read_values
from .stop import StopSignals

_DEFAULT_FRAME_RATE = 50.0  # the official format does not say; DAC 16 kHz has this one


def train(settings: TrainSettings) -> Path | None:
    """Train the experts that the settings name and, once all of the model are trained, make RUN/checkpoint.

    Returns the checkpoint's folder, or None while experts are missing. Everything a user can get wrong is checked
    before anything is written. Raises InputError, ConfigError, DataError and CheckpointError for those; TrainingError
    for a loss that is not a number; TrainingStoppedError after SIGTERM or SIGINT, when a state has been saved.
    """
    check_loggers(settings.tensorboard, settings.wandb)
    with join(settings.device, alone=settings.experts == "rank") as world, _own_random_state(world.device):
        run = _Run(settings, world)
        world.first_does(run.begin)
        with StopSignals() as stop:
            for index in run.chosen:
                run.train(index, stop)
        checkpoint = run.out / "checkpoint"
        world.first_does(lambda: run.finish(checkpoint))
        return checkpoint if not unfinished(run.out) else None


class _Run:
    """A run's parts, all read and checked when it is made."""

    def __init__(self, settings: TrainSettings, world: World) -> None:
        self.settings, self.world = settings, world
        self.out = Path(settings.out).expanduser().resolve()
        self.source: Manifest | None = None if settings.init_from is None else read_manifest(settings.init_from)
        if settings.config is not None:
            self.config = read_config(settings.config)
        elif self.source is not None:
            self.config = self.source.config
        else:
            raise InputError("give a config (a preset's name or a JSON file), or init_from")
        if self.source is not None and self.source.config != self.config:
            raise InputError(f"config and {self.source.root / 'config.json'} differ; leave config out with init_from")
        self.chosen = settings.chosen_experts(self.config)
        settings.paths(world.device)
        from ..data import check_codec, open_tokens, split

        tokens = open_tokens(settings.data)
        _check_tokens(tokens, self.config, settings.data)
        self.codec = self._find_codec()
        self.embeddings: list[DecodeEmbedding] | None = None
        if self.codec is not None:
            check_codec(tokens, self.codec)
            self.embeddings = self.codec.decode_embeddings()
            _check_embeddings(self.embeddings[0], self.config)
        crop = settings.crop_frames(_frame_rate(tokens), self.config.max_seq_len)
        if settings.val_data is None:
            training, validation = split(tokens, settings.val_fraction)
            held_out = tokens
        else:
            training = np.arange(len(tokens))
            held_out = open_tokens(settings.val_data)
            _check_tokens(held_out, self.config, settings.val_data)
            _check_same_encoder(tokens, held_out)
            if self.codec is not None:
                check_codec(held_out, self.codec)
            validation = np.arange(len(held_out))
        training = usable(tokens, training, crop)
        if not len(training):
            raise InputError(f"{settings.data} leaves no clip to train on; lower val_fraction, or tokenize more clips")
        micro_batches = settings.accumulate * world.size
        batches = Batches(
            tokens,
            training,
            settings.seed,
            settings.batch_size,
            micro_batches,
            crop,
            settings.prompt_dropout,
            settings.bucket,
            settings.compile,
        )
        total = settings.max_steps or batches.steps(settings.epochs)
        agreed = settings.of_the_result() | {
            "config": self.config.to_dict(),
            "total_steps": total,
            "clips_per_step": settings.batch_size * micro_batches,
            "crop_frames": crop,
            "data": fingerprint(tokens, training),
            "codec": None if self.codec is None else self.codec.identity,
            "init_from": None if self.source is None else [entry.sha256 for entry in self.source.experts],
        }
        agreed = json.loads(json.dumps(agreed))
        held = fixed_batches(held_out, validation, settings.batch_size, crop, settings.compile)
        self.job = Job(settings, batches, held, total, agreed, world)
        self.encoder = self._encoder_name(tokens)

    def begin(self) -> None:
        """Compare with what an earlier run left in the folder, and note down this one."""
        if not (self.out / LOCK).exists():  # no run begins here: nothing is written to a folder of the user's
            self._check_folder()
        with locked(self.out, wait=True):  # processes that train an expert each begin at the same time
            self._check_folder()
            if self.codec is not None and not ((self.out / RUN).exists() and (self.out / "codec").exists()):
                self.codec.save_pretrained(self.out / "codec")
            values = {"format_version": 1, "settings": self.job.agreed, "prompt_encoder": self.encoder}
            write_files({self.out / RUN: (json.dumps(values, indent=2) + "\n").encode()})

    def _check_folder(self) -> None:
        path = self.out / RUN
        if path.exists():
            before = read_run(self.out)
            check_same(before["settings"], self.job.agreed, path)
            if not self.settings.resume:
                raise InputError(f"{self.out} holds a run already; resume it, or choose another folder")
        elif self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file; choose another folder")
        elif self.out.exists() and not all(_is_ours(child.name) for child in self.out.iterdir()):
            raise InputError(f"{self.out} is not empty and holds no run; choose another folder")

    def train(self, index: int, stop: StopSignals) -> None:
        """Train one expert to the end, unless it is trained."""
        folder = expert_folder(self.out, index * self.config.codes_per_expert)
        path = latest_state(folder)
        if path is not None:
            values = read_values(path)
            check_same(values["settings"], self.job.agreed, path)
            if values["step"] == self.job.total:
                return
        with ExitStack() as stack:
            self.world.first_does(lambda: stack.enter_context(locked(folder)))
            train_expert(self.job, self._new_expert(index), folder, stop)

    def finish(self, checkpoint: Path) -> None:
        """Make the checkpoint if all experts are trained. Processes of one run take turns."""
        if not unfinished(self.out):
            with locked(self.out, wait=True):
                assemble(self.out, checkpoint, self.settings.checkpoint_dtype)

    def _new_expert(self, index: int) -> Expert:
        start = index * self.config.codes_per_expert
        if self.source is not None:
            with torch.device("meta"):
                expert = Expert(self.config, start)
            tensors = iter_tensors(self.source.experts[index], self.config)
            expert.load_state_dict({name: tensor.float() for name, tensor in tensors}, assign=True)
            for name, parameter in expert.named_parameters():
                parameter.requires_grad_(".codebook." not in name and ".dac_out." not in name)
        else:
            torch.manual_seed(weight_seed(self.settings.seed, index))
            expert = Expert(self.config, start)
        if self.embeddings is not None:
            expert.set_decode_embeddings(self.embeddings)
        return expert

    def _find_codec(self) -> Codec | None:
        source = self.settings.codec or (self.source.codec if self.source is not None else None)
        if source is not None:
            return Codec.from_pretrained(source)
        if self.source is None and not self.settings.allow_random_codebooks:
            raise InputError(
                "give codec, the folder of the codec that made the tokens: its decode embeddings go into every expert "
                "(allow_random_codebooks does without, for a test of the machinery)"
            )
        return None

    def _encoder_name(self, tokens: Any) -> str | None:
        """The checkpoint's prompt encoder: a name that anyone can load, the absolute path of a folder, or None."""
        given = self.settings.prompt_encoder
        if given is not None:
            if isinstance(given, Path) or given.startswith((".", "/")):  # as PromptEncoder.from_pretrained has it
                folder = Path(given).expanduser().resolve()
                if not folder.is_dir():
                    raise InputError(f"prompt_encoder: there is no folder {str(folder)!r}")
                return str(folder)
            check_prompt_encoder(self.out / "checkpoint", self.out / "checkpoint" / "manifest.json", given)
            return given
        if self.source is not None and self.source.prompt_encoder is not None:
            return self.source.prompt_encoder
        name = (tokens.encoder_identity or "").partition(" ")[0]
        return name if name == "minilm" or "/" in name else None


def _is_ours(name: str) -> bool:
    """Whether a file of a folder without run.json was left by a run that ended while it began."""
    return name in (LOCK, "codec") or name.startswith((".codec.saving-", ".codec.previous", ".siren-"))


def fingerprint(tokens: Tokens, indices: NDArray[np.int64]) -> str:
    """A hash of the ids, lengths and captions of the clips `indices`, and of the codes of 64 of them."""
    digest = hashlib.sha256(np.asarray(tokens.frames, dtype=np.int64)[indices].tobytes())
    for i in indices.tolist():
        digest.update(json.dumps([tokens.clip_id(i), tokens.captions(i)]).encode())
    for i in np.unique(indices[np.linspace(0, len(indices) - 1, 64).astype(int)]).tolist():
        digest.update(tokens.codes(i, 0, int(tokens.frames[i])).astype(np.int64).tobytes())
    return digest.hexdigest()


def _check_tokens(tokens: Any, config: SirenConfig, where: object) -> None:
    """Sizes, and the length of every prompt: one that is too long would end the training where it comes up."""
    for name in ("num_codebooks", "codebook_size", "prompt_dim"):
        if getattr(tokens, name) != getattr(config, name):
            raise InputError(f"{where} has {name} {getattr(tokens, name)}, the config {getattr(config, name)}")
    for i in range(len(tokens)):
        for variant in range(len(tokens.captions(i) or "?")):
            count = len(tokens.prompt(i, variant))
            if count > config.max_prompt_len:
                raise InputError(
                    f"{where}: a prompt of clip {tokens.clip_id(i)!r} has {count} tokens; the config's max_prompt_len "
                    f"is {config.max_prompt_len}: raise it, or shorten the caption and tokenize again"
                )


def _check_same_encoder(tokens: Any, held_out: Any) -> None:
    given, other = tokens.encoder_identity, held_out.encoder_identity
    if None not in (given, other) and given != other:
        raise InputError(
            f"{held_out.path} holds prompts of {other}, {tokens.path} of {given}; tokenize one of them again"
        )


def _check_embeddings(embedding: DecodeEmbedding, config: SirenConfig) -> None:
    width, code_dim = embedding.weight.shape
    if (code_dim, width) != (config.dac_code_dim, config.dac_feature_dim):
        raise InputError(
            f"the codec's decode embeddings go from {code_dim} to {width} values; the config's dac_code_dim and "
            f"dac_feature_dim are {config.dac_code_dim} and {config.dac_feature_dim}"
        )


def _frame_rate(tokens: Any) -> float:
    return _DEFAULT_FRAME_RATE if not tokens.sample_rate else float(tokens.sample_rate / tokens.hop_length)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Weights and dropout seed torch's generators; the caller's are put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
