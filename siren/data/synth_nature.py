"""Weather, water and fire."""

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
    decay,
    impulses,
    log_uniform,
    lowpass,
    normalise,
    pick,
    resonate,
    reverb,
    seconds,
    shaped_noise,
    sine,
    times,
    wander,
)


def rain(rng: Rng, n: int) -> Event:
    """A hiss of far drops, and near drops that make a surface ring."""
    strength, rate, hiss = pick(rng, [("light", 60, 0.15), ("steady", 350, 0.5), ("heavy", 1500, 1.0)])
    surface, centres, t60 = pick(
        rng,
        [
            ("", (2500, 4500, 6500), 0.004),
            (" on a roof", (500, 1300, 3000), 0.02),
            (" on a window", (1800, 3200, 5200), 0.012),
            (" on leaves", (1500, 3500, 5500), 0.003),
        ],
    )
    bed = shaped_noise(rng, n, [100, 500, 2000, 5000, 8000], [-30, -14, -3, 0, -rng.uniform(1, 8)])
    bed *= wander(rng, n, 0.7, 0.75, 1.1)
    drops = np.zeros(n)
    for centre in centres:
        clicks = impulses(rng, n, rate * rng.uniform(0.5, 1.2), 1.0)
        drops += resonate(clicks, [centre * rng.uniform(0.8, 1.25)], [t60 * rng.uniform(0.7, 1.5)], [1.0])
    drops /= np.std(drops) + 1e-9
    wave = hiss * bed + drops * rng.uniform(0.5, 1.0)
    captions = [f"{strength} rain falling{surface}", f"{strength} rain", f"the sound of {strength} rain{surface}"]
    return Event(wave, [*captions, f"it is raining{' hard' if strength == 'heavy' else ''}{surface}"])


def thunder(rng: Rng, n: int) -> Event:
    """A rumble of many overlapping reflections, after a crack if the lightning is near."""
    near = rng.uniform() < 0.5
    start = seconds(rng.uniform(0.02, 0.12) * n / RATE)
    length = n - start
    envelope = np.zeros(length)
    for _ in range(int(rng.integers(4, 9))):
        peal = decay(length, rng.uniform(1.0, 3.0), rng.uniform(0.01, 0.04) if near else rng.uniform(0.1, 0.4))
        add(envelope, peal, int(length * rng.uniform(0, 0.45)) if envelope.any() else 0, rng.uniform(0.3, 1.0))
    top = rng.uniform(120, 260) if near else rng.uniform(60, 130)
    rumble = shaped_noise(rng, length, [20, 40, top, 4 * top, 16 * top], [-12, 0, -2, -26, -60])
    rumble *= envelope * wander(rng, length, 9.0, 0.35, 1.0)
    body = normalise(rumble)
    if near:
        crack = shaped_noise(rng, length, [50, 300, 1500, 6000], [0, -2, -8, -20])
        crackle = decay(length, rng.uniform(0.5, 0.9), 0.003) * wander(rng, length, 40.0, 0.1, 1.0)
        body = 0.8 * body + 0.9 * normalise(crack * crackle)
    wave = np.zeros(n)
    add(wave, body, start)
    if near:
        return Event(wave, ["a loud clap of thunder", "thunder", "thunder cracking close by, then rolling away"])
    return Event(wave, ["distant thunder rumbling", "thunder", "the low rumble of thunder far away"])


def wind(rng: Rng, n: int) -> Event:
    """Bands of noise that swell and fade, and a whistling resonance where it howls."""
    kind = pick(rng, ["gentle", "strong", "howling"])
    rate = {"gentle": 0.5, "strong": 1.2, "howling": 0.8}[kind]
    gust = wander(rng, n, rate, 0.15, 1.0)
    wave = shaped_noise(rng, n, [30, 100, 300, 1000, 4000], [0, 0, -8, -22, -45]) * gust
    wave += shaped_noise(rng, n, [100, 400, 900, 2500, 8000], [-20, 0, -3, -18, -40]) * gust**2 * 0.8
    if kind == "strong":
        wave += shaped_noise(rng, n, [200, 1000, 3000, 8000], [-20, 0, -8, -25]) * gust**3 * 0.7
    if kind == "howling":
        base = log_uniform(rng, 350, 800)
        for ratio in (1.0, rng.uniform(1.4, 1.9)):
            pitch = base * ratio * (0.7 + 0.6 * gust) * wander(rng, n, 2.0, 0.93, 1.07)
            breath = lowpass(rng.standard_normal(n), 25.0) * 12
            wave = wave * 0.75 + breath * sine(pitch, n) * gust**2
    words = {
        "gentle": ["a gentle wind blowing", "a soft breeze of wind outdoors"],
        "strong": ["a strong wind blowing in gusts", "gusts of strong wind"],
        "howling": ["wind howling", "a storm wind whistling and howling"],
    }[kind]
    return Event(wave, [words[0], "wind blowing", words[1]])


