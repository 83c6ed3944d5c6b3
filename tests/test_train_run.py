"""Training runs: what comes out is the model that was asked for, however often they were stopped on the way."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import contents
from training_runs import TINY, assert_same_runs, final_state, make_codec, make_data, metrics, settings

import siren
from siren.data import open_tokens, split
from siren.errors import CheckpointError, DataError, InputError, MissingDependencyError, SirenError
from siren.expert import Expert
from siren.train import TrainingError, TrainingStoppedError, assemble, train
from siren.train.batches import Batches, usable, weight_seed
from siren.train.settings import TrainSettings
from siren.train.state import LOCK, latest_state, locked
from siren.train.stop import StopSignals

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """A run that nobody stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(settings(data, run)) is None  # two experts are missing
    return run


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """A signal comes while the update `step` (from 0) is computed."""
    frames = Batches.frames

    def signalling(self: Batches, now: int) -> int:
        if now == step and sys._getframe(1).f_code.co_name == "update":
            signal.raise_signal(number)
        return frames(self, now)

    monkeypatch.setattr(Batches, "frames", signalling)


def test_updates_are_those_of_a_plain_loop(tmp_path: Path, data: dict[str, Any]) -> None:
    """The same weights as a loop over `Expert.loss` and AdamW that was written for this test, to float32 rounding."""
    config = TINY.from_dict(TINY.to_dict() | {"dropout": 0.0})
    options = settings(data, tmp_path / "run", config=config, max_steps=4, bucket=1)
    train(options)
    torch.manual_seed(weight_seed(0, 1))
    expert = Expert(config, 4)
    expert.set_decode_embeddings(make_codec().decode_embeddings())
    tokens = open_tokens(data["data"])
    indices, _ = split(tokens, 0.2)
    batches = Batches(tokens, usable(tokens, indices, 5), 0, 3, 2, 5, 0.2)
    parameters = [p for p in expert.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    losses = []
    for step, rate in enumerate((1.5e-4, 3e-4, 3e-4, 3e-5)):
        total, frames = torch.zeros(()), 0
        for number in range(2):
            batch = batches.batch(step, number)
            mask = (
                torch.ones_like(batch.codes[:, 0], dtype=torch.bool)
                if batch.sequence_mask is None
                else batch.sequence_mask
            )
            count = int(mask.sum())
            total = total + expert.loss(batch.codes, batch.prompt, batch.prompt_mask, mask).mean() * count
            frames += count
        loss = total / frames
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    logged = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-6)
    assert [line["learning_rate"] for line in logged] == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-5])
    trained = final_state(tmp_path / "run").model
    for name, tensor in expert.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_a_signal_that_a_launcher_repeats_is_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM twice in a moment (SLURM's and torchrun's) still saves; a later one, or Ctrl-C, does not wait."""
    now = 100.0
    ended: list[int] = []
    monkeypatch.setattr("time.monotonic", lambda: now)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: ended.append(number)) for number in numbers]
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGTERM)
            now += 1
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM and not ended
            now += 9
            signal.raise_signal(signal.SIGTERM)
            assert ended == [signal.SIGTERM]
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert stop.received == signal.SIGTERM and ended == [signal.SIGTERM, signal.SIGINT]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_six_experts_to_a_checkpoint(tmp_path: Path, data: dict[str, Any]) -> None:
    """All experts, their codec and their encoder's name in the contract's format; the loss falls while they train."""
    run = tmp_path / "run"
    options = settings(
        data,
        run,
        experts="all",
        max_steps=16,
        learning_rate=3e-3,
        prompt_dropout=0.0,
        accumulate=1,
        save_every=8,
        checkpoint_dtype="bfloat16",
        keep=1,
    )
    before = torch.get_rng_state()
    checkpoint = train(options)
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint == run / "checkpoint"
    model = siren.Siren.from_pretrained(checkpoint)
    assert model.config == TINY and model.prompt_encoder_name == "minilm"
    assert model.codec_path is not None
    assert siren.Codec.from_pretrained(model.codec_path).identity == make_codec().identity
    for start, expert in zip((0, 4, 8), model.experts, strict=True):
        state = final_state(run, start).model
        for name, tensor in expert.state_dict().items():
            torch.testing.assert_close(tensor, state[name].bfloat16().float(), rtol=0, atol=0)
        for layer, wanted in zip(expert.codebooks.layers, make_codec().decode_embeddings(), strict=True):
            assert torch.equal(layer.codebook.weight, wanted.codebook.bfloat16().float())
        losses = [line["loss"] for line in metrics(run, start) if "loss" in line]
        assert len(losses) == 16 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
        assert [line["step"] for line in metrics(run, start) if "val_loss" in line] == [4, 8, 12, 16]
        assert [path.name for path in sorted((run / f"expert_{start}").glob("state-*"))] == ["state-00000016"]
    again = contents(checkpoint)
    assert train(options) == checkpoint  # nothing is left to do
    assert contents(checkpoint) == again
    with pytest.raises(InputError, match="holds a run already"):
        train(dataclasses.replace(options, resume=False))


def test_a_signal_saves_and_resuming_changes_nothing(
    tmp_path: Path, data: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at updates 2 and 6 and 8, one of them with validation due; the finished run is the uninterrupted one."""
    run = tmp_path / "run"
    handlers = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)]
    for step, number in ((1, signal.SIGTERM), (5, signal.SIGINT), (7, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            with pytest.raises(TrainingStoppedError, match=f"update {step + 1} of 9") as caught:
                train(settings(data, run, workers=step % 3))
        assert caught.value.exit_code == 128 + number
        assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)] == handlers
        assert final_state(run).values["step"] == step + 1
        with (run / "expert_4" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "loss": 1}\n{"step": 1, "lo')  # what a killed run may leave
    train(settings(data, run, save_every=0, log_every=3, keep=1))
    assert_same_runs(whole, run)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"checkpoint_activations": True, "grad_clip": 0.0}])
