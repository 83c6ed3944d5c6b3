"""The benchmarks for a GPU do what they say, as far as a CPU shows: their gates, decoders, clocks and reports. Those of
the CUDA engine alone are in test_cuda_benchmarks.py.

Where a GPU is needed to go on, its events and copies are replaced. No figure is judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import siren
from siren.sampling import SamplingSettings

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SEEDS = np.array([3, 1 << 50, 4], dtype=np.uint64)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ or benchmarks/kernels/."""
    monkeypatch.syspath_prepend(FOLDER / "kernels")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def equal_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 8 units in the last place of the largest value: attention over another length adds in another order."""
    limit = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def test_static_decoder_draws_the_codes_of_the_reference(load: Any) -> None:
    """Also in several steps, with a padded prompt, and when codes are forced; beyond its room it raises."""
    config = siren.SirenConfig.preset("tiny")
    reference = load("arms").build("naive-fp32", config, 1, {})
    static = load("static_arm").StaticDecoder(reference, 20)
    prompt, mask = load("arms").random_prompts(config, 3, 7)
    mask[1, 4:] = False
    plain, state = (decoder.start(prompt, mask, SEEDS, SamplingSettings()) for decoder in (reference, static))
    plain.step(20, None)
    done = []
    state.step(1, None)
    state.step(19, lambda *progress: done.append(progress))
    assert torch.equal(state.codes, plain.codes)
    equal_to_rounding(state.logprobs, plain.logprobs)
    assert done == [(frame, 19) for frame in range(1, 20)]
    with pytest.raises(siren.InputError, match="room for 20 frames, not 20 \\+ 1"):
        state.step(1)

    codes = plain.codes[:, :, :5].flip(1)
    plain, state = (decoder.start(prompt, mask, SEEDS, SamplingSettings()) for decoder in (reference, static))
    expected = plain.force(codes)
    equal_to_rounding(state.force(codes), expected)
    assert torch.equal(state.codes, codes)
    with pytest.raises(siren.InputError, match="default settings"):
        static.start(prompt, mask, SEEDS, SamplingSettings(top_k=3))


def test_compiled_static_decoder_compiles_each_shape_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the backbone blocks of all experts, two for the residual decoders; the codes are the same."""
    config = siren.SirenConfig.preset("tiny")
    reference = load("arms").build("naive-fp32", config, 1, {})
    counter = importlib.import_module("torch._dynamo.testing").CompileCounterWithBackend("eager")
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: compile_(function, backend=counter, **options)
    )
    static = load("static_arm").StaticDecoder(reference, 6, compiled=True)
    monkeypatch.undo()
    prompt, mask = torch.randn(3, 5, config.prompt_dim), torch.ones(3, 5, dtype=torch.bool)
    plain, state = (decoder.start(prompt, mask, SEEDS, SamplingSettings()) for decoder in (reference, static))
    plain.step(6, None)
    state.step(6, None)
    assert torch.equal(state.codes, plain.codes)
    assert counter.frame_count == 3
    torch.compiler.reset()


