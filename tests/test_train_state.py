"""States: whole or not there at any moment of a save, every byte of them under a hash, and never another run's."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from siren.errors import CheckpointError, InputError
from siren.train.settings import TrainSettings, check_same
from siren.train.state import latest_state, locked, read_state, read_values, write_state


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    model = {"a.weight": torch.randn(3, 5, generator=generator), "sos": torch.randn(1, 1, 4, generator=generator)}
    return model, {"exp_avg/sos": torch.randn(1, 1, 4, generator=generator), "step/sos": torch.tensor(float(step))}


def write(folder: Path, step: int, keep: int = 2) -> Path:
    return write_state(folder, {"step": step, "settings": {"seed": 3, "betas": [0.9, 0.95]}}, *tensors(step), keep)


def check(path: Path | None, step: int) -> None:
    """The state is the one that `write` writes for the step, bit for bit."""
    assert path is not None
    state, (model, optimizer) = read_state(path), tensors(step)
    assert state.values["step"] == step and state.values["settings"] == {"seed": 3, "betas": [0.9, 0.95]}
    for got, wanted in ((state.model, model), (state.optimizer, optimizer)):
        assert got.keys() == wanted.keys()
        assert all(got[name].dtype == wanted[name].dtype for name in wanted)
        assert all(got[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)


def in_a_process(work: Callable[[], object]) -> int:
    """Exit code of a fork of this process that does `work`: 0, or 1 for an error."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_round_trip_and_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "expert_0"
    assert latest_state(folder) is None
    for step in (2, 10, 9, 100_000_001):
        check(write(folder, step, keep=3), step)
        check(latest_state(folder), step if step != 9 else 10)
    assert sorted(path.name for path in folder.iterdir()) == ["state-00000009", "state-00000010", "state-100000001"]
    write(folder, 100_000_002, keep=1)
    assert [path.name for path in folder.iterdir()] == ["state-100000002"]
    check(write(folder, 100_000_002, keep=1), 100_000_002)  # the same again replaces it


def test_a_copy_that_the_user_made_of_a_state_stays(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    copy = shutil.copytree(path, path.with_name(f"{path.name}-good"))
    (tmp_path / "state-notes").touch()
    write(tmp_path, 2, keep=1)
    assert sorted(child.name for child in tmp_path.iterdir()) == [copy.name, "state-00000002", "state-notes"]


def test_a_save_that_dies_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended at any of its operations on files, a save leaves the old state or the new one, and the next works."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what a process wrote survives its end without

    def die_at(number: int, folder: Path, step: int) -> int:
        count = 0

        def hook(event: str, _: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                count += 1
                if count == number:
                    os._exit(9)

        def work() -> None:
            sys.addaudithook(hook)
            write(folder, step, keep=1)

        return in_a_process(work)

    outcomes = []
    for number in range(1, 200):
        folder = tmp_path / f"{number}"
        write(folder, 1)
        code = die_at(number, folder, 2)
        path = latest_state(folder)
        assert path is not None
        outcomes.append(int(read_values(path)["step"]))
        check(path, outcomes[-1])
        write(folder, 3, keep=2)
        check(latest_state(folder), 3)
        left = {child.name for child in folder.iterdir()}
        assert left == {"state-00000003", f"state-0000000{outcomes[-1]}"}, f"garbage after operation {number}"
        if code == 0:
            break
    assert code == 0 and number > 15, "the save has fewer operations than files: the hook does not see them"
    assert outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2 and outcomes[-2] == 2


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_every_altered_byte_is_refused(tmp_path: Path, file: str) -> None:
    """Flipped, added, removed; the message names the file and how to go on."""
    path = write(tmp_path, 5)
    data = (path / file).read_bytes()
    places = range(0, len(data) - 1, 11)  # the last byte of the JSON is the newline after it
    spoilt = [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in places]
    for bad in (*spoilt, data[: len(data) // 2], b"", data + b"x"):
        (path / file).write_bytes(bad)
        with pytest.raises(CheckpointError, match=file) as caught:
            read_state(path)
        assert "\n" not in str(caught.value)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        read_state(path)


def test_a_swapped_file_is_refused(tmp_path: Path) -> None:
    """A whole file of another state does not belong here."""
    first, second = write(tmp_path, 5), write(tmp_path, 6)
    (first / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="altered"):
        read_state(first)
    check(second, 6)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    write(tmp_path, 5)
    model, optimizer = tensors(6)
    model["sos"][0, 0, 2] = torch.nan
    with pytest.raises(CheckpointError, match="step 6: sos holds NaN"):
        write_state(tmp_path, {"step": 6}, model, optimizer, 1)
    check(latest_state(tmp_path), 5)


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
            write(tmp_path, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000005"]
    check(latest_state(tmp_path), 5)
    check(write(tmp_path, 6), 6)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    """A second process is refused at once; a killed one holds nothing."""

    def hold() -> None:
        with locked(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = os.fork()
    if not child:
        hold()
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.005)
        with pytest.raises(CheckpointError, match="another process"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path), locked(tmp_path / "other", wait=True):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a folder that is busy."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CheckpointError, match=r"cannot lock .*Operation not supported"), locked(tmp_path):
        pass


def test_other_settings_are_named(tmp_path: Path) -> None:
    """Each that the result depends on, old and new; those that it does not depend on may change."""
    before = TrainSettings(data="a", out="b", config="tiny", seed=3, save_every=5)
    same = TrainSettings(data="c", out="d", config="tiny", seed=3, save_every=9, keep=7, device="cuda", fsdp=True)
    check_same(before.of_the_result(), same.of_the_result(), tmp_path)
    other = TrainSettings(data="a", out="b", config="tiny", seed=4, precision="bf16")
    with pytest.raises(InputError, match=r"precision was 'fp32' and is 'bf16'; seed was 3 and is 4\."):
        check_same(before.of_the_result(), other.of_the_result(), tmp_path)
