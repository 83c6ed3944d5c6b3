"""The clips of a report as cards: prompt, spectrogram, player, scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..mel import hertz_to_mel
from .report_sounds import MAX_CLIPS, Sound, choose_clips, load_sound, score_of
from .report_text import cut, decimals, escape, number


def clips_section(clips: Sequence[dict[str, Any]], scores: Sequence[str], better: dict[str, Any], base: Path) -> str:
    """Players and pictures of the chosen clips."""
    first = scores[0] if scores else None
    chosen = choose_clips(clips, first, better.get(first) if first is not None else None)
    if not chosen:
        return '<section aria-labelledby="heard">\n<h2 id="heard">Clips</h2>\n<p>There are none.</p>\n</section>'
    places = {name: decimals(score_of(clip, name) for clip, _ in chosen) for name in scores}
    cards = "\n".join(_card(clip, place, places, base, len(chosen)) for clip, place in chosen)
    which = f"{len(clips):,} clips" if len(clips) <= MAX_CLIPS else f"{len(chosen)} of {len(clips):,} clips"
    if first is not None:
        which += f", in the order of {escape(cut(first))}"
    elif len(clips) > MAX_CLIPS:
        which += ", evenly spaced in the list"
    options = '<option value="place 1">as listed</option>'
    for i, name in enumerate(scores):
        for sign, word in ((1, "lowest"), (-1, "highest")):
            options += f'<option value="s{i} {sign}">{escape(cut(name))}, {word} first</option>'
    options += '<option value="prompt 1">prompt</option>'
    return (
        f'<section aria-labelledby="heard">\n<h2 id="heard">Clips</h2>\n<p>{which}.</p>\n'
        f'<p class="order" hidden><label for="order">Order</label> <select id="order">{options}</select></p>\n'
        f'<ol class="cards" id="clips">\n{cards}\n</ol>\n</section>'
    )


def _card(clip: dict[str, Any], place: str, places: dict[str, int], base: Path, clips: int) -> str:
    prompt, file = cut(clip.get("prompt") or ""), str(clip.get("file") or "")
    keys = [f'data-prompt="{escape(prompt)}"']
    rows = ""
    for i, (name, count) in enumerate(places.items()):
        value = score_of(clip, name)
        rows += f"<dt>{escape(cut(name))}</dt><dd>{number(value, count)}</dd>"
        keys += [f'data-s{i}="{value!r}"'] if value is not None else []
    try:
        body = _sound(load_sound(base / file, clips), prompt or file)
    except DataError as error:
        body = f'<p class="warn">No sound: {escape(error)}.</p>'
    title = escape(prompt) if prompt else '<span class="muted">no prompt</span>'
    whole = f' title="{escape(cut(file))}"' if Path(file).name != file else ""
    named = [escape(cut(clip["id"]))] if clip.get("id") else []
    named.append(f"<code{whole}>{escape(cut(Path(file).name))}</code>")
    named += [f"not in the figures: {escape(cut(clip['skipped']))}"] if clip.get("skipped") else []
    return (
        f'<li class="card clip" {" ".join(keys)}>'
        + (f'<div class="rank">{place}</div>' if place else "")
        + f'<h3 dir="auto">{title}</h3>{body}'
        + (f"<dl>{rows}</dl>" if rows else "")
        + f'<div class="muted small">{" · ".join(named)}</div></li>'
    )


def _sound(sound: Sound, name: str) -> str:
    label, shown = escape(cut(name)), f"{sound.shown:.1f} s"
    length = f"the first {sound.shown:.1f} of {sound.seconds:.1f} s" if sound.shown < sound.seconds else shown
    mixed = f", {sound.channels} channels mixed to one" if sound.channels > 1 else ""
    ticks = "".join(
        f'<span style="bottom:{100 * height:.0f}%">{hertz // 1000} kHz</span>'
        for hertz in (1000, 4000, 16000)
        if (height := float(hertz_to_mel(hertz) / hertz_to_mel(sound.sample_rate / 2))) < 0.9
    )
    return (
        f'<figure class="picture"><img src="{sound.picture}" alt="Mel spectrogram of {label}, 0 to {shown}, 0 to '
        f'{sound.sample_rate // 2:,} Hz"><div aria-hidden="true">{ticks}</div></figure>'
        f'<audio controls src="{sound.player}" aria-label="{label}"></audio>'
        f'<div class="muted small">{length}, {sound.sample_rate:,} Hz{mixed}</div>'
    )
