"""The `siren` command. An error of the user's is one line on stderr and exit code 2, with nothing written.

Each command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_align, cli_convert, cli_critic, cli_data, cli_evaluate, cli_study, cli_train
from .errors import InputError, MissingDependencyError, SirenError
from .manifest import MINI

if TYPE_CHECKING:
    from .audio import Audio
    from .rerank import Reward

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_study.app, name="study")
app.command()(cli_train.train)
app.command()(cli_train.train_codec)
app.command()(cli_train.train_aligner)
app.command()(cli_align.align)
app.command()(cli_critic.train_critic)
app.command()(cli_convert.convert_embedder)
app.command()(cli_evaluate.evaluate)
app.command()(cli_evaluate.compare_evaluations)

_BESIDE = "<beside>"  # --picture without a path


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="PROMPT", help="What to hear, or a .jsonl file with --out-dir.")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT.wav]", help="The .wav or .flac file to write.")] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder.")] = MINI,
    seconds: Annotated[float | None, typer.Option(help="Length of a clip; by default the model's, else 6.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same sound; clip i gets seed + i.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the most probable code; by default the model's, else 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k most probable codes; 0: all; by default the model's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable that reach p; by default the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Above 1: follow the prompt more closely; by default the model's, else 1.")
    ] = None,
    n: Annotated[int, typer.Option(help="Clips for each prompt.")] = 1,
    best_of: Annotated[
        int, typer.Option(metavar="N", help="Generate N clips for each prompt and write the best; --n of them.")
    ] = 1,
    rerank: Annotated[
        str | None, typer.Option(metavar="REWARD", help="What the best is: as --reward of align; by default aligner.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="[PATH.png]", help="Draw the sound too; without a path, beside it.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option(help="Folder for the clips of a .jsonl file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Clips decoded together: more are faster and need more memory.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in --out-dir.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do part I of N of a .jsonl file, such as 2/4; others do the rest."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the clips that are finished in --out-dir.")] = False,
    backend: Annotated[str, typer.Option(help="auto, cpu, reference, triton or cuda.")] = "auto",
    weights: Annotated[str, typer.Option(help="fp32, bf16, int8, or fp8 on cuda.")] = "bf16",
    threads: Annotated[int | None, typer.Option(help="Threads of the cpu backend; all cores by default.")] = None,
    codec: Annotated[str | None, typer.Option(help="Codec folder; the checkpoint's by default.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Prompt encoder; the checkpoint's by default.")] = None,
) -> None:
    """Generate sound from a prompt, or from each line of a .jsonl file.

    A line of the file is {"prompt": "..."} and, if wanted, "id" (it names the files), "seed" and "seconds".
    With --best-of or --rerank the clips of a prompt are in the order of their scores, the best first. After a stop the
    same command with --resume does the rest. Shards share a folder or not: each has its own list of results.
    """
    from .generate import MAX_CLIPS, check_whole, fill_in
    from .generate import generate as generate_audio
    from .jsonl import generate_jobs, read_jobs
    from .manifest import read_manifest
    from .sampling import SamplingSettings
    from .shard import parse_shard

    part = (1, 1) if shard is None else parse_shard(shard)
    check_whole("--n", n, MAX_CLIPS)
    check_whole("--best-of", best_of, MAX_CLIPS)
    if 1 < best_of < n:
        raise InputError(f"--best-of {best_of} is less than the {n} clips of --n")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("pictures need matplotlib: pip install 'siren[pictures]'")
    if out_dir is None and (resume or shard is not None):
        raise InputError("--resume and --shard are for a .jsonl file of prompts with --out-dir")
    if out_dir is None:
        targets = _check_out(source, out, picture, n)
    elif out is not None or picture not in (None, _BESIDE):
        raise InputError("with --out-dir name no other file; clips and pictures are named by the ids of the lines")

    manifest = read_manifest(model)
    given = {"seconds": seconds, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = fill_in(manifest, given | {"guidance_scale": guidance_scale})
    reward = _reward(rerank or "aligner") if best_of > 1 or rerank is not None else None
    if out_dir is not None:
        jobs = read_jobs(source, options.pop("seconds"), seed, n, best_of)
        results = generate_jobs(
            jobs,
            manifest,
            out_dir,
            SamplingSettings(**options),
            count=n,
            candidates=best_of,
            rerank=reward,
            batch_size=batch_size,
            codec=codec,
            encoder=encoder,
            backend=backend,
            weights=weights,
            threads=threads,
            pictures=picture is not None,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
            shard=part,
            resume=resume,
        )
        typer.echo(str(results))
        return
    audio = generate_audio(
        manifest,
        source,
        **options,
        seed=seed,
        num_return_sequences=max(n, best_of),
        rerank=reward,
        progress=sys.stderr.isatty(),
        codec=codec,
        encoder=encoder,
        backend=backend,
        weights=weights,
        threads=threads,
        batch_size=batch_size,
    )
    if reward is not None and all(map(math.isnan, audio.scores)):
        raise InputError(f"the reward gave none of the {len(audio)} clips a score, so none is the best")
    _save(audio[:n], targets)
    for paths in targets:
        typer.echo("\n".join(map(str, paths)))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    preset: Annotated[str, typer.Option(help="tiny, siren-1.6b or siren-3.1b.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Make a checkpoint with random weights, to try everything but the sound: what it generates is noise."""
    from .demo import write_demo

    write_demo(folder, preset, seed, dtype, overwrite)
    typer.echo(f"{folder}: preset {preset}, random weights; it was not trained, so what it generates is noise")


