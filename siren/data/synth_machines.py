"""Engines, vehicles and power tools."""

from __future__ import annotations

import numpy as np

from .synth_tools import (
    RATE,
    Event,
    Rng,
    Signal,
    add,
    band_noise,
    decay,
    fade,
    formants,
    glide,
    highpass,
    lowpass,
    pick,
    resonate,
    reverb,
    seconds,
    shaped_noise,
    sine,
    tone,
    wander,
)


def _motor(rng: Rng, n: int, firing: Signal, cylinders: int, rough: float) -> Signal:
    """Combustion: one pulse a firing, each cylinder its own, ringing in the exhaust; plus mechanical noise."""
    phase = np.cumsum(firing) / RATE
    count = np.floor(phase).astype(int)
    start = np.diff(count, prepend=0) > 0
    strength = rng.uniform(1 - rough, 1 + rough, cylinders)[count % cylinders] * rng.uniform(0.85, 1.15, n)
    burst = start * strength
    noise = shaped_noise(rng, n, [60, 300, 1500, 6000], [-6, 0, -4, -14])
    pulse = np.exp(-(phase % 1.0) * 6)
    exhaust = resonate(
        burst, rng.uniform([55, 120, 240, 480], [90, 180, 360, 700]), [0.12, 0.09, 0.06, 0.03], [1, 0.9, 0.6, 0.5]
    )
    exhaust /= np.std(exhaust) + 1e-9
    return exhaust + rng.uniform(0.3, 0.6) * noise * (0.3 + pulse * strength)


def engine(rng: Rng, n: int) -> Event:
    """A car, truck or motorcycle engine that idles or revs."""
    kind, low, high, cylinders, rough = pick(
        rng, [("car", 24, 32, 4, 0.2), ("diesel truck", 15, 22, 6, 0.35), ("motorcycle", 13, 19, 2, 0.5)]
    )
    idle = rng.uniform(low, high) * wander(rng, n, 3, 0.96, 1.04)
    revving = rng.uniform() < 0.4
    if revving:
        peaks = int(rng.integers(1, 4))
        spots = np.linspace(0, 1, 2 * peaks + 1)
        idle = idle * glide(n, list(spots), [1.0 if i % 2 == 0 else rng.uniform(2.5, 4.5) for i in range(len(spots))])
    wave = _motor(rng, n, idle, cylinders, rough)
    if kind == "diesel truck":
        knock = shaped_noise(rng, n, [500, 1500, 4000], [-10, 0, -8])
        wave += 0.3 * knock * np.exp(-((np.cumsum(idle) / RATE) % 1.0) * 14)
    if revving:
        wave *= 0.5 + 0.5 * idle / idle.max()
    action = "revving" if revving else "idling"
    return Event(wave, [f"a {kind} engine {action}", "an engine running", f"the engine of a {kind} {action}"])


def passing_car(rng: Rng, n: int) -> Event:
    """Tyre noise and motor that swell, drop in pitch and fade as the car goes by."""
    fast = rng.uniform() < 0.5
    speed, distance = (rng.uniform(22, 34) if fast else rng.uniform(8, 14)), rng.uniform(4, 9)
    moment = rng.uniform(0.35, 0.6) * n / RATE
    along = speed * (np.arange(n) / RATE - moment)
    away = np.sqrt(along**2 + distance**2)
    near = distance / away
    doppler = 1 - speed * along / away / 343
    low = shaped_noise(rng, n, [60, 200, 700, 1200, 4000], [-12, -4, 0, -3, -25])
    high = shaped_noise(rng, n, [300, 1000, 3000, 7000], [-20, -3, 0, -15])
    wave = low * near**1.1 + 0.6 * high * near**2
    motor = tone(rng.uniform(60, 130) * doppler, n, 1 / np.arange(1, 14) ** 0.8)
    wave += rng.uniform(0.15, 0.5) * motor * near**1.2
    how = "fast" if fast else "slowly"
    verb = "speeding past" if fast else "driving past slowly"
    return Event(
        fade(wave, 0.1, 0.2), [f"a car {verb}, passing by", "a car passing by", f"a car passes {how} on the road"]
    )


