"""One frame of all backbones: the error rule against float64, the cache, and independence of what must not matter."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import library

pytest.importorskip("triton")

from decode_inputs import backbone_arguments, relative_error
from siren.kernels import backbone_step as module
from siren.kernels.backbone_step import backbone_step, backbone_step_reference

SMALL = {
    "experts": 2,
    "blocks": 2,
    "rows": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 5,
    "hidden": 33,
    "prompts": 2,
    "tokens": 7,
    "capacity": 9,
    "frame": 3,
}


def copied(arguments: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The arguments with copies of the caches, which the operation writes."""
    return arguments | {name: arguments[name].clone() for name in ("keys", "values")} | changed


@pytest.fixture(params=[16, 64], ids=lambda rows: f"tiles of {rows}")
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The matrices in tiles as on a GPU, and in larger ones."""
    sizes = module.tile_sizes
    monkeypatch.setattr(module, "tile_sizes", lambda *given: {**sizes(*given), "BLOCK_N": request.param})
    return request.param


@st.composite
def shapes(take: st.DrawFn) -> dict[str, Any]:
    kv_heads = take(st.integers(1, 2))
    capacity = take(st.integers(1, 7))
    return {
        "experts": take(st.integers(1, 2)),
        "blocks": 1,
        "rows": take(st.sampled_from([1, 2, 3, 17])),
        "heads": kv_heads * take(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "head_dim": take(st.sampled_from([1, 3, 8, 17])),
        "hidden": take(st.sampled_from([1, 7, 65])),
        "prompts": take(st.integers(1, 3)),
        "tokens": take(st.sampled_from([1, 2, 5])),
        "capacity": capacity,
        "frame": take(st.integers(0, capacity - 1)),
        "seed": take(st.integers(0, 99)),
    }


@hypothesis.settings(max_examples=8)
@hypothesis.given(shape=shapes(), weights=st.sampled_from(["fp32", "bf16", "int8"]))
def test_error_rule(shape: dict[str, Any], weights: str, device: str) -> None:
    """h, and the keys and values written, err at most twice as much as PyTorch does at that precision."""
    arguments = backbone_arguments(device, weights, **shape)
    low = torch.float32 if weights == "fp32" else torch.bfloat16
    results = []
    for dtype in (None, torch.float64, low):
        given = copied(arguments)
        if dtype is None:
            h = backbone_step(**given)
        else:
            # Caches in the dtype too: the kernel's rounding of what it stores counts as its error.
            wide = {name: arguments[name].to(dtype) for name in ("inputs", "keys", "values")}
            given = arguments | wide
            h = backbone_step_reference(**given)
        now = shape["frame"]
        results.append((h, given["keys"][..., now, :], given["values"][..., now, :]))
    for name, ours, exact, plain in zip(("h", "keys", "values"), *results, strict=True):
        # On a handful of numbers PyTorch may be exact by luck: two units in the last place are free.
        allowed = max(2 * relative_error(plain, exact), 2 * torch.finfo(low).eps)
        assert relative_error(ours, exact) <= allowed, (name, relative_error(ours, exact), allowed)


def test_large_batches_and_long_pasts(tile: int, device: str) -> None:
    """33 rows take several tiles of activations, 300 frames several of keys; gate tiles cross the end of `hidden`."""
    changed = {
        "experts": 1,
        "blocks": 1,
        "rows": 33,
        "head_dim": 3,
        "hidden": 37,
        "capacity": 301,
        "frame": 299,
        "tokens": 130,
    }
    for weights in ("fp32", "bf16"):
        arguments = backbone_arguments(device, weights, **SMALL | changed | {"heads": 1, "kv_heads": 1})
        exact = backbone_step_reference(**copied(arguments, inputs=arguments["inputs"].double()))
        low = torch.float32 if weights == "fp32" else torch.bfloat16
        plain = backbone_step_reference(**copied(arguments, inputs=arguments["inputs"].to(low)))
        assert relative_error(backbone_step(**copied(arguments)), exact) <= 2 * relative_error(plain, exact)


def test_poisoned_memory(tile: int, device: str) -> None:
    """Padding of prompts, later frames of the cache and positions beyond it may hold NaN; earlier frames stay as they
    are, and of this frame every key and value is written."""
    arguments = backbone_arguments(device, "bf16", **SMALL)
    arguments["prompt_mask"][1, [2, 5]] = False
    expected = copied(arguments)
    h = backbone_step(**expected)
    poisoned = copied(arguments)
    for name in ("prompt_keys", "prompt_values"):
        poisoned[name] = arguments[name].clone()
        padding = ~arguments["prompt_mask"]
        poisoned[name].permute(2, 4, 0, 1, 3, 5)[padding] = math.nan
    for name in ("keys", "values"):
        poisoned[name][..., 3:, :] = math.nan
    poisoned["positions"] = arguments["positions"].clone()
    poisoned["positions"][4:] = math.nan
    assert torch.equal(backbone_step(**poisoned), h)
    for name in ("keys", "values"):
        assert torch.equal(poisoned[name][..., :4, :], expected[name][..., :4, :])
        assert torch.equal(expected[name][..., :3, :], arguments[name][..., :3, :])
        assert torch.equal(expected[name][..., 4:, :], arguments[name][..., 4:, :])
        assert poisoned[name][..., 4:, :].isnan().all()


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_alone_and_together(weights: str, device: str) -> None:
    """A row's h does not depend on the rows beside it, bit for bit, nor on a second run."""
    arguments = backbone_arguments(device, weights, **SMALL | {"blocks": 1, "experts": 1, "heads": 2, "rows": 18})
    h = backbone_step(**copied(arguments))
    assert torch.equal(h, backbone_step(**copied(arguments)))
    for row in (0, 7, 17):
        alone = copied(arguments, inputs=arguments["inputs"][:, [row]].contiguous())
        alone |= {name: arguments[name][:, :, [row]].contiguous() for name in ("keys", "values")}
        alone["prompt_index"] = arguments["prompt_index"][[row]]
        assert torch.equal(backbone_step(**alone)[:, 0], h[:, row])


