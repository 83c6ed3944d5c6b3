"""Birds, insects and other animals: whistled, pulsed and voiced calls."""

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
    log_uniform,
    normalise,
    pick,
    reverb,
    seconds,
    shaped_noise,
    sine,
    times,
    tone,
    wander,
)


def _chirp(rng: Rng, length: float, points: list[float], second: float = 0.08) -> Signal:
    """A whistled note through the given pitches, swelling and fading."""
    n = seconds(length)
    pitch = glide(n, list(np.linspace(0, 1, len(points))), points)
    swell = np.sin(np.pi * np.arange(n) / n) ** rng.uniform(0.5, 1.2)
    note = sine(pitch, n)
    if max(points) < 3800:
        note += second * sine(2 * pitch, n)
    return note * swell


def _phrase(rng: Rng, kind: str, base: float) -> list[Signal]:
    """The notes of one bird's phrase, to be sung in a row."""
    if kind == "chirping":
        shape = [base * 1.25, base * 0.85] if rng.uniform() < 0.6 else [base * 0.8, base * 1.3, base]
        return [_chirp(rng, rng.uniform(0.06, 0.13), shape) for _ in range(int(rng.integers(1, 4)))]
    if kind == "trilling":
        note = _chirp(rng, rng.uniform(0.03, 0.055), [base * rng.uniform(0.85, 1.0), base * rng.uniform(1.1, 1.3)])
        return [note] * int(rng.integers(10, 24))
    notes = int(rng.integers(3, 7))  # singing
    return [
        _chirp(rng, rng.uniform(0.08, 0.28), list(base * rng.uniform(0.75, 1.35, int(rng.integers(2, 4)))))
        for _ in range(notes)
    ]


def bird(rng: Rng, n: int) -> Event:
    """Songbirds: swept whistles between 2 and 7 kHz in phrases."""
    kind = pick(rng, ["chirping", "trilling", "singing"])
    many = rng.uniform() < 0.35
    wave = np.zeros(n)
    for _ in range(int(rng.integers(3, 6)) if many else 1):
        base, gain = log_uniform(rng, 2300, 5000), rng.uniform(0.4, 1.0)
        voice = pick(rng, ["chirping", "trilling", "singing"]) if many else kind
        position = rng.uniform(0.02, 0.5)
        while position < n / RATE - 0.15:
            for note in _phrase(rng, voice, base):
                add(wave, note, seconds(position), gain * rng.uniform(0.8, 1.0))
                position += len(note) / RATE + (0.008 if voice == "trilling" else rng.uniform(0.02, 0.09))
            position += rng.uniform(0.15, 0.6)
    wave = reverb(rng, wave, rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.4), 6000)
    if many:
        return Event(wave, ["many birds singing at once", "birds chirping", "a chorus of birds"])
    return Event(wave, [f"a bird {kind}", "a bird chirping", f"a single bird {kind} in a tree"])


def crickets(rng: Rng, n: int) -> Event:
    """Pulses of a nearly pure tone: a few wing strokes to a chirp, or a long trill of many insects."""
    many = rng.uniform() < 0.5
    wave = np.zeros(n)
    t = np.arange(n) / RATE
    for _ in range(int(rng.integers(4, 8)) if many else 1):
        pitch, stroke = rng.uniform(3600, 5200), rng.uniform(28, 45)
        period, count = rng.uniform(0.3, 0.8), int(rng.integers(3, 6))
        chirp = (t + rng.uniform(0, period)) % period
        pulses = np.maximum(np.sin(2 * np.pi * stroke * chirp), 0) ** 1.5
        if not (many and rng.uniform() < 0.4):  # otherwise an endless trill
            pulses *= chirp < count / stroke
        wave += sine(pitch, n, rng.uniform()) * pulses * rng.uniform(0.4, 1.0)
    wave += 0.01 * band_noise(rng, n, 2000, 6000)
    if many:
        return Event(wave, ["many crickets chirping at night", "crickets chirping", "a field full of crickets"])
    return Event(wave, ["a single cricket chirping", "crickets chirping", "one cricket chirping in the grass"])


