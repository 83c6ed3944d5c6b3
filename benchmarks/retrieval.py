"""Do generated sounds match their prompts? Retrieval of the prompt's class by an embedding that training never saw.

    python benchmarks/retrieval.py --recordings out/recordings --procedural out/procedural --tokens out/tokens

For each class of retrieval_classes.py, aiSFX (siren.aisfx) turns real training clips into a prototype. Three kinds of
sounds are then put to the nearest prototype: other real clips of the class, the same clips after the codec, and sounds
generated from the class's prompt. The real ones are of the validation split; where a class has too few there, training
clips, each taken out of its prototype first. All sounds are cut or padded with silence to one length.

The embedding hears 100 dB down, where digital silence differs from what any codec makes of it. So all sounds, those of
the prototypes too, get the same faint noise, 60 dB below their peaks; the scores without it are also given. A silent
sound is a miss: its noise alone would pass for rain.

Also measured: the distance of log-mel spectra that the codec leaves, and, with --tokens, the loss of every codebook on
held-out clips with their own prompts and with those of other clips.

What it does not show: sounds of other classes than those trained on, and a codec's error on sounds it was not fitted
to, since `siren train-codec` takes all clips. Settings that were chosen by this score need a report with other seeds.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import torch
import typer
from retrieval_classes import CLASSES, PromptClass
from retrieval_clips import Selection, add_noise, is_silent, read_waves, reconstruct, select, unpadded
from retrieval_loss import held_out_loss
from retrieval_report import draw_grid, report
from retrieval_scores import Prototypes, score

import siren
from siren.aisfx import SoundEvents
from siren.audio import write_files
from siren.codec_error import log_mel_distance
from siren.data.clips import ClipRecord, read_clip_folder
from siren.data.tokens import check_codec, check_encoder, open_tokens
from siren.errors import InputError
from siren.generate import fill_in, find_codec, find_encoder
from siren.pretrained import missing

_PICTURES = 6  # rows of the picture: the first classes
_HEAD = """# Do generated sounds match their prompts?

Written by `python benchmarks/retrieval.py`, whose docstring says how."""
_NOISE = 1e-3  # of a sound's peak, -60 dB


def run(
    recordings: Annotated[Path, typer.Option(help="Clip folder of `siren data recordings`.")] = Path("out/recordings"),
    procedural: Annotated[Path, typer.Option(help="Clip folder of `siren data procedural`.")] = Path("out/procedural"),
    model: Annotated[str, typer.Option(help="Name or checkpoint folder.")] = "siren-mini",
    tokens: Annotated[
        Path | None, typer.Option(help="Token set of these clips: also the loss on its held-out ones.")
    ] = None,
    classes: Annotated[
        str, typer.Option(help="Labels to use, with commas between; all of retrieval_classes.py if empty.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Sounds of each class and kind.")] = 5,
    references: Annotated[int, typer.Option(min=3, help="Most clips in a prototype.")] = 24,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Not above training's, or trained clips count as held out.")
    ] = 0.04,
    seconds: Annotated[float, typer.Option(help="Length of all sounds.")] = 4.0,
    guidance_scale: Annotated[float | None, typer.Option(help="By default, as the next three, the model's.")] = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    first_seed: Annotated[int, typer.Option(help="The generated sounds have the seeds from here on.")] = 0,
    out: Path = Path("out/retrieval.json"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: spectrograms of real, coded and generated sounds.")] = None,
    sounds: Annotated[Path | None, typer.Option(help="Folder for the generated sounds.")] = None,
) -> None:
    """Retrieval of prompt classes by real, coded and generated sounds."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    chosen = pick_classes(classes)
    check_files([path for path in (out, markdown, picture) if path is not None])
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib", "pictures")
    folders = {"recordings": recordings, "procedural": procedural}
    clips = {source: read_clip_folder(folders[source]) for source in sorted({kind.source for kind in chosen})}
    selections = [select(clips[kind.source], kind, references, seeds, val_fraction) for kind in chosen]
    events = SoundEvents.from_installed()
    network = siren.Siren.from_pretrained(model)
    given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = fill_in(network, given)
    codec = find_codec(network)
    token_set = None if tokens is None else open_tokens(tokens)
    if token_set is not None:
        check_codec(token_set, codec)
        check_encoder(token_set, find_encoder(network))

    started = time.perf_counter()
    audio = network.generate(
        [kind.prompt for kind in chosen],
        seconds=seconds,
        seed=first_seed,
        num_return_sequences=seeds,
        **sampling,
        progress=sys.stderr.isatty(),
    )
    elapsed = time.perf_counter() - started
    if sounds is not None:
        sounds.mkdir(parents=True, exist_ok=True)
        for i, kind in enumerate(chosen):
            audio[i * seeds : (i + 1) * seeds].save(sounds / f"{kind.label.replace(' ', '-')}.wav")

    measured, waves = measure(chosen, selections, codec, events, audio, seeds)
    value: dict[str, Any] = {
        "about": {**machine.describe(), "options": options | sampling, "embedding": events.identity},
        "generation_seconds": elapsed,
        "prompts_that_are_captions": known_prompts(chosen, [clip for folder in clips.values() for clip in folder]),
        **measured,
    }
    if token_set is not None:
        value["loss"] = held_out_loss(network, token_set, val_fraction)
    text = report(value)
    json_file.write(out, value)
    print(text)
    files = {}
    if markdown is not None:
        files[markdown] = f"{_HEAD}\n\n{text}".encode()
    if picture is not None:
        rows = zip(chosen[:_PICTURES], waves, strict=False)
        files[picture] = draw_grid([(kind.prompt, *sounds) for kind, sounds in rows], audio.sample_rate)
    write_files(files)


