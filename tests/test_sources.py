"""Clip folders and the layouts of published data sets: what becomes a clip, and which lists are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siren.data.clips import CLIPS, DROPPED, ClipRecord, read_clip_folder
from siren.data.sources import LAYOUTS, import_clips, read_records
from siren.errors import DataError, InputError, SirenError


def put(folder: Path, *names: str) -> None:
    """Short sound files, each with other samples."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(40, (i + 1) / 1000, np.float32), 8000)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_clip_folder(tmp_path: Path) -> None:
    """One caption or several, what may be missing, empty captions, blank lines, a byte-order mark, a missing sound."""
    put(tmp_path, "a.wav", "deep/b.flac")
    text = lines(
        {"id": "a", "audio": "a.wav", "caption": "  rain \n on tin ", "label": "rain", "licence": "CC0", "source": "x"},
        {"id": "b", "audio": "deep/b.flac", "caption": ["one", " ", "two", "one"], "label": None},
        {"id": 3, "audio": "gone.wav", "caption": "", "licence": ""},
        {"id": "d", "audio": "a.wav"},
    )
    write(tmp_path / CLIPS, "\ufeff" + text.replace("\n", "\n\n", 1))
    assert read_clip_folder(str(tmp_path)) == [
        ClipRecord("a", tmp_path / "a.wav", ("rain on tin",), "rain", "CC0", "x"),
        ClipRecord("b", tmp_path / "deep/b.flac", ("one", "two")),
        ClipRecord("3", tmp_path / "gone.wav", ()),
        ClipRecord("d", tmp_path / "a.wav", ()),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON object"),
        ('{"id": "x"}', "audio must be a text"),
        ('{"audio": "a.wav"}', "id must be a text"),
        ('{"id": true, "audio": "a.wav"}', "id must be a text"),
        ('{"id": " ", "audio": "a.wav"}', "id must be a text"),
        ('{"id": "a\\nb", "audio": "a.wav"}', "printable"),
        (json.dumps({"id": "x" * 201, "audio": "a.wav"}), "at most 200"),
        ('{"id": "\\ud800", "audio": "a.wav"}', "not valid Unicode"),
        ('{"id": "x", "audio": "a.wav", "captions": "rain"}', "unknown key 'captions'"),
        ('{"id": "x", "audio": "a.wav", "caption": {"en": "rain"}}', "caption must be a text"),
        ('{"id": "x", "audio": "a.wav", "caption": ["rain", 1.5]}', "caption must be a text"),
        ('{"id": "x", "audio": "../a.wav"}', "not a path inside"),
        ('{"id": "x", "audio": "deep/../../a.wav"}', "not a path inside"),
        ('{"id": "x", "audio": "/etc/passwd"}', "not a path inside"),
        ('{"id": "x", "audio": "."}', "not a path inside"),
        ('{"id": "x", "audio": "a\\u0000.wav"}', "not a path inside"),
        ('{"id": "first", "audio": "a.wav"}', "taken by .*line 1"),
        (json.dumps({"id": "x", "audio": "a.wav", "caption": "rain" * 300_000}), "longer than"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / CLIPS, '{"id": "first", "audio": "a.wav"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        read_clip_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3") and len(message) < 500 and "\n" not in message


def test_a_folder_that_is_no_clip_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"no clip folder: it has no clips.jsonl"):
            read_clip_folder(folder)
    write(tmp_path / CLIPS, "\n")
    with pytest.raises(DataError, match="lists no clips"):
        read_clip_folder(tmp_path)
    (tmp_path / CLIPS).write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        read_clip_folder(tmp_path)


@settings(
    derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.binary(max_size=80)
    | st.fixed_dictionaries(
        dict.fromkeys(("id", "audio", "caption"), st.none() | st.text("a/. \n\0é\ud800", max_size=6))
    )
)
def test_any_bytes_give_clips_or_a_data_error(tmp_path: Path, values: bytes | dict[str, object]) -> None:
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    (tmp_path / CLIPS).write_bytes(data)
    try:
        (record,) = read_clip_folder(tmp_path)
    except DataError:
        return
    assert record.path.is_relative_to(tmp_path) and ".." not in record.path.parts


def test_folder_layout(tmp_path: Path) -> None:
    """Sounds at any depth in the order of their names; words of file or folder names; like names numbered."""
    put(tmp_path, "DogBark_02-far.wav", "rain/0001.ogg", "rain/heavy.flac", "rain/heavy.wav", "rain/heavy-2.wav")
    put(tmp_path, ".hidden/x.wav", "rain/._heavy.wav")
    write(tmp_path / "rain/notes.txt", "no sound")
    records = read_records(tmp_path, "folder", licence="CC0")
    assert [(r.id, r.captions, r.label) for r in records] == [
        ("DogBark_02-far", ("dog bark far",), None),
        ("rain/0001", ("rain",), "rain"),
        ("rain/heavy-2", ("heavy",), "rain"),
        ("rain/heavy", ("heavy",), "rain"),
        ("rain/heavy-3", ("heavy",), "rain"),
    ]
    assert {r.licence for r in records} == {"CC0"} and all(r.path.is_file() for r in records)
    named = [r.captions for r in read_records(tmp_path, "folder", weak_captions="folder")]
    assert named == [(), ("rain",), ("rain",), ("rain",), ("rain",)]
    assert all(not r.captions for r in read_records(tmp_path, "folder", weak_captions="none"))


def test_csv_layout(tmp_path: Path) -> None:
    """Known column names, numbered captions, several rows of one sound, quotes, TSV, and columns of any name."""
    put(tmp_path, "x/a.wav", "x/b.wav", "x/a.flac")
    rows = 'file_name,caption_1,caption_2,license\nx/a.wav," rain, hard",drops,CC0\nx/b.wav,wind,,\nx/a.wav,drops,,\n'
    path = write(tmp_path / "list.csv", rows + ",,,\nx/a.flac,,,\nx/gone.wav,lost,,\n")
    wanted = [
        ClipRecord("x/a", tmp_path / "x/a.wav", ("rain, hard", "drops"), licence="CC0"),
        ClipRecord("x/b", tmp_path / "x/b.wav", ("wind",)),
        ClipRecord("x/a-2", tmp_path / "x/a.flac", ()),
        ClipRecord("x/gone", tmp_path / "x/gone.wav", ("lost",)),
    ]
    assert read_records(tmp_path, "csv") == wanted == read_records(path, "csv")
    write(tmp_path / "other.tsv", "name\tsays\tclip\tkind\na.wav\train\t7\tweather\n")
    columns = {"audio": "name", "caption": "says", "id": "clip", "label": "kind"}
    records = read_records(tmp_path / "other.tsv", "csv", audio=tmp_path / "x", columns=columns)
    assert records == [ClipRecord("7", tmp_path / "x/a.wav", ("rain",), "weather")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no clips"),
        ("audio,caption\n", "has no clips"),
        ("sound,caption\na.wav,x\n", "line 2 has no audio or file_name"),
        ("audio,caption\na.wav\n", "line 2 has 1 fields; there are 2"),
        ("audio,caption\na.wav,x,y\n", "line 2 has 3 fields"),
        ("audio,caption\n../a.wav,x\n", "line 2: '../a.wav' is not a path inside"),
        ("audio,caption\n,x\n", "line 2: audio must be a text"),
        ("id,audio\n1,a.wav\n1,b.wav\n", "line 3: the id '1' is taken by .*line 2"),
        ('audio,caption\na.wav,"x\n', "not valid CSV"),
        ("audio,caption\ngone.wav,x\n", "none of the 1 sounds"),
        ("audio,caption\na.wav,\udcff\n", "not UTF-8"),
        (f"audio,caption\na.wav,{'x' * 200_000}\n", "not valid CSV"),
    ],
)
def test_a_faulty_csv_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    put(tmp_path, "a.wav", "b.wav")
    (tmp_path / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=reason):
        read_records(tmp_path, "csv")


