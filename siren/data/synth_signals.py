"""Signals: sirens, alarms, telephones, bells, whistles and horns."""

from __future__ import annotations

import numpy as np

from .synth_tools import (
    RATE,
    Event,
    Rng,
    Signal,
    add,
    band_noise,
    click,
    fade,
    formants,
    glide,
    log_uniform,
    pick,
    resonate,
    reverb,
    seconds,
    shaped_noise,
    sine,
    times,
    tone,
    wander,
)


def siren(rng: Rng, n: int) -> Event:
    """A rich tone whose pitch wails, yelps, or steps between two notes."""
    kind = pick(rng, ["wail", "wail", "yelp", "hi-lo"])
    t = np.arange(n) / RATE
    low = rng.uniform(420, 650)
    if kind == "wail":
        cycle = (t / rng.uniform(1.8, 3.5) + rng.uniform()) % 1
        pitch = low + rng.uniform(600, 900) * np.where(cycle < 0.4, cycle / 0.4, (1 - cycle) / 0.6) ** 0.8
        captions = ["a police siren wailing", "a siren", "the rising and falling wail of a siren"]
    elif kind == "yelp":
        cycle = (t * rng.uniform(1.8, 3.5) + rng.uniform()) % 1
        pitch = low + rng.uniform(600, 900) * (1 - np.abs(2 * cycle - 1))
        captions = ["a police siren yelping fast", "a siren", "an emergency siren with quick yelps"]
    else:
        cycle = (t / rng.uniform(0.9, 1.4) + rng.uniform()) % 1
        pitch = low * np.where(cycle < 0.5, rng.uniform(1.25, 1.4), 1.0)
        captions = ["an ambulance siren with two alternating tones", "a siren", "a hi-lo siren of an ambulance"]
    voice = tone(pitch, n, 1 / np.arange(1, 16) ** rng.uniform(0.8, 1.3))
    voice = formants(voice, [low, 1300, 2600], [700, 900, 1200], [0.8, 1.0, 0.7])
    wave = fade(reverb(rng, voice, rng.uniform(0.4, 1.2), rng.uniform(0.1, 0.5), 3500), 0.05, 0.1)
    return Event(wave, captions)


def alarm(rng: Rng, n: int) -> Event:
    """Electronic beeps in a fixed pattern."""
    pitch = log_uniform(rng, 900, 3400)
    pattern, length, gap, pause = pick(
        rng,
        [
            ("in groups of four beeps", 0.06, 0.06, 0.5),
            ("with one beep after another", 0.3, 0.3, 0.0),
            ("with fast beeps", 0.09, 0.09, 0.0),
            ("in groups of three long beeps", 0.35, 0.2, 0.8),
        ],
    )
    group = 4 if "four" in pattern else 3 if "three" in pattern else 1
    speed = rng.uniform(0.85, 1.2)
    length, gap, pause = length * speed, gap * speed, pause * speed
    m = seconds(length)
    beep = fade(tone(pitch, m, [1, 0, 0.35, 0, 0.2] if rng.uniform() < 0.7 else [1.0]), 0.002, 0.003)
    wave = np.zeros(n)
    position = rng.uniform(0.02, 0.3)
    while position < n / RATE:
        for _ in range(group):
            add(wave, beep, seconds(position))
            position += length + gap
        position += pause
    return Event(wave, [f"an alarm beeping {pattern}", "an alarm beeping", "the electronic beeping of an alarm clock"])


def telephone(rng: Rng, n: int) -> Event:
    """An old bell telephone, or the warble of an electronic one; rings and pauses."""
    old = rng.uniform() < 0.5
    ring, pause = rng.uniform(0.9, 1.8), rng.uniform(0.6, 1.6)
    m = seconds(ring)
    t = np.arange(m) / RATE
    if old:
        strikes = np.zeros(m)
        strikes[(np.arange(0, ring * 0.999, 1 / rng.uniform(20, 26)) * RATE).astype(int)] = 1.0
        base = rng.uniform(900, 1500)
        bells = [base, base * rng.uniform(1.18, 1.3), base * 2.7, base * 3.3, base * 4.2]
        call = resonate(strikes, bells, [0.5, 0.5, 0.35, 0.3, 0.2], [1, 1, 0.6, 0.5, 0.4])
        captions = ["an old telephone ringing", "a telephone ringing", "the bell of an old rotary phone"]
    else:
        low = rng.uniform(700, 1300)
        pitch = np.where((t * rng.uniform(10, 18)) % 1 < 0.5, low, low * rng.uniform(1.2, 1.35))
        call = tone(pitch, m, [1, 0.4, 0.3, 0.15])
        captions = [
            "an electronic telephone ringing",
            "a telephone ringing",
            "the warbling ringtone of an office phone",
        ]
    call = fade(call, 0.005, 0.08 if old else 0.01)
    wave = np.zeros(n)
    position = rng.uniform(0.02, 0.4)
    while position < n / RATE - 0.2:
        add(wave, call, seconds(position))
        position += ring + pause
    return Event(reverb(rng, wave, 0.3, rng.uniform(0.02, 0.15)), captions)


