"""Token sets: what was written is what is read, and nothing damaged, altered or foreign is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from fake_data import FakeCodec, FakeEncoder, random_clips, write_tokens
from hypothesis import given
from hypothesis import strategies as st

from siren.data import TokenSet, check_codec, check_encoder, open_tokens, split
from siren.data.shards import Clip, pack_shard
from siren.errors import DataError, InputError


@pytest.fixture(scope="module")
def shards() -> list[list[Clip]]:
    return [random_clips(5), random_clips(1, seed=1), random_clips(3, seed=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: list[list[Clip]]) -> Path:
    return write_tokens(tmp_path_factory.mktemp("sets") / "tokens", shards)


@pytest.fixture
def copy(tmp_path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_reads_what_was_written(folder: Path, shards: list[list[Clip]]) -> None:
    """Every clip of every shard, with its codes, captions, prompts and class, whole and in part."""
    tokens = open_tokens(folder)
    assert isinstance(tokens, TokenSet)
    clips = [clip for shard in shards for clip in shard]
    assert len(tokens) == len(clips) and tokens.frames.tolist() == [len(clip.codes) for clip in clips]
    assert (tokens.num_codebooks, tokens.codebook_size, tokens.prompt_dim) == (12, 1024, 8)
    assert (tokens.sample_rate, tokens.hop_length) == (16000, 320)
    assert tokens.codec_identity == FakeCodec().identity and tokens.encoder_identity == FakeEncoder().identity
    for i, clip in enumerate(clips):
        codes = tokens.codes(i)
        assert codes.dtype == np.int16 and codes.flags.c_contiguous
        np.testing.assert_array_equal(codes, clip.codes.T)
        np.testing.assert_array_equal(tokens.codes(i, len(clip.codes) - 1, len(clip.codes)), clip.codes.T[:, -1:])
        assert tokens.captions(i) == clip.captions and tokens.clip_id(i) == clip.id and tokens.label(i) == clip.label
        for variant, prompt in enumerate(clip.prompts):
            got = tokens.prompt(i, variant)
            assert got.dtype == torch.float32
            np.testing.assert_allclose(got, prompt, rtol=2**-11)
        assert tokens.crop_starts(i) is None and tokens.score(i) is None and tokens.licence(i) is None


def test_optional_parts(tmp_path: Path) -> None:
    """Crop starts, scores, licences and sources survive; one codebook and one frame do too."""
    prompt = np.full((2, 3), 0.1)
    values: dict[str, Any] = {"captions": ["x"], "prompts": [prompt], "licence": "CC0", "source": "a book"}
    clips = [
        Clip("a", np.array([[5]]), crop_starts=np.array([0]), score=0.5, **values),
        Clip("b", np.array([[1023], [0]]), crop_starts=np.array([0, 1]), score=0.25, **values),
    ]
    data = pack_shard(clips, 1024)
    folder = write_tokens(tmp_path / "tokens", [random_clips(1)])
    path = folder / "shard-00000.safetensors"
    path.write_bytes(data)
    change(folder, lambda values: (values["codec"].update(num_codebooks=1), values["encoder"].update(dim=3)))
    rehash(folder, clips=2, frames=3)
    tokens = TokenSet(folder)
    starts = tokens.crop_starts(1)
    assert starts is not None
    starts[:] = 7  # a private copy
    assert [tokens.crop_starts(i).tolist() for i in range(2)] == [[0], [0, 1]]  # type: ignore[union-attr]
    assert [tokens.score(i) for i in range(2)] == [0.5, 0.25]
    assert (tokens.licence(1), tokens.source(1)) == ("CC0", "a book")
    assert [tokens.codes(i).tolist() for i in range(2)] == [[[5]], [[1023, 0]]]


def test_returns_private_copies(folder: Path) -> None:
    """Writing to what was returned changes no later answer, in memory or on the disk."""
    tokens = open_tokens(folder)
    codes, prompt = tokens.codes(0).copy(), tokens.prompt(0).clone()
    tokens.codes(0)[:] = 7
    tokens.prompt(0).zero_()
    np.testing.assert_array_equal(tokens.codes(0), codes)
    assert torch.equal(tokens.prompt(0), prompt)


def test_stays_mapped_when_replaced(copy: Path) -> None:
    """A set replaced while it is read still gives what was opened."""
    tokens = open_tokens(copy)
    wanted = [tokens.codes(i).copy() for i in range(len(tokens))]
    shutil.rmtree(copy)
    for i, codes in enumerate(wanted):
        np.testing.assert_array_equal(tokens.codes(i), codes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 99), (1, 1), (1, 0)])
def test_frames_that_are_not_there(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(InputError, match="frames"):
        open_tokens(folder).codes(0, start, stop)


def test_reserve(tmp_path: Path) -> None:
    """The clips with the highest scores are set aside, and only opened when asked for."""
    clips = random_clips(6)
    for clip, score in zip(clips, (0.4, 0.9, 0.5, 0.9, 0.6, 0.41), strict=True):
        clip.score = score
    folder = write_tokens(tmp_path / "tokens", [clips[:2], clips[2:]], reserve=2)
    kept, reserve = open_tokens(folder), open_tokens(folder, reserve=True)
    assert [reserve.clip_id(i) for i in range(len(reserve))] == [clips[1].id, clips[3].id]
    assert [kept.clip_id(i) for i in range(len(kept))] == [clips[i].id for i in (0, 2, 4, 5)]
    np.testing.assert_array_equal(kept.codes(1), clips[2].codes.T)
    with pytest.raises(DataError, match="has no clips outside its reserve"):
        open_tokens(write_tokens(tmp_path / "all", [clips], reserve=6))
    with pytest.raises(DataError, match="has no reserve"):
        open_tokens(write_tokens(tmp_path / "none", [clips]), reserve=True)


def test_split_holds_and_keeps_recordings_together(tmp_path: Path) -> None:
    """Sides follow the ids alone, in about the asked proportion, and pieces of a recording stay together."""
    prompt = [np.zeros((1, 8))]
    clips = [Clip(f"r{i // 2}#{i % 2}", np.zeros((1, 12)), ["x"], prompt) for i in range(1000)]
    tokens = open_tokens(write_tokens(tmp_path / "a", [clips]))
    train, validation = split(tokens, 0.1)
    assert sorted([*train, *validation]) == list(range(1000)) and 60 <= len(validation) <= 140
    assert {i // 2 for i in train}.isdisjoint(i // 2 for i in validation)
    names = {clips[i].id for i in validation}
    fewer = open_tokens(write_tokens(tmp_path / "b", [clips[300:]]))
    assert {fewer.clip_id(i) for i in split(fewer, 0.1)[1]} == names & {clip.id for clip in clips[300:]}
    bucket = int(hashlib.sha256(b"r0").hexdigest(), 16) % 1000
    assert (0 in split(tokens, (bucket + 1) / 1000)[1]) and 0 not in split(tokens, bucket / 1000)[1]
    assert not len(split(tokens, 0.0)[1])
    with pytest.raises(InputError, match="val_fraction"):
        split(tokens, 1.0)


def test_other_codec_and_encoder(folder: Path) -> None:
    tokens = open_tokens(folder)
    check_codec(tokens, FakeCodec())
    check_encoder(tokens, FakeEncoder())
    with pytest.raises(DataError, match=r"another codec .*other sha256.*tokenize again"):
        check_codec(tokens, FakeCodec("other"))
    smaller = FakeCodec()
    smaller.codebook_size = 512
    with pytest.raises(DataError, match="12 codebooks of 1024, the codec has 12 codebooks of 512"):
        check_codec(tokens, smaller)
    for encoder in (FakeEncoder("other"), FakeEncoder(dim=4)):
        with pytest.raises(DataError, match="another encoder"):
            check_encoder(tokens, encoder)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def rehash(folder: Path, **entry: Any) -> None:
    """Make the first shard's hash right again, and other fields of its entry as given."""
    data = (folder / "shard-00000.safetensors").read_bytes()

    def edit(values: dict[str, Any]) -> None:
        values["shards"][0].update(entry, sha256=hashlib.sha256(data).hexdigest())
        values.update({name: sum(shard[name] for shard in values["shards"]) for name in ("clips", "frames")})

    change(folder, edit)