def pick_classes(labels: str) -> list[PromptClass]:
    """The classes with these labels, or all. Raises InputError for an unknown one, a repeated one, or one alone."""
    if not labels:
        return list(CLASSES)
    known = {kind.label: kind for kind in CLASSES}
    wanted = [label.strip() for label in labels.split(",")]
    for label in wanted:
        if label not in known:
            raise InputError(f"there is no class {label!r}; there are {', '.join(known)}")
    if len(wanted) < 2 or len(set(wanted)) < len(wanted):
        raise InputError(f"--classes must be two labels or more, each once, not {labels!r}")
    return [known[label] for label in wanted]


def check_files(paths: Sequence[Path]) -> None:
    """Make the folders of files that will be written. Raises InputError where that cannot be."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


def known_prompts(chosen: Sequence[PromptClass], clips: Sequence[ClipRecord]) -> list[str]:
    """Labels of the classes whose prompt is a caption of a clip word for word; training may have seen it."""
    captions = {caption.lower() for clip in clips for caption in clip.captions}
    return [kind.label for kind in chosen if kind.prompt.lower() in captions]


def measure(
    chosen: Sequence[PromptClass],
    selections: Sequence[Selection],
    codec: siren.Codec,
    events: SoundEvents,
    audio: siren.Audio,
    seeds: int,
) -> tuple[dict[str, Any], list[tuple[np.ndarray, ...]]]:
    """The scores of all three kinds of sounds and the codec's error; and one sound of each kind for each class.

    `audio` holds `seeds` sounds for each class, in the order of `chosen`.
    """
    rate, seconds = audio.sample_rate, audio.seconds
    known = [clip for selection in selections for clip in selection.references]
    queries = [clip for selection in selections for clip in selection.queries]
    labels = [i for i, selection in enumerate(selections) for _ in selection.queries]
    real = read_waves(queries, rate, seconds)
    coded = reconstruct(codec, real)
    made = list(audio.waveform[:, 0].numpy())
    known_waves = read_waves(known, rate, seconds)
    known_labels = [i for i, selection in enumerate(selections) for _ in selection.references]
    # A clip's path tells it from those of the other folder, which may have its id.
    known_paths, paths = [str(clip.path) for clip in known], [str(clip.path) for clip in queries]
    kinds = {
        "real": (real, labels, paths),
        "codec": (coded, labels, paths),
        "generated": (made, [i for i in range(len(chosen)) for _ in range(seeds)], [None] * len(made)),
    }
    names = [kind.label for kind in chosen]

    def scores(noise: float) -> dict[str, Any]:
        def embed(waves: Sequence[np.ndarray]) -> np.ndarray:
            rows = events.embed([add_noise(wave, noise) for wave in waves], rate, progress=True)
            rows[[is_silent(wave) for wave in waves]] = 0  # near to no class
            return rows

        prototypes = Prototypes(embed(known_waves), known_labels, known_paths, len(chosen))
        return {
            kind: score(prototypes.similarities(embed(waves), ids), wanted, names)
            for kind, (waves, wanted, ids) in kinds.items()
        }

    # Without the padding: silence that comes back as silence would hide the error of what is heard.
    sizes = [unpadded(wave) for wave in real]
    pairs = (
        (torch.from_numpy(a[:size]), torch.from_numpy(b[:size])) for a, b, size in zip(real, coded, sizes, strict=True)
    )
    distances = [log_mel_distance(*pair, rate) for pair in pairs]
    value = {
        "classes": [asdict(kind) for kind in chosen],
        "references": len(known),
        "held_out_queries": sum(selection.held_out for selection in selections),
        "silent": sum(map(is_silent, made)),
        "noise": _NOISE,
        "retrieval": scores(_NOISE),
        "retrieval_without_noise": scores(0.0),
        "codec_log_mel_db": {"mean": float(np.mean(distances)), "median": float(np.median(distances))},
    }
    examples = [(real[labels.index(i)], coded[labels.index(i)], made[i * seeds]) for i in range(len(chosen))]
    return value, examples


if __name__ == "__main__":
    machine.main(run)
