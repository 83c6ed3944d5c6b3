"""Which jobs a shard does, what its file is called, and what is no shard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siren.errors import InputError
from siren.shard import parse_shard, shard_name


@given(jobs=st.integers(0, 40), count=st.integers(1, 50))
def test_every_job_is_in_one_shard(jobs: int, count: int) -> None:
    """The shards of any list, also of one shorter than their number, are parts of it without overlap."""
    shards = [parse_shard(f"{index}/{count}") for index in range(1, count + 1)]
    parts = [list(range(jobs))[index - 1 :: of] for index, of in shards]
    assert sorted(job for part in parts for job in part) == list(range(jobs))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_names() -> None:
    """A shard has a file of its own; one shard of one is the whole list and has the plain name."""
    assert parse_shard("2/4") == (2, 4)
    assert shard_name("results.jsonl", (2, 4)) == "results-2-of-4.jsonl"
    assert shard_name("results.jsonl", (1, 1)) == "results.jsonl"


@pytest.mark.parametrize(
    "text", ["", "2", "3/2", "0/4", "0/0", "a/b", "1/", "-1/4", "1.0/4", " 1/4", "1/4\n", "²/4", "1/99999"]
)
def test_what_is_no_shard(text: str) -> None:
    """Anything else is one line that says what a shard looks like."""
    with pytest.raises(InputError, match="--shard must be I/N") as raised:
        parse_shard(text)
    assert "\n" not in str(raised.value)