@given(where=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(folder: Path, tmp_path_factory: pytest.TempPathFactory, where: int, bit: int) -> None:
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("flip") / "copy"))
    path = copy / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00002.safetensors is damaged, cut off or was altered"):
        open_tokens(copy)


@pytest.mark.parametrize("keep", [0, 1, 7, 100, -1])
def test_cut_off_shard(copy: Path, keep: int) -> None:
    path = copy / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged, cut off"):
        open_tokens(copy)


def test_missing_shard(copy: Path) -> None:
    (copy / "shard-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00001.safetensors is missing"):
        open_tokens(copy)


HOSTILE: list[tuple[str, Callable[[dict[str, np.ndarray]], object]]] = [
    ("outside 0..1023", lambda t: t["codes"].__setitem__((0, 0), 1024)),
    ("outside 0..1023", lambda t: t["codes"].__setitem__((0, 0), -1)),
    ("codes have type int32", lambda t: t.update(codes=t["codes"].astype(np.int32))),
    ("codes have", lambda t: t.update(codes=t["codes"][:, :11].copy())),
    ("offsets do not rise", lambda t: t["offsets"].__setitem__(-1, t["offsets"][-1] + 1)),
    ("offsets do not rise", lambda t: t["offsets"].__setitem__(1, -1)),
    ("offsets must be", lambda t: t.update(offsets=t["offsets"].astype(np.int32))),
    ("prompts have", lambda t: t.update(prompts=t["prompts"].astype(np.float32))),
    ("offsets do not rise", lambda t: t["prompt_offsets"].__setitem__(-1, 10**15)),
    ("no shard", lambda t: t.update(more=t["offsets"])),
    ("no shard", lambda t: t.pop("prompts")),
    ("no shard", lambda t: t.update(crop_starts=t["offsets"])),
    ("crop starts after", lambda t: t.update(crop_starts=np.array([0, 9, 0, 0, 0]), crop_offsets=np.arange(6))),
    ("do not fit", lambda t: t.update(crop_starts=np.array([0, -1, 0, 0, 0]), crop_offsets=np.arange(6))),
    ("do not fit", lambda t: t.update(crop_starts=np.array([0, 0]), crop_offsets=np.arange(3))),
    ("", lambda t: t.update(description=np.frombuffer(b"[" * 5000, np.uint8))),
    ("'captions'", lambda t: t.update(description=np.frombuffer(b"{}", np.uint8))),
    ("differ in number", lambda t: describe(t, lambda d: d["clips"].pop())),
    ("differ in number", lambda t: describe(t, lambda d: d["captions"].pop())),
    ("captions that are not there", lambda t: describe(t, lambda d: d["clips"][0].update(captions=[99]))),
    ("captions that are not there", lambda t: describe(t, lambda d: d["clips"][0].update(captions=[-1]))),
    ("no captions", lambda t: describe(t, lambda d: d["clips"][0].update(captions=[]))),
    ("not a string", lambda t: describe(t, lambda d: d["clips"][0].update(label=3))),
    ("not a string", lambda t: describe(t, lambda d: d["captions"].__setitem__(0, None))),
    ("not an object", lambda t: describe(t, lambda d: d["clips"].__setitem__(0, 3))),
]


