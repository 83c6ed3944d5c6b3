"""What people do with feet, hands and hearts, drums and strings."""

from __future__ import annotations

import numpy as np

from .synth_tools import (
    RATE,
    WOOD,
    Event,
    Rng,
    Signal,
    add,
    band_noise,
    click,
    decay,
    fade,
    glide,
    hit,
    lowpass,
    normalise,
    pick,
    resonate,
    reverb,
    seconds,
    signal,
    times,
)


def _step(rng: Rng, ground: str, shoe: float) -> Signal:
    if ground in ("gravel", "snow", "dry leaves"):
        low, high, rate, length = {
            "gravel": (900, 5500, 420, 0.2),
            "snow": (300, 1800, 900, 0.28),
            "dry leaves": (2500, 7000, 260, 0.28),
        }[ground]
        n = seconds(length * rng.uniform(0.85, 1.15))
        grains = (rng.uniform(size=n) < rate * 4 / RATE) * rng.lognormal(0, 0.9, n)
        crunch = band_noise(rng, n, low, high) * lowpass(grains, 500, 1)
        crunch *= glide(n, [0, 0.15, 0.45, 0.65, 1], [0, 1, 0.35, 0.7, 0])
        return normalise(crunch)
    base, t60, low, high = {
        "wood": (95, 0.09, 150, 1500),
        "concrete": (160, 0.04, 500, 3500),
        "tiles": (220, 0.035, 1200, 5500),
    }[ground]
    step = np.zeros(seconds(0.35))
    for start, gain in ((0.0, 1.0), (rng.uniform(0.07, 0.11), 0.4)):  # heel, toe
        thump = hit(rng, 0.2, base * shoe * rng.uniform(0.9, 1.1), [1.0, 1.9, 3.1], t60, 0.3)
        tap = click(rng, rng.uniform(0.012, 0.03), low * shoe, high * shoe)
        add(step, thump, seconds(start + 1e-4), gain * (1.0 if ground == "wood" else 0.5))
        add(step, tap, seconds(start + 1e-4), 0.3 * gain)
    scuff = band_noise(rng, seconds(0.15), low, high) * np.hanning(seconds(0.15))
    add(step, scuff, seconds(0.02), rng.uniform(0.01, 0.05))
    return normalise(step)


def footsteps(rng: Rng, n: int) -> Event:
    """Heel and toe on hard ground, crunching grains on loose ground."""
    ground = pick(rng, ["wood", "concrete", "tiles", "gravel", "snow", "dry leaves"])
    pace, period = pick(rng, [("slow", 0.8), ("", 0.55), ("running", 0.3)])
    shoe = rng.uniform(0.8, 1.25)
    wave = np.zeros(n)
    for start in times(rng, n, period * rng.uniform(0.9, 1.1), 0.03):
        add(wave, _step(rng, ground, shoe), start, rng.uniform(0.65, 1.0))
    if ground in ("wood", "concrete", "tiles"):
        wave = reverb(rng, wave, rng.uniform(0.3, 0.9), rng.uniform(0.05, 0.35))
    surface = "a wooden floor" if ground == "wood" else ground
    walker = "running" if pace == "running" else "walking slowly" if pace == "slow" else "walking"
    first = f"{pace} footsteps on {surface}".strip()
    return Event(wave, [first, "footsteps", f"a person {walker} on {surface}"])


def knocking(rng: Rng, n: int) -> Event:
    """Knuckles on a door: groups of two to five blows."""
    count = int(rng.integers(2, 6))
    base = rng.uniform(130, 330)
    speed, gap = pick(rng, [("slowly", 0.4), ("", 0.22), ("quickly", 0.13)])
    gap *= rng.uniform(0.9, 1.1)
    wave = np.zeros(n)
    position = rng.uniform(0.05, 0.4)
    rounds = 0
    while position + count * gap < n / RATE:
        for _ in range(count):
            blow = hit(rng, 0.3, base * rng.uniform(0.97, 1.03), WOOD, rng.uniform(0.09, 0.13), 0.55)
            add(wave, blow, seconds(position), rng.uniform(0.7, 1.0))
            position += gap * rng.uniform(0.93, 1.07)
        rounds += 1
        position += rng.uniform(0.6, 1.8)
        if rounds == 1 and rng.uniform() < 0.4:
            break
    if not rounds:
        add(wave, hit(rng, 0.3, base, WOOD, 0.1, 0.55), 0)
        return Event(wave, ["a single knock, someone knocking on a wooden door", "knocking", "one knock on wood"])
    wave = reverb(rng, wave, rng.uniform(0.25, 0.8), rng.uniform(0.05, 0.3))
    word = ["two", "three", "four", "five"][count - 2]
    how = f" {speed}" if speed else ""
    again = "" if rounds == 1 else ", again and again"
    first = f"someone knocking{how} on a wooden door"
    return Event(wave, [first, "knocking on a door", f"{word} knocks on wood{again}"])


