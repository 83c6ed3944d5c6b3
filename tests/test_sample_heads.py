"""One draw in one kernel: the code its logits give under the contract, for every setting, and everything it updates."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from siren.kernels import sample_heads as module
from siren.kernels.draw import draw as device_draw
from siren.kernels.gumbel_noise import gumbel_noise_reference
from siren.kernels.sample_heads import sample_heads, sample_heads_reference
from torch import library

from siren.sampling import SamplingSettings, draw


def arguments_of(device: str, B: int = 3, V: int = 11, d: int = 10, K: int = 2, **changed: Any) -> dict[str, Any]:
    """Random arguments of a plain draw of B sequences."""
    generator = torch.Generator().manual_seed(B + V)
    guided = changed.get("guidance", 1.0) != 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    R = 2 * B if guided else B
    seeds = torch.arange(B) + 5
    values = {
        "x": random(R, d),
        "norm": 1 + 0.1 * random(d),
        "head": random(V, d),
        "scale": None,
        "noise": gumbel_noise_reference(seeds, seeds, 1, V)[:, 0].to(device),
        "forced": None,
        "tables": random(K, 3, V, d)[:, 1],
        "total": random(K, B, d),
        "start": random(K, R, d),
        "condition": random(K, R, d),
        "conditioning": "accumulated",
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "guidance": 1.0,
        "eps": 1e-5,
    }
    if changed.get("temperature") == 0:
        values["noise"] = None
    return values | changed


def copied(arguments: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The arguments with copies of what the operation writes."""
    return arguments | {name: arguments[name].clone() for name in ("total", "condition")} | changed