def _bell(rng: Rng, n: int, base: float, t60: float) -> Signal:
    """One stroke of a cast bell: hum, prime, minor third, fifth, nominal and higher ones, in slightly split pairs."""
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.66, 3.0, 4.0, 5.33])
    gains = np.array([0.5, 0.7, 0.7, 0.25, 1.0, 0.3, 0.3, 0.35, 0.35, 0.2]) * rng.uniform(0.6, 1.3, 10)
    stroke = np.zeros(n)
    hammer = click(rng, 0.004, 300, 5000)
    stroke[: min(n, len(hammer))] = hammer[:n]
    stroke[0] += 3.0
    t60s = t60 / ratios**0.8
    split = 1 + rng.uniform(0.0005, 0.002, 10)
    out = resonate(stroke, base * ratios, t60s, gains)
    return out + resonate(stroke, (base * ratios * split)[:5], t60s[:5], 0.6 * gains[:5])


def church_bell(rng: Rng, n: int) -> Event:
    """A large bell tolling."""
    size, low, high = pick(rng, [("large", 170, 280), ("", 280, 430), ("small", 430, 620)])
    speed, period = pick(rng, [("slowly", 2.2), ("", 1.3), ("quickly", 0.75)])
    bell = _bell(rng, n, log_uniform(rng, low, high), rng.uniform(4, 9))
    wave = np.zeros(n)
    strokes = times(rng, n, period * rng.uniform(0.9, 1.1), 0.02)
    for start in strokes:
        add(wave, bell, start, rng.uniform(0.75, 1.0))
    wave = reverb(rng, wave, rng.uniform(0.8, 2.5), rng.uniform(0.1, 0.5), 3000, 0.03)
    how = f" {speed}" if speed else ""
    name = f"a {size} church bell".replace("  ", " ")
    if len(strokes) == 1:
        return Event(wave, [f"{name} struck once", "a church bell", f"a single stroke of {name}"])
    return Event(wave, [f"{name} tolling{how}", "a church bell ringing", f"{name} ringing{how} from a tower"])


def wind_chimes(rng: Rng, n: int) -> Event:
    """Hanging tubes hit at random: modes of a free bar."""
    material, t60, low, high = pick(
        rng, [("metal", 3.0, 480, 900), ("metal", 3.0, 480, 900), ("glass", 0.8, 1300, 1900)]
    )
    scale = log_uniform(rng, low, high) * 2 ** (np.array([0, 2, 4, 7, 9, 12]) / 12)
    busy, rate = pick(rng, [("softly", 3.0), ("", 6.0), ("wildly", 12.0)])
    wave = np.zeros(n)
    strikes = np.cumsum(rng.exponential(1 / rate, int(rate * n / RATE * 2) + 3))
    owner = rng.integers(len(scale), size=len(strikes))
    for tube, base in enumerate(scale):
        hits = np.zeros(n)
        for start in strikes[owner == tube]:
            if start * RATE < n:
                hits[int(start * RATE)] += rng.lognormal(-0.3, 0.5)
        if not hits.any():
            continue
        own = t60 * rng.uniform(0.8, 1.2)
        wave += resonate(hits, [base, base * 2.756, base * 5.404], [own, own * 0.5, own * 0.25], [1.0, 0.5, 0.25])
    how = f" {busy}" if busy else ""
    return Event(
        wave, [f"{material} wind chimes tinkling{how}", "wind chimes", f"{material} wind chimes in the breeze"]
    )