def test_jsonl_layout(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    text = lines({"path": "a.wav", "text": ["one", "two"], "seconds": 3}, {"path": "b.wav", "class": 4, "id": "bee"})
    write(tmp_path / "list.jsonl", text)
    assert read_records(tmp_path, "jsonl") == [
        ClipRecord("a", tmp_path / "a.wav", ("one", "two")),
        ClipRecord("bee", tmp_path / "b.wav", (), "4"),
    ]
    with pytest.raises(DataError, match=r"line 2 has no text; it has path, class, id"):
        read_records(tmp_path, "jsonl", columns={"caption": "text"})


def test_audiocaps_layout(tmp_path: Path) -> None:
    """A clip's five captions are rows; its sound goes by any of the names that downloaders give it."""
    put(tmp_path / "waves", "-abc_30.wav", "sub/Ydef.flac", "ghi_0_10000.ogg", "jkl.mp3")
    rows = "1,-abc,30,rain\n2,-abc,30,drops\n3,def,0,wind\n4,ghi,0,bell\n5,jkl,170,siren\n6,gone,10,nothing\n"
    path = write(tmp_path / "test.csv", "audiocap_id,youtube_id,start_time,caption\n" + rows)
    found = [(r.id, r.path.name, r.captions) for r in read_records(tmp_path, "audiocaps")]
    assert found == [
        ("-abc_30", "-abc_30.wav", ("rain", "drops")),
        ("def_0", "Ydef.flac", ("wind",)),
        ("ghi_0", "ghi_0_10000.ogg", ("bell",)),
        ("jkl_170", "jkl.mp3", ("siren",)),
        ("gone_10", "gone_10", ("nothing",)),
    ]
    write(tmp_path / "val.csv", "")
    with pytest.raises(DataError, match=r"several lists, pass one of them: test.csv, val.csv"):
        read_records(tmp_path, "audiocaps")
    assert len(read_records(path, "audiocaps", audio=tmp_path / "waves")) == 5
    put(tmp_path / "copy", "jkl.wav")
    with pytest.raises(DataError, match=r"line 6: 'jkl' may be copy/jkl.wav or waves/jkl.mp3"):
        read_records(path, "audiocaps")
    for row, reason in (("1,a,soon,x", "'soon' is not a start"), ("1,../a,3,x", "not a path inside")):
        write(path, f"audiocap_id,youtube_id,start_time,caption\n{row}\n")
        with pytest.raises(DataError, match=reason):
            read_records(path, "audiocaps")
    write(path, "youtube_id,caption\na,b\n")
    with pytest.raises(DataError, match="has no column 'start_time'; it has youtube_id, caption"):
        read_records(path, "audiocaps")


def test_clotho_layout(tmp_path: Path) -> None:
    put(tmp_path / "development", "Rain, 1.wav", "b.wav")
    header = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6))
    write(tmp_path / "clotho_captions_development.csv", f'{header}\n"Rain, 1.wav",a,b,c,d,e\nb.wav,a,a,,c,d\n')
    write(tmp_path / "clotho_metadata_development.csv", "file_name,keywords\n")
    records = read_records(tmp_path, "clotho")
    assert [(r.id, r.captions, r.source) for r in records] == [
        ("development/Rain, 1", ("a", "b", "c", "d", "e"), "Clotho"),
        ("development/b", ("a", "c", "d"), "Clotho"),
    ]
    assert all(r.path.is_file() for r in records)


