"""`siren align`: a checkpoint in, prompts and rewards, a checkpoint with some experts aligned out.

RUN/run.json         the settings that the result depends on
RUN/state-*/         states; RUN/metrics.jsonl one line a step
RUN/checkpoint/      the aligned model, when the run is through
"""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..audio import write_files
from ..checkpoint import save_checkpoint
from ..errors import CheckpointError, InputError
from ..generate import find_codec, find_encoder
from ..manifest import parse_json, read_manifest
from ..model import Siren
from ..sampler import Sampler
from ..train.distributed import World, join
from ..train.logs import METRICS, check_loggers
from ..train.run import fingerprint
from ..train.settings import CHECKPOINT_DTYPES, check_same
from ..train.state import LOCK, locked
from ..train.stop import StopSignals
from .loop import Alignment, Job
from .prompts import PromptSet
from .rewards import RewardMix, load_reward
from .settings import AlignSettings

RUN = "run.json"


def align(settings: AlignSettings) -> Path:
    """Align experts (paper, section 4.2) and write RUN/checkpoint, whose folder is returned.

    Everything a user can get wrong is checked before anything is written. Raises InputError, DataError and
    CheckpointError for those; TrainingError for a gradient that is not a number or rewards that fail again and again;
    TrainingStoppedError after SIGTERM or SIGINT, when a state has been saved. The same call goes on.
    """
    check_loggers(settings.tensorboard, settings.wandb)
    out = Path(settings.out).expanduser().resolve()
    with join(settings.device, alone=False) as world, ExitStack() as stack:
        job = make_job(settings, world)
        world.first_does(lambda: _check_folder(out, job))
        world.first_does(lambda: stack.enter_context(locked(out)))
        world.first_does(lambda: _begin(out, job))
        with StopSignals() as stop:
            Alignment(job, out, stop).run()
        world.first_does(lambda: _finish(out, job))
    return out / "checkpoint"


def make_job(settings: AlignSettings, world: World) -> Job:
    from ..data import check_codec, check_encoder, open_tokens, split

    manifest = read_manifest(settings.model)
    chosen = settings.chosen_experts(manifest.config.num_experts)
    if settings.prompts_per_step % world.size:
        raise InputError(f"prompts_per_step {settings.prompts_per_step} must be a multiple of {world.size} processes")
    tokens = open_tokens(settings.data, settings.reserve)
    training, validation = split(tokens, settings.val_fraction)
    prompts = PromptSet(tokens, training)
    held_out = PromptSet(tokens, validation, without=prompts)
    codec = find_codec(manifest)
    check_codec(tokens, codec)
    if manifest.prompt_encoder is not None:
        check_encoder(tokens, find_encoder(manifest))
    elif tokens.prompt_dim != manifest.config.prompt_dim:
        raise InputError(
            f"{settings.data} has prompts of {tokens.prompt_dim} values, the model takes {manifest.config.prompt_dim}"
        )
    frames, longest = settings.seconds * codec.sample_rate / codec.hop_length, manifest.config.max_seq_len
    if not 1 <= round(frames) <= longest:
        raise InputError(f"seconds {settings.seconds} are {round(frames)} frames; the model's max_seq_len is {longest}")
    reward = RewardMix(
        [load_reward(function) if isinstance(function, str) else function for function in settings.reward_funcs],
        settings.reward_weights,
        settings.reward_timeout or None,
    )
    model = Siren.from_pretrained(settings.model, world.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".codebook." not in name and ".dac_out." not in name)
    needs_reference = settings.loss == "dpo" or settings.beta > 0
    experts: list[Any] = list(model.experts)
    agreed = settings.of_the_result() | {
        "total_steps": settings.max_steps,
        "model": [entry.sha256 for entry in manifest.experts],
        "data": fingerprint(tokens, np.asarray(training)),
        "rewards": reward.identities,
    }
    return Job(
        settings,
        model,
        {k: copy.deepcopy(experts[k]).requires_grad_(False) for k in chosen} if needs_reference else {},
        Sampler(model, settings.backend, settings.rollout_weights, settings.threads),
        codec,
        reward,
        prompts,
        held_out.some(settings.eval_prompts),
        json.loads(json.dumps(agreed)),
        world,
    )


def _check_folder(out: Path, job: Job) -> None:
    path = out / RUN
    if path.exists():
        try:
            before = parse_json(path.read_bytes(), str(path))["settings"]
        except (OSError, KeyError) as error:
            raise CheckpointError(f"{path} is no description of an alignment ({error})") from error
        check_same(before, job.agreed, path)
        if not job.settings.resume:
            raise InputError(f"{out} holds a run already; resume it, or choose another folder")
    elif out.exists() and not all(_is_ours(child.name) for child in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no run; choose another folder")


def _is_ours(name: str) -> bool:
    """Whether a file of a folder without run.json was left by a run that ended while it began."""
    return name in (LOCK, METRICS) or name.startswith(".siren-")


def _begin(out: Path, job: Job) -> None:
    _check_folder(out, job)
    values = {"format_version": 1, "settings": job.agreed}
    write_files({out / RUN: (json.dumps(values, indent=2) + "\n").encode()})


def _finish(out: Path, job: Job) -> None:
    dtype = CHECKPOINT_DTYPES[job.settings.checkpoint_dtype]
    model, experts = job.model, list[Any](job.model.experts)
    save_checkpoint(
        out / "checkpoint",
        model.config,
        (
            (
                expert.start_codebook,
                {name: value.detach().cpu().to(dtype) for name, value in expert.state_dict().items()},
            )
            for expert in experts
        ),
        model.codec_path,
        model.prompt_encoder_name,
        model.generation,
    )
