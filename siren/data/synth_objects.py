"""Things that are struck, dropped, broken or rubbed."""

from __future__ import annotations

import numpy as np

from .synth_tools import (
    METAL,
    RATE,
    Event,
    Rng,
    add,
    click,
    decay,
    fade,
    glide,
    hit,
    log_uniform,
    pick,
    resonate,
    reverb,
    seconds,
    shaped_noise,
    times,
    wander,
)


def clock(rng: Rng, n: int) -> Event:
    """Tick and tock of an escapement."""
    kind, period, low, high, t60 = pick(
        rng,
        [
            ("a wall clock", 0.5, 1800, 2800, 0.02),
            ("a grandfather clock", 1.0, 900, 1400, 0.05),
            ("a small alarm clock", 0.25, 2600, 3800, 0.012),
        ],
    )
    period *= rng.uniform(0.9, 1.1)
    base = log_uniform(rng, low, high)
    tick = hit(rng, 0.15, base, [1, 1.7, 2.3, 3.1], t60, 0.95)
    tock = hit(rng, 0.15, base * rng.uniform(0.72, 0.88), [1, 1.7, 2.3, 3.1], t60, 0.95)
    rebound = seconds(rng.uniform(0.012, 0.03))
    wave = np.zeros(n)
    for i, start in enumerate(times(rng, n, period, 0.004)):
        sound = tick if i % 2 == 0 else tock
        add(wave, sound, start, rng.uniform(0.9, 1.0))
        add(wave, sound, start + rebound, 0.3)
    if kind == "a grandfather clock":
        wave = reverb(rng, wave, 0.6, 0.25)
    how = {"a wall clock": "steadily", "a grandfather clock": "slowly", "a small alarm clock": "fast"}[kind]
    return Event(wave, [f"{kind} ticking {how}", "a clock ticking", f"the tick-tock of {kind}"])


def hammering(rng: Rng, n: int) -> Event:
    """A hammer on an anvil, a pipe, or a nail in wood."""
    target = pick(rng, ["an anvil", "a metal pipe", "a nail"])
    period = rng.uniform(0.35, 0.9)
    wave = np.zeros(n)
    base, t60, modes = {
        "an anvil": (rng.uniform(1100, 1900), rng.uniform(0.7, 1.6), METAL),
        "a metal pipe": (rng.uniform(350, 700), rng.uniform(0.4, 1.0), METAL),
        "a nail": (rng.uniform(1300, 2200), 0.12, [0.2, 0.33, 0.5, 1.0, 1.4, 2.1, 2.9]),  # low modes: the board
    }[target]
    blow = hit(rng, 1.5, base, modes, t60, 0.95)
    for start in times(rng, n, period, 0.05):
        gain = rng.uniform(0.7, 1.0)
        add(wave, blow, start, gain)
        add(wave, click(rng, 0.012, 1500, 6500), start, 0.2 * gain)
    wave = reverb(rng, wave, rng.uniform(0.3, 0.9), rng.uniform(0.05, 0.3))
    where = "a nail into wood" if target == "a nail" else f"on {target}"
    return Event(
        wave,
        [
            f"someone hammering {where}",
            "hammering",
            f"blows of a hammer {where.replace('a nail into', 'driving a nail into')}",
        ],
    )


def sawing(rng: Rng, n: int) -> Event:
    """Hand saw: rasping strokes to and fro; the teeth chop the noise."""
    period = rng.uniform(0.32, 0.6)
    speed = "fast" if period < 0.42 else "slowly" if period > 0.52 else ""
    wave = np.zeros(n)
    position = rng.uniform(0.02, 0.2)
    tooth, colour = rng.uniform(90, 170), rng.uniform(0.8, 1.25)
    push = True
    while position < n / RATE - 0.1:
        m = seconds(period * (0.85 if push else 0.75))
        shape = np.sin(np.pi * np.arange(m) / m) ** 0.8
        teeth = (np.cumsum(tooth * (0.5 + 0.5 * shape)) / RATE) % 1.0
        rasp = shaped_noise(
            rng, m, [200, 900 * colour, 2500 * colour, 7000], [-18, -4, 0, -10] if push else [-24, -8, 0, -6]
        )
        add(wave, rasp * shape * (0.25 + 0.75 * np.exp(-4 * teeth)), seconds(position), 1.0 if push else 0.55)
        position += period * rng.uniform(0.96, 1.04)
        push = not push
    wave += 0.4 * resonate(wave, [rng.uniform(250, 450), rng.uniform(600, 900)], [0.06, 0.04], [0.15, 0.15])
    how = f" {speed}" if speed else ""
    return Event(wave, [f"someone sawing wood{how}", "sawing wood", f"a hand saw cutting{how} through a board"])