def test_resuming_is_exact_in_every_mode(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    train(settings(data, runs[0], max_steps=5, **changes))
    stop_at(monkeypatch, 2)
    with pytest.raises(TrainingStoppedError):
        train(settings(data, runs[1], max_steps=5, **changes))
    monkeypatch.undo()
    train(settings(data, runs[1], max_steps=5, **changes))
    assert_same_runs(*runs)
    assert ("grad_norm" in metrics(runs[0])[0]) == ("grad_clip" not in changes)


def test_checkpointed_activations_change_nothing(tmp_path: Path, data: dict[str, Any], whole: Path) -> None:
    """With dropout: what is computed again drops the same."""
    train(settings(data, tmp_path / "run", checkpoint_activations=True))
    assert_same_runs(whole, tmp_path / "run")


def test_compiled_updates_are_the_same(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without breaks for all batches, with the losses of the packed step."""
    config = TINY.from_dict(TINY.to_dict() | {"dropout": 0.0})
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, **options))
    for name, changes in (("plain", {}), ("compiled", {"compile": True})):
        train(settings(data, tmp_path / name, config=config, max_steps=3, val_fraction=0.0, **changes))
    assert len(graphs) == 1
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[0]) == 3


@pytest.mark.parametrize("options", [[], ["--align"]], ids=["train", "align"])
def test_killed_runs(tmp_path: Path, options: list[str]) -> None:
    """A few stops of benchmarks/kill_resume.py, which does as many as one likes."""
    command = [sys.executable, ROOT / "benchmarks" / "kill_resume.py", "--points", "3", "--folder", tmp_path / "runs"]
    command += options
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    found = re.match(r"(\d) kills and (\d) terminations .* 0 problems", made.stdout)
    assert found is not None and int(found[1]) + int(found[2]) >= 3, made.stdout


def test_experts_in_processes_of_their_own(
    tmp_path: Path, data: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a process, in any order; whoever is last makes the checkpoint. Each is what it is when trained alone."""
    run = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, name in ((2, "SLURM_PROCID"), (1, "RANK"), (0, "SLURM_ARRAY_TASK_ID")):  # the later one counts
        monkeypatch.setenv(name, str(rank))
        made = train(settings(data, run, experts="rank"))
        assert (made is None) == (rank > 0)
        if rank:
            with pytest.raises(CheckpointError, match=r"not trained to the end: .*expert_0"):
                assemble(run, tmp_path / "early")
    assert_same_runs(whole, run)
    siren.Siren.from_pretrained(run / "checkpoint")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID is '3'"):
        train(settings(data, run, experts="rank"))


def test_a_partial_checkpoint(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts that are still in training, if that is asked for."""
    run = tmp_path / "run"
    stop_at(monkeypatch, 0)
    for index in range(3):
        with pytest.raises(TrainingStoppedError):
            train(settings(data, run, experts=[index]))
    with pytest.raises(CheckpointError, match="not trained to the end: expert_0, expert_4, expert_8"):
        assemble(run, tmp_path / "model")
    assemble(run, tmp_path / "model", partial=True)
    siren.Siren.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="a training run"):
        assemble(tmp_path, tmp_path / "other")


def test_fine_tuning(tmp_path: Path, data: dict[str, Any]) -> None:
    """Weights, config, codec and encoder of a checkpoint are where it starts."""
    model = siren.Siren(TINY)
    model.set_decode_embeddings(make_codec().decode_embeddings())
    model.save_pretrained(tmp_path / "model", codec=make_codec(), prompt_encoder="minilm")
    options = settings({"data": data["data"]}, tmp_path / "run", config=None, init_from=tmp_path / "model")
    train(TrainSettings(**vars(options) | {"learning_rate": 1e-9, "max_steps": 1}))
    for name, tensor in model.experts[1].state_dict().items():
        torch.testing.assert_close(final_state(tmp_path / "run").model[name], tensor, rtol=0, atol=1e-7)
    frozen = {name for name in final_state(tmp_path / "run").model if ".codebook." in name or ".dac_out." in name}
    assert len(frozen) == 36
    moved = {name.partition("/")[2] for name in final_state(tmp_path / "run").optimizer}
    assert moved == set(model.experts[1].state_dict()) - frozen
    assert (tmp_path / "run" / "codec").is_dir()


def test_the_official_format(tmp_path: Path) -> None:
    """Trains as it is, without a codec if that is said; a second file serves as validation."""
    lines = []
    for i in range(6):
        np.savez(
            tmp_path / f"{i}.npz", codes=np.full((12, 4 + i), 7 * i), prompt_embeddings=np.ones((2, 8), np.float32)
        )
        lines.append(json.dumps({"id": f"{i}", "npz": f"{i}.npz"}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "val.jsonl").write_text("".join(lines[4:]))
    files = {"data": tmp_path / "train.jsonl", "val_data": tmp_path / "val.jsonl"}
    with pytest.raises(InputError, match="give codec"):
        train(settings(files, tmp_path / "run", max_steps=2))
    train(settings(files, tmp_path / "run", max_steps=2, allow_random_codebooks=True))
    assert sum("val_loss" in line for line in metrics(tmp_path / "run")) == 1


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear line each, and no folder."""
    other = make_codec(seed=1)
    other.save_pretrained(tmp_path / "codec")
    (tmp_path / "file").touch()
    strange = {}
    for part in ("codec", "encoder"):
        (tmp_path / f"strange {part}").mkdir()
        strange[part] = make_data(tmp_path / f"strange {part}")["data"]
        manifest = json.loads((strange[part] / "manifest.json").read_text())
        manifest[part]["identity"] = "strange"
        (strange[part] / "manifest.json").write_text(json.dumps(manifest))
    config = TINY.to_dict()
    wrong: list[tuple[dict[str, Any], type[SirenError], str]] = [
        ({"codec": tmp_path / "codec"}, DataError, "another codec"),
        ({"codec": tmp_path / "none"}, CheckpointError, "no folder"),
        ({"data": tmp_path / "none"}, DataError, "no token set"),
        ({"config": TINY.from_dict(config | {"prompt_dim": 9})}, InputError, "prompt_dim 8, the config 9"),
        ({"config": TINY.from_dict(config | {"dac_feature_dim": 9})}, InputError, "from 2 to 8 values"),
        ({"config": tmp_path / "none.json"}, SirenError, "none.json"),
        ({"config": None}, InputError, "give a config"),
        ({"crop_seconds": 30.0}, InputError, "1500 frames; the config's max_seq_len is 64"),
        ({"attention": "flash"}, InputError, "flash attention needs a GPU"),
        ({"compile": True, "fsdp": True}, InputError, "compile and fsdp"),
        ({"experts": [3]}, InputError, "from 0 to 2"),
        ({"experts": "some"}, InputError, "from 0 to 2"),
        ({"experts": [1, 1]}, InputError, "each once"),
        ({"device": "nowhere"}, InputError, "cannot use device"),
        ({"device": "cuda:77"}, InputError, "cannot use device"),
        ({"init_from": tmp_path / "none"}, CheckpointError, "no checkpoint folder"),
        ({"config": TINY.from_dict(config | {"max_prompt_len": 1})}, InputError, "max_prompt_len is 1"),
        ({"val_data": strange["codec"]}, DataError, "another codec"),
        ({"val_data": strange["encoder"]}, InputError, "holds prompts of strange"),
        ({"prompt_encoder": "./none"}, InputError, "there is no folder '.*/none'"),
        ({"prompt_encoder": "two words"}, CheckpointError, "must be a name"),
    ]
    for changes, error, message in wrong:
        with pytest.raises(error, match=message) as caught:
            train(settings(data, tmp_path / "run", **changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists(), message
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID"):
        train(settings(data, tmp_path / "run", experts="rank"))
    with pytest.raises(InputError, match="file is a file"):
        train(settings(data, tmp_path / "file"))
    for size, message in (("two", "WORLD_SIZE is 'two'"), ("2", "WORLD_SIZE is 2, .* start them with torchrun")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setenv("WORLD_SIZE", size)
            train(settings(data, tmp_path / "run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(MissingDependencyError, match=r"siren\[train\]"):
        train(settings(data, tmp_path / "run", tensorboard=True))
    with pytest.raises(MissingDependencyError, match="wandb"):
        train(settings(data, tmp_path / "run", wandb=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("batch_size", 0), ("seed", -1), ("max_steps", 0), ("learning_rate", 0), ("learning_rate", float("nan"))],
        *[("precision", "fp16"), ("betas", (0.9, 1.0)), ("prompt_dropout", 1.5), ("checkpoint_dtype", "int8")],
        *[("epochs", True), ("max_steps", True), ("val_fraction", 1.0)],
    ],
)
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        TrainSettings(data="a", out="b", **{name: value})  # type: ignore[arg-type]


def test_other_settings_do_not_resume(tmp_path: Path, data: dict[str, Any], whole: Path) -> None:
    """Settings, data and codec that would change the result, by name; a folder of something else; a busy one."""
    before = contents(whole)
    for changes in ({"seed": 1}, {"batch_size": 4}, {"max_steps": 10}, {"accumulate": 1}, {"val_fraction": 0.1}):
        with pytest.raises(InputError, match="|".join((*changes, "clips_per_step", "total_steps"))):
            train(settings(data, whole, **changes))
    more = make_data(tmp_path, clips=30)
    with pytest.raises(InputError, match="data was"):
        train(settings(more, whole))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        train(settings(data, tmp_path / "full"))
    with locked(whole / "expert_0"), pytest.raises(CheckpointError, match="another process"):
        train(settings(data, whole, experts=[0]))
    after = contents(whole)
    assert {name: after[name] for name in before} == before


def test_a_folder_in_which_a_run_just_begins_is_joined(tmp_path: Path, data: dict[str, Any]) -> None:
    """What is there before run.json, when another process has begun or was killed while it began, is no obstacle."""
    run = tmp_path / "run"
    (run / ".codec.saving-1a2b3c4d").mkdir(parents=True)
    (run / LOCK).touch()
    (run / ".siren-1a2b3c4d").touch()
    train(settings(data, run, experts=[0]))
    assert (run / "run.json").is_file()


def test_a_tampered_state_does_not_resume(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit, in each file; removing the state goes on from the one before."""
    run = tmp_path / "run"
    stop_at(monkeypatch, 4)
    with pytest.raises(TrainingStoppedError):
        train(settings(data, run))
    monkeypatch.undo()
    path = latest_state(run / "expert_4")
    assert path is not None and path.name == "state-00000005"
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        good = (path / file).read_bytes()
        (path / file).write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
        with pytest.raises(CheckpointError, match=f"{file} is damaged or was altered|{file} is not valid JSON"):
            train(settings(data, run))
        (path / file).write_bytes(good)
    (path / "state.json").unlink()
    train(settings(data, run))
    assert final_state(run).values["step"] == 9


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Training stops, names the update and the clips of the batch, and the state before can be resumed."""
    run = tmp_path / "run"
    sums = Expert.loss_sums
    calls = 0

    def failing(self: Expert, *inputs: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        made = sums(self, *inputs, **options)
        if calls == 10 and where == "gradient":  # update 5, second batch
            made.register_hook(lambda gradient: gradient * torch.inf)
        return made * torch.nan if calls == 10 and where == "loss" else made

    with monkeypatch.context() as patch:
        patch.setattr(Expert, "loss_sums", failing)
        with pytest.raises(TrainingError, match=f"the {where} of update 5 of expert 1") as caught:
            train(settings(data, run, val_every=0))
    tokens = open_tokens(data["data"])
    batches = Batches(tokens, usable(tokens, split(tokens, 0.2)[0], 5), 0, 3, 2, 5, 0.2, 2)
    assert ", ".join(batches.names(4, 1)) in str(caught.value) and "state, of update 3, is kept" in str(caught.value)
    assert final_state(run).values["step"] == 3
    train(settings(data, run, val_every=0))
    assert final_state(run).values["step"] == 9


def test_tensorboard_and_wandb(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb gets every number under its update; TensorBoard is used as soon as it is installed."""
    logged: list[tuple[int, dict[str, float]]] = []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    class FakeWandb:
        @staticmethod
        def init(**_: object) -> FakeRun:
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())  # type: ignore[arg-type]
    monkeypatch.setattr(FakeWandb, "__spec__", object(), raising=False)
    installed = True
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        installed = False
    train(settings(data, tmp_path / "run", max_steps=2, wandb=True, tensorboard=None))
    assert [step for step, _ in logged] == [1, 2, 2, -1]
    assert {"loss", "ce_codebook_4", "ce_codebook_7", "learning_rate", "grad_norm"} <= logged[0][1].keys()
    assert "val_loss" in logged[2][1] and "step" not in logged[0][1]
    assert (tmp_path / "run" / "expert_4" / "tensorboard").exists() == installed