def helicopter(rng: Rng, n: int) -> Event:
    """Blade slap: a thump and a burst of noise at every pass of a blade, over a turbine."""
    rate = rng.uniform(9, 19)
    phase = (np.arange(n) * rate / RATE + rng.uniform()) % 1.0
    slap = np.exp(-phase * rng.uniform(5, 9))
    thump = sine(rng.uniform(45, 80), n) + shaped_noise(rng, n, [30, 80, 200, 800, 3000], [-5, 0, -4, -16, -35])
    chop = shaped_noise(rng, n, [200, 700, 2500, 7000], [-12, 0, -10, -30])
    wave = thump * slap + rng.uniform(0.3, 0.7) * chop * slap**1.5
    wave += 0.04 * tone(rng.uniform(700, 1300), n, [1, 0.5, 0.3]) * wander(rng, n, 2, 0.6, 1)
    action = pick(rng, ["hovering", "approaching", "flying away"])
    if action == "approaching":
        wave *= glide(n, [0, 1], [0.12, 1.0])
    elif action == "flying away":
        wave *= glide(n, [0, 1], [1.0, 0.1])
    return Event(wave, [f"a helicopter {action}", "a helicopter", f"the chopping blades of a helicopter {action}"])


def train(rng: Rng, n: int) -> Event:
    """A steam train: puffs, four to a turn of the wheels, and sometimes its whistle."""
    speed, rate = pick(rng, [("slowly", 2.2), ("steadily", 4.5), ("fast", 7.5)])
    rate *= rng.uniform(0.85, 1.15)
    phase = np.arange(n) * rate / RATE + rng.uniform()
    accent = rng.uniform(0.55, 1.0, 4)[np.floor(phase).astype(int) % 4]
    puff = np.minimum((phase % 1.0) * 12, 1) * np.exp(-(phase % 1.0) * 4)
    wave = shaped_noise(rng, n, [80, 300, 900, 2500, 7000], [-8, 0, -3, -10, -22]) * puff * accent
    wave += 0.12 * shaped_noise(rng, n, [40, 100, 300, 2000], [0, 0, -10, -30])
    blown = rng.uniform() < 0.4
    if blown:
        m = seconds(min(rng.uniform(0.8, 1.8), n / RATE * 0.6))
        base = rng.uniform(380, 560)
        pitch = glide(m, [0, 0.15, 0.85, 1], [0.9, 1, 1, 0.92])
        chord = sum((tone(base * ratio * pitch, m, [1, 0.5, 0.3, 0.15]) for ratio in (1.0, 1.19, 1.5)), np.zeros(m))
        chord += 0.4 * band_noise(rng, m, base, 6 * base)
        add(wave, fade(chord, 0.08, 0.25) * 0.7, int(rng.uniform(0.05, 0.4) * n))
    wave = reverb(rng, wave, rng.uniform(0.3, 0.8), rng.uniform(0.05, 0.3))
    if blown:
        return Event(
            wave, ["a steam train blowing its whistle", "a steam train", f"a train puffing {speed} and whistling"]
        )
    return Event(
        wave, [f"a steam train chugging {speed}", "a steam train", f"a steam locomotive puffing {speed}, a train"]
    )


def power_drill(rng: Rng, n: int) -> Event:
    """An electric motor's whine and gear noise, spinning up and down."""
    wave = np.zeros(n)
    base = rng.uniform(230, 420)
    position = rng.uniform(0.02, 0.3)
    while position < n / RATE - 0.4:
        m = seconds(min(rng.uniform(0.7, 2.5), n / RATE - position))
        spin = glide(m, [0, min(0.2 * RATE / m, 0.4), 0.9, 1], [0.4, 1.0, rng.uniform(0.85, 1.0), 0.4])
        load = wander(rng, m, 6, 0.95, 1.0)
        whine = tone(base * spin * load, m, 1 / np.arange(1, 26) ** 0.5)
        gears = tone(base * 7.3 * spin * load, m, [1, 0.3])
        noise = highpass(band_noise(rng, m, 1500, 6500), 800) * (0.5 + 0.5 * sine(base * spin, m))
        add(wave, fade((whine + 0.6 * gears + 0.5 * noise) * spin, 0.03, 0.08), seconds(position))
        position += m / RATE + rng.uniform(0.2, 0.6)
    return Event(wave, ["a power drill whirring", "a power drill", "a cordless drill boring a hole"])


