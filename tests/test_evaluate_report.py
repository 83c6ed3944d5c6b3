"""The page of an evaluation: sound HTML that loads nothing, reads nothing of a file as HTML and is of bounded size."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import re
import struct
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from siren.errors import DataError
from siren.evaluate.report import report_html
from siren.evaluate.report_plots import histogram, interval_plot, scatter
from siren.evaluate.report_sounds import MAX_CLIPS, choose_clips, load_sound
from siren.evaluate.report_text import decimals, hashes, number

RATE = 16000
HASH = "0123456789abcdef" * 4
NASTY = '<script>alert(1)</script><b onclick="x">\' " & \ud800\x00 https://example.org/'
VOID = {"meta", "img", "br", "link", "input", "hr", "source"}
numbers = st.floats(-1e12, 1e12)


class Page(HTMLParser):
    """All elements with their attributes, and their text; asserts that tags are closed in the order of opening."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("style", "script"))


def figure(metric: str, embedding: str, value: float | None, **more: Any) -> dict[str, Any]:
    made = {"metric": metric, "embedding": embedding, "label": f"{metric} ({embedding})", "value": value}
    made |= {
        "low": value and value * 0.9,
        "high": value and value * 1.2,
        "better": "lower" if metric == "KL" else "higher",
    }
    made |= {"identity": f"{embedding}-1 sha256:{HASH}", "sample_rate": 44100, "n": 98, "n_reference": None}
    return made | {"list": HASH, "reference_list": None, "bootstrap": 1000, "confidence": 0.95, "note": ""} | more


def side(**more: Any) -> dict[str, Any]:
    made = {"list": "clips/results.jsonl", "sha256": HASH, "clips": 100, "used": 98, "skipped": {"silent": 2}}
    return made | {"skips": [{"id": f"s{i}", "file": f"s{i}.wav", "reason": "silent"} for i in range(2)]} | more


def result(**more: Any) -> dict[str, Any]:
    figures = [figure("score", "aligner", 0.3112), figure("IS", "aisfx", 12.5), figure("KL", "aisfx", 1.234)]
    cloud = {"generated": [[0.0, 1.0], [2.0, 3.0], [math.nan, 0.0]], "reference": [[1.0, 1.0]] * 700}
    made = {"format": "siren-evaluation 1", "about": {"siren": "1.2.3", "date": "2026-01-02", "options": {"seed": 0}}}
    made |= {"generated": side(), "reference": side(sha256="f" * 64), "figures": figures, "seconds": 1.25}
    return made | {"scatter": {"aisfx": cloud}} | more


def write_clip(path: Path, seconds: float = 0.3, rate: int = RATE, channels: int = 1, seed: int = 0) -> Path:
    generator = np.random.Generator(np.random.Philox(seed))
    wave = generator.uniform(-0.5, 0.5, (round(seconds * rate), channels))
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


def make_clips(folder: Path, count: int) -> list[dict[str, Any]]:
    """Clips of one file, of which every fifth has no score."""
    write_clip(folder / "a.wav")
    scores = [{} if i % 5 == 4 else {"score (aligner)": i / 100, "KL (aisfx)": 2.0 - i / 100} for i in range(count)]
    return [{"id": f"c{i}", "file": "a.wav", "prompt": f"rain {i}", "scores": s} for i, s in enumerate(scores)]


def test_page_is_sound_and_accessible(tmp_path: Path) -> None:
    """Balanced tags, one h1 and no skipped level, scopes, alternatives, names; ids are unique and references hold."""
    page = Page(report_html(result(), make_clips(tmp_path, 7), tmp_path))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.all("th") and all(head.get("scope") in ("row", "col") for head in page.all("th"))
    assert all(image.get("alt") for image in page.all("img"))
    assert all(sound.get("aria-label") and "controls" in sound for sound in page.all("audio"))
    assert all(plot.get("aria-label") or plot.get("aria-hidden") for plot in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {
        value for _, attributes in page.tags for key in ("aria-labelledby", "for") if (value := attributes.get(key))
    } <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("audio")) == len(page.all("img")) == 7


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    """Lists, counts, reasons, hashes in whole as titles, options, and a figure that was made of another list."""
    page = report_html(result(figures=[figure("IS", "aisfx", 2.5, list="a" * 64, note="few clips")]), [], tmp_path)
    text = Page(page).text()
    for words in ("98 of 100 clips", "2 silent", "clips/results.jsonl", "0123456789ab…", "few clips", "1.2.3", "seed"):
        assert words in text, words
    assert "of another generated list" in text and f'title="{"a" * 64}"' in page
    assert HASH not in text and f'title="{HASH}"' in page
    assert "95 % from 1,000 bootstrap draws" in text and "2.25 to 3.00" in text


