"""The studies of a training, gradients, convergence and task vectors, on numbers that are known beforehand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_experts, random_inputs
from safetensors.torch import load_file
from study_data import token_set
from training_runs import TINY, make_codec, make_data, settings

from siren import Siren
from siren.config import SirenConfig
from siren.errors import CheckpointError, DataError, InputError, SirenError
from siren.manifest import read_manifest
from siren.studies.convergence import convergence, read_metrics, smooth
from siren.studies.draw_training import draw_convergence, draw_gradients, draw_task_vectors
from siren.studies.gradients import KINDS, gradients, study_gradients
from siren.studies.task_vectors import make_initial, task_vectors
from siren.train import train
from siren.train.batches import Batch

PNG = b"\x89PNG\r\n\x1a\n"
# AudioGen's way: all heads on one backbone.
SINGLE = dataclasses.replace(TINY, num_experts=1, factorized_layers=0, conditioning="none", dropout=0.0)


def batch(config: SirenConfig, seed: int) -> Batch:
    codes, prompt, mask = random_inputs(config, seed, 2, 3, 5)
    return Batch(codes, prompt, mask, None)


def small(**changes: Any) -> SirenConfig:
    return dataclasses.replace(SINGLE, num_codebooks=3, codebook_size=7, **changes)


def test_angles_of_heads_that_are_the_same_or_opposed() -> None:
    """Equal heads with equal targets send equal gradients, 0 degrees; a head of the opposite sign, by a loss that is
    linear in small logits, opposite ones."""
    config = small()
    [expert] = random_experts(config, 0)
    with torch.no_grad():
        expert.heads[0].weight *= 1e-5
        expert.heads[1].weight.copy_(expert.heads[0].weight)
        expert.heads[2].weight.copy_(-expert.heads[0].weight)
    batches = [batch(config, seed) for seed in range(3)]
    for part in batches:
        part.codes[:] = part.codes[:, :1]
    found = gradients(expert, batches)
    assert (found.batches, found.clips, found.frames) == (3, 6, 30)
    for kind in KINDS:
        assert found.pairs[kind][0, 1].count == 3
        # The angle is the arc cosine of 1 - 1e-16 or so, whose root is what is seen; the logits are about 1e-5.
        assert found.pairs[kind][0, 1].quantile(0.99) < 1
        assert found.pairs[kind][0, 2].quantile(0.01) > 179
        assert found.pairs[kind][1, 2].quantile(0.01) > 179
    for name, angles in found.by_weight.items():
        assert angles["whole"] == pytest.approx(120, abs=1), name  # the mean of 0, 180 and 180


def test_angles_are_those_of_the_gradients_of_the_last_block() -> None:
    """Backward passes of each loss by itself, over a model with a residual decoder, give the same angles."""
    config = dataclasses.replace(TINY, num_experts=4, codebook_size=11, spatial_layers=2, dropout=0.0)
    expert = random_experts(config, 1)[2]
    batches = [batch(config, seed) for seed in (5, 6)]
    rows: dict[str, list[list[np.ndarray]]] = {kind: [] for kind in KINDS}
    for part in batches:
        kept: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        for i in range(3):
            expert.zero_grad()
            expert.requires_grad_(True)
            expert.losses(*part.arguments())[i].backward()
            matrices = [p.grad.double() for p in expert.spatial_blocks[-1].parameters() if p.dim() == 2]
            kept["averaged"].append(torch.cat([m.mean(0) for m in matrices]).numpy())
            kept["whole"].append(torch.cat([m.flatten() for m in matrices]).numpy())
        for kind in KINDS:
            rows[kind].append(kept[kind])

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        return math.degrees(math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    found = gradients(expert, batches)
    assert found.codebooks == [6, 7, 8]
    for kind in KINDS:
        one, two = rows[kind]
        assert found.sizes[kind] == len(one[0])
        for (i, j), pair in (((0, 1), (6, 7)), ((0, 2), (6, 8)), ((1, 2), (7, 8))):
            wanted = (angle(one[i], one[j]) + angle(two[i], two[j])) / 2
            assert found.pairs[kind][pair].mean == pytest.approx(wanted, abs=0.01)
            own = one[i] @ two[i], one[j] @ two[j]
            cosine = (one[i] @ two[j] + one[j] @ two[i]) / 2 / math.sqrt(own[0] * own[1]) if min(own) > 0 else 2
            if abs(cosine) <= 1:
                assert found.without_noise[kind][pair] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.01)
            else:
                assert math.isnan(found.without_noise[kind][pair])
        for i, j in enumerate(found.codebooks):
            assert found.same_head[kind][j].mean == pytest.approx(angle(one[i], two[i]), abs=0.01)
    assert draw_gradients(found).startswith(PNG)


def test_gradients_of_a_checkpoint(tmp_path: Path) -> None:
    """From the folders: the same numbers for the same seed, and one line for what does not fit."""
    inputs = make_data(tmp_path)
    torch.manual_seed(0)
    for name, config in (("single", SINGLE), ("apart", dataclasses.replace(TINY, num_experts=12))):
        model = Siren(config)
        model.set_decode_embeddings(make_codec().decode_embeddings())
        model.save_pretrained(tmp_path / name, inputs["codec"])
    options: dict[str, Any] = {"batches": 2, "batch_size": 2, "seconds": 0.1, "val_fraction": 0.5}
    found = study_gradients(tmp_path / "single", inputs["data"], **options)
    assert found.codebooks == list(range(12)) and found.clips == 4
    again = study_gradients(tmp_path / "single", inputs["data"], **options)
    assert again.without_noise["whole"][0, 1] == pytest.approx(found.without_noise["whole"][0, 1], nan_ok=True)
    assert again.overall("averaged").mean == found.overall("averaged").mean
    assert len(found.numbers()["averaged"]["pairs"]) == 66
    for model, changes, message in (
        ("apart", {}, "one head"),
        ("single", {"expert": 1}, "no expert 1"),
        ("single", {"batches": 1}, "batches"),
        ("single", {"val_fraction": 0.0}, "val_fraction"),
    ):
        with pytest.raises(InputError, match=message):
            study_gradients(tmp_path / model, inputs["data"], **options | changes)
    make_codec(1).save_pretrained(tmp_path / "other-codec")
    Siren(SINGLE).save_pretrained(tmp_path / "other", tmp_path / "other-codec")
    with pytest.raises(DataError, match="another codec"):
        study_gradients(tmp_path / "other", inputs["data"], **options)


def write_run(folder: Path, losses: dict[int, list[list[float]]], validation: bool = False, **values: Any) -> Path:
    """A run's settings and metrics: for the first codebook of each expert, the losses of each of its codebooks."""
    folder.mkdir()
    config = dataclasses.replace(TINY, num_codebooks=sum(map(len, losses.values())), num_experts=1).to_dict()
    run = {"format_version": 1, "settings": {"config": config, **values}, "prompt_encoder": None}
    (folder / "run.json").write_text(json.dumps(run))
    for first, rows in losses.items():
        lines = []
        for i, step in enumerate(zip(*rows, strict=True)):
            record = {"step": i + 1, "frames": 10 + i % 2}
            lines.append(record | {f"ce_codebook_{first + j}": loss for j, loss in enumerate(step)})
        if validation:
            held_out = {f"val_ce_codebook_{first + j}": 1.0 + first + j for j in range(len(rows))}
            lines.append({"step": len(lines), **held_out})
        (folder / f"expert_{first}").mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"expert_{first}" / "metrics.jsonl").write_text(text + '{"step": 9')  # a kill cut this one short
    return folder


