"""The CUDA engine's benchmarks do what they say, as far as its emulator shows: gate, operations and timeline.

No figure is judged.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import siren
from siren.sampling import SamplingSettings

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(FOLDER / "kernels")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("siren._emulator", reason="the emulator of the CUDA engine is not built")
    monkeypatch.setenv("SIREN_CUDA_EMULATE", "1")
    monkeypatch.setenv("SIREN_CUDA_EMULATE_SMS", "2")


@pytest.mark.usefixtures("emulator")
def test_gate_of_the_cuda_engine(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Green for its frames and for its residual decoders alone, in each type of weights; red for a residual() that
    reports wrong log-probabilities or draws others than the best."""
    monkeypatch.setattr(load("arms"), "GATE_FRAMES", 2)
    engine = load("siren.cuda_engine")
    gate = load("gpu_arms").Gate(siren.SirenConfig.preset("tiny"), "cpu")
    for weights in ("bf16", "int8"):
        assert gate.check(f"cuda-{weights}").startswith(f"cuda-{weights}: logits ")
        assert gate.check(f"cuda-{weights}", residual=True).startswith(f"cuda-{weights}: logits ")
    residual = engine.CudaDecoder.residual

    def reports_less(self: Any, *given: Any) -> Any:
        codes, logprobs, inputs = residual(self, *given)
        return codes, logprobs - 1, inputs

    def draws_another(self: Any, *given: Any) -> Any:
        codes, logprobs, inputs = residual(self, *given)
        return codes ^ 1, logprobs, inputs

    for fault in (reports_less, draws_another):
        gate.residual_errors.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="cuda-bf16: logits"):
            patch.setattr(engine.CudaDecoder, "residual", fault)
            gate.check("cuda-bf16", residual=True)


