"""The official JSONL + NPZ format: read as the published code writes it, and nothing hostile is unpacked or run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_data import FakeCodec, FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from siren.data import check_codec, check_encoder, open_tokens, split
from siren.data.official import OfficialTokens
from siren.errors import DataError, InputError


def arrays(frames: int, seed: int = 0, **changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1024, (12, frames))
    return {"codes": codes, "prompt_embeddings": rng.standard_normal((3, 8)).astype(np.float32)} | changed


def write(folder: Path, clips: list[dict[str, np.ndarray]], save: Callable[..., object] = np.savez) -> Path:
    """A data set of these clips, one NPZ each."""
    (folder / "npz").mkdir(parents=True)
    lines = []
    for i, clip in enumerate(clips):
        save(folder / "npz" / f"{i}.npz", **clip)
        lines.append(json.dumps({"id": f"clip-{i}", "npz": f"npz/{i}.npz"}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [np.int16, np.int64, np.uint16])
def test_reads_what_was_written(tmp_path: Path, save: Callable[..., object], kind: type) -> None:
    clips = [arrays(frames, frames) for frames in (1, 7, 20)]
    for clip in clips:
        clip["codes"] = clip["codes"].astype(kind)
    tokens = open_tokens(write(tmp_path / "set", clips, save))
    assert isinstance(tokens, OfficialTokens)
    assert len(tokens) == 3 and tokens.frames.tolist() == [1, 7, 20]
    assert (tokens.num_codebooks, tokens.codebook_size, tokens.prompt_dim) == (12, 1024, 8)
    for i, clip in enumerate(clips):
        assert tokens.codes(i).dtype == np.int16
        np.testing.assert_array_equal(tokens.codes(i), clip["codes"])
        np.testing.assert_array_equal(tokens.codes(i, 0, 1), clip["codes"][:, :1])
        assert torch.equal(tokens.prompt(i), torch.from_numpy(clip["prompt_embeddings"]))
        assert tokens.clip_id(i) == f"clip-{i}"
        assert tokens.captions(i) is None and tokens.label(i) is None and tokens.crop_starts(i) is None
    train, validation = split(tokens, 0.5)
    assert sorted([*train, *validation]) == [0, 1, 2]


def test_keys_and_types_of_its_own(tmp_path: Path) -> None:
    """Keys named in the line, half precision, Fortran order, and keys of other programs."""
    path = write(tmp_path / "set", [])
    codes = np.asfortranarray(np.arange(24).reshape(12, 2))
    np.savez(tmp_path / "set" / "npz" / "x.npz", q=codes, p=np.ones((2, 4), np.float16), other=np.ones(3))
    line = {"id": 7, "npz": "npz/x.npz", "codes_key": "q", "prompt_key": "p", "duration": 0.04}
    path.write_text(json.dumps(line) + "\n\n")
    tokens = open_tokens(path)
    np.testing.assert_array_equal(tokens.codes(0), codes)
    assert tokens.prompt(0).dtype == torch.float32 and tokens.prompt(0).shape == (2, 4) and tokens.clip_id(0) == "7"


def test_names_no_codec(tmp_path: Path) -> None:
    """Only sizes can be compared."""
    tokens = open_tokens(write(tmp_path / "set", [arrays(2)]))
    check_codec(tokens, FakeCodec("any"))
    check_encoder(tokens, FakeEncoder("any"))
    other = FakeCodec()
    other.num_codebooks = 4
    with pytest.raises(DataError, match="tokenize again"):
        check_codec(tokens, other)
    with pytest.raises(DataError, match="width 4"):
        check_encoder(tokens, FakeEncoder(dim=4))


def test_out_of_range(tmp_path: Path) -> None:
    tokens = open_tokens(write(tmp_path / "set", [arrays(3)]))
    with pytest.raises(InputError, match="3 frames"):
        tokens.codes(0, 2, 4)
    with pytest.raises(InputError, match="variant 1"):
        tokens.prompt(0, 1)
    with pytest.raises(InputError, match="no reserve"):
        open_tokens(tokens.path, reserve=True)


BAD_ARRAYS: list[tuple[str, dict[str, np.ndarray]]] = [
    ("codes must be whole numbers", {"codes": np.zeros((12, 3))}),
    ("codes must be whole numbers", {"codes": np.zeros((12, 0), int)}),
    ("codes must be whole numbers", {"codes": np.zeros(12, int)}),
    ("codes must be whole numbers", {"codes": np.zeros((65, 1), int)}),
    ("Python objects", {"codes": np.array([[None]])}),
    ("Python objects", {"prompt_embeddings": np.array([[{}]])}),
    ("prompt_embeddings must be floats", {"prompt_embeddings": np.zeros((0, 8))}),
    ("prompt_embeddings must be floats", {"prompt_embeddings": np.zeros((3, 8), int)}),
    ("prompt_embeddings must be floats", {"prompt_embeddings": np.zeros((3, 8, 1))}),
    ("of different models", {"codes": np.zeros((11, 3), int)}),
    ("of different models", {"prompt_embeddings": np.zeros((3, 9))}),
]


@pytest.mark.parametrize(("message", "changed"), BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, message: str, changed: dict[str, np.ndarray]) -> None:
    """Refused when the set is opened, by the name of the file."""
    path = write(tmp_path / "set", [arrays(2), arrays(2, **changed)])
    with pytest.raises(DataError, match=rf"npz/1.npz.*{message}"):
        open_tokens(path)


@pytest.mark.parametrize("code", [-1, 1024, 1 << 40])
def test_codes_out_of_range(tmp_path: Path, code: int) -> None:
    codes = np.zeros((12, 3), int)
    codes[11, 2] = code
    tokens = open_tokens(write(tmp_path / "set", [arrays(3, codes=codes)]))
    with pytest.raises(DataError, match=r"npz/0.npz: codes must be within 0..1023"):
        tokens.codes(0, 0, 1)


def test_prompt_with_infinity(tmp_path: Path) -> None:
    tokens = open_tokens(write(tmp_path / "set", [arrays(3, prompt_embeddings=np.full((1, 8), np.inf))]))
    with pytest.raises(DataError, match="NaN or infinity"):
        tokens.prompt(0)


def test_never_unpickles(tmp_path: Path) -> None:
    """A member that is a pickle is not run."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    path = write(tmp_path / "set", [arrays(2)])
    with zipfile.ZipFile(tmp_path / "set/npz/0.npz", "w") as archive:
        archive.writestr("codes.npy", pickle.dumps(Trap()))
        archive.writestr("prompt_embeddings.npy", pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"npz/0.npz"):
        open_tokens(path)
    assert not (tmp_path / "run").exists()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(12, 1 << 30), (1 << 62, 1 << 62)])