def test_losses_that_fall_as_they_are_made(tmp_path: Path) -> None:
    """Steps down at known updates, over two experts: final losses, when they are near, ratio and mean."""
    falls = {0: [[4.0] * 10 + [1.0] * 30], 1: [[6.0] * 20 + [2.0] * 20, [8.0] * 30 + [3.0] * 10]}
    found = convergence(write_run(tmp_path / "run", falls, validation=True), window=1)
    assert found.final == {0: 1.0, 1: 2.0, 2: 3.0}
    assert found.reached == {0: 11, 1: 21, 2: 31}
    assert found.loss_ratio == 3 and found.loss_mean == 2
    values = found.numbers()
    assert (values["val_loss_ratio"], values["val_loss_mean"]) == (3, 2)
    assert [part["updates_within_5%"] for part in values["codebooks"]] == [11, 21, 31]
    assert draw_convergence(found).startswith(PNG)
    smoothed = convergence(tmp_path / "run", window=5)
    assert smoothed.reached == {0: 15, 1: 25, 2: 35} and smoothed.final == found.final


def test_a_smoothed_loss_is_the_mean_over_the_frames() -> None:
    """Of the last updates; a window longer than the run is the run."""
    rows = [(1, 5.0, 1.0), (2, 1.0, 3.0), (3, 2.0, 1.0)]
    updates, losses = smooth(rows, 2)
    assert updates.tolist() == [2, 3] and losses == pytest.approx([2.0, 1.25])
    assert smooth(rows, 9)[1] == pytest.approx([2.0])


