"""Tokenizing on a Ray cluster: the same function for each clip, mapped by Ray Data over groups of clips.

A row is a group, and comes back as a shard, so that only plain bytes travel. The machines of the cluster must see the
sound files, and models given by folder, at the same paths; shards are written where the call is made.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import SirenError
from ..pretrained import missing
from .clip_tokenizer import ClipTokenizer, Models, Settings
from .clips import ClipRecord
from .unfinished import pack_group


class GroupTokenizer:
    """One of Ray's actors."""

    def __init__(self, models: Models, settings: Settings) -> None:
        torch.set_num_threads(1)
        self._tokenizer = ClipTokenizer(models, settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"group", "clips": JSON} to {"group", "shard": bytes, "record": JSON}."""
        records = [ClipRecord(**values | {"path": Path(values["path"])}) for values in json.loads(row["clips"])]
        outcomes = [self._tokenizer(record) for record in records]
        shard, record = pack_group(row["group"], outcomes, self._tokenizer.models.codec.codebook_size)
        return {"group": row["group"], "shard": shard, "record": json.dumps(record)}


def import_ray() -> Any:
    """The module. Raises MissingDependencyError."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing("ray", "ray") from error
    return ray


def ray_groups(
    groups: Sequence[tuple[int, Sequence[ClipRecord]]], models: Models, settings: Settings, workers: int | None
) -> Generator[tuple[int, bytes, dict[str, Any]]]:
    """(group, shard, record) of each group, as `pack_group` gives them, in the order in which they get done.

    `workers` actors of one CPU, and one GPU if the settings name one; None is as many as the cluster has room for.
    Connects to the cluster that RAY_ADDRESS names, or starts Ray on this machine and stops it in the end.
    """
    ray = import_ray()
    models = Models(*(_absolute(getattr(models, part.name)) for part in fields(models)))
    started = not ray.is_initialized()
    gpus = 1 if settings.device.startswith("cuda") else 0
    rows = [{"group": i, "clips": json.dumps([_plain(record) for record in records])} for i, records in groups]
    try:
        if started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        room = ray.cluster_resources().get("GPU" if gpus else "CPU", 1)
        tokenizer: Any = GroupTokenizer  # which Ray's types do not take for a function
        actors = ray.data.ActorPoolStrategy(size=min(workers or int(room), len(rows)))
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            tokenizer, fn_constructor_args=(models, settings), compute=actors, num_cpus=1, num_gpus=gpus
        )
        for row in data.iter_rows():
            yield row["group"], row["shard"], json.loads(row["record"])
    except (ray.exceptions.RayError, ConnectionError) as error:  # ConnectionError: no cluster at RAY_ADDRESS
        reason = str(error).strip().split("\n")[-1]
        raise SirenError(f"Ray failed ({reason}); finished shards are kept: run the same command again") from error
    finally:
        if started:
            ray.shutdown()


def _absolute(model: Any) -> Any:
    """A model given by folder: actors do not run in this process's folder. "minilm" and the hub's names stay."""
    if not isinstance(model, (str, Path)) or model == "minilm" or not Path(model).expanduser().is_dir():
        return model
    return Path(model).expanduser().resolve()


def _plain(record: ClipRecord) -> dict[str, Any]:
    return asdict(record) | {"path": os.fspath(record.path.absolute()), "captions": list(record.captions)}