def frog(rng: Rng, n: int) -> Event:
    """A croak is a fast train of pulses through the resonance of the vocal sac."""
    size, low, high = pick(rng, [("small", 1500, 2600), ("", 700, 1300), ("big", 300, 550)])
    centre = log_uniform(rng, low, high)
    rate = rng.uniform(35, 75) if size != "big" else rng.uniform(25, 45)
    length = rng.uniform(0.18, 0.4) if size != "big" else rng.uniform(0.35, 0.7)
    many = rng.uniform() < 0.3
    wave = np.zeros(n)
    for _ in range(3 if many else 1):
        own = centre * rng.uniform(0.9, 1.15)
        for start in times(rng, n, length + rng.uniform(0.25, 0.9), 0.1):
            m = seconds(length * rng.uniform(0.9, 1.1))
            pulse_rate = glide(m, [0, 0.5, 1], [rate * 0.8, rate * 1.1, rate * 0.9])
            phase = np.cumsum(pulse_rate) / RATE
            pulses = (np.diff(np.floor(phase), prepend=0) > 0) * rng.uniform(0.8, 1.0, m)
            croak = formants(pulses, [own, own * 1.9, own * 2.8], [own * 0.12, own * 0.2, 300], [1.0, 0.5, 0.2])
            add(wave, croak * glide(m, [0, 0.3, 0.8, 1], [0.2, 1, 0.8, 0]), start, rng.uniform(0.7, 1.0))
    wave = reverb(rng, wave, rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.4), 4000)
    word = f"{size} frog".strip()
    if many:
        return Event(wave, [f"several {word}s croaking by a pond", "frogs croaking", "a pond with frogs"])
    return Event(wave, [f"a {word} croaking", "a frog croaking", f"the croak of a {word}"])


def owl(rng: Rng, n: int) -> Event:
    """Hoots: soft low notes, almost sines, in a fixed rhythm with pauses."""
    base = log_uniform(rng, 290, 520)
    rhythm = pick(rng, [[0.45], [0.16, 0.5], [0.25, 0.14, 0.14, 0.35], [0.3, 0.3, 0.45]])
    wave = np.zeros(n)
    position = rng.uniform(0.05, 0.5)
    calls = 0
    while position < n / RATE - 0.3:
        calls += 1
        for length in rhythm:
            m = seconds(length * rng.uniform(0.95, 1.1))
            pitch = base * glide(m, [0, 0.25, 0.7, 1], [0.92, 1.0, 0.99, 0.9]) * wander(rng, m, 8, 0.995, 1.005)
            hoot = tone(pitch, m, [1, 0.12, 0.05]) + 0.02 * band_noise(rng, m, base, 2 * base)
            add(wave, hoot * np.sin(np.pi * np.arange(m) / m) ** 0.7, seconds(position))
            position += m / RATE + rng.uniform(0.1, 0.16)
        position += rng.uniform(0.7, 1.6)
    wave = reverb(rng, wave, rng.uniform(0.8, 1.6), rng.uniform(0.2, 0.6), 2000)
    times_said = "an owl hooting once" if calls == 1 else "an owl hooting"
    return Event(wave, [times_said, "an owl", "an owl calling at night"])


def _howl(rng: Rng, n: int) -> Signal:
    top = log_uniform(rng, 380, 680)
    start, end = rng.uniform(0.5, 0.75), rng.uniform(0.55, 0.85)
    rise, fall = rng.uniform(0.12, 0.25), rng.uniform(0.65, 0.85)
    pitch = top * glide(n, [0, rise, fall, 1], [start, 1.0, rng.uniform(0.92, 1.02), end])
    pitch *= 1 + 0.008 * sine(rng.uniform(4, 6), n) * wander(rng, n, 1, 0, 1)
    voice = tone(pitch, n, 1 / np.arange(1, 12) ** 1.7)
    voice += 0.06 * shaped_noise(rng, n, [200, 600, 1500, 5000], [-20, 0, -8, -35])
    voice = formants(voice, [top, 900, 1700], [250, 250, 400], [1.0, 0.6, 0.2])
    return voice * glide(n, [0, 0.12, 0.75, 1], [0, 1, 0.85, 0])