def test_losses_as_shares_of_the_entropy(tmp_path: Path) -> None:
    """A codebook that says one of two codes evenly has ln 2, one that always says the same none."""
    codes = np.zeros((64, 12), int)
    codes[::2, 0] = 1023
    codes[:, 1] = np.arange(64)
    tokens = token_set(tmp_path / "tokens", [codes])
    run = write_run(tmp_path / "run", {0: [[1.0] * 3 for _ in range(12)]}, codec=tokens.codec_identity)
    found = convergence(run, tokens)
    assert found.entropy is not None
    assert [found.entropy[j] for j in range(3)] == pytest.approx([math.log(2), math.log(64), 0])
    shares = [part.get("final_loss_over_entropy") for part in found.numbers()["codebooks"]]
    assert shares[:2] == pytest.approx([1 / math.log(2), 1 / math.log(64)]) and shares[2] is None
    assert draw_convergence(found).startswith(PNG)
    other = write_run(tmp_path / "other", {0: [[1.0] * 3 for _ in range(12)]}, codec="another")
    with pytest.raises(DataError, match="another codec"):
        convergence(other, tokens)


def test_metrics_that_do_not_serve(tmp_path: Path) -> None:
    """No run, a run without metrics, damaged ones, losses that are no numbers, a window longer than the run."""
    with pytest.raises(CheckpointError, match="training run"):
        convergence(tmp_path)
    with pytest.raises(DataError, match="nothing was trained"):
        empty = write_run(tmp_path / "empty", {0: [[1.0]]})
        (empty / "expert_0" / "metrics.jsonl").unlink()
        convergence(empty)
    run = write_run(tmp_path / "run", {0: [[1.0, 2.0]]})
    with pytest.raises(InputError, match="window"):
        convergence(run, window=3)
    path = run / "expert_0" / "metrics.jsonl"
    for line, message in (
        ("{", "line 1"),
        ('{"loss": 1}', "line 1"),
        ('{"step": 1, "ce_codebook_0": NaN}', "no number"),
        ('{"step": 1, "ce_codebook_0": "1"}', "no number"),
        ('{"step": 1, "frames": 0, "ce_codebook_0": 1}', "frames"),
        ('{"step": 1}', "no losses"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            convergence(run)
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path / "none")


def save_model(folder: Path, change: Any) -> Path:
    """A checkpoint of TINY whose experts have the weights change(expert, name, tensor) of one first expert."""
    torch.manual_seed(0)
    model = Siren(TINY)
    first = {name: tensor.clone() for name, tensor in model.experts[0].state_dict().items()}
    for i, expert in enumerate(model.experts):
        expert.load_state_dict({name: change(i, name, tensor) for name, tensor in first.items()})
    model.save_pretrained(folder)
    return folder


def test_task_vectors_of_known_angles(tmp_path: Path) -> None:
    """Experts 0 and 1 go the same way by different lengths, expert 2 the opposite one but for the heads, across."""
    ways = {f"heads.{i}.weight": torch.zeros(1024, TINY.dim) for i in range(TINY.codes_per_expert)}
    across = {name: way.clone() for name, way in ways.items()}
    for name in ways:
        ways[name][::2], across[name][1::2] = 1.0, 1.0

    def change(i: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ways:
            return tensor + (0.5 * across[name] if i == 2 else (i + 1) * ways[name])
        way = torch.linspace(-1, 1, tensor.numel()).view(tensor.shape) + 0.1
        return tensor + (-way if i == 2 else (i + 1) * way)

    initial = save_model(tmp_path / "initial", lambda i, name, tensor: tensor)
    trained = save_model(tmp_path / "trained", change)
    found = task_vectors(trained, initial)
    assert found.same_start and found.experts == [0, 4, 8] and found.steps is None
    shapes = Siren(TINY).experts[0].state_dict().items()
    trainable = [tensor.numel() for name, tensor in shapes if "codebook." not in name and "dac_out" not in name]
    assert sum(layer.numbers for layer in found.layers) == sum(trainable)
    for layer in found.layers:
        other = 0.0 if layer.module == "Classifier" else -1.0
        wanted = {(0, 4): 1.0, (0, 8): other, (4, 8): other}
        assert layer.pairs == pytest.approx(wanted, abs=1e-4), layer.name
    modules = found.numbers()["modules"]
    assert modules["Classifier"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert modules["Backbone"]["mean"] == pytest.approx(-1 / 3, abs=1e-4)
    assert set(modules["RVQ decoder"]["by_kind"]) == {"attention", "feed-forward", "norm", "other"}
    assert draw_task_vectors(found).startswith(PNG)


def test_layers_that_did_not_change_have_no_cosine(tmp_path: Path) -> None:
    """NaN, which no mean counts, and a picture all the same."""
    initial = save_model(tmp_path / "initial", lambda i, name, tensor: tensor)
    trained = save_model(tmp_path / "trained", lambda i, name, t: t + (i + 1.0 if name.startswith("spatial") else 0.0))
    found = task_vectors(trained, initial)
    for layer in found.layers:
        assert math.isnan(layer.mean) == (layer.module != "Backbone")
    assert found.numbers()["modules"]["Backbone"]["mean"] == pytest.approx(1)
    assert draw_task_vectors(found).startswith(PNG)


def test_task_vectors_of_runs(tmp_path: Path) -> None:
    """An ordinary run's experts start apart from weights that are drawn again: those of update 0. A run from
    `make_initial` starts from one point; its states are those that were trained."""
    inputs = make_data(tmp_path)
    plain = settings(inputs, tmp_path / "plain", experts=[0, 2], max_steps=4, save_every=2, learning_rate=1e-12)
    train(plain)
    found = task_vectors(tmp_path / "plain")
    assert not found.same_start and found.experts == [0, 8]
    assert (found.steps, found.early_steps) == ([4, 4], [2, 2])
    assert all(layer.change < 1e-6 for layer in found.layers)  # hardly a rate: nothing moved from what was drawn

    make_initial(tmp_path / "initial", TINY, inputs["codec"], seed=3, prompt_encoder="minilm")
    files = [load_file(entry.path) for entry in read_manifest(tmp_path / "initial").experts]
    assert all(torch.equal(files[0][name], other[name]) for other in files for name in files[0])
    with pytest.raises(CheckpointError, match="exists"):
        make_initial(tmp_path / "initial", TINY, inputs["codec"])
    same = settings(inputs, tmp_path / "same", experts="all", max_steps=4, save_every=2, config=None)
    train(dataclasses.replace(same, init_from=tmp_path / "initial"))
    found = task_vectors(tmp_path / "same", tmp_path / "initial")
    assert found.same_start and len(found.layers[0].pairs) == 3
    assert all(layer.early is not None for layer in found.layers)
    assert all(layer.change > 0 for layer in found.of("Classifier"))
    assert draw_task_vectors(found).startswith(PNG)
    with pytest.raises(InputError, match="init_from"):
        task_vectors(tmp_path / "same")
    make_initial(tmp_path / "other", TINY, inputs["codec"], seed=4)
    with pytest.raises(InputError, match="other weights"):
        task_vectors(tmp_path / "same", tmp_path / "other")


def test_task_vectors_without_a_pair(tmp_path: Path) -> None:
    """One expert, no initial weights, other sizes, no folder."""
    torch.manual_seed(0)
    Siren(SINGLE).save_pretrained(tmp_path / "single")
    with pytest.raises(InputError, match="pair"):
        task_vectors(tmp_path / "single", tmp_path / "single")
    Siren(TINY).save_pretrained(tmp_path / "many")
    with pytest.raises(InputError, match="initial weights"):
        task_vectors(tmp_path / "many")
    with pytest.raises(InputError, match="different sizes"):
        task_vectors(tmp_path / "many", tmp_path / "single")
    with pytest.raises(SirenError, match="none"):
        task_vectors(tmp_path / "none")
    inputs = make_data(tmp_path)
    train(settings(inputs, tmp_path / "run", max_steps=1))
    with pytest.raises(InputError, match="1 trained expert;"):
        task_vectors(tmp_path / "run")