def test_decode_gate(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Green for the static decoder; red for wrong logits, for wrong draws of right logits, and for wrong reports."""
    static_arm = load("static_arm")
    gate = load("gpu_arms").Gate(siren.SirenConfig.preset("tiny"), "cpu")
    assert "graph-fp32: 0 of 576 codes differ" in gate.check("graph-fp32")
    assert gate.check("graph-bf16").startswith("graph-bf16: logits ")

    advance, keep = static_arm.StaticState._advance, static_arm.StaticState._keep

    def no_positions(self: Any, pick: Any) -> None:
        self.positions.zero_()
        advance(self, pick)

    def greedy(self: Any, codebook: int, logits: torch.Tensor) -> torch.Tensor:
        codes = logits.argmax(dim=-1)
        keep(self, codebook, logits, codes)
        return codes

    faults = {
        "_advance": no_positions,
        "_draw": greedy,
        "_keep": lambda self, codebook, logits, codes: keep(self, codebook, logits * 0.9, codes),
    }
    for name, fault in faults.items():
        gate.errors.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="graph-bf16: logits"):
            patch.setattr(static_arm.StaticState, name, fault)
            gate.check("graph-bf16")


class Probe:
    """Stands for gpu_timing.CopyProbe."""

    def run(self) -> float:
        return 4e12


def clocked(call: Any) -> float:
    """Stands for gpu_timing.elapsed."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_decode_rows(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row for each arm and batch, with the frames it stands for; written also when an arm is red."""
    gpu_decode, machine, docs = load("gpu_decode"), load("machine"), load("docs")
    monkeypatch.setattr(gpu_decode, "CopyProbe", Probe)
    monkeypatch.setattr(gpu_decode, "elapsed", clocked)
    about = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "date": "2026-01-01T", "commit": "c"}
    monkeypatch.setattr(machine, "describe_gpu", lambda: about)
    monkeypatch.setattr(machine, "gpu_clocks", lambda: {"sm": "1980 MHz"})
    monkeypatch.setitem(sys.modules, "siren.triton_engine", None)
    names, out = ["naive-bf16", "graph-bf16", "triton-bf16"], tmp_path / "decode.json"
    config = siren.SirenConfig.preset("tiny")
    with pytest.raises(siren.SamplingError, match=r"red for triton-bf16, residual\(\) of triton-bf16: not timed"):
        gpu_decode.compare(config, "cpu", {"preset": "tiny", "command": "c"}, names, [1, 2], 4, 3, 5, out, None)
    result = json.loads(out.read_text())
    assert [(row["batch"], row["arm"]) for row in result["rows"]] == [(b, a) for b in (1, 2) for a in names[:2]]
    frames = {"naive-bf16": [1, 4], "graph-bf16": [4, 16]}  # the naive arm gets a fifth, but not less than one
    assert all(row["frames"] == frames[row["arm"]] and row["ms"] > 0 for row in result["rows"])
    assert result["rows"][0]["ratio_to_naive_bf16"] == 1
    assert [(row["arm"], row["batch"]) for row in result["residual"]] == [("naive-bf16", 1), ("naive-bf16", 2)]
    row = result["residual"][1]
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_moved"] / (row["us"] / 1e6 * 4000))
    assert result["copy_gb_per_s"]["2"] == {"median": 4000, "all": [4000] * 8}
    row = result["rows"][1]
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_moved"] / (row["ms"] / 1e3 * 4000))

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    saved = tmp_path / "benchmarks" / "results" / "gpu-x.json"
    saved.write_text(json.dumps({"parts": {"decode": result}}))
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    section = docs.decode_section()
    assert section.startswith("tiny, a GPU, SM at 1980 MHz, driver 1, torch 2, triton 3, 2026-01-01, commit c. Copy ")
    assert section.count("\n| graph-bf16 |") == 2
    assert section.count("\n| naive-bf16 |") == 4 and "\n\n| residual() | batch |" in section
    del result["about"]["clocks_after"]
    saved.write_text(json.dumps({"parts": {"decode-compile": result}}))
    assert "SM at unknown" in docs.decode_section()


