"""`--shard I/N`: the part of a list of jobs that one of N machines does. It does jobs I, I + N, I + 2N and so on."""

from __future__ import annotations

import re

from .errors import InputError

MAX_SHARDS = 9999


def parse_shard(text: str) -> tuple[int, int]:
    """("2/4") -> (2, 4): the second of four shards, counted from 1. Raises InputError for anything else.

    The shard's jobs are `jobs[index - 1 :: count]`: every job is in exactly one shard.
    """
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise InputError(f"--shard must be I/N with I of 1 to N, such as 2/4, and N up to {MAX_SHARDS}; not {text!r}")
    return index, count


def shard_name(name: str, shard: tuple[int, int]) -> str:
    """("results.jsonl", (2, 4)) -> "results-2-of-4.jsonl": the file a shard writes. Of 1/1 the name as it is."""
    index, count = shard
    stem, dot, suffix = name.rpartition(".")
    return name if count == 1 else f"{stem}-{index}-of-{count}{dot}{suffix}"