def typing(rng: Rng, n: int) -> Event:
    """Key presses and releases at a writer's uneven pace."""
    kind, base, t60 = pick(
        rng, [("a mechanical keyboard", 1700, 0.025), ("a laptop keyboard", 900, 0.012), ("a typewriter", 2400, 0.05)]
    )
    base *= rng.uniform(0.85, 1.2)
    speed, rate = pick(rng, [("slowly", 3.0), ("", 6.0), ("fast", 10.0)])
    keys = [hit(rng, 0.1, base * rng.uniform(0.8, 1.25), [1, 1.9, 2.7, 3.5], t60, 0.9) for _ in range(6)]
    wave = np.zeros(n)
    position = rng.uniform(0.05, 0.3)
    while position < n / RATE - 0.1:
        key = keys[int(rng.integers(6))]
        gain = rng.uniform(0.5, 1.0)
        add(wave, key, seconds(position), gain)
        add(wave, click(rng, 0.006, 2000, 7000), seconds(position), 0.15 * gain)
        add(wave, key, seconds(position + rng.uniform(0.06, 0.1)), 0.3 * gain)
        if kind == "a typewriter":
            add(wave, click(rng, 0.03, 600, 5000), seconds(position + 0.012), 0.35 * gain)
        position += rng.gamma(4.0, 0.25 / rate) + 0.02
        if rng.uniform() < 0.06:
            position += rng.uniform(0.2, 0.5)
    how = f" {speed}" if speed else ""
    return Event(
        wave,
        [
            f"someone typing{how} on {kind}",
            "typing on a keyboard" if "keyb" in kind else "typing",
            f"the keys of {kind} clacking",
        ],
    )