def small_bell(rng: Rng, n: int) -> Event:
    """A small bell shaken, or a bicycle's or counter's bell struck."""
    kind = pick(rng, ["hand bell", "bicycle bell", "counter bell"])
    base = log_uniform(rng, 1500, 2600)
    ratios, t60 = np.array([1.0, 1.005, 2.3, 2.75, 3.9]), rng.uniform(0.7, 1.8)
    hits = np.zeros(n)
    if kind == "hand bell":
        rate = rng.uniform(4, 7)
        for start in times(rng, n, 1 / rate, 0.15):
            hits[start] += rng.uniform(0.4, 1.0)
        captions = ["a small hand bell being shaken", "a small bell ringing", "a hand bell rung quickly"]
    elif kind == "bicycle bell":
        for start in times(rng, n, rng.uniform(1.0, 2.0), 0.2):
            for i in range(int(rng.integers(6, 12))):
                if start + (at := seconds(i * 0.045 + 1e-4)) < n:
                    hits[start + at] += 0.95**i
        captions = ["a small bicycle bell ringing", "a small bell ringing", "the bell of a bicycle"]
    else:
        for start in times(rng, n, rng.uniform(1.2, 3.0), 0.2):
            hits[start] += 1.0
        captions = ["a small counter bell dinging", "a small bell ringing", "a ding of a reception desk bell"]
        t60 *= 1.5
    wave = resonate(hits, base * ratios, t60 / ratios, [1.0, 0.7, 0.5, 0.4, 0.25])
    return Event(wave, captions)


def whistle(rng: Rng, n: int) -> Event:
    """A referee's whistle with its rattling pea, or a person whistling a tune."""
    wave = np.zeros(n)
    if rng.uniform() < 0.5:
        pitch, rattle = rng.uniform(2200, 3100), rng.uniform(28, 50)
        long = rng.uniform() < 0.5
        position = rng.uniform(0.02, 0.4)
        while position < n / RATE - 0.1:
            m = seconds(rng.uniform(0.8, 1.8) if long else rng.uniform(0.15, 0.35))
            pea = 0.5 + 0.5 * sine(rattle * wander(rng, m, 10, 0.9, 1.1), m)
            blow = sine(pitch * (1 + 0.03 * pea), m) + 0.7 * sine(1.07 * pitch * (1 - 0.02 * pea), m)
            blow = blow * (0.35 + 0.65 * pea) + 0.2 * band_noise(rng, m, 1500, 7000)
            add(wave, fade(blow, 0.02, 0.04), seconds(position))
            position += m / RATE + (rng.uniform(0.5, 1.5) if long else rng.uniform(0.1, 0.5))
        length = "long" if long else "short"
        return Event(
            wave, [f"a referee whistle with {length} blasts", "a whistle", f"{length} blows of a sports whistle"]
        )
    base = float(rng.uniform(800, 1400))
    position = rng.uniform(0.02, 0.3)
    last = base
    while position < n / RATE - 0.15:
        target = base * 2 ** (pick(rng, [0, 2, 4, 5, 7, 9, 12]) / 12)
        m = seconds(pick(rng, [0.18, 0.36, 0.55]) * rng.uniform(0.9, 1.1))
        melody = glide(m, [0, 0.2, 1], [last, target, target]) * (1 + 0.006 * sine(rng.uniform(5, 7), m))
        air = 0.03 * shaped_noise(rng, m, [400, 1500, 4000], [-15, 0, -10])
        add(wave, fade((sine(melody, m) + air) * glide(m, [0, 0.2, 1], [0.5, 1, 0.7]), 0.03, 0.03), seconds(position))
        position += m / RATE + (0.0 if rng.uniform() < 0.7 else 0.15)
        last = target
    wave = reverb(rng, wave, 0.4, rng.uniform(0.05, 0.3))
    return Event(wave, ["a person whistling a tune", "a person whistling", "someone whistles a melody"])


def car_horn(rng: Rng, n: int) -> Event:
    """Two buzzing tones a third apart, honked."""
    low = rng.uniform(330, 450)
    kind, shortest, longest = pick(
        rng, [("one long honk", 1.2, 2.5), ("short honks", 0.14, 0.17), ("several honks", 0.3, 0.7)]
    )
    wave = np.zeros(n)
    position = rng.uniform(0.02, 0.4)
    count = 0
    while position < n / RATE - 0.1:
        m = seconds(rng.uniform(shortest, longest))
        honk = tone(low, m, 1 / np.arange(1, 20) ** 0.5) + tone(low * 1.24, m, 1 / np.arange(1, 16) ** 0.5)
        add(wave, fade(honk, 0.015, 0.03), seconds(position))
        position += m / RATE + rng.uniform(0.1, 0.4)
        count += 1
        if (kind == "one long honk") or (count > 1 and rng.uniform() < 0.3):
            break
    wave = formants(wave, [700, 1500, 2600], [500, 700, 900], [0.7, 1.0, 0.8])
    wave = reverb(rng, wave, rng.uniform(0.3, 0.8), rng.uniform(0.05, 0.3))
    return Event(
        wave,
        [
            f"a car horn, {kind if count > 1 or kind[0] == 'o' else 'one short honk'}",
            "a car horn",
            "a car honking its horn",
        ],
    )