def wolf(rng: Rng, n: int) -> Event:
    """Long voiced howls that rise, hold and fall."""
    pack = rng.uniform() < 0.3
    wave = np.zeros(n)
    if pack:
        for _ in range(int(rng.integers(3, 6))):
            start = int(n * rng.uniform(0.0, 0.45))
            add(wave, _howl(rng, int((n - start) * rng.uniform(0.7, 1.0))), start, rng.uniform(0.5, 1.0))
    else:
        position = rng.uniform(0.02, 0.3)
        while position < n / RATE - 1.0:
            length = min(rng.uniform(1.5, 3.4), n / RATE - position)
            add(wave, _howl(rng, seconds(length)), seconds(position))
            position += length + rng.uniform(0.3, 1.0)
        if not wave.any():
            add(wave, _howl(rng, n), 0)
    wave = reverb(rng, wave, rng.uniform(0.8, 2.0), rng.uniform(0.2, 0.7), 2500, 0.03)
    if pack:
        return Event(wave, ["a wolf pack howling together", "wolves howling", "several wolves howling at night"])
    return Event(wave, ["a wolf howling", "a wolf", "the long howl of a wolf at night"])


def _bark(rng: Rng, pitch: float, tract: float) -> Signal:
    n = seconds(rng.uniform(0.11, 0.2) * (1.3 if pitch < 300 else 1.0))
    f0 = pitch * glide(n, [0, 0.25, 1], [0.75, 1.15, 0.6]) * wander(rng, n, 60, 0.93, 1.07)
    rough = tone(f0, n, 1 / np.arange(1, 30) ** 0.7) + 0.5 * shaped_noise(
        rng, n, [100, 500, 2000, 6000], [-10, 0, -4, -15]
    )
    voice = formants(rough, [600 * tract, 1150 * tract, 2500 * tract], [180, 250, 500], [1.0, 0.8, 0.35])
    return normalise(voice * glide(n, [0, 0.12, 0.5, 1], [0, 1, 0.7, 0]))


def dog(rng: Rng, n: int) -> Event:
    """Barks: short harsh voiced bursts, in groups."""
    size, low, high, tract = pick(rng, [("small", 550, 850, 1.45), ("", 330, 500, 1.1), ("big", 160, 260, 0.85)])
    pitch, tract = log_uniform(rng, low, high), tract * rng.uniform(0.92, 1.08)
    wave = np.zeros(n)
    period = rng.uniform(0.3, 0.7)
    once, barks = rng.uniform() < 0.2, 0
    for i, start in enumerate(times(rng, n, period, 0.1)):
        if (once and i) or (not once and i > 1 and rng.uniform() < 0.2):
            continue
        barks += 1
        add(wave, _bark(rng, pitch * rng.uniform(0.93, 1.08), tract), start, rng.uniform(0.7, 1.0))
    wave = reverb(rng, wave, rng.uniform(0.2, 0.6), rng.uniform(0.05, 0.3), 4000)
    word = f"{size} dog".strip()
    if barks == 1:
        return Event(wave, [f"a {word} barking once", "a dog barking", f"a single bark of a {word}"])
    return Event(wave, [f"a {word} barking repeatedly", "a dog barking", f"a {word} barks again and again"])