def test_esc50_layout(tmp_path: Path) -> None:
    """Classes are captions; folds; the licence of the ESC-10 part differs."""
    put(tmp_path / "audio", "1-100032-A-0.wav", "2-1-A-12.wav")
    header = "filename,fold,target,category,esc10,src_file,take\n"
    rows = "1-100032-A-0.wav,1,0,dog,True,100032,A\n2-1-A-12.wav,2,12,crackling_fire,False,1,A\n"
    path = write(tmp_path / "meta/esc50.csv", header + rows)
    dog, fire = read_records(tmp_path, "esc50")
    assert (dog.id, dog.captions, dog.label, dog.licence) == ("1-100032-A-0", ("dog",), "dog", "CC BY 3.0")
    assert (fire.captions, fire.label, fire.licence) == (("crackling fire",), "crackling fire", "CC BY-NC 3.0")
    assert read_records(path, "esc50", split=2) == [fire]
    assert read_records(path, "esc50", split="1", weak_captions="none")[0].captions == ()
    with pytest.raises(DataError, match="has no clips of the split 6"):
        read_records(path, "esc50", split=6)


def test_vggsound_layout(tmp_path: Path) -> None:
    """The list has no header; labels may hold commas; files are named by the start in six digits, or by the video."""
    put(tmp_path / "audio", "-a_000030.wav", "b.flac")
    write(tmp_path / "vggsound.csv", '-a,30,"playing drums, fast",train\nb,1,rain,test\nc,2,wind,test\n')
    records = read_records(tmp_path, "vggsound")
    assert [(r.id, r.path.name, r.captions, r.label) for r in records] == [
        ("-a_000030", "-a_000030.wav", ("playing drums, fast",), "playing drums, fast"),
        ("b_000001", "b.flac", ("rain",), "rain"),
        ("c_000002", "c_000002", ("wind",), "wind"),
    ]
    assert read_records(tmp_path, "vggsound", split="train") == records[:1]
    assert not read_records(tmp_path, "vggsound", weak_captions="none")[0].captions


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    for options, reason in (
        ({"layout": "zip"}, "layout must be one of folder, csv"),
        ({"layout": "folder", "weak_captions": "all"}, "weak_captions must be one of file"),
        ({"layout": "folder", "columns": {"audio": "x"}}, "columns are for csv and jsonl"),
        ({"layout": "csv", "columns": {"sound": "x"}}, "name some of audio, caption"),
        ({"layout": "folder", "split": 1}, "the layout folder has no split"),
    ):
        with pytest.raises(InputError, match=reason):
            read_records(tmp_path, **options)  # type: ignore[arg-type]
    for layout in LAYOUTS:
        with pytest.raises(DataError, match="there is no"):
            read_records(tmp_path / "nothing", layout)
    for layout in LAYOUTS[1:]:
        with pytest.raises(DataError, match=r"where the layout \w+ has its list"):
            read_records(tmp_path, layout)
    with pytest.raises(DataError, match="there is no folder"):
        read_records(tmp_path / "a.wav", "folder")
    with pytest.raises(DataError, match=r"there is no folder .*gone to find the sounds in"):
        read_records(tmp_path, "folder", audio=tmp_path / "gone")
    with pytest.raises(DataError, match="has no clips"):
        read_records(tmp_path, "folder", audio=write(tmp_path / "empty/x.txt", "").parent)