def test_zip_bomb(tmp_path: Path, shape: tuple[int, int]) -> None:
    """A few kilobytes that would unpack to gigabytes are refused by their header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    path = write(tmp_path / "set", [arrays(2)])
    with zipfile.ZipFile(tmp_path / "set/npz/0.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", header.getvalue() + bytes(4 << 20))
        archive.writestr("prompt_embeddings.npy", npy(np.ones((3, 8))))
    with pytest.raises(DataError, match="cut off or too long"):
        open_tokens(path)


def test_replaced_after_opening(tmp_path: Path) -> None:
    """A file that changes while it is used gives an error, not other codes."""
    path = write(tmp_path / "set", [arrays(3)])
    tokens = open_tokens(path)
    np.savez(tmp_path / "set/npz/0.npz", **arrays(4))
    with pytest.raises(DataError, match="changed"):
        tokens.codes(0)
    np.savez(tmp_path / "set/npz/0.npz", **arrays(3, prompt_embeddings=np.ones((3, 5))))
    with pytest.raises(DataError, match="changed"):
        tokens.prompt(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "npz": "../0.npz"}', "not a path inside"),
        ('{"id": "a", "npz": "/etc/passwd"}', "not a path inside"),
        ('{"id": "a"}', "npz must be a text"),
        ('{"npz": "npz/0.npz"}', "id must be a text"),
        ('{"id": "a", "npz": "npz/9.npz"}', "cannot be read"),
        ('{"id": "a", "npz": "npz/0.npz", "codes_key": "none"}', r"cannot be read.*none.npy"),
        ('{"id": "a", "npz": "npz/0.npz", "codes_key": 1.5}', "codes_key must be a text"),
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("", "lists no clips"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "set", [arrays(2)])
    path.write_text(line)
    with pytest.raises(DataError, match=message) as caught:
        open_tokens(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("official") / "set", [arrays(4)], np.savez_compressed)


@given(data=st.data())
def test_damaged_archives(archive: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is flipped or cut off: the right arrays, or a DataError."""
    whole = (archive.parent / "npz/0.npz").read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for where in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        if where < len(damaged):
            damaged[where] ^= data.draw(st.integers(1, 255))
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder / "set", [arrays(4)])
    (folder / "set/npz/0.npz").write_bytes(damaged)
    wanted = arrays(4)
    try:
        tokens = open_tokens(path)
        codes, prompt = tokens.codes(0), tokens.prompt(0).numpy()
    except DataError:
        return
    np.testing.assert_array_equal(codes, wanted["codes"])
    np.testing.assert_array_equal(prompt, wanted["prompt_embeddings"])