def bee(rng: Rng, n: int) -> Event:
    """Wing beats: a bright periodic tone that comes and goes as the insect moves."""
    swarm = rng.uniform() < 0.35
    wave = np.zeros(n)
    for _ in range(int(rng.integers(6, 10)) if swarm else 1):
        pitch = rng.uniform(170, 270) * wander(rng, n, rng.uniform(1, 4), 0.93, 1.07) * wander(rng, n, 30, 0.99, 1.01)
        buzz = tone(pitch, n, 1 / np.arange(1, 30) ** 0.9, rng.uniform())
        wave += buzz * wander(rng, n, rng.uniform(0.8, 2.0), 0.15, 1.0)
    wave = formants(highpass(wave, 150), [400, 1200, 3000], [300, 700, 1500], [1.0, 0.6, 0.3])
    if swarm:
        return Event(wave, ["a swarm of bees buzzing", "bees buzzing", "a beehive humming with bees"])
    return Event(wave, ["a bee buzzing around", "a bee buzzing", "the buzz of a single bee"])


def crow(rng: Rng, n: int) -> Event:
    """Caws: hoarse voiced calls."""
    pitch, centre = rng.uniform(380, 560), rng.uniform(1200, 1700)
    wave = np.zeros(n)
    length = rng.uniform(0.25, 0.42)
    calls = int(rng.integers(1, 6))
    for start in times(rng, n, length + rng.uniform(0.15, 0.5), 0.08)[:calls]:
        m = seconds(length * rng.uniform(0.9, 1.1))
        f0 = pitch * glide(m, [0, 0.2, 0.7, 1], [0.85, 1.05, 1.0, 0.75]) * wander(rng, m, 120, 0.9, 1.1)
        rough = tone(f0, m, 1 / np.arange(1, 20) ** 0.4) * wander(rng, m, 70, 0.3, 1.0)
        rough += 0.4 * shaped_noise(rng, m, [300, 1200, 3000, 7000], [-15, 0, -5, -20])
        caw = formants(rough, [centre * 0.62, centre, centre * 1.75], [250, 300, 500], [0.6, 1.0, 0.5])
        add(wave, fade(caw * glide(m, [0, 0.15, 0.7, 1], [0, 1, 0.9, 0])), start, rng.uniform(0.75, 1.0))
    wave = reverb(rng, wave, rng.uniform(0.3, 1.0), rng.uniform(0.1, 0.4), 4000)
    return Event(wave, ["a crow cawing", "a crow", "the hoarse caw of a crow"])


def rooster(rng: Rng, n: int) -> Event:
    """Cock-a-doodle-doo: two short notes, a longer one and a long falling one."""
    pitch = rng.uniform(480, 750)
    wave = np.zeros(n)
    position = rng.uniform(0.02, 0.3)
    scale = min(rng.uniform(0.85, 1.2), (n / RATE - position) / 2.2)
    notes = [
        (0.16, [0.8, 1.0, 0.95]),
        (0.14, [0.95, 1.1, 1.0]),
        (0.3, [1.05, 1.45, 1.4]),
        (0.9, [1.2, 1.35, 1.25, 0.7]),
    ]
    for length, shape in notes:
        m = seconds(length * scale * rng.uniform(0.9, 1.1))
        f0 = pitch * glide(m, list(np.linspace(0, 1, len(shape))), shape) * wander(rng, m, 50, 0.97, 1.03)
        voice = tone(f0, m, 1 / np.arange(1, 16) ** 0.6) + 0.15 * band_noise(rng, m, 800, 4000)
        call = formants(voice, [1000, 1900, 3200], [300, 400, 600], [1.0, 0.8, 0.4])
        add(wave, call * glide(m, [0, 0.1, 0.8, 1], [0, 1, 0.8, 0]) * decay(m, 6.0), seconds(position))
        position += m / RATE + 0.04 * scale
    wave = reverb(rng, wave, rng.uniform(0.3, 1.0), rng.uniform(0.1, 0.4), 4000)
    return Event(wave, ["a rooster crowing", "a rooster", "a rooster calling at dawn"])