def chainsaw(rng: Rng, n: int) -> Event:
    """A small two-stroke motor, screaming when it cuts."""
    idle, full = rng.uniform(38, 48), rng.uniform(105, 150)
    cuts = int(rng.integers(1, 3))
    spots, values = [0.0], [idle]
    for i in range(cuts):
        begin = (i + rng.uniform(0.1, 0.3)) / cuts
        spots += [begin, begin + 0.1 / cuts, (i + 0.8) / cuts, (i + 0.95) / cuts]
        values += [idle, full, full * rng.uniform(0.8, 1.0), idle]
    firing = glide(n, [*spots, 1.0], [*values, idle]) * wander(rng, n, 20, 0.97, 1.03)
    phase = np.cumsum(firing) / RATE
    pulses = (np.diff(np.floor(phase), prepend=0) > 0) * rng.uniform(0.6, 1.0, n)
    buzz = formants(pulses, [350, 900, 2100, 4200], [150, 250, 500, 900], [1.0, 1.0, 0.8, 0.4])
    buzz /= np.std(buzz) + 1e-9
    cutting = (firing - idle) / (full - idle)
    rasp = shaped_noise(rng, n, [300, 1500, 4000, 8000], [-12, 0, -3, -12]) * cutting
    return Event(
        buzz * (0.5 + 0.5 * cutting) + 0.5 * rasp, ["a chainsaw cutting wood", "a chainsaw", "the roar of a chainsaw"]
    )


def airplane(rng: Rng, n: int) -> Event:
    """A propeller plane: a droning rich tone that beats and passes."""
    base = rng.uniform(70, 115)
    moment, speed = rng.uniform(0.3, 0.7), rng.uniform(1.2, 2.5)
    along = speed * (np.arange(n) / n - moment) * 2
    near = 1 / np.sqrt(1 + along**2)
    pitch = base * (1 - 0.07 * along * near)
    drone = tone(pitch, n, 1 / np.arange(1, 30) ** 0.8) + 0.7 * tone(pitch * 1.013, n, 1 / np.arange(1, 25) ** 0.9, 0.3)
    drone = drone * (0.8 + 0.2 * sine(pitch / 3, n))
    wash = shaped_noise(rng, n, [60, 250, 1000, 5000], [-6, 0, -8, -30])
    wave = lowpass(drone, 2600) + 0.6 * wash * near
    return Event(
        wave * near**1.3, ["a propeller airplane flying over", "an airplane", "the drone of a small airplane overhead"]
    )


def vacuum_cleaner(rng: Rng, n: int) -> Event:
    """A fan's broad rush of air with the hum and whine of its motor."""
    base = rng.uniform(180, 320)
    t = np.arange(n) / RATE
    starts = rng.uniform() < 0.35
    spin = 1 - 0.75 * np.exp(-t / 0.35) if starts else np.ones(n)
    push = wander(rng, n, 1.2, 0.9, 1.0)
    air = shaped_noise(rng, n, [80, 300, 900, 2500, 7000], [-14, -3, 0, -5, -14])
    motor = tone(base * spin * push, n, [1, 0.6, 0.3, 0.4, 0.2, 0.3]) + 0.5 * sine(base * 9 * spin * push, n)
    wave = air * spin**2 * wander(rng, n, 1.0, 0.7, 1.0) + 0.35 * motor * spin
    if starts:
        return Event(wave, ["a vacuum cleaner starting up", "a vacuum cleaner", "someone switches on a vacuum cleaner"])
    return Event(wave, ["a vacuum cleaner running", "a vacuum cleaner", "the steady drone of a vacuum cleaner"])


def car_ignition(rng: Rng, n: int) -> Event:
    """A starter motor cranking until the engine catches."""
    crank = min(rng.uniform(0.8, 1.6), n / RATE * 0.5)
    m = seconds(crank)
    rate = rng.uniform(6, 9)
    wheeze = 0.6 + 0.4 * sine(rate, m)
    starter = tone(rng.uniform(160, 240) * (0.85 + 0.15 * wheeze), m, 1 / np.arange(1, 24) ** 0.6) * wheeze
    starter += 0.4 * band_noise(rng, m, 800, 4000) * wheeze
    wave = np.zeros(n)
    begin = seconds(rng.uniform(0.05, 0.3))
    add(wave, fade(starter * 0.5, 0.02, 0.05), begin)
    rest = n - begin - m
    if rest > seconds(0.3):
        firing = rng.uniform(24, 32) * (1 + rng.uniform(1.0, 1.8) * decay(rest, 4.0, 0.15))
        add(wave, fade(_motor(rng, rest, firing, 4, 0.2) * 0.45, 0.05, 0.05), begin + m)
    return Event(wave, ["a car engine starting", "a car starting", "a starter cranking until the car engine catches"])