@pytest.mark.usefixtures("emulator")
def test_the_tiny_model_runs_on_the_cuda_engine() -> None:
    command = [sys.executable, str(FOLDER / "cuda_tiny.py"), "--short"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr
    assert [line.split(":")[0] for line in made.stdout.splitlines()[1:]] == ["bf16, guidance 1", "bf16, guidance 3"]
    assert "'device': 'emulated'" in made.stdout


@pytest.mark.usefixtures("emulator")
def test_operations_that_are_wrong_are_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is on the emulator; with weights that the executor does not know the operation that reads them is, while the
    whole frames, which have the same weights, only differ from the executor's; frames that go wrong in one launch are
    named too."""
    operations, arms = load("cuda_operations"), load("arms")
    sizes = {"spatial_layers": 1, "num_codebooks": 2, "num_experts": 1, "codebook_size": 40}
    config = dataclasses.replace(siren.SirenConfig.preset("tiny"), **sizes)
    decoder = operations.CudaDecoder(config, arms.random_experts(config, 0), "int8")

    def check(scale: float) -> Any:
        both = operations.Both(decoder, 2, SamplingSettings(guidance_scale=2.0))
        offset, length = both.program.vectors["scale:heads", 0, 1]
        decoder.weights.vectors[offset : offset + length].mul_(torch.linspace(scale, 1, length))
        return operations.check(both)

    whole = operations.FRAMES * len(decoder.weights.plan(2, True).program.operations)
    assert check(1) == {"operations": whole, "differences": [], "other_codes": 0}
    run = operations.Both.run

    def slips(self: Any, first: int, last: int, frame: int, frames: int = 1) -> None:
        run(self, first, last, frame, frames)
        if frames > 1:
            self.there["logprobs_out"][1, 0, 0].nextafter_(torch.zeros(()))

    with monkeypatch.context() as patch:
        patch.setattr(operations.Both, "run", slips)
        (line,) = check(1)["differences"]
    assert line.startswith("2 frames in one launch: 1 codes and log-probabilities are not those of an operation a")
    found = check(-90)
    lines = found["differences"]
    assert [line.split(":")[0] for line in lines] == [f"expert 0 codebook 1 heads, frame {frame}" for frame in range(2)]
    assert ": logits: " in lines[0] and " are wrong, the first at " in lines[0]
    assert found["operations"] == whole and found["other_codes"] > 0


@pytest.mark.usefixtures("emulator")
def test_an_emulated_engine_is_not_taken_for_a_gpu(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is a GPU: no arm of it, and the timeline and the operations say what they ran on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = dataclasses.replace(siren.SirenConfig.preset("tiny"), spatial_layers=1, num_codebooks=2, num_experts=1)
    arms = load("gpu_arms")
    for build in (
        lambda: arms.build("cuda-bf16", config, "cuda", 1, {}),
        lambda: arms.build_residual("cuda-bf16", config, "cuda", {}),
    ):
        with pytest.raises(siren.BackendError, match="would run on cpu instead of cuda: unset SIREN_CUDA_EMULATE"):
            build()
    monkeypatch.setattr(siren.SirenConfig, "preset", lambda name: config)
    load("cuda_timeline").run(batch="1", frames=2, out=tmp_path / "timeline.json")
    assert json.loads((tmp_path / "timeline.json").read_text())["about"]["gpu"] == "emulated"
    with pytest.raises(SystemExit, match="0"):
        load("cuda_operations").run(batch=1, out=tmp_path / "operations.json")
    assert json.loads((tmp_path / "operations.json").read_text())["device"] == "emulated"


@pytest.mark.usefixtures("emulator")
def test_timeline_of_the_emulator(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every instruction of the frame is in it once, after what it waited for; the picture is drawn."""
    timeline, arms = load("cuda_timeline"), load("arms")
    config = dataclasses.replace(siren.SirenConfig.preset("tiny"), spatial_layers=1)
    decoder = timeline.CudaDecoder(config, arms.random_experts(config, 0))
    program, notes = timeline.traced(decoder, 1, 2)
    at = timeline.spans(program, notes)
    assert len(at["sm"]) == len(program.instructions)
    assert ((at["began"] <= at["waited"]) & (at["waited"] <= at["done"])).all()
    frame = timeline.summarise(program, notes)
    assert 0 < frame["work_share"] + frame["wait_share"] <= 1
    assert sum(row["instructions"] for row in frame["kinds"].values()) == len(program.instructions)
    assert list(frame["phases_us"]) == ["backbones", *(f"codebook {j}" for j in range(config.num_codebooks))]
    pytest.importorskip("matplotlib")
    timeline.draw_picture(program, notes, "tiny", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_timeline_sums(load: Any) -> None:
    """Work, waits and busy shares of a frame whose notes are known; what did not run counts nowhere."""
    timeline = load("cuda_timeline")
    operations = [
        SimpleNamespace(kind="noise", name="noise", matrix=None, fields={}),
        SimpleNamespace(kind="enter", name="expert 0 codebook 0 enter", matrix=None, fields={"source": 1}),
        SimpleNamespace(kind="draw", name="expert 0 codebook 0 draw", matrix=None, fields={}),
    ]
    instructions = np.zeros((5, 32), dtype=np.int32)
    instructions[:, 1] = [0, 1, 2, 0, 1]
    program = SimpleNamespace(operations=operations, instructions=instructions, starts=np.array([0, 3, 5]))
    notes = np.array([[1000, 2000], [2500, 4000], [-1, -1], [1000, 1500], [4500, 6000]]) + 10**18
    notes[2] = -1
    found = timeline.summarise(program, notes)
    assert (found["frame_us"], found["instructions"], found["clock_step_ns"]) == (5, 4, 500)
    assert (found["work_share"], found["wait_share"]) == (pytest.approx(0.45), pytest.approx(0.35))
    assert found["kinds"]["decoder enter"] == {
        "instructions": 2, "work_us": 3, "wait_us": 3.5, "work_share": 0.3, "wait_share": 0.35
    }  # fmt: skip
    assert found["phases_us"] == {"backbones": [0, 1], "codebook 0": [1.5, 5]}
    assert found["busy_share_of_sm"] == [0.5, 0.4]