def drawn_from(logits: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that draw from given logits [B, V]: the head is the identity."""
    identity = torch.eye(logits.shape[1], device=logits.device)
    return copied(arguments, x=logits, norm=None, head=identity, scale=None, **row_of(logits, arguments))


def row_of(logits: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """tables, total, start and condition for an x of these columns."""
    K, B, V = len(arguments["total"]), *logits.shape
    zeros = {name: torch.zeros(K, B, V, device=logits.device) for name in ("total", "start", "condition")}
    return {"tables": torch.zeros(K, V, V, device=logits.device), "guidance": 1.0, **zeros}


def test_reference_is_the_contract(device: str) -> None:
    """sample_heads_reference draws what siren.sampling.draw does, with its log-probabilities."""
    for settings in ({}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.7}, {"temperature": 0.0}):
        arguments = arguments_of("cpu", B=40, V=9, **{"temperature": 0.8} | settings)
        logits = torch.randn(40, 9)
        codes, logprobs, _ = sample_heads_reference(**drawn_from(logits, arguments))
        expected = draw(logits, arguments["noise"], SamplingSettings(**{"temperature": 0.8} | settings))
        assert torch.equal(codes, expected[0])
        assert torch.equal(logprobs, expected[1])


@st.composite
def draws(take: st.DrawFn) -> dict[str, Any]:
    return {
        "B": take(st.sampled_from([1, 2, 3, 9, 17])),
        "V": take(st.sampled_from([2, 3, 16, 33, 65])),
        "d": take(st.sampled_from([1, 3, 16, 65])),
        "K": take(st.integers(1, 3)),
        "conditioning": take(st.sampled_from(["none", "residual", "accumulated"])),
        "temperature": take(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "top_k": take(st.sampled_from([0, 0, 1, 2])),
        "top_p": take(st.sampled_from([1.0, 1.0, 0.1, 0.9])),
        "guidance": take(st.sampled_from([1.0, 1.0, 2.5, 0.0])),
    }


@hypothesis.settings(max_examples=15)
@hypothesis.given(choice=draws(), weights=st.sampled_from(["fp32", "bf16", "int8"]), tile=st.sampled_from([16, 64]))
def test_draws_from_its_logits(choice: dict[str, Any], weights: str, tile: int, device: str) -> None:
    """Logits obey the error rule; the code is the reference's for these very logits; sums are exact."""
    arguments = arguments_of(device, **choice)
    head = arguments["head"]
    if weights == "int8":
        scale = head.abs().amax(-1) / 127
        arguments |= {"head": (head / scale[:, None]).round().to(torch.int8), "scale": scale}
    elif weights == "bf16":
        arguments |= {"head": head.bfloat16(), "tables": arguments["tables"].bfloat16()}
    ours, exact, plain = copied(arguments), copied(arguments), copied(arguments)
    sizes = module.tile_sizes
    module.tile_sizes = lambda *given: {**sizes(*given), "BLOCK_N": tile}
    try:
        codes, logprobs, logits = sample_heads(**ours)
    finally:
        module.tile_sizes = sizes
    low = torch.float32 if weights == "fp32" else torch.bfloat16
    truth = sample_heads_reference(**exact | {"x": arguments["x"].double()})[2]
    theirs = sample_heads_reference(**plain | {"x": arguments["x"].to(low), "norm": arguments["norm"].to(low)})[2]
    # On few numbers PyTorch may err by nothing at all: a few units in the last place of the products' sizes are free.
    sizes_of = {"x": arguments["x"].double().abs(), "norm": arguments["norm"].abs(), "head": arguments["head"].abs()}
    products = sample_heads_reference(**copied(arguments) | sizes_of | {"guidance": 0.0})[2].max()
    floor = 4 * torch.finfo(low).eps * float(products) * (1 + 2 * choice["guidance"])
    assert float((logits - truth).abs().max()) <= max(2 * float((theirs - truth).abs().max()), floor)

    again = sample_heads_reference(**drawn_from(logits, arguments))
    assert torch.equal(codes, again[0])
    torch.testing.assert_close(logprobs, again[1], rtol=1e-5, atol=2e-6)  # what float32 leaves of a logarithm near 5
    latest = arguments["tables"][:, codes].float()
    assert torch.equal(ours["total"], arguments["total"] + latest)
    known = {"none": None, "residual": latest, "accumulated": ours["total"]}[choice["conditioning"]]
    if known is None:
        assert torch.equal(ours["condition"], arguments["condition"])
    else:
        repeats = len(arguments["x"]) // choice["B"]
        assert torch.equal(ours["condition"], arguments["start"] + known.repeat(1, repeats, 1))


@triton.jit
def _draw_kernel(
    logits,
    noise,
    codes,
    logprobs,
    B,
    V,
    temperature,
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    FORCED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.arange(0, ROWS)
    code, logprob = device_draw(
        logits + b * V, b < B, noise + b * V, codes + b, V, temperature, top_k, top_p,
        GREEDY, TOP_K, TOP_P, FORCED, BLOCK_V,
    )  # fmt: skip
    tl.store(codes + b, code.to(tl.int64), mask=b < B)
    tl.store(logprobs + b, logprob, mask=b < B)


def draw_from(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The device function alone, on any logits [B, V], with the noise of seeds 0, 1, 2..."""
    B, V = logits.shape
    seeds = torch.arange(B)
    noise = gumbel_noise_reference(seeds, seeds, 1, V).to(logits.device)
    codes = torch.full((B,), -1, device=logits.device) if forced is None else forced.clone()
    logprobs = torch.full((B,), -1.0, device=logits.device)
    _draw_kernel[(1,)](
        logits, noise, codes, logprobs, B, V, temperature, top_k, module.float64_bits(top_p),
        GREEDY=temperature == 0, TOP_K=top_k > 0, TOP_P=top_p < 1, FORCED=forced is not None,
        ROWS=triton.next_power_of_2(B), BLOCK_V=triton.next_power_of_2(V),
    )  # fmt: skip
    return codes, logprobs


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, 3),
        ({"top_k": 10}, 10),
        ({"top_p": 0.1}, 1),  # 0.1 in float32 is more than 0.1, and would keep two
        ({"top_p": 0.7}, 7),
        ({"top_p": 0.71}, 8),
        ({"top_k": 4, "top_p": 0.5}, 2),
    ],
)
def test_ties(settings: dict[str, Any], kept: int, device: str) -> None:
    """Of ten equal logits, zeros of both signs, the lowest indices are kept; all of those are drawn."""
    logits = torch.zeros(150, 10, device=device)
    logits[:, ::2] = -0.0
    codes, logprobs = draw_from(logits, **settings)
    assert set(codes.tolist()) == set(range(kept))
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(10)))


def test_greedy_takes_the_lowest_of_equals(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-math.inf, -5.0, -5.0, -7.0]], device=device)
    assert draw_from(logits, temperature=0.0)[0].tolist() == [1, 1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_marked(bad: float, settings: dict[str, Any], device: str) -> None:
    """Code 0 and NaN, for that row alone. A row with some -inf is drawn from, a row of nothing else is not."""
    logits = torch.randn(5, 7, device=device)
    logits[3, 1:6] = -math.inf
    expected = draw_from(logits, **settings)
    logits[1, 6] = bad
    logits[2] = -math.inf
    codes, logprobs = draw_from(logits, **settings)
    assert codes[[1, 2]].tolist() == [0, 0] and logprobs[[1, 2]].isnan().all()
    others = [0, 3, 4]
    assert torch.equal(codes[others], expected[0][others]) and torch.equal(logprobs[others], expected[1][others])
    assert int(codes[3]) in (0, 6)


def test_codes_that_are_none_are_marked(device: str) -> None:
    """A given code out of range reads nothing out of bounds: code 0 and NaN, as on a GPU, where no one looks first."""
    forced = torch.tensor([-1, 6, 7, 2**32 + 1, 2], device=device)
    codes, logprobs = draw_from(torch.randn(5, 7, device=device), forced=forced)
    assert codes.tolist() == [0, 6, 0, 0, 2]
    assert logprobs.isnan().tolist() == [True, False, True, True, False]


def test_extreme_logits(device: str) -> None:
    """Logits of any size keep finite log-probabilities, and the order that top-k ranks by."""
    logits = torch.tensor([[3e38, -3e38, 0.0, 1e38], [-3e38, -2e38, -1e38, -1.1e38]], device=device)
    codes, logprobs = draw_from(logits, top_k=1)
    assert codes.tolist() == [0, 2] and logprobs.tolist() == [0.0, 0.0]


def test_forced_codes(device: str) -> None:
    """The codes given are taken: their log-probabilities and embeddings, no noise."""
    arguments = arguments_of(device, B=3, V=11, noise=None, temperature=0.7)
    forced = torch.tensor([10, 0, 4], device=device)
    ours, theirs = copied(arguments, forced=forced), copied(arguments, forced=forced)
    codes, logprobs, logits = sample_heads(**ours)
    assert torch.equal(codes, forced)
    expected = (logits / 0.7).log_softmax(-1)[range(3), forced]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=2e-6)
    sample_heads_reference(**theirs)
    assert torch.equal(ours["total"], theirs["total"]) and torch.equal(ours["condition"], theirs["condition"])


def test_alone_and_together(device: str) -> None:
    """A sequence's draw does not depend on its neighbours, bit for bit, nor on a second run; nor do NaN in them."""
    arguments = arguments_of(device, B=19, V=33, d=65, guidance=1.7, top_k=9)
    results = sample_heads(**copied(arguments))
    assert all(torch.equal(a, b) for a, b in zip(results, sample_heads(**copied(arguments)), strict=True))
    for b in (0, 7, 18):
        rows = [b, b + 19]
        one = {name: arguments[name][:, [b]] for name in ("total",)}
        one |= {name: arguments[name][:, rows].contiguous() for name in ("start", "condition")}
        one |= {"x": arguments["x"][rows], "noise": arguments["noise"][[b]]}
        alone = sample_heads(**copied(arguments | one))
        assert all(torch.equal(a[0], whole[b]) for a, whole in zip(alone, results, strict=True))
    poisoned = copied(arguments)
    poisoned["x"] = arguments["x"].clone()
    poisoned["x"][5] = math.nan
    codes, logprobs, logits = sample_heads(**poisoned)
    assert int(codes[5]) == 0 and bool(logprobs[5].isnan())
    others = [b for b in range(19) if b != 5]
    assert torch.equal(codes[others], results[0][others]) and torch.equal(logits[others], results[2][others])


def test_writes_its_outputs_and_no_more(device: str) -> None:
    """Strided outputs inside poisoned tensors: every element is written, no neighbour is; the counts return to 0."""
    arguments = arguments_of(device, B=6, V=33)
    codes = torch.full((8, 3), -7, device=device)
    logprobs = torch.full((8, 3), math.nan, device=device)
    logits = torch.full((8, 3, 33), math.nan, device=device)
    count = torch.zeros(6, dtype=torch.int32, device=device)
    outer = {name: torch.cat([arguments[name]] * 3) for name in ("total", "condition")}
    inside = {name: tensor[2:4] for name, tensor in outer.items()}
    before = {name: tensor.clone() for name, tensor in outer.items()}
    module.launch(*(arguments | inside).values(), codes[1:7, 1], logprobs[1:7, 1], logits[1:7, 1], count)
    expected = sample_heads(**copied(arguments))
    for tensor, wanted in zip((codes, logprobs, logits), expected, strict=True):
        assert torch.equal(tensor[1:7, 1], wanted)
        rest = torch.cat((tensor[:, [0, 2]].flatten(), tensor[[0, 7], 1].flatten()))
        assert (rest == -7).all() if tensor is codes else rest.isnan().all()
    for name, tensor in outer.items():
        assert torch.equal(tensor[[0, 1, 4, 5]], before[name][[0, 1, 4, 5]])
    assert not count.any()


def test_operation(device: str) -> None:
    """opcheck accepts it, and it survives torch.compile."""
    for changed in ({}, {"noise": None, "temperature": 0.0}, {"guidance": 2.0}):
        arguments = arguments_of(device, **changed)
        library.opcheck(sample_heads, tuple(copied(arguments).values()))
    arguments, eager, compiled = (arguments_of(device) for _ in range(3))
    function = torch.compile(lambda values: sample_heads(**values), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(function(compiled), sample_heads(**eager), strict=True))
    assert torch.equal(compiled["total"], eager["total"]) and not torch.equal(eager["total"], arguments["total"])


def test_arguments(device: str) -> None:
    """What does not fit is named, before anything is launched."""
    good = arguments_of(device)
    wrong = {
        r"x must have a row for each of 3 sequences, or two with guidance, not 4": {
            "x": torch.zeros(4, 10, device=device)
        },
        r"x must be contiguous float32 \[R, d\]": {"x": good["x"].double()},
        r"norm must be .*\[d\] = \[10\]": {"norm": torch.zeros(9, device=device)},
        r"head must be .*\[V, d\] = \[11, 10\]": {"head": torch.zeros(11, 9, device=device)},
        r"head must come with scale when it is int8": {"head": good["head"].to(torch.int8)},
        r"noise must be given when codes are drawn": {"noise": None},
        r"noise must be .*\[B, V\] = \[3, 11\]": {"noise": good["noise"][:, :9]},
        r"forced must be contiguous int64": {"forced": torch.zeros(3, device=device), "noise": None},
        r"tables\[0\] must be": {"tables": good["tables"].mT},
        r"tables must be those of 2 experts, not of 1": {"tables": good["tables"][:1]},
        r"start must be .*\[K, R, d\]": {"start": good["start"][:, :2]},
        r"conditioning must be one of none, residual, accumulated": {"conditioning": "all"},
        r"head has 8193 rows": {"head": torch.zeros(8193, 10, device=device)},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            sample_heads(**good | changed)
    if device == "cpu":
        with pytest.raises(ValueError, match="forced codes must be from 0 to 10"):
            sample_heads(**good | {"forced": torch.tensor([0, 11, 2]), "noise": None})