def bouncing_ball(rng: Rng, n: int) -> Event:
    """Impacts ever closer together and softer."""
    kind, base, t60, hardness, loss = pick(
        rng,
        [
            ("a ping pong ball", 1300, 0.03, 0.95, 0.88),
            ("a basketball", 95, 0.16, 0.4, 0.76),
            ("a rubber ball", 330, 0.06, 0.6, 0.82),
        ],
    )
    base *= rng.uniform(0.85, 1.2)
    loss *= rng.uniform(0.96, 1.03)
    wave = np.zeros(n)
    ring = hit(rng, 0.25, base * 6.5, [1, 1.6], 0.14, 0.5)  # of the air in a large ball
    position, gap, size = rng.uniform(0.03, 0.3), rng.uniform(0.45, 0.8), 1.0
    while position < n / RATE - 0.05 and gap > 0.02:
        add(wave, hit(rng, 0.25, base, [1, 2.3, 3.6, 5.1], t60, hardness), seconds(position), size)
        if kind == "a basketball":
            add(wave, click(rng, 0.02, 300, 2500), seconds(position), 0.1 * size)
            add(wave, ring, seconds(position), 0.3 * size)
        position += gap
        gap *= loss
        size *= loss
    wave = reverb(rng, wave, 0.5, rng.uniform(0.05, 0.3))
    return Event(
        wave, [f"{kind} bouncing on the floor", "a bouncing ball", f"{kind} dropped, bouncing lower and lower"]
    )


def glass(rng: Rng, n: int) -> Event:
    """A pane or bottle that shatters: a crack, then shards that ring as they fall."""
    size, shards, spread = pick(rng, [("a glass bottle", 30, 0.3), ("a window", 80, 0.7), ("a wine glass", 18, 0.25)])
    wave = np.zeros(n)
    begin = rng.uniform(0.05, 0.25) * n / RATE
    crack = click(rng, rng.uniform(0.05, 0.15), 1500, 7000)
    add(wave, crack, seconds(begin), 0.5)
    base = rng.uniform(1800, 3200)
    for _ in range(int(shards * rng.uniform(0.8, 1.3))):
        m = seconds(0.35)
        t60 = rng.uniform(0.05, 0.3)
        pitch = min(log_uniform(rng, base, 7200), 7500)
        shard = np.sin(2 * np.pi * pitch * np.arange(m) / RATE) * decay(m, t60, 0.0005)
        add(wave, shard, seconds(begin + rng.exponential(spread * 0.45)), 0.5 * rng.lognormal(-1.0, 0.7))
    wave = reverb(rng, wave, 0.4, rng.uniform(0.05, 0.3), 7000)
    name = size if "glass" in size else "a glass window"
    verb = pick(rng, ["breaking", "shattering"])
    return Event(wave, [f"{name} {verb}", "glass breaking", f"{name} smashed to pieces"])


def door_creak(rng: Rng, n: int) -> Event:
    """A dry hinge: stick-slip pulses whose rate wanders, through the modes of the door."""
    wave = np.zeros(n)
    position = rng.uniform(0.05, 0.4)
    slow = rng.uniform() < 0.5
    while position < n / RATE - 0.4:
        m = seconds(min(rng.uniform(0.9, 2.2) if slow else rng.uniform(0.4, 0.9), n / RATE - position))
        rate = log_uniform(rng, 60, 160) * wander(rng, m, 3.0, 0.4, 1.6)
        phase = np.cumsum(rate) / RATE
        slips = (np.diff(np.floor(phase), prepend=0) > 0) * rng.uniform(0.5, 1.0, m)
        creak = resonate(
            slips, rng.uniform([380, 900, 1700, 2900], [600, 1400, 2400, 3900]), [0.03] * 4, [1, 1, 0.8, 0.5]
        )
        add(wave, fade(creak * glide(m, [0, 0.2, 0.8, 1], [0.2, 1, 0.8, 0])), seconds(position))
        position += m / RATE + rng.uniform(0.2, 0.7)
    wave = reverb(rng, wave, rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.4))
    how = "slowly" if slow else "quickly"
    return Event(wave, [f"a door creaking open {how}", "a door creaking", "a squeaky door hinge"])
