r"""What alignment does to siren-mini: several directions and losses, several seeds, judged on prompts held out from it.

    siren data procedural out/prompts --clips 320 --scenes 0 --seed 5 \
        --labels "rain,church bell,siren,wolf,helicopter,bird,telephone,thunder"
    siren data tokenize out/prompts --out out/prompt-tokens --codec siren/models/siren-mini/codec --seconds 4
    python benchmarks/alignment.py --workers 2

The prompts are captions of synthetic sounds of eight kinds, the first of benchmarks/retrieval.py. A fifth of the clips
gives the training prompts; the captions of the others that are not among them are held out.

Every arm is `siren align` with the same steps, prompts, rollouts and learning rate; an arm says what differs:

    anti-causal   expert 0 learns (the paper's direction)
    first-two     experts 0 and 1 (its table 7)
    causal        expert 5, the last one
    dpo           expert 0 by direct preference optimisation on the best and the worst of each group
    guided        expert 0, rollouts drawn with classifier-free guidance and the objective computed on that distribution

Then the model before and the models after generate the same held-out prompts with the same noise, without guidance and,
for the arms anti-causal and guided, with it.
The reward that is reported is the one that was optimised (the aligner of siren-mini): the tables say whether it was
raised, not whether a listener agrees; benchmarks/retrieval.py --model asks another embedding.

Held-out prompts are other captions of the same eight kinds, often near the training ones in words. Kinds, temperature,
rate and steps were settled by trials with other seeds, also by their held-out rewards. The shipped sampling settings of
siren-mini (with top-k, 4 s) are not judged here.

Intervals are 95%, over prompts and, where there are several, over seeds (alignment_report.interval). All differences
are paired: same prompts, same noise. What was finished by an earlier call with the same --out is not done again; other
options need another --out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import torch
import typer
from alignment_report import draw_curves, report
from tqdm import tqdm

from siren.align import align
from siren.align.prompts import PromptSet, rollout_seeds
from siren.align.rewards import RewardMix, load_reward
from siren.align.rollout import roll_out
from siren.align.settings import AlignSettings
from siren.audio import write_files
from siren.data.processes import worker_pool
from siren.data.tokens import open_tokens, split
from siren.errors import InputError
from siren.generate import find_codec
from siren.manifest import MINI, read_manifest
from siren.pretrained import missing
from siren.sampler import Sampler
from siren.train.run import fingerprint

ARMS: dict[str, dict[str, Any]] = {
    "anti-causal": {"experts": (0,)},
    "causal": {"experts": (5,)},
    "dpo": {"experts": (0,), "loss": "dpo"},
    "first-two": {"experts": (0, 1)},
    "guided": {"experts": (0,)},  # with --guidance-scale
}
GUIDED = ("anti-causal", "guided")  # arms that are judged with guidance too
BEFORE = "before"
_JUDGED = 1 << 40  # in place of a run's seed, for the seeds of judging
_OF_A_CALL = ("tokens", "out", "model", "reward", "arms", "seeds", "workers", "results", "markdown", "picture")


def run(
    tokens: Annotated[Path, typer.Option(help="Token set whose captions are the prompts.")] = Path("out/prompt-tokens"),
    out: Annotated[Path, typer.Option(help="Folder for runs and scores.")] = Path("out/alignment"),
    model: Annotated[str, typer.Option(help="Checkpoint to begin with.")] = MINI,
    reward: Annotated[str, typer.Option(help="As --reward of `siren align`.")] = "aligner",
    arms: Annotated[str, typer.Option(help="With commas between.")] = ",".join(ARMS),
    seeds: Annotated[str, typer.Option(help="Of the runs, with commas between.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1)] = 36,
    prompts_per_step: int = 8,
    num_generations: int = 8,
    num_iterations: int = 2,
    learning_rate: Annotated[float, typer.Option(help="After 2 steps of warm-up; a cosine down to a tenth.")] = 3e-4,
    seconds: Annotated[float, typer.Option(help="Of rollouts and of the sounds that are judged.")] = 2.0,
    temperature: Annotated[float, typer.Option(help="Of rollouts and of the sounds that are judged.")] = 0.8,
    guidance_scale: Annotated[float, typer.Option(help="Of the arm `guided`, and for judging with guidance.")] = 3.0,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips whose captions are held out.")] = 0.8,
    sounds: Annotated[int, typer.Option(min=1, help="Judged sounds of each held-out prompt.")] = 8,
    eval_every: Annotated[int, typer.Option(help="Steps between the points of the curves.")] = 6,
    eval_prompts: Annotated[int, typer.Option(help="Held-out prompts of those and of judging, at most.")] = 1000,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 1,
    results: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: reward curves, as figure 5 of the paper.")] = None,
) -> None:
    """Align by each arm and seed, then judge on held-out prompts."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    chosen = [name.strip() for name in arms.split(",")]
    for name in chosen:
        if name not in ARMS:
            raise InputError(f"--arms: there is {', '.join(ARMS)}, not {name!r}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds must be whole numbers with commas between, not {seeds!r}") from None
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib", "pictures")

    def settings(arm: str, seed: int) -> AlignSettings:
        values: dict[str, Any] = {"guidance_scale": guidance_scale if arm == "guided" else 1.0} | ARMS[arm]
        values["temperature"] = temperature
        return AlignSettings(
            model, tokens, out / f"{arm}-{seed}", [reward], val_fraction=val_fraction, seed=seed, max_steps=steps,
            prompts_per_step=prompts_per_step, num_generations=num_generations, num_iterations=num_iterations,
            learning_rate=learning_rate, warmup_steps=2, min_lr_ratio=0.1, seconds=seconds,
            eval_every=eval_every, eval_prompts=eval_prompts, eval_generations=2, save_every=10, keep=1,
            device="cpu", threads=1, tensorboard=False, progress=False, **values,
        )  # fmt: skip

    check_folder(out, options, tokens, model, reward)
    runs = {(arm, seed): settings(arm, seed) for seed in numbers for arm in chosen}
    jobs = {f"align {arm} {seed}": (align_one, (given,)) for (arm, seed), given in runs.items()}
    checkpoints = {(arm, seed): Path(given.out) / "checkpoint" for (arm, seed), given in runs.items()}
    with worker_pool(workers, torch.set_num_threads, 1) as pool:
        run_all(pool, jobs, "aligning")
        scales = [1.0, guidance_scale] if set(chosen) & set(GUIDED) else [1.0]
        judge = {(BEFORE, -1, scale): (Path(model) if Path(model).is_dir() else model) for scale in scales}
        judge |= {(*key, 1.0): folder for key, folder in checkpoints.items()}
        judge |= {(*key, guidance_scale): folder for key, folder in checkpoints.items() if key[0] in GUIDED}
        given = {"reward": reward, "val_fraction": val_fraction, "seconds": seconds, "sounds": sounds}
        given |= {"temperature": temperature, "tokens": tokens, "most": eval_prompts, "out": out}
        tasks = {
            f"judge {arm} {seed} {scale:g}": (held_out_rewards, (folder, scale, given))
            for (arm, seed, scale), folder in judge.items()
        }
        scores = dict(zip(judge, run_all(pool, tasks, "judging").values(), strict=True))

    value = {
        "about": {**machine.describe(), "options": options},
        "reward": RewardMix([load_reward(reward)]).identities[0],
        "curves": {f"{arm} {seed}": curve(Path(given.out)) for (arm, seed), given in runs.items()},
        "before": BEFORE,
        "scores": [
            {"arm": arm, "seed": seed, "guidance_scale": scale, "rewards": rewards}
            for (arm, seed, scale), rewards in scores.items()
        ],
    }
    text = report(value)
    json_file.write(results or out / "alignment.json", value)
    print(text)
    if markdown is not None:
        write_files({markdown: text.encode()})
    if picture is not None:
        write_files({picture: draw_curves(value)})