def test_embeddings_have_tables_of_their_own(tmp_path: Path) -> None:
    """Each model, and each version of one, has one table that holds its figures and no others."""
    figures = [figure("FD", "aisfx", 1.0), figure("FD", "cnn14", 2.0), figure("IS", "aisfx", 3.0)]
    figures.append(figure("FD", "aisfx", 4.0, identity="aisfx-2"))
    page = report_html(result(figures=figures), [], tmp_path)
    groups = re.findall(r'<section class="card group".*?</section>', page, re.DOTALL)
    assert [re.findall(r'<th scope="row">([^<]+)', group) for group in groups] == [
        ["FD (aisfx)", "IS (aisfx)"],
        ["FD (cnn14)"],
        ["FD (aisfx)"],
    ]
    assert all(group.count("<table") == 1 for group in groups)


def test_nothing_of_a_file_is_read_as_html(tmp_path: Path) -> None:
    """Markup, quotes, control characters and halves of characters in every string make no element and no attribute."""
    clip = {"id": NASTY, "file": NASTY, "prompt": NASTY, "scores": {NASTY: 1.0}, "skipped": NASTY}
    skips = [{"id": NASTY, "file": NASTY, "reason": NASTY, "detail": NASTY}]
    lists = side(list=NASTY, sha256=NASTY, skipped={NASTY: 1}, skips=skips)
    nasty = figure(NASTY, NASTY, 1.0, label=NASTY, identity=NASTY, note=NASTY, list=NASTY, better=NASTY)
    about = {"siren": NASTY, "date": NASTY, "options": {NASTY: [NASTY]}}
    cloud = {NASTY: {"generated": [[0, 1]], "reference": [[2, 3]]}}
    absent = [{"label": NASTY, "reason": NASTY}]
    changed = result(about=about, generated=lists, reference=lists, figures=[nasty], scatter=cloud, absent=absent)
    text = report_html(changed, [clip], tmp_path)
    text.encode()
    assert "\x00" not in text
    page = Page(text)
    plain = Page(report_html(result(), [], tmp_path))
    assert len(page.all("script")) == 1 and all(not attributes for attributes in page.all("b"))
    assert {name for _, attributes in page.tags for name in attributes} - {
        name for _, attributes in plain.tags for name in attributes
    } <= {"data-prompt", "data-s0", "dir", "id", "for", "hidden", "value"}
    assert page.text().count("<script>alert(1)</script>") > 15


def test_page_loads_nothing(tmp_path: Path) -> None:
    """No address, no link; sources are data; and the browser is told to load nothing and to run this script only."""
    text = report_html(result(), make_clips(tmp_path, 3), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"  // .*|base64,[^\"]*", "", text))
    page = Page(text)
    assert not page.all("link") and not page.all("a") and not page.all("iframe")
    for _, attributes in page.tags:
        assert str(attributes.get("src", "data:")).startswith("data:") and not {"href", "srcset"} & attributes.keys()
    script = next(text for tag, text in page.texts if tag == "script")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_page_is_the_same_each_time(tmp_path: Path) -> None:
    """The same results, also after a detour through JSON and as an iterator, and the same files: the same bytes."""
    clips, made = make_clips(tmp_path, 5), result(scatter={})
    again = report_html(json.loads(json.dumps(made)), iter(clips), tmp_path)
    assert report_html(made, clips, tmp_path) == again


def test_sound_in_the_page_is_that_of_the_file(tmp_path: Path) -> None:
    """The first 10 s, sample by sample; stereo is averaged; what is longer is said to be cut; absolute paths work."""
    path = write_clip(tmp_path / "long.wav", seconds=10.5, channels=2)
    page = Page(report_html(result(), [{"id": "x", "file": str(path), "prompt": ""}], Path("elsewhere")))
    source = page.all("audio")[0]["src"]
    assert source is not None
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    original = soundfile.read(path)[0].mean(axis=1)[: 10 * RATE]
    assert rate == RATE and wave.shape == original.shape
    assert np.abs(wave - original).max() <= 2.0**-15  # one step of 16 bits
    assert "the first 10.0 of 10.5 s" in page.text() and "2 channels mixed to one" in page.text()


