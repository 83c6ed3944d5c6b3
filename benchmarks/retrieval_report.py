"""The tables and the picture of benchmarks/retrieval.py."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from siren.picture import mel_spectrogram
from siren.pretrained import missing

KINDS = {"real": "real clips", "codec": "the same after the codec", "generated": "generated from the prompt"}
_COLOURS = 32  # of the PNG: few, so that the file stays small
_COLUMNS = 150  # spectra of one panel


def report(value: dict[str, Any]) -> str:
    """Markdown: retrieval of the three kinds of sounds, each class, confusions, codec error and losses."""
    options, about = value["about"]["options"], value["about"]
    retrieval, classes = value["retrieval"], value["classes"]
    about_sounds = (
        f"{options['model']}, {len(classes)} classes, {options['seeds']} sounds each of {options['seconds']:g} s, "
        f"temperature {options['temperature']:g}, top-k {options['top_k']}, top-p {options['top_p']:g}, guidance "
        f"{options['guidance_scale']:g}, seeds from {options['first_seed']}. Prototypes of {value['references']} real "
        f"clips; {value['held_out_queries']} of the {retrieval['real']['sounds']} real queries were held out from "
        f"training (--val-fraction {options['val_fraction']:g}), the others only from their prototype. "
        f"Noise of {20 * math.log10(value['noise']):.0f} dB. "
    )
    about_classes = (
        f"All classes are of the training data, {_synthetic(classes)}, and were chosen so that the embedding tells "
        "their real and coded clips apart; the codec may have been fitted to any clip. Prompts that are captions of "
        f"the data word for word: {', '.join(value['prompts_that_are_captions']) or 'none'}. "
        f"Silent sounds among the generated, which are misses: {value['silent']}."
    )
    intervals = (
        "Intervals are Wilson's. For these prompts every sound is a trial; for such prompts all sounds of one are a "
        "single trial, because they succeed and fail together."
    )
    lines = [
        f"{about_sounds}Embedding {about['embedding'][:32]}..., {about['date'][:10]}, commit {about['commit']}.",
        "",
        about_classes,
        "",
        "| Sounds | Own class first | 95%, these prompts | 95%, such prompts | Shuffled | Own class | Others | AUC |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, end in (("retrieval", ""), ("retrieval_without_noise", ", without the noise")):
        for kind, title in KINDS.items():
            row = value[name][kind]
            these, such = ("{:.2f} to {:.2f}".format(*row[key]) for key in ("interval", "interval_by_class"))
            lines.append(
                f"| {title}{end} | {row['hits']} of {row['sounds']} ({row['top1']:.2f}) | {these} | {such} | "
                f"{row['shuffled']['top1']:.2f}, at most {row['shuffled']['largest']:.2f} | {row['own']:.3f} | "
                f"{row['other']:.3f} | {row['auc']:.3f} |"
            )
    lines += [
        "",
        f"{intervals} Shuffled: each class gets the prompt of another. Own class and Others: mean similarities.",
        "",
    ]
    lines += ["| Class | Prompt | Real | Codec | Generated |", "| --- | --- | ---: | ---: | ---: |"]
    for kind in classes:
        shares = ("{} of {}".format(*retrieval[name]["classes"][kind["label"]]) for name in KINDS)
        lines.append(f"| {kind['label']} ({kind['source']}) | {kind['prompt']} | {' | '.join(shares)} |")
    confusions = [f"{a} as {b} ({count})" for a, b, count in retrieval["generated"]["confusions"]]
    lines += ["", f"Generated sounds most often taken for another class: {', '.join(confusions) or 'none'}."]
    error = value["codec_log_mel_db"]
    lines += ["", f"Log-mel distance after the codec: mean {error['mean']:.2f} dB, median {error['median']:.2f} dB."]
    if "loss" in value:
        lines += ["", *_losses(value["loss"])]
    return "\n".join(lines) + "\n"


def _synthetic(classes: Sequence[dict[str, Any]]) -> str:
    return f"{sum(kind['source'] == 'procedural' for kind in classes)} of {len(classes)} synthetic sound"


def _losses(loss: dict[str, Any]) -> list[str]:
    books = range(len(loss["own"]))
    rows = [
        f"| {title} | {' | '.join(f'{x:.2f}' for x in loss[name])} | {np.mean(loss[name]):.3f} |"
        for title, name in (("own prompt", "own"), ("another clip's prompt", "shuffled"))
    ]
    return [
        f"Loss in nats on {loss['clips']} held-out clips ({loss['frames']} frames), by codebook:",
        "",
        f"| Prompt | {' | '.join(map(str, books))} | mean |",
        f"| --- |{' ---: |' * (len(books) + 1)}",
        *rows,
    ]


def draw_grid(rows: Sequence[tuple[str, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]], sample_rate: int) -> bytes:
    """PNG: mel spectrograms of a real, a coded and a generated sound, one row for each (prompt, real, coded, made)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError as error:
        raise missing("matplotlib", "pictures") from error

    figure = Figure(figsize=(8, 0.3 + 1.25 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 3, squeeze=False, sharex=True)
    for line, (prompt, *waves) in zip(panels, rows, strict=True):
        for panel, wave in zip(line, waves, strict=True):
            sound = np.asarray(wave, dtype=np.float32)
            sound = sound / max(float(np.abs(sound).max()), 1e-9)  # loudness is not compared
            image = mel_spectrogram(sound, sample_rate, max(1, len(sound) // _COLUMNS))
            image = image[: len(image) // 2 * 2].reshape(-1, 2, image.shape[1]).mean(axis=1)
            options = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "cmap": "magma"}
            panel.imshow(image, vmin=-80, vmax=0, extent=(0, len(sound) / sample_rate, 0, 1), **options)
            panel.set_yticks([])
            panel.tick_params(labelsize=7)
        line[0].set_title(prompt.replace("$", r"\$"), loc="left", fontsize=8)
    for panel, title in zip(panels[0], ("real", "codec", "generated"), strict=True):
        panel.set_title(title, loc="right", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("seconds", fontsize=7)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    file = io.BytesIO()
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return file.getvalue()