def check_folder(out: Path, options: dict[str, Any], tokens: Path, model: str, reward: str) -> None:
    """Note what the results in `out` depend on. Raises InputError if those that are there depend on something else."""
    token_set, manifest = open_tokens(tokens), read_manifest(model)
    shared = {name: value for name, value in options.items() if name not in _OF_A_CALL}
    shared |= {"tokens": fingerprint(token_set, np.arange(len(token_set)))}
    shared |= {"model": [entry.sha256 for entry in manifest.experts], "codec": find_codec(manifest).identity}
    shared |= {"reward": RewardMix([load_reward(reward)]).identities}
    before = json_file.read(out / "options.json")
    changed = sorted(name for name in shared if before is not None and before.get(name) != shared[name])
    if changed:
        raise InputError(f"{out} holds runs with other {', '.join(changed)}; choose another --out")
    json_file.write(out / "options.json", shared)


def run_all(pool: ProcessPoolExecutor, jobs: dict[str, tuple[Any, tuple[Any, ...]]], title: str) -> dict[str, Any]:
    """The results of all jobs, in their order. The first error is raised after the jobs under way have ended."""
    futures: dict[str, Future[Any]] = {name: pool.submit(work, *given) for name, (work, given) in jobs.items()}
    names = {future: name for name, future in futures.items()}
    with tqdm(total=len(jobs), desc=title, disable=not sys.stderr.isatty()) as bar:
        for future in as_completed(names):
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
                raise future.exception()  # type: ignore[misc]
            bar.set_postfix_str(names[future])
            bar.update()
    return {name: future.result() for name, future in futures.items()}