def test_no_cache_grows_while_frames_are_timed(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose first room is for one frame has room for all of them before the first is timed."""
    pytest.importorskip("triton")
    gpu_decode, session = load("gpu_decode"), load("siren.triton_session")
    monkeypatch.setattr(gpu_decode, "CopyProbe", Probe)
    monkeypatch.setattr(gpu_decode, "elapsed", clocked)
    monkeypatch.setattr(load("siren.device_session"), "_FIRST_CAPACITY", 1)
    step, seen = session.TritonState.step, []

    def watched(self: Any, *given: Any) -> None:
        seen.append(self.capacity)
        step(self, *given)
        seen.append(self.capacity)

    monkeypatch.setattr(session.TritonState, "step", watched)
    config, built = siren.SirenConfig.preset("tiny"), {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["persistent-fp32", "triton-fp32"]
    for name in names:
        built.setdefault(name, load("gpu_arms").build(name, config, device, 6, built))
    one, other = vars(built["persistent-fp32"]), vars(built["triton-fp32"])
    assert [name for name in other if one[name] is not other[name]] == ["persistent"] and one["persistent"]
    gpu_decode.measure(config, built, names[1:], 1, 1, 1, 3)
    assert seen == [2] * 4


def test_eager_arms_give_what_the_contract_says(load: Any) -> None:
    """Where they are not the reference itself: the same bits."""
    pytest.importorskip("triton")
    policy, rvq = load("siren.kernels.policy_loss"), load("siren.kernels.rvq_embed")
    backbone, residual = load("siren.kernels.backbone_step"), load("siren.kernels.residual_frame")
    benchmark = load("kernel_times").load
    x, weight, codes = torch.randn(9, 6).bfloat16(), torch.randn(5, 6).bfloat16(), torch.arange(9) % 5
    given = (x, weight, codes, -torch.rand(9), torch.randn(9))
    torch.testing.assert_close(
        benchmark("policy_loss").plain(*given), policy.policy_loss_reference(*given), rtol=0, atol=0
    )
    given = (torch.randn(2, 3, 5, 7).bfloat16(), torch.randint(5, (2, 3, 4)))
    assert torch.equal(benchmark("rvq_embed").plain(*given), rvq.rvq_embed_reference(*given))
    inputs = load("decode_inputs")
    for module, made, name in (
        (backbone, inputs.backbone_arguments, "inputs"),
        (residual, inputs.residual_arguments, "h"),
    ):
        stem = module.__name__.rpartition(".")[2]
        given = made("cpu", "int8", **benchmark(stem).SMALL)
        given[name] = given[name].bfloat16()
        reference = getattr(module, f"{stem}_reference")
        plain = inputs.in_bf16(given, list(module.WEIGHTS), module.MATRICES)
        if "frame" in plain:
            plain["frame"] = int(plain["frame"])
        torch.testing.assert_close(reference(**plain), reference(**given), rtol=0, atol=0)


def fake_kernels(load: Any, gates: dict[str, Any]) -> ModuleType:
    """A benchmark module with a case for each gate; every arm adds its name to `ran`."""
    module = ModuleType("fake")
    module.ran = []  # type: ignore[attr-defined]
    case = load("case").Case

    def cases(device: str, small: bool) -> Any:
        for label, gate in gates.items():
            arms = {
                name: lambda name=name, label=label: module.ran.append((label, name)) for name in ("eager", "triton")
            }
            yield case("fake", label, arms, gate, 3_000_000, 5)

    module.cases = cases  # type: ignore[attr-defined]
    return module


def test_nothing_runs_on_a_red_gate(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A gate that fails or raises is red; an arm that raises is a fault of its own; out of time is said."""
    times = load("kernel_times")

    def fail() -> None:
        raise AssertionError("error 3,\n limit 2")

    fake = fake_kernels(load, {"good": lambda: None, "bad": fail, "ugly": lambda: 1 / 0})
    monkeypatch.setattr(times, "load", lambda stem: fake)
    options = argparse.Namespace(device="cpu", small=True, gates=False, stem=["fake"], budget=9.0, json=tmp_path / "j")
    result = times.measure(options)
    assert json.loads(options.json.read_text()) == result
    assert [row["gate"] for row in result["rows"]] == [
        "green",
        "red: AssertionError: error 3, limit 2",
        "red: ZeroDivisionError: division by zero",
    ]
    assert fake.ran == [("good", "eager"), ("good", "triton")]
    assert len(times.faults(result["rows"])) == 2
    assert times.run_once(load("case").Case("s", "l", {"eager": fail}, fail, 1, 1)) == {
        "eager": "AssertionError: error 3, limit 2"
    }
    options.budget = -1.0
    assert times.measure(options) == {"rows": [], "not_run": ["fake: good and what follows"]}


def test_a_row_is_written_before_its_arms_run(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a run which is ended while it compiles or times keeps what its gate found."""
    times, path = load("kernel_times"), tmp_path / "rows.json"
    monkeypatch.setattr(times, "load", lambda stem: fake_kernels(load, {"good": lambda: None}))
    written = []
    monkeypatch.setattr(times, "run_once", lambda case: written.append(json.loads(path.read_text())) or {})
    times.measure(argparse.Namespace(device="cpu", small=True, gates=False, stem=["fake"], budget=9.0, json=path))
    assert [row["gate"] for row in written[0]["rows"]] == ["green"]
    assert "arm_errors" in json.loads(path.read_text())["rows"][0]


def test_figures_of_a_case(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times, timing = load("kernel_times"), load("gpu_timing")
    seconds = {"eager": [4e-6] * 9, "triton": [1e-6, 2e-6, 3e-6]}
    monkeypatch.setattr(timing, "interleaved", lambda arms, budget: {name: seconds[name] for name in arms})
    (case,) = fake_kernels(load, {"good": lambda: None}).cases("cuda", False)
    row = {"stem": "fake", "label": "good", "gate": "green", "arms": times.timed(case, {}, 3e12, 1e9)}
    own = row["arms"]["triton"]
    assert own["ratio_to"] == {"eager": pytest.approx(2)}
    assert (own["share_of_copy"], own["share_of_matmul"]) == (pytest.approx(0.5), pytest.approx(0.0025))
    assert times.table([row]).endswith("\n| fake: good | green | triton | 2.0 | 1.2 to 2.8 | 2.00 |  | 0.50 | 0.00 |")
    assert list(times.timed(case, {"triton": "raises"}, 3e12, 1e9)) == ["eager"]


@no_gpu
def test_without_a_gpu_it_is_one_line() -> None:
    made = run(FOLDER / "gpu_check.py")
    assert made.returncode == 2
    assert made.stderr.startswith(f"error: torch {torch.__version__} of ") and made.stderr.count("\n") == 1
    made = run(FOLDER / "decode.py", "--device", "cuda")
    assert (made.returncode, made.stderr) == (2, f"error: torch {torch.__version__} sees no CUDA device\n")


@pytest.fixture
def check(load: Any, tmp_path: Path) -> Any:
    return load("gpu_check").Check(tmp_path / "out.json", 60, tmp_path)


def test_a_program_that_hangs_is_ended_with_what_it_started(check: Any, tmp_path: Path) -> None:
    """Out of time: no exit code, what it printed is kept, and no process of its own outlives it."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert check.run("hang", [sys.executable, "-c", code], 2) == (None, "begun\n")
    time.sleep(3)
    assert not mark.exists()
    assert check.run("fail", [sys.executable, "-c", "print(1); raise SystemExit(3)"], 30) == (3, "1\n")


def test_nothing_outlives_a_program_or_the_time_for_all(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a program leaves running ends with it, and a step cannot take more than is left."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert check.run("leaves", [sys.executable, "-c", code], 30) == (0, "")
    monkeypatch.setattr(check, "stop", time.monotonic() + 3)
    begin = time.monotonic()
    assert check.run("late", [sys.executable, "-c", "import time; time.sleep(30)"], 30) == (None, "")
    assert time.monotonic() - begin < 10
    assert not mark.exists()


def test_no_emulator_runs_under_the_name_of_the_gpu(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIREN_CUDA_EMULATE", "SIREN_CUDA_EMULATE_SMS", "SIREN_CUDA_EMULATE_SEED", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    code = "import os; print([name for name in os.environ if 'EMULATE' in name or 'INTERPRET' in name])"
    assert check.run("names", [sys.executable, "-c", code], 30) == (0, "[]\n")


def test_test_results_are_counted(load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu_check = load("gpu_check")
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    source = "import pytest\n\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_n(n):\n    assert n < 3\n"
    (tmp_path / "tests" / "test_mixed.py").write_text(source + "\n\ndef test_none():\n    pytest.skip()\n")
    threads = "import os\n\ndef test_one():\n    assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '2'\n"
    (tmp_path / "tests" / "test_good.py").write_text(threads)
    slow = "import time\n\ndef test_one():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    (tmp_path / "tests" / "test_slow.py").write_text(slow)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for names, limit in ((["mixed"], 300), (["good", "missing"], 300), (["slow"], 4)):
        monkeypatch.setattr(gpu_check, "TESTS", names)
        gpu_check.tests(check, limit)
        monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)  # xdist takes longer to start
    part = check.result["parts"]["tests"]
    assert {key: part["mixed"][key] for key in ("passed", "failed", "skipped")} == {
        "passed": 2,
        "failed": ["test_n[3]"],
        "skipped": 1,
    }
    assert (part["good"]["passed"], part["good"]["exit"], part["good"]["end"]) == (1, 0, "")
    assert sorted(line.split(":")[0] for line in check.result["red"]) == [
        "test_missing.py",
        "test_mixed.py",
        "test_slow.py",
    ]
    assert (part["slow"]["exit"], part["slow"]["passed"]) == (None, 0)


STANDS_FOR_A_BENCHMARK = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[sys.argv.index("--json" if "--json" in sys.argv else "--out") + 1])
row = {"stem": "s", "label": "l", "gate": "green"}
path.write_text(json.dumps({"rows": [row], "not_run": ["s: k and what follows"]}))
time.sleep(3)
path.write_text("{")  # stopped in the middle of writing
"""


def test_what_was_not_timed_is_red_and_what_was_read_stays(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_check = load("gpu_check")
    for name in ("kernel_times.py", "decode.py", "train.py"):
        (tmp_path / name).write_text(STANDS_FOR_A_BENCHMARK)
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path)
    check.stems = ["s"]
    gpu_check.kernels(check, 20, "times", [])
    assert check.result["red"] == ["times: no time for s: k and what follows"]
    gpu_check.decode_of(check, 20, "decode", "naive-bf16", "1")
    gpu_check.training(check, 20)
    parts = check.result["parts"]
    assert len(parts["times"]["s"]["rows"]) == len(parts["decode"]["rows"]) == len(parts["train"]["rows"]) == 1
    (tmp_path / "decode.py").write_text("")  # ends well and has timed nothing
    gpu_check.decode_of(check, 20, "decode", "naive-bf16", "1")
    (tmp_path / "train.py").write_text("raise SystemExit('error: the gate is red')")
    gpu_check.training(check, 20)
    assert check.result["red"][1:] == ["decode: exit code 0: no output", "train: exit code 1: error: the gate is red"]


@no_gpu
def test_the_training_step_is_asked_for_in_words_that_it_knows(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark takes the command line up to where it looks for a GPU, and knows the arms."""
    gpu_check = load("gpu_check")
    monkeypatch.setattr(gpu_check, "LIBRARY", FOLDER.parent)
    gpu_check.training(check, 120)
    assert check.result["red"] == [f"train: exit code 2: error: torch {torch.__version__} sees no CUDA device"]
    assert set(gpu_check.TRAIN_ARMS.split(",")) <= set(load("train").ARMS)


def test_sanitizers_that_do_not_finish_are_red(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """memcheck that is done in time, then racecheck that is not."""
    gpu_check = load("gpu_check")
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\n[ "$2" = memcheck ] || sleep 30\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(tool))
    gpu_check.sanitize(check, 3, "rvq_embed")
    assert [row["exit"] for row in check.result["parts"]["sanitizers"].values()] == [0, None]
    assert check.result["red"] == ["racecheck, rvq_embed: not done in time: no output"]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    gpu_check.sanitize(check, 3, "rvq_embed")
    missing = [f"{kind}, rvq_embed: compute-sanitizer is not on PATH" for kind in ("memcheck", "racecheck")]
    assert check.result["red"][1:] == missing
    gpu_check.sanitize_tiny(check, 3)  # the engine did not run: nothing to watch
    assert check.result["red"][1:] == missing
    check.cuda = True
    gpu_check.sanitize_tiny(check, 3)
    assert {line.split(",")[0] for line in check.result["red"][3:]} == {"memcheck", "racecheck", "synccheck"}


def test_a_build_without_the_cuda_engine_is_red_and_goes_on(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_check = load("gpu_check")
    (tmp_path / "setup.py").write_text(
        "import os\nraise SystemExit('error: no' if os.environ['SIREN_CUDA'] > '0' else 0)"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "LIBRARY", tmp_path / "lib")
    gpu_check.build(check, 30)
    assert check.result["parts"]["build"] == {"exit": 0, "cuda": False}
    assert check.result["red"] == ["build with SIREN_CUDA=1: exit code 1: error: no"]


def test_microbench_is_compiled_for_this_gpu_and_read(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its rows are kept; a pattern that was stuck is red, and so is a program that ends before its JSON does."""
    gpu_check, nvcc = load("gpu_check"), tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=os.pathsep)
    monkeypatch.setenv("SIREN_CUDA_ARCHS", "90a")
    result = {"copy_gb_per_s": 4000, "exchange": [{"how": "counter", "ns": 900}, {"how": "data", "fault": "stuck"}]}
    for text, code in ((json.dumps(result), 3), ('{"copy_gb', 1)):
        program = f"#!/bin/sh\necho '{text}'\nexit {code}\n"
        nvcc.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat >"$5" <<"END"\n{program}END\nchmod +x "$5"\n')
        nvcc.chmod(0o755)
        gpu_check.microbench(check, 20)
        assert "-gencode=arch=compute_90a,code=sm_90a" in (tmp_path / "words").read_text()
        found = check.result["parts"]["microbench"]
        assert found == {"exit": code, **(result if code == 3 else {"end": '{"copy_gb\n'})}
    assert check.result["red"] == ["microbench: stuck", 'microbench: exit code 1: {"copy_gb']


def test_operations_that_differ_are_red(load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each setting has its own row and line; without the engine there is nothing to do."""
    gpu_check = load("gpu_check")
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(gpu_check, "OPERATIONS", ("--batch 1", "--batch 2"))
    source = "import sys\nassert sys.argv[1] == '--batch'\nraise SystemExit('error: no' if sys.argv[2] == '2' else 0)\n"
    (tmp_path / "cuda_operations.py").write_text(source)
    gpu_check.operations(check, 30)
    assert "operations" not in check.result["parts"]
    check.result["parts"]["build"] = {"exit": 0, "cuda": True}
    gpu_check.operations(check, 30)
    assert {name: row["exit"] for name, row in check.result["parts"]["operations"].items()} == {
        "--batch 1": 0,
        "--batch 2": 1,
    }
    assert check.result["red"] == ["cuda_operations.py --batch 2: exit code 1: error: no"]


STANDS_FOR_DECODE = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "cuda" in words["--arms"]:
    raise SystemExit("error: an illegal memory access")
pathlib.Path(words["--out"]).write_text(json.dumps({"rows": [words["--arms"]]}))
"""


@pytest.mark.parametrize("runs", [False, True])
def test_a_broken_cuda_engine_leaves_the_other_arms_their_times(
    load: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: bool
) -> None:
    """Whether the tiny model fails, or does not and its arms break the process that times all of them."""
    gpu_check = load("gpu_check")
    monkeypatch.setattr(gpu_check, "BENCHMARKS", tmp_path)
    (tmp_path / "cuda_tiny.py").write_text(f"raise SystemExit({0 if runs else 1})")
    (tmp_path / "decode.py").write_text(STANDS_FOR_DECODE)
    (tmp_path / "cuda_timeline.py").write_text("raise SystemExit('error: no')")
    check.result["parts"]["gates"] = {"residual_frame": {"rows": [{"gate": "green"}]}}
    for step in (gpu_check.tiny, gpu_check.decode, gpu_check.timeline):
        step(check, 30)
    assert check.result["parts"]["decode"]["rows"] == [f"{gpu_check.DECODE_ARMS},persistent-bf16"]
    named = [line.split(":")[0] for line in check.result["red"]]
    assert named == (["decode", "timeline"] if runs else ["cuda_tiny.py"])


def test_check_in_the_interpreter(tmp_path: Path) -> None:
    """One kernel through the whole harness: gates and arms run, and it says that nothing was timed."""
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    made = run(FOLDER / "gpu_check.py", "--device", "cpu", "--small", "--stem", "sample_heads", "--out", out)
    result = json.loads(out.read_text())
    assert made.returncode == 0, made.stdout
    assert "nothing was timed, nothing ran on a GPU" in made.stdout
    rows = result["parts"]["gates and arms"]["sample_heads"]["rows"]
    assert rows and all(row["gate"] == "green" and row["arm_errors"] == {} and "arms" not in row for row in rows)
    assert result["red"] == []
