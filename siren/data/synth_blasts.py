"""Guns, explosions and lasers."""

from __future__ import annotations

import numpy as np

from .synth_tools import (
    RATE,
    Event,
    Rng,
    add,
    click,
    decay,
    pick,
    reverb,
    seconds,
    shaped_noise,
    sine,
    times,
    tone,
    wander,
)


def gunshot(rng: Rng, n: int) -> Event:
    """The blast wave, powder noise that dies fast, and echoes."""
    kind = pick(rng, ["pistol", "rifle", "automatic"])
    m = seconds(0.5)
    t = np.arange(m) / RATE
    blast = np.exp(-t / 0.0015) * 2.0
    powder = shaped_noise(rng, m, [50, 200, 900, 3000, 8000], [-4, 0, 0, -4, -14]) * decay(
        m, rng.uniform(0.16, 0.3), 0.0004
    )
    thump = np.sin(2 * np.pi * rng.uniform(70, 130) * t) * decay(m, 0.2) * (1.5 if kind == "rifle" else 0.7)
    shot = np.tanh(1.5 * (blast + powder + thump))
    wave = np.zeros(n)
    begin = rng.uniform(0.03, 0.35)
    if kind == "automatic":
        period = rng.uniform(0.08, 0.13)
        shots = int(rng.integers(5, 16))
    else:
        period, shots = rng.uniform(0.5, 1.2), pick(rng, [1, 1, 2, 3])
    fired = 0
    for i in range(shots):
        start = seconds(begin + i * period * rng.uniform(0.97, 1.03))
        if start < n - 800 or i == 0:
            add(wave, shot, min(start, n - 1), rng.uniform(0.85, 1.0))
            fired += 1
    wave = reverb(rng, wave, rng.uniform(0.6, 1.8), rng.uniform(0.2, 0.7), 2500, rng.uniform(0.01, 0.06))
    if kind == "automatic":
        return Event(wave, ["a burst of gunshots from a machine gun", "gunshots", "a machine gun firing"])
    word = f"{['one', 'two', 'three'][fired - 1]} {kind} gunshot{'s' if fired > 1 else ''}"
    return Event(
        wave,
        [
            word,
            "a gunshot" if fired == 1 else "gunshots",
            f"a {kind} firing {['once', 'twice', 'three times'][fired - 1]}",
        ],
    )


def explosion(rng: Rng, n: int) -> Event:
    """A deep boom with a long roaring tail and falling debris."""
    large = rng.uniform() < 0.5
    begin = seconds(rng.uniform(0.03, 0.1) * n / RATE)
    m = n - begin
    t60 = rng.uniform(2.2, 3.6) if large else rng.uniform(1.0, 1.8)
    t = np.arange(m) / RATE
    boom = np.sin(2 * np.pi * np.cumsum(30 + rng.uniform(40, 70) * np.exp(-t / 0.12)) / RATE) * decay(
        m, t60 * 0.6, 0.002
    )
    body = shaped_noise(rng, m, [25, 80, 300, 1200, 6000], [-4, 0, -4, -14, -32]) * decay(m, t60, 0.003)
    blast = shaped_noise(rng, m, [100, 500, 2500, 8000], [-4, 0, -3, -10]) * decay(m, 0.45, 0.001)
    wave = np.zeros(n)
    add(wave, np.tanh(1.2 * (1.1 * boom + 0.9 * body * wander(rng, m, 14, 0.5, 1.0) + 0.8 * blast)), begin)
    debris = rng.uniform() < 0.5
    if debris:
        for _ in range(int(rng.integers(20, 60))):
            at = begin + seconds(rng.uniform(0.3, 1.8))
            add(wave, click(rng, rng.uniform(0.01, 0.05), 800, 5000), at, 0.06 * rng.lognormal(0, 0.6))
    wave = reverb(rng, wave, rng.uniform(0.8, 2.0), rng.uniform(0.1, 0.4), 1200, 0.05)
    size = "large" if large else "small"
    first = f"a {size} explosion" + (" with falling debris" if debris else "")
    return Event(wave, [first, "an explosion", f"a {'huge blast' if large else 'bang'}, something explodes"])


def laser(rng: Rng, n: int) -> Event:
    """A science-fiction zap: a pitch that falls fast."""
    top, bottom = rng.uniform(2500, 5500), rng.uniform(150, 500)
    length = rng.uniform(0.15, 0.5)
    m = seconds(length)
    pitch = bottom + (top - bottom) * np.exp(-np.arange(m) / m * rng.uniform(3, 6))
    zap = tone(pitch, m, [1.0] if rng.uniform() < 0.4 else [1, 0, 0.33, 0, 0.2]) * decay(m, length * 2.5, 0.002)
    if rng.uniform() < 0.4:
        zap = zap * (0.6 + 0.4 * sine(rng.uniform(40, 90), m))
    fast = rng.uniform() < 0.5
    wave = np.zeros(n)
    starts = times(rng, n, rng.uniform(0.16, 0.3) if fast else rng.uniform(0.6, 1.4), 0.15)
    for start in starts:
        add(wave, zap, start, rng.uniform(0.7, 1.0))
    wave = reverb(rng, wave, 0.5, rng.uniform(0.0, 0.3))
    if fast:
        return Event(wave, ["a laser gun firing rapidly", "a laser", "rapid laser shots in a space battle"])
    return Event(wave, ["a laser gun zapping", "a laser", "zaps of a science fiction laser"])
