"""Procedural clips: the classes in turn, placed near or far, and scenes of several events. Pure functions of a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from . import synth_animals, synth_blasts, synth_machines, synth_nature, synth_objects, synth_people, synth_signals
from .synth_tools import RATE, Event, Rng, Signal, add, fade, lowpass, normalise, pick, reverb, seconds

MIN_SECONDS, MAX_SECONDS = 1.0, 30.0
VERSION = 1  # of the sounds; whoever changes them raises it, so that no folder mixes old and new ones

_SYNTHESIZERS: dict[str, Callable[[Rng, int], Event]] = {
    "rain": synth_nature.rain,
    "siren": synth_signals.siren,
    "church bell": synth_signals.church_bell,
    "bird": synth_animals.bird,
    "engine": synth_machines.engine,
    "footsteps": synth_people.footsteps,
    "thunder": synth_nature.thunder,
    "telephone": synth_signals.telephone,
    "wolf": synth_animals.wolf,
    "helicopter": synth_machines.helicopter,
    "clock": synth_objects.clock,
    "wind": synth_nature.wind,
    "alarm": synth_signals.alarm,
    "dog": synth_animals.dog,
    "train": synth_machines.train,
    "knocking": synth_people.knocking,
    "ocean waves": synth_nature.ocean_waves,
    "whistle": synth_signals.whistle,
    "crickets": synth_animals.crickets,
    "car passing": synth_machines.passing_car,
    "hammering": synth_objects.hammering,
    "stream": synth_nature.stream,
    "wind chimes": synth_signals.wind_chimes,
    "frog": synth_animals.frog,
    "power drill": synth_machines.power_drill,
    "typing": synth_people.typing,
    "dripping water": synth_nature.dripping_water,
    "small bell": synth_signals.small_bell,
    "owl": synth_animals.owl,
    "chainsaw": synth_machines.chainsaw,
    "sawing": synth_objects.sawing,
    "fire": synth_nature.fire,
    "car horn": synth_signals.car_horn,
    "bee": synth_animals.bee,
    "airplane": synth_machines.airplane,
    "drum": synth_people.drum,
    "laser": synth_blasts.laser,
    "crow": synth_animals.crow,
    "vacuum cleaner": synth_machines.vacuum_cleaner,
    "guitar": synth_people.guitar,
    "gunshot": synth_blasts.gunshot,
    "rooster": synth_animals.rooster,
    "car starting": synth_machines.car_ignition,
    "glass": synth_objects.glass,
    "explosion": synth_blasts.explosion,
    "applause": synth_people.applause,
    "bouncing ball": synth_objects.bouncing_ball,
    "creaking door": synth_objects.door_creak,
    "heartbeat": synth_people.heartbeat,
}
CLASSES: tuple[str, ...] = tuple(_SYNTHESIZERS)

_FAR = frozenset(
    [
        "siren",
        "church bell",
        "bird",
        "wolf",
        "dog",
        "train",
        "whistle",
        "hammering",
        "frog",
        "owl",
        "chainsaw",
        "car horn",
        "drum",
        "crow",
        "gunshot",
        "rooster",
        "explosion",
        "applause",
        "airplane",
    ]
)
_INDOORS = frozenset(
    [
        "footsteps",
        "clock",
        "telephone",
        "knocking",
        "small bell",
        "drum",
        "guitar",
        "applause",
        "bouncing ball",
        "creaking door",
        "whistle",
        "hammering",
        "glass",
        "typing",
        "alarm",
    ]
)
_BACKGROUNDS = ("rain", "wind", "crickets", "stream", "ocean waves", "bird", "fire", "engine", "applause", "train")


@dataclass(frozen=True, eq=False)
class ProceduralClip:
    """A clip: waveform float32 [samples] within -1..1 at 16 kHz; captions, the first the fullest, all of them true;
    label, one of CLASSES, or None for a scene; id, unique for a seed.
    """

    waveform: npt.NDArray[np.float32]
    captions: tuple[str, ...]
    label: str | None
    id: str


def synthesize(
    index: int, seed: int = 0, seconds: float = 4.0, label: str | None = None, scenes: float = 0.2
) -> ProceduralClip:
    """Clip `index` of the endless collection that belongs to `seed`; the same arguments give the same clip.

    `seconds` of sound, 1 to 30. A share of `scenes` (0 to 1) of the indices, evenly spread, are scenes of two or three
    events; the others go through CLASSES in turn. `label` asks for an event of that class instead. The peak is between
    -12 and -1 dBFS. Raises InputError for arguments outside of these.
    """
    check_arguments(index, seed, seconds, scenes)
    if label is not None and label not in _SYNTHESIZERS:
        raise InputError(f"there is no class {label!r}; there are {', '.join(CLASSES)}")
    label = label or label_in_turn(index, scenes)
    kind = len(CLASSES) if label is None else CLASSES.index(label)
    rng = np.random.default_rng([seed, index, kind])
    n = round(seconds * RATE)
    event = _scene(rng, n) if label is None else _placed(rng, n, label)
    wave = normalise(fade(event.wave - np.mean(event.wave), 0.003, 0.02))
    wave *= 10 ** (rng.uniform(-11.9, -1.1) / 20)
    name = f"procedural-{seed}-{index:06d}-{(label or 'scene').replace(' ', '-')}"
    return ProceduralClip(wave.astype(np.float32), tuple(dict.fromkeys(event.captions)), label, name)


def label_in_turn(index: int, scenes: float, labels: Sequence[str] = CLASSES) -> str | None:
    """The class of clip `index`, `labels` in turn; None if it is a scene."""
    before = math.floor(index * scenes)  # scenes among the clips before this one
    if math.floor((index + 1) * scenes) > before:
        return None
    return labels[(index - before) % len(labels)]


def check_arguments(index: int, seed: int, seconds: float, scenes: float) -> None:
    """InputError for what `synthesize` cannot do."""
    for name, whole in (("index", index), ("seed", seed)):
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
            raise InputError(f"{name} must be a whole number of at least 0, not {whole!r}")
    for name, value, low, high in (("seconds", seconds, MIN_SECONDS, MAX_SECONDS), ("scenes", scenes, 0.0, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def _event(rng: Rng, n: int, label: str) -> Event:
    """An event of a class, drawn again in the rare case that it would begin only after the end of a short clip."""
    while True:
        event = _SYNTHESIZERS[label](rng, n)
        if float(np.max(np.abs(event.wave))) > 1e-6:
            return event._replace(wave=normalise(event.wave))


def _placed(rng: Rng, n: int, label: str, halls: bool = True) -> Event:
    """An event, now and then far away or in a large hall, which its captions then say."""
    event = _event(rng, n, label)
    first, name, *others = event.captions
    chance = rng.uniform()
    if label in _FAR and chance < 0.2:
        wave = lowpass(reverb(rng, event.wave, rng.uniform(0.8, 2.0), rng.uniform(0.5, 1.0), 1500), 1400)
        return Event(wave, [f"{first} in the distance", name, f"{name} far away"])
    if halls and label in _INDOORS and chance > 0.85:
        wave = reverb(rng, event.wave, rng.uniform(1.5, 3.0), rng.uniform(0.3, 0.7), 3500, 0.02)
        return Event(wave, [f"{first} in a large echoing hall", name, *others])
    return event


def _scene(rng: Rng, n: int) -> Event:
    """Two or three events: one after another, or over a background."""
    labels = [CLASSES[i] for i in rng.permutation(len(CLASSES))]
    if rng.uniform() < 0.5:
        back_label = pick(rng, _BACKGROUNDS)
        front = _placed(rng, n, next(label for label in labels if label != back_label), halls=False)
        back = _event(rng, n, back_label)
        wave = _level(front.wave, 0.12) + _level(back.wave, 0.12) * 10 ** (rng.uniform(-16, -8) / 20)
        a, b = front.captions, back.captions
        return Event(
            wave,
            [f"{a[0]} with {b[0]} in the background", f"{a[1]} and {b[1]}", f"{b[0]} while {a[0]} is heard over it"],
        )
    count = 3 if rng.uniform() < 0.25 and n >= seconds(3 * MIN_SECONDS) else 2
    cuts = np.linspace(0, n, count + 1).astype(int)
    wave = np.zeros(n)
    events = []
    for label, start, stop in zip(labels, cuts, cuts[1:], strict=False):
        event = _event(rng, max(stop - start, seconds(MIN_SECONDS)), label)
        add(wave, _level(fade(event.wave, 0.01, 0.08), 0.12), int(start))
        events.append(event.captions)
    fulls, names = [event[0] for event in events], [event[1] for event in events]
    return Event(wave, [", then ".join(fulls), ", then ".join(names), " followed by ".join(names)])


def _level(wave: Signal, rms: float) -> Signal:
    """The wave at an RMS, measured where it sounds, so that short and long events are about equally loud."""
    loud = wave[np.abs(wave) > 0.02 * np.max(np.abs(wave))]
    return wave * (rms / float(np.sqrt(np.mean(loud * loud))))