@pytest.mark.parametrize("link", [False, True])
def test_import_makes_a_clip_folder(tmp_path: Path, link: bool) -> None:
    """What is read back is what was imported; missing sounds are counted and listed; a second run is refused."""
    put(tmp_path / "in", "x/a.wav", "b.wav", "c.wav")
    (tmp_path / "in/link.wav").symlink_to(tmp_path / "in/b.wav")  # links are followed: their owner made them
    rows = "audio,caption,license\nx/a.wav,rain,CC0\ngone.wav,wind,\nb.wav,,\nlink.wav,bell,\n"
    write(tmp_path / "in/list.csv", rows)
    done = import_clips(tmp_path / "in", tmp_path / "out", "csv", link=link, licence="CC BY 4.0")
    assert (done.clips, done.without_caption, done.missing) == (3, 1, ("gone",))
    assert str(done) == "3 clips (1 without caption), 1 sounds missing"
    out = tmp_path / "out"
    assert read_clip_folder(out) == [
        ClipRecord("x/a", out / "audio/x/a.wav", ("rain",), licence="CC0"),
        ClipRecord("b", out / "audio/b.wav", (), licence="CC BY 4.0"),
        ClipRecord("link", out / "audio/link.wav", ("bell",), licence="CC BY 4.0"),
    ]
    for name, origin in (("x/a.wav", "x/a.wav"), ("b.wav", "b.wav"), ("link.wav", "b.wav")):
        assert (out / "audio" / name).read_bytes() == (tmp_path / "in" / origin).read_bytes()
        assert (out / "audio" / name).samefile(tmp_path / "in" / origin) == link
    assert json.loads((out / DROPPED).read_text()) == {"id": "gone", "reason": "missing", "detail": "audio/gone.wav"}
    with pytest.raises(InputError, match="holds clips already"):
        import_clips(tmp_path / "in", out, "csv")
    assert not list(out.rglob(".siren-*"))