def ocean_waves(rng: Rng, n: int) -> Event:
    """Swells of noise: a low roar that builds up, the break, and foam that hisses away."""
    big = rng.uniform() < 0.5
    period = rng.uniform(2.6, 4.5) if big else rng.uniform(1.6, 2.8)
    t = np.arange(n) / RATE
    roar, foam = np.full(n, 0.06), np.full(n, 0.05)
    peak = rng.uniform(0.2, 1.0) * period - period
    while peak < n / RATE + period:
        size = rng.uniform(0.6, 1.0)
        rise, fall = rng.uniform(0.25, 0.4) * period, rng.uniform(0.3, 0.5) * period
        shape = np.where(t < peak, np.exp(-(((t - peak) / rise) ** 2)), np.exp(-(t - peak) / fall))
        roar += size * shape
        late = t - peak - 0.1 * period
        foam += size * np.where(late < 0, np.exp(-((late / (0.5 * rise)) ** 2)), np.exp(-late / (1.2 * fall)))
        peak += period * rng.uniform(0.8, 1.25)
    low = shaped_noise(rng, n, [40, 150, 500, 1500, 5000], [-10, 0, -4, -15, -40])
    high = shaped_noise(rng, n, [200, 800, 2500, 6000, 8000], [-25, -6, 0, -5, -10])
    wave = (1.0 if big else 0.3) * low * roar + (0.7 if big else 0.5) * high * foam
    if big:
        return Event(wave, ["big ocean waves crashing on the shore", "ocean waves", "surf roaring, waves breaking"])
    return Event(wave, ["gentle ocean waves washing onto a beach", "ocean waves", "small waves lapping at the shore"])


def _bubble(rng: Rng, pitch: float, t60: float, rise: float) -> Signal:
    """An air bubble under water: a sine whose pitch rises as it nears the surface, dying fast."""
    n = seconds(t60)
    t = np.arange(n) / RATE
    return np.sin(2 * np.pi * pitch * t * (1 + rise * t / t60)) * decay(n, t60, 0.002) * rng.uniform(0.5, 1.0)


def stream(rng: Rng, n: int) -> Event:
    """Many bubbles of all sizes over a soft hiss."""
    fast = rng.uniform() < 0.5
    low, high = (450, 2600) if fast else (250, 1500)
    wave = np.zeros(n)
    rate = rng.uniform(110, 180) if fast else rng.uniform(30, 70)
    grains = [
        _bubble(rng, pitch, min(0.12, 60 / pitch) * rng.uniform(0.8, 1.6), rng.uniform(0.05, 0.4))
        for pitch in np.exp(rng.uniform(np.log(low), np.log(high), 60))
    ]
    for start in rng.integers(-400, n, size=int(rate * n / RATE)):
        add(wave, grains[int(rng.integers(len(grains)))], max(int(start), 0), rng.lognormal(-0.5, 0.6))
    wave /= np.std(wave) + 1e-9
    hiss = shaped_noise(rng, n, [100, 400, 1500, 4000, 8000], [-18, -4, 0, -10, -25]) * wander(rng, n, 3.0, 0.6, 1.0)
    wave += (0.5 if fast else 0.12) * hiss
    if fast:
        return Event(wave, ["a fast stream rushing over stones", "a stream", "water rushing down a brook"])
    return Event(wave, ["a small stream bubbling gently", "a stream of water", "water gurgling in a creek"])


def dripping_water(rng: Rng, n: int) -> Event:
    """Single drops into a pool: a tick, then a bubble that sings."""
    speed, period = pick(rng, [("slowly", 1.3), ("steadily", 0.6), ("quickly", 0.33)])
    period *= rng.uniform(0.85, 1.2)
    pitch = log_uniform(rng, 500, 1300)
    wave = np.zeros(n)
    for start in times(rng, n, period, 0.2 if rng.uniform() < 0.5 else 0.03):
        gain = rng.uniform(0.5, 1.0)
        splash = click(rng, rng.uniform(0.02, 0.06), 1500, 7000)
        add(wave, splash, start, rng.uniform(0.1, 0.3) * gain)
        for i in range(int(rng.integers(1, 4))):  # the main bubble, and smaller ones that the splash makes
            drop = _bubble(rng, pitch * rng.uniform(0.7, 1.4), rng.uniform(0.06, 0.14), rng.uniform(0.2, 0.7))
            add(wave, drop, start + seconds(rng.uniform(0.008, 0.02) + 0.03 * i), gain * 0.5**i)
    where = pick(rng, ["into a sink", "in a cave", "into a bucket"])
    if where == "in a cave":
        wave = reverb(rng, wave, rng.uniform(1.2, 2.2), 1.0, 3500)
    if where == "into a bucket":
        wave += resonate(wave, [rng.uniform(250, 450)], [0.12], [0.12])
    captions = [f"water dripping {speed} {where}", "dripping water", f"drops of water falling {speed}"]
    return Event(wave, [*captions, f"a leak dripping {where}"])


def fire(rng: Rng, n: int) -> Event:
    """Pops of many sizes, a low flutter of flames and a faint hiss."""
    size, rate, roar = pick(rng, [("small", 14, 0.04), ("", 30, 0.12), ("large", 60, 0.4)])
    pops = np.zeros(n)
    for low, high, share in ((1200, 2500, 0.35), (2500, 5000, 0.45), (5000, 7500, 0.2)):
        grains = [click(rng, rng.uniform(0.003, 0.012), low, high) for _ in range(4)]
        for start in rng.integers(n, size=int(rng.poisson(rate * share * n / RATE))):
            add(pops, grains[int(rng.integers(4))], int(start), 0.06 * rng.pareto(1.6) + 0.04)
    pops = np.tanh(pops * 1.2)
    flames = shaped_noise(rng, n, [30, 80, 200, 600, 3000], [-6, 0, -6, -22, -45]) * wander(rng, n, 9.0, 0.2, 1.0)
    hiss = band_noise(rng, n, 3000, 7000) * wander(rng, n, 2.0, 0.3, 1.0)
    wave = pops + roar * flames + 0.012 * hiss
    word = {"small": "a small campfire", "": "a fire", "large": "a large fire"}[size]
    action = "roaring and crackling" if size == "large" else "crackling"
    place = "" if size == "large" else pick(rng, ["", " in a fireplace"]) if size == "" else ""
    return Event(wave, [f"{word} {action}{place}", "a fire crackling", f"burning wood {action}{place}"])