def applause(rng: Rng, n: int) -> Event:
    """Hands of many people, each clapping at an own pace and pitch."""
    crowd, people = pick(rng, [("a few people", 4), ("a small audience", 25), ("a large crowd", 110)])
    wave = np.zeros(n)
    for _ in range(min(people, 12)):
        hits = np.zeros(n)
        for _ in range(max(1, people // 12)):
            rate, shift = rng.uniform(2.8, 4.8), rng.uniform(-0.6, 0.0)
            moments = shift + np.cumsum(np.clip(rng.normal(1 / rate, 0.02, int(n / RATE * rate) + 4), 0.1, None))
            index = (moments * RATE).astype(int)
            index = index[(index >= 0) & (index < n)]
            np.add.at(hits, index, rng.uniform(0.5, 1.0) * rng.uniform(0.7, 1.0, len(index)))
        burst = click(rng, 0.03, rng.uniform(600, 1000), rng.uniform(1800, 3500))
        wave += signal.oaconvolve(hits, burst)[:n]
    wave = reverb(rng, wave, rng.uniform(0.5, 1.5), rng.uniform(0.1, 0.5), 4500)
    return Event(wave, [f"applause from {crowd}", "applause", f"{crowd} clapping"])


def heartbeat(rng: Rng, n: int) -> Event:
    """Lub-dub: two soft thumps a beat."""
    speed, rate = pick(rng, [("slow", 50), ("", 75), ("fast", 120)])
    beat = 60 / (rate * rng.uniform(0.9, 1.1))
    low = rng.uniform(60, 95)
    wave = np.zeros(n)
    for start in times(rng, n, beat, 0.02):
        for pitch, gap, gain in ((low, 0.0, 1.0), (low * 1.25, 0.32 * min(beat, 0.9), 0.7)):
            m = seconds(0.16)
            thump = np.tanh(2 * np.sin(2 * np.pi * pitch * np.arange(m) / RATE)) * np.hanning(m)
            add(wave, thump, start + seconds(gap + 1e-4), gain * rng.uniform(0.9, 1.0))
    wave = lowpass(wave, 400) + 0.02 * lowpass(rng.standard_normal(n), 150)
    first = f"a {speed} heartbeat".replace("  ", " ")
    return Event(
        wave, [first, "a heartbeat", f"a heart beating{' fast' if speed == 'fast' else ' slowly' if speed else ''}"]
    )


def _drum_hit(rng: Rng, kind: str, base: float) -> Signal:
    if kind == "snare":
        n = seconds(0.3)
        wires = band_noise(rng, n, 1200, 6500) * decay(n, 0.22, 0.001)
        return normalise(0.12 * wires + hit(rng, 0.3, rng.uniform(170, 220), [1, 1.6, 2.2], 0.18, 0.5))
    if kind == "hat":
        n = seconds(0.12)
        return band_noise(rng, n, 5500, 7600) * decay(n, 0.07, 0.001) * 0.12
    n = seconds(1.0)
    t60 = 0.45 if kind == "kick" else 0.9
    pitch = base * (1 + (1.4 if kind == "kick" else 0.12) * np.exp(-np.arange(n) / RATE / 0.03))
    body = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * decay(n, t60, 0.001)
    if kind == "tom":
        body += 0.4 * np.sin(2 * np.pi * 1.59 * np.cumsum(pitch) / RATE) * decay(n, 0.4, 0.001)
    add(body, click(rng, 0.015, 300, 3000), 0, 0.15)
    return body


def drum(rng: Rng, n: int) -> Event:
    """A drum kit's beat, a snare roll, or a single drum beaten steadily."""
    kind = pick(rng, ["kit", "roll", "big", "hand"])
    wave = np.zeros(n)
    if kind == "kit":
        beat = 60 / rng.uniform(85, 150)
        kick, snare, hat = (_drum_hit(rng, part, rng.uniform(50, 65)) for part in ("kick", "snare", "hat"))
        extra = rng.uniform() < 0.5
        for i in range(int(n / RATE / beat * 2) + 1):
            start = seconds(0.03 + i * beat / 2)
            add(wave, hat, start, 0.8 if i % 2 == 0 else 0.5)
            if i % 4 == 0 or (extra and i % 8 == 3):
                add(wave, kick, start)
            if i % 4 == 2:
                add(wave, snare, start, 0.8)
        speed = "fast" if beat < 0.48 else "slow" if beat > 0.6 else "steady"
        captions = [f"a drum kit playing a {speed} beat", "a drum beat", f"a {speed} beat on drums with hi-hat"]
    elif kind == "roll":
        snare, rate = _drum_hit(rng, "snare", 190.0), rng.uniform(11, 18)
        for start in times(rng, n, 1 / rate, 0.15, 0.02):
            add(wave, snare, start, rng.uniform(0.6, 1.0) * (0.4 + 0.6 * start / n))
        captions = ["a snare drum roll", "a drum roll", "a drum roll getting louder"]
    elif kind == "big":
        boom = _drum_hit(rng, "tom", rng.uniform(55, 85))
        for start in times(rng, n, rng.uniform(0.5, 1.1), 0.02):
            add(wave, boom, start, rng.uniform(0.7, 1.0))
        captions = ["a big deep drum beaten slowly", "a drum", "slow beats of a big drum"]
    else:
        low = rng.uniform(120, 190)
        hits = [_drum_hit(rng, "tom", low), _drum_hit(rng, "tom", low * rng.uniform(1.35, 1.6))]
        slap = click(rng, 0.04, 500, 3500)
        pattern = rng.integers(0, 3, 8)  # low, high, or a rest; the first is low
        for i, start in enumerate(times(rng, n, rng.uniform(0.15, 0.24), 0.02, 0.05)):
            if (part := 0 if i % 8 == 0 else int(pattern[i % 8])) < 2:
                add(wave, hits[part], start, rng.uniform(0.6, 1.0))
                add(wave, slap, start, rng.uniform(0.05, 0.15))
        captions = ["hand drums playing a rhythm", "a drum", "a rhythm on two hand drums"]
    wave = reverb(rng, wave, rng.uniform(0.2, 0.9), rng.uniform(0.02, 0.2))
    return Event(wave, captions)


def _pluck(rng: Rng, pitch: float, length: float, damping: float) -> Signal:
    """A plucked string: what Karplus and Strong's loop computes, harmonic by harmonic.

    A period of noise passes the mean of two neighbours and `damping` once around, so harmonic k fades by
    damping * cos(pi k / period) a turn. The spectra of all turns are transformed at once.
    """
    period = round(RATE / pitch)
    turns = seconds(length) // period + 1
    start = rng.standard_normal(period)
    spectrum = np.fft.rfft(start + np.roll(start, period // 5))
    spectrum[0] = 0.0
    harmonics = np.arange(len(spectrum))
    step = damping * np.abs(np.cos(np.pi * harmonics / period))
    string = np.fft.irfft(spectrum * step ** np.arange(turns)[:, None], period, axis=1)
    return fade(string.reshape(-1), 0.001, 0.05)


def guitar(rng: Rng, n: int) -> Event:
    """Notes, or strummed chords, on plucked strings with a wooden body."""
    root = rng.uniform(82, 165)
    strum = rng.uniform() < 0.5
    wave = np.zeros(n)
    if strum:
        for start in times(rng, n, rng.uniform(0.5, 1.3), 0.03):
            chord = pick(rng, [[0, 7, 12, 16, 19, 24], [0, 7, 12, 15, 19, 24]])
            shift = 2 ** (pick(rng, [0, 5, 7, -3]) / 12)
            for i, step in enumerate(chord):
                add(wave, _pluck(rng, root * shift * 2 ** (step / 12), 1.6, 0.995), start + seconds(0.012 * i + 1e-4))
        captions = ["a guitar strumming chords", "a guitar", "someone strums an acoustic guitar"]
    else:
        scale = [0, 3, 5, 7, 10, 12, 15, 17]
        for start in times(rng, n, rng.uniform(0.22, 0.6), 0.03):
            add(wave, _pluck(rng, root * 2 ** ((12 + pick(rng, scale)) / 12), 1.5, 0.996), start, rng.uniform(0.7, 1))
        captions = ["a guitar plucking a melody", "a guitar", "single notes plucked on a guitar"]
    wave += resonate(wave, [105, 210, 400], [0.1, 0.08, 0.05], [0.05, 0.05, 0.05])
    return Event(reverb(rng, wave, 0.4, rng.uniform(0.02, 0.15)), captions)