def test_an_import_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is one clear error, without a clips.jsonl and without half a file; the next run copies the rest."""
    put(tmp_path / "in", "a.wav", "b.wav", "c.wav")
    copied: list[str] = []
    copy = shutil.copyfileobj

    def full_after_one(source: BinaryIO, target: BinaryIO) -> None:
        copied.append(Path(source.name).name)
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr("siren.data.clips.shutil.copyfileobj", full_after_one)
    with pytest.raises(SirenError, match=r"cannot write .*b.wav: No space left on device"):
        import_clips(tmp_path / "in", tmp_path / "out", "folder")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["a.wav"]
    assert import_clips(tmp_path / "in", tmp_path / "out", "folder").clips == 3
    assert copied == ["a.wav", "b.wav", "b.wav", "c.wav"]


def test_what_is_no_file_is_listed(tmp_path: Path) -> None:
    """A pipe is not waited for, and a name may be longer than any file's."""
    put(tmp_path / "in", "a.wav")
    os.mkfifo(tmp_path / "in/pipe.wav")
    write(tmp_path / "in/list.csv", f"id,audio\nlong,{'x' * 300}\npipe,pipe.wav\ngood,a.wav\n")
    done = import_clips(tmp_path / "in", tmp_path / "out", "csv")
    assert (done.clips, done.missing) == (1, ("long", "pipe"))


def test_an_import_into_the_sounds_it_searches_is_refused(tmp_path: Path) -> None:
    """Copies of a run that was stopped would be taken for sounds of the data set. A list names its sounds."""
    put(tmp_path / "in", "a.wav")
    for out in (tmp_path / "in", tmp_path / "in/out"):
        with pytest.raises(InputError, match="is searched for sounds at any depth; choose a folder beside it"):
            import_clips(tmp_path / "in", out, "folder")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.wav"]
    write(tmp_path / "in/list.csv", "audio\na.wav\n")
    assert import_clips(tmp_path / "in", tmp_path / "in/out", "csv").clips == 1


def test_names_that_are_not_utf8_are_listed(tmp_path: Path) -> None:
    """Such a file can be read as a clip, but not be named in a clip folder."""
    put(tmp_path / "in", "a.wav", f"{'long' * 50}.wav")
    (tmp_path / "in/a.wav").rename(tmp_path / "in" / os.fsdecode(b"ra\xfcn.wav"))
    put(tmp_path / "in", "a.wav")
    assert [len(record.id) for record in read_records(tmp_path / "in", "folder")] == [1, 177, 4]
    done = import_clips(tmp_path / "in", tmp_path / "out", "folder")
    assert (done.clips, done.missing) == (2, ("ra_n",))
    listed = json.loads((tmp_path / "out" / DROPPED).read_text())
    assert listed == {"id": "ra_n", "reason": "name is not UTF-8", "detail": "audio/ra\\udcfcn.wav"}