def test_operation(device: str) -> None:
    """opcheck accepts it, and it survives torch.compile."""
    arguments = backbone_arguments(device, "bf16", **SMALL | {"blocks": 1, "experts": 1, "heads": 2})
    library.opcheck(backbone_step, tuple(copied(arguments).values()))
    eager, compiled = copied(arguments), copied(arguments)
    function = torch.compile(lambda given: backbone_step(**given) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(compiled), backbone_step(**eager) + 1)
    assert torch.equal(compiled["keys"], eager["keys"])
    assert torch.equal(compiled["values"], eager["values"])


def test_arguments(device: str) -> None:
    """What does not fit is named, before anything is launched."""
    good = backbone_arguments(device, "bf16", **SMALL)
    weights = good["weights"]
    wrong = {
        r"inputs must be contiguous float32 \[K, R, d\]": {"inputs": good["inputs"].double()},
        r"frame must be contiguous int64 \[1\]": {"frame": torch.tensor([1, 2], device=device)},
        r"values must be .*bfloat16 \[L, K, R": {"values": good["values"].float()},
        r"keys must be": {"keys": good["keys"].mT},
        r"prompt_index must be contiguous int32 \[R\] = \[3\]": {"prompt_index": good["prompt_index"].long()},
        r"prompt_mask must be contiguous bool": {"prompt_mask": good["prompt_mask"].int()},
        r"prompt_keys must be .*\[L, K, U, heads, P, head_dim\]": {"prompt_keys": good["prompt_keys"][:, :, :1]},
        r"positions has 2 rows for a cache of 9 frames": {"positions": good["positions"][:2]},
        r"weights must be the 12 tensors cross_norm, .*, not 11": {"weights": weights[:11]},
        r"cross_norm must be contiguous float32": {"weights": [weights[0].bfloat16(), *weights[1:]]},
        r"cross_query must be .*\[L, K, d, d\]": {"weights": [weights[0], weights[1][:1], *weights[2:]]},
        r"must have one dtype": {"weights": [weights[0], weights[1].float(), *weights[2:]]},
        r"scales must be one for each of no matrices, not 1": {"scales": [weights[0]]},
        r"5 heads do not fit": {"heads": 5},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            backbone_step(**copied(good) | changed)
    quantised = backbone_arguments(device, "int8", **SMALL)
    with pytest.raises(ValueError, match=r"scales must be one for each of cross_query, .*, not 0"):
        backbone_step(**copied(quantised, scales=[]))
    with pytest.raises(ValueError, match=r"the scale of cross_query must be contiguous float32 \[L, K, d\]"):
        backbone_step(**copied(quantised, scales=[quantised["scales"][2], *quantised["scales"][1:]]))
