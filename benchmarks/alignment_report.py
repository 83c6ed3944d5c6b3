"""The tables and the picture of benchmarks/alignment.py, and the intervals in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from siren.pretrained import missing

_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 1.960)  # 97.5%: 1, 2 .. 9, many
_HEAD = """# What alignment did to siren-mini

Written by `python benchmarks/alignment.py`, whose docstring says how and what it does not show."""
_PAIRS = (("anti-causal", "causal"), ("anti-causal", "dpo"), ("anti-causal", "first-two"), ("anti-causal", "guided"))

Array = npt.NDArray[np.float64]


def interval(values: Array) -> tuple[float, float]:
    """95% of the mean of values [seeds, prompts], for other prompts of the kind and other seeds.

    Two errors are added as squares: of the mean over the prompts, and of the mean over the seeds, by Student's t, since
    seeds are few. Noise of single values is in both, so the interval is rather wide. One seed: prompts alone.
    """
    seeds, prompts = values.shape
    of_prompts = _STUDENT_T[-1] * values.mean(axis=0).std(ddof=1) / prompts**0.5
    of_seeds = 0.0
    if seeds > 1:
        t = _STUDENT_T[min(seeds - 2, len(_STUDENT_T) - 1)]
        of_seeds = t * values.mean(axis=1).std(ddof=1) / seeds**0.5
    half = float(np.hypot(of_prompts, of_seeds))
    return float(values.mean()) - half, float(values.mean()) + half


class Scores:
    """The judged rewards as arrays: of an arm and a guidance scale [seeds, prompts], means over a prompt's sounds.

    Prompts that lack a reward anywhere are left out everywhere, so that all differences are of the same prompts.
    """

    def __init__(self, value: dict[str, Any]) -> None:
        rows = [(row["arm"], row["guidance_scale"], _means(row["rewards"])) for row in value["scores"]]
        known = np.isfinite([means for _, _, means in rows]).all(axis=0)
        self.prompts, self.left_out = int(known.sum()), int((~known).sum())
        self.sounds = len(value["scores"][0]["rewards"][0])
        self.scales = sorted({scale for _, scale, _ in rows})
        self.rewards: dict[tuple[str, float], Array] = {}
        for arm, scale in dict.fromkeys((arm, scale) for arm, scale, _ in rows):
            parts = [means[known] for a, s, means in rows if (a, s) == (arm, scale)]
            self.rewards[arm, scale] = np.stack(parts)

    def gain(self, arm: str, scale: float, before: tuple[str, float]) -> Array:
        """Reward minus that of the model before, [seeds, prompts]."""
        return self.rewards[arm, scale] - self.rewards[before]


def report(value: dict[str, Any]) -> str:
    """Markdown: the reward of every arm, what it gained, and the differences between arms."""
    about, scores = value["about"], Scores(value)
    options, before = about["options"], value["before"]
    lines = [
        _HEAD,
        "",
        f"{options['model']}, {options['steps']} steps of {options['prompts_per_step']} prompts with "
        f"{options['num_generations']} rollouts of {options['seconds']:g} s, {options['num_iterations']} updates a "
        f"step, learning rate {options['learning_rate']:g} down to a tenth. Judged on {scores.prompts} held-out prompts"
        + (f" ({scores.left_out} without a reward left out)" if scores.left_out else "")
        + f", {scores.sounds} sounds each, temperature {options['temperature']:g}. Reward: {value['reward'][:32]}..., "
        f"{about['date'][:10]}, commit {about['commit']}.",
        "",
        "| Arm | Judged with guidance | Seeds | Reward | Gain | 95% | Gain of each seed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (arm, scale), rewards in scores.rewards.items():
        cells = [arm, f"{scale:g}", "", f"{rewards.mean():.3f}", "", "", ""]
        if arm != before:
            gain = scores.gain(arm, scale, (before, scale))
            each = ", ".join(f"{row.mean():+.3f}" for row in gain)
            cells[2], cells[4:] = str(len(rewards)), [f"{gain.mean():+.3f}", _bounds(gain), each]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| Difference of gains | Mean | 95% |", "| --- | ---: | ---: |"]
    for first, second in _PAIRS:
        if (first, 1.0) in scores.rewards and (second, 1.0) in scores.rewards:
            difference = scores.rewards[first, 1.0] - scores.rewards[second, 1.0]
            lines.append(f"| {first} minus {second} | {difference.mean():+.3f} | {_bounds(difference)} |")
    for arm, scale in scores.rewards:
        if scale != 1 and arm == before:
            difference = scores.rewards[arm, scale] - scores.rewards[before, 1.0]
            lines.append(
                f"| guidance {scale:g} alone, without alignment | {difference.mean():+.3f} | {_bounds(difference)} |"
            )
    return "\n".join(lines) + "\n"


def draw_curves(value: dict[str, Any]) -> bytes:
    """PNG: mean held-out reward over the steps of each arm, a faint line for each seed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "pictures") from error

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    arms: dict[str, list[dict[str, Sequence[float]]]] = {}
    for name, curve in value["curves"].items():
        arms.setdefault(name.rpartition(" ")[0], []).append(curve)
    for i, (arm, curves) in enumerate(arms.items()):
        for curve in curves:
            axes.plot(curve["held_out_steps"], curve["held_out_rewards"], color=f"C{i}", alpha=0.3, linewidth=1)
        points = [dict(zip(c["held_out_steps"], c["held_out_rewards"], strict=True)) for c in curves]
        steps = sorted(set.intersection(*(set(values) for values in points)))
        mean = [np.mean([values[step] for values in points]) for step in steps]
        axes.plot(steps, mean, color=f"C{i}", linewidth=2, marker="o", label=arm)
    axes.set_xlabel("steps")
    axes.set_ylabel("reward on held-out prompts")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _means(rewards: Sequence[Sequence[float | None]]) -> Array:
    """[prompts], NaN for a prompt one of whose sounds has no reward."""
    return np.array([[np.nan if value is None else value for value in row] for row in rewards]).mean(axis=1)


def _bounds(values: Array) -> str:
    return "{:+.3f} to {:+.3f}".format(*interval(values))