def describe(tensors: dict[str, np.ndarray], edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(tensors["description"].tobytes())
    edit(values)
    tensors["description"] = np.frombuffer(json.dumps(values).encode(), np.uint8)


@pytest.mark.parametrize(("message", "edit"), HOSTILE)
def test_hostile_shard(copy: Path, message: str, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """A shard with the right hash and the wrong contents is refused as well."""
    path = copy / "shard-00000.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))
    rehash(copy)
    with pytest.raises(DataError, match=rf"shard-00000.safetensors .*{message}"):
        open_tokens(copy)


def test_prompt_with_nan(copy: Path) -> None:
    """Prompts may be many gigabytes: their values are checked when they are read."""
    path = copy / "shard-00000.safetensors"
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load(path.read_bytes()).items()}
    tensors["prompts"][0, 0] = np.nan
    path.write_bytes(safetensors.numpy.save(tensors))
    rehash(copy)
    with pytest.raises(DataError, match="'sound 0' holds NaN"):
        open_tokens(copy).prompt(0)


MANIFESTS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("kind must be", lambda m: m.update(kind="other")),
    ("format_version must be 1, not 2", lambda m: m.update(format_version=2)),
    ("codec must be an object", lambda m: m.update(codec=[])),
    ("codec must be an object", lambda m: m["codec"].pop("identity")),
    (r"codec.num_codebooks must be", lambda m: m["codec"].update(num_codebooks=10**9)),
    (r"codec.codebook_size must be", lambda m: m["codec"].update(codebook_size=True)),
    (r"encoder.dim must be", lambda m: m["encoder"].update(dim="8")),
    ("shards must be a list", lambda m: m.update(shards={})),
    ("token set is empty", lambda m: m.update(shards=[], clips=0, frames=0)),
    (r"shards\[1\] must be an object", lambda m: m["shards"].__setitem__(1, "x")),
    (r"shards\[0\].file must be", lambda m: m["shards"][0].update(file="../shard.safetensors")),
    (r"shards\[0\].file must be", lambda m: m["shards"][0].update(file="/tmp/shard.safetensors")),
    (r"shards\[0\].file must be", lambda m: m["shards"][0].update(file="shard.pt")),
    (r"shards\[0\].sha256 must be", lambda m: m["shards"][0].update(sha256="0")),
    (r"shards\[0\].clips must be", lambda m: m["shards"][0].update(clips=-1)),
    ("a shard appears twice", lambda m: m["shards"].append(m["shards"][0])),
    ("clips is not the sum", lambda m: m.update(clips=99)),
    ("does not hold the clips and frames", lambda m: (m["shards"][0].update(clips=6), m.update(clips=10))),
    ("reserve must be", lambda m: m.update(reserve=[3])),
    ("dropped must hold", lambda m: m.update(dropped={"unreadable": "many"})),
]


@pytest.mark.parametrize(("message", "edit"), MANIFESTS)
def test_hostile_manifest(copy: Path, message: str, edit: Callable[[dict[str, Any]], object]) -> None:
    change(copy, edit)
    with pytest.raises(DataError, match=message) as caught:
        open_tokens(copy)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"kind": NaN}'])
def test_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json"):
        open_tokens(copy)


def test_link_out_of_the_folder(copy: Path, folder: Path) -> None:
    (copy / "shard-00000.safetensors").unlink()
    (copy / "shard-00000.safetensors").symlink_to(folder / "shard-00000.safetensors")
    with pytest.raises(DataError, match="leaves the folder"):
        open_tokens(copy)


def test_no_token_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no token set"):
        open_tokens(tmp_path / "nothing")
    with pytest.raises(DataError, match="is this a token set"):
        open_tokens(tmp_path)