@app.command()
def convert_codec(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS.pth", help="Descript's file, e.g. weights_16khz.pth.")],
    folder: Annotated[Path, typer.Argument(help="The codec folder to write.")],
) -> None:
    """Turn Descript's own codec weights into a codec folder. Nothing in the file is run."""
    from .codec import Codec

    codec = Codec.from_descript(weights)
    codec.save_pretrained(folder)
    typer.echo(f"{folder}: {codec!r}")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what this installation can do: versions, CPU paths, GPU, optional packages, and the backend "auto" picks."""
    from .env import environment, report

    values = environment()
    typer.echo(json.dumps(values, indent=2) if as_json else report(values))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, 2 for an error of the user's, or 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        from . import __version__

        print(f"siren {__version__}")
        return
    try:
        code = app(_picture_path(given) or ["--help"], prog_name="siren", standalone_mode=False)
    except SirenError as error:
        _fail(str(error), getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # PyTorch's is a RuntimeError
            _fail("not enough memory: ask for fewer or shorter clips, or use a smaller --batch-size or model")
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, of ~ and no such user
            _fail(f"a path begins with ~ of a user that does not exist ({error})")
        if not hasattr(error, "format_message"):  # click's errors of usage; typer may carry a click of its own
            raise
        _fail(error.format_message())
    if code == 130:
        print("error: interrupted", file=sys.stderr)
    if code:
        raise SystemExit(code)


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _picture_path(arguments: list[str]) -> list[str]:
    """Give `--picture` its path where none that ends in .png follows: typer has no options with optional values."""
    given = []
    for i, argument in enumerate(arguments):
        given.append(argument)
        if argument == "--picture" and not "".join(arguments[i + 1 : i + 2]).lower().endswith(".png"):
            given.append(_BESIDE)
    return given


def _check_out(prompt: str, out: Path | None, picture: str | None, n: int) -> list[list[Path]]:
    """The files of each clip, sound first, of a single prompt; all are checked before any work is done."""
    named_file = prompt.lower().endswith(".jsonl")
    if out is None:
        raise InputError(f"nowhere to write to: add {'--out-dir FOLDER' if named_file else 'OUT.wav'}")
    if named_file and _expanded(Path(prompt)).is_file():
        raise InputError(f"{prompt} is a file of prompts: give --out-dir FOLDER in place of {out}")
    if out.suffix.lower() not in (".wav", ".flac"):
        raise InputError(f"{out} must end in .wav or .flac")
    targets = [[path] for path in _numbered(out, n)]
    if picture == _BESIDE:
        targets = [[path, path.with_suffix(".png")] for [path] in targets]
    elif picture is not None:
        targets = [[path, drawn] for [path], drawn in zip(targets, _numbered(Path(picture), n), strict=True)]
    from .jsonl import check_folder

    for folder in {path.parent for path in targets[0]}:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; make it first")
        check_folder(folder)
    for path in (path for paths in targets for path in paths):
        if path.is_dir():
            raise InputError(f"{path} is a folder")
    return targets


def _reward(name: str) -> Reward:
    """The reward of that name; what it raises when it is called is an error of whoever named it."""
    from .align.rewards import load_reward

    function = load_reward(name)

    def reward(*given: Any, **more: Any) -> Sequence[float | None]:
        try:
            return function(*given, **more)
        except SirenError:
            raise
        except Exception as error:
            raise InputError(f"the reward {name!r} failed ({type(error).__name__}: {error})") from error

    reward.identity = str(getattr(function, "identity", name))  # type: ignore[attr-defined]
    return reward


def _numbered(path: Path, n: int) -> list[Path]:
    """The path itself, or rain-0.wav, rain-1.wav and so on, as `Audio.save` names them."""
    path = _expanded(path)
    return [path] if n == 1 else [path.with_stem(f"{path.stem}-{i:0{len(str(n - 1))}}") for i in range(n)]


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~ of a user that does not exist
        raise InputError(f"{path} is not a path ({error})") from error


def _save(audio: Audio, targets: list[list[Path]]) -> None:
    """Write sound and pictures of every clip, all or none."""
    from .audio import write_files
    from .picture import draw_picture

    contents = {}
    for clip, (sound, *drawn) in zip(audio, targets, strict=True):
        contents[sound] = clip._encode(0, sound.suffix[1:].upper())
        contents |= {
            path: draw_picture(clip.waveform[0, 0].numpy(), clip.sample_rate, clip.prompts[0]) for path in drawn
        }
    write_files(contents)


if __name__ == "__main__":
    main()