def test_spectrogram_is_a_png_with_high_notes_on_top(tmp_path: Path) -> None:
    """Chunks have their checksums, and a note of 7000 of 8000 Hz is bright in the top tenth and nowhere else."""
    time = np.arange(RATE) / RATE
    soundfile.write(tmp_path / "note.wav", 0.5 * np.sin(2 * np.pi * 7000 * time), RATE)
    data = base64.b64decode(load_sound(tmp_path / "note.wav", 1).picture.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any() and len(chunks[b"PLTE"]) == 3 * 256
    loud = np.flatnonzero(np.median(rows[:, 1:], axis=1) > 200)
    assert len(loud) and loud.max() < height / 10


def test_clips_without_sound_are_listed(tmp_path: Path) -> None:
    """Gone, a folder, damaged, empty, not finite, no name, a name no file can have: each is there, with the reason."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "x.raw").write_bytes(bytes(100))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, math.nan]), RATE, subtype="FLOAT")
    reasons = {"gone.wav": "is gone", "folder": "not a file", "text.wav": "cannot be read as sound", "": "not a file"}
    reasons |= {
        "empty.wav": "holds no sound",
        "nan.wav": "NaN",
        "a\0b.wav": "sound|gone",
        "x.raw": "sound",
        "n" * 5000: "too long",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason):
            load_sound(tmp_path / name, 1)
    clips = [{"id": str(i), "file": name, "prompt": f"p{i}", "scores": {}} for i, name in enumerate(reasons)]
    page = Page(report_html(result(), [*clips, *make_clips(tmp_path, 2)], tmp_path))
    assert page.text().count("No sound: ") == len(reasons) and len(page.all("audio")) == 2
    assert all(f"p{i}" in page.text() for i in range(len(reasons)))


def test_loud_and_short_sounds(tmp_path: Path) -> None:
    """A sound over full scale is turned down, not wrapped; one sample, silence and long rates can be drawn."""
    loud = np.array([0.5, -4.0, 2.0], np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, RATE, subtype="FLOAT")
    sound = load_sound(tmp_path / "loud.wav", 1)
    wave, _ = soundfile.read(io.BytesIO(base64.b64decode(sound.player.partition(",")[2])))
    assert np.abs(wave - loud / 4).max() <= 2.0**-15
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 192000)
    assert load_sound(tmp_path / "one.wav", 24).shown == 1 / 192000


@pytest.mark.parametrize(
    "changed",
    [
        {"figures": [], "reference": None, "scatter": None},
        {"figures": [figure("IS", "aisfx", None), figure("KL", "aisfx", math.nan), figure("FD", "aisfx", 0.0)]},
        {"figures": [figure("IS", "aisfx", 2.0, low=None, high=None)], "about": {}, "seconds": None},
        {"generated": side(skips=[], skipped={}), "scatter": {"a": {"generated": [], "reference": []}}},
        {"generated": side(rates={"16000": 98}, clipped=3)},
    ],
)
@pytest.mark.parametrize(
    "scores", [{}, {"a": None}, {"a": math.nan, "b": math.inf}, {"a": 1.0}, {"a": -0.0, "b": 1e-9}]
)
def test_what_is_empty(tmp_path: Path, changed: dict[str, Any], scores: dict[str, Any]) -> None:
    """No clips, figures, reference, intervals, scores: a page that says so, without NaN."""
    for clips in ([], [{"id": "x", "file": "x.wav", "prompt": "", "scores": scores}]):
        text = report_html(result(**changed), clips, tmp_path)
        assert not re.search(r"\bnan\b|None|\binf\b", Page(text).text())
        assert ("There are none." in text) == (not clips or changed.get("figures") == [])


def test_page_is_bounded(tmp_path: Path) -> None:
    """24 players and less than 20 MB for 5,000 clips of 20 s in stereo, with prompts and skips without end."""
    write_clip(tmp_path / "long.flac", 20, 48000, 2)
    scores = [{f"s{j}": math.sin(i + j) for j in range(15)} for i in range(5000)]
    long = "rain " * 20000
    clips = ({"id": long, "file": "long.flac", "prompt": long, "scores": s} for s in scores)
    skips = [{"id": long, "file": long, "reason": long}] * 5000
    made = result(generated=side(skips=skips, clips=10000, used=5000, skipped={"silent": 5000}))
    text = report_html(made, clips, tmp_path)
    assert len(Page(text).all("audio")) == MAX_CLIPS and len(text.encode()) < 20e6
    assert "24 of 5,000 clips" in text and "and 4,950 more" in text and re.search(r"the first \d\.\d of 20\.0 s", text)


scored = st.lists(st.none() | st.floats(-100, 100), max_size=120)


@given(scored, st.sampled_from(["lower", "higher", None]))
def test_choice_of_clips(values: list[float | None], better: str | None) -> None:
    """At most 24, none twice, in the order of the score with true ranks; the best and the worst are among them."""
    clips = [{"id": i, "scores": {} if value is None else {"s": value}} for i, value in enumerate(values)]
    chosen = choose_clips(clips, "s", better)
    assert len(chosen) == min(MAX_CLIPS, len(clips))
    assert max(Counter(clip["id"] for clip, _ in chosen).values(), default=1) == 1
    known = sorted((v for v in values if v is not None), reverse=better != "lower")
    shown = [clip["scores"]["s"] for clip, _ in chosen if clip["scores"]]
    assert shown == sorted(shown, reverse=better != "lower")
    assert not known or (shown[0], shown[-1]) == (known[0], known[-1])
    for clip, place in chosen:
        assert bool(place) == bool(clip["scores"])
        if place:
            assert known[int(place.split()[-3]) - 1] == clip["scores"]["s"] and place.endswith(f"of {len(known)}")


def test_choice_without_scores_is_evenly_spaced() -> None:
    """Of 240 clips every tenth."""
    chosen = choose_clips([{"id": i} for i in range(240)], None, None)
    assert [clip["id"] for clip, _ in chosen] == list(range(0, 240, 10))


@given(st.lists(numbers, min_size=1, max_size=8))
def test_numbers_of_a_column(values: list[float]) -> None:
    """One number of decimals, right to half of the last; powers of ten only for what would be 0 or is huge."""
    places = decimals(values)
    assert 0 <= places <= 4
    for value in values:
        text = number(value, places).replace("−", "-")
        if "e" in text:
            assert abs(value) >= 1e7 or abs(value) <= 0.5 * 10.0**-places
            assert float(text) == pytest.approx(value, rel=0.005)  # three digits
        else:
            assert len(text.partition(".")[2]) == places
            assert abs(float(text) - value) <= 0.5 * 10.0**-places * (1 + 1e-9)


def test_number_examples() -> None:
    """Three significant digits of the smallest, no negative zero, a minus sign, a dash for what is no number."""
    assert [number(v, decimals([12.345, 1.5])) for v in (12.345, 1.5)] == ["12.35", "1.50"]
    assert number(-0.31, 3) == "−0.310" and number(-0.0, 2) == "0.00" and number(1234.5, decimals([1234.5])) == "1234"
    assert number(None, 2) == number(math.inf, 2) == number("1", 2) == "–" and number(1e-6, 4) == "1.00e-06"
    assert hashes(f"x sha256:{HASH}<") == f'<code title="x sha256:{HASH}&lt;">x sha256:{HASH[:12]}…&lt;</code>'


def coordinates(svg: str) -> list[float]:
    """Of the absolute positions x and cx, and of M and H in paths."""
    return [float(x) for x in re.findall(r'(?:\bc?x="|[MH])(-?[\d.]+)', svg)]


@given(numbers, numbers, numbers)
def test_interval_plot_fits(value: float, low: float, high: float) -> None:
    """Whatever the three values are, equal or far apart: all is inside the picture, and some tick has a number."""
    svg = interval_plot(value, min(low, high), max(low, high), 2, "t")
    Page(svg)
    assert all(0 <= x <= 320 for x in coordinates(svg)) and svg.count("<text") >= 2


@given(st.lists(numbers, min_size=1, max_size=60))
def test_histogram_fits(values: list[float]) -> None:
    """Whatever the values are, all is inside the picture and there is a bar."""
    svg = histogram(values, "t")
    Page(svg)
    assert all(0 <= x <= 320 for x in coordinates(svg)) and 'class="fill" d="M' in svg


points = st.lists(st.tuples(numbers, numbers), max_size=20)


@given(points, points)
def test_scatter_fits(reference: list[tuple[float, float]], generated: list[tuple[float, float]]) -> None:
    """Every point is inside the picture."""
    svg, circles, crosses = scatter(reference, generated, "t")
    assert (circles, crosses) == (len(reference), len(generated)) and bool(svg) == bool(circles + crosses)
    Page(svg)
    for x, y in re.findall(r"M(-?[\d.]+) (-?[\d.]+)", svg):
        assert 0 <= float(x) <= 320 and 0 <= float(y) <= 240


def test_scatter_is_bounded() -> None:
    """The first 500 points of each side, and none that is not finite."""
    cloud = [[math.nan, 0.0], [1.0, math.inf], *([float(i), 0.0] for i in range(800))]
    assert scatter(cloud, cloud[:3], "t")[1:] == (500, 1)