def align_one(settings: AlignSettings) -> None:
    """A run, unless it is through."""
    if not (Path(settings.out) / "checkpoint").exists():
        align(settings)


def held_out_rewards(folder: str | Path, guidance_scale: float, given: dict[str, Any]) -> list[list[float | None]]:
    """The reward of each sound of each held-out prompt, [prompts, sounds]; None for a sound without one.

    Kept in a file beside the runs, under what it depends on.
    """
    manifest = read_manifest(folder)
    depends = {"experts": [entry.sha256 for entry in manifest.experts], "guidance_scale": guidance_scale}
    depends |= {name: str(value) for name, value in given.items() if name != "out"}
    name = folder if isinstance(folder, str) else folder.parent.name
    path = given["out"] / f"scores-{name}-{guidance_scale:g}.json"
    kept = json_file.read(path)
    if kept is not None and kept["depends"] == depends:
        return list(kept["rewards"])
    tokens, codec = open_tokens(given["tokens"]), find_codec(manifest)
    training, validation = split(tokens, given["val_fraction"])
    prompts = PromptSet(tokens, validation, without=PromptSet(tokens, training)).some(given["most"])
    reward = RewardMix([load_reward(given["reward"])])
    frames = round(given["seconds"] * codec.sample_rate / codec.hop_length)
    seeds = [seed for place in range(len(prompts)) for seed in rollout_seeds(given["sounds"], _JUDGED, 0, place)]
    rollouts = roll_out(
        Sampler(manifest, "auto", "fp32", 1),
        codec,
        reward,
        prompts,
        seeds,
        frames,
        64,
        given["temperature"],
        guidance_scale,
    )
    values = rollouts.rewards.view(len(prompts), -1).tolist()
    rewards = [[value if np.isfinite(value) else None for value in row] for row in values]
    json_file.write(path, {"depends": depends, "prompts": [prompt.text for prompt in prompts], "rewards": rewards})
    return rewards


def curve(folder: Path) -> dict[str, Sequence[float]]:
    """Of a run: its steps' mean rewards, and the held-out ones with the steps they were measured at."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_reward"] for line in lines if "eval_reward" in line}
    return {
        "rewards": [line["reward"] for line in lines if "reward" in line],
        "held_out_steps": list(held_out),
        "held_out_rewards": list(held_out.values()),
    }


if __name__ == "__main__":
    machine.main(run)
