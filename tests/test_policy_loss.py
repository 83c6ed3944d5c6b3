"""The fused policy objective against float64, its slope at every kink against PyTorch's autograd, and masking.

The error rule and its floor are those of test_linear_cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library

pytest.importorskip("triton")

import siren.kernels.linear_logprob as module
from siren.kernels.linear_cross_entropy import linear_cross_entropy
from siren.kernels.linear_logprob import linear_logprob, linear_logprob_reference
from siren.kernels.policy_loss import policy_loss, policy_loss_reference
from test_linear_cross_entropy import DTYPES, floors

from siren import sampling


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In this mode PyTorch fills the memory that torch.empty gives with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and chunks of 32 rows, so that small sizes take several of each, the last one partly filled."""
    tiles = {"BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_D": 16}
    monkeypatch.setattr(module, "_settings", lambda V, d, dtype: tiles)
    monkeypatch.setattr(module, "CHUNK", 32)


def inputs(
    N: int, V: int, d: int, dtype: torch.dtype, device: str, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, codes, old log-probabilities and advantages of both signs.

    The ratios are 1/2, 1 and 2: so far from the bounds that no rounding takes one across.
    """
    generator = torch.Generator().manual_seed(N * 10_000 + V * 100 + d)
    x, weight = (
        torch.randn(N, d, generator=generator).to(dtype),
        (torch.randn(V, d, generator=generator) / d**0.5).to(dtype),
    )
    codes, advantages = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    exact, _ = linear_logprob_reference(x.double(), weight.double(), codes, None, temperature)
    old = (exact - torch.tensor([0.5, 1.0, 2.0])[torch.arange(N) % 3].log()).float()
    x, weight, codes, old, advantages = (tensor.to(device) for tensor in (x, weight, codes, old, advantages))
    return x, weight, codes, old, advantages


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, weight: Tensor, *arguments: object
) -> list[Tensor]:
    """Losses, log-probabilities, and the gradients of the losses' weighted sum in x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    losses, logprobs = function(x, weight, *arguments)
    assert losses.requires_grad and not logprobs.requires_grad
    upstream = torch.linspace(0.5, 1.5, len(losses), device=losses.device, dtype=losses.dtype)
    return [losses.detach(), logprobs, *torch.autograd.grad(losses, (x, weight), upstream)]


def check_against_float64(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> None:
    rest = (mask, temperature)
    exact = with_gradients(
        policy_loss_reference, x.double(), weight.double(), codes, old.double(), advantages.double(), *rest
    )
    ours = with_gradients(policy_loss, x, weight, codes, old, advantages, *rest)
    theirs = with_gradients(policy_loss_reference, x, weight, codes, old, advantages, *rest)
    slopes = 2 * 1.5 * advantages.to(x.dtype)  # at most: the ratio times the weight of the sum
    logit, d_x, d_weight = floors(x if mask is None else x[mask], weight / (temperature or 1), slopes)
    floor = [logit * slopes.abs().max().item(), logit, d_x, d_weight]
    names = ("losses", "logprobs", "d_x", "d_weight")
    for name, a, b, c, least in zip(names, ours, theirs, exact, floor, strict=True):
        assert a.shape == c.shape and a.dtype == b.dtype, name
        error, allowed = ((result.double() - c).abs().max().item() for result in (a, b))
        assert error <= max(2 * allowed, least), (
            f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}, floor {least:.3g}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(device: str, dtype: torch.dtype) -> None:
    for N in (1, 3, 63, 65):
        for V in (2, 5, 33):
            for d in (1, 3, 33, 64):
                check_against_float64(*inputs(N, V, d, dtype, device))
    check_against_float64(*inputs(3, 1025, 33, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_and_chunks(device: str, small_tiles: None, dtype: torch.dtype) -> None:
    for N, V, d in ((3, 5, 33), (65, 33, 3), (33, 16, 33)):
        check_against_float64(*inputs(N, V, d, dtype, device))


@given(
    N=st.integers(1, 40),
    V=st.integers(1, 40),
    d=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    masked=st.booleans(),
)
def test_random_configurations(
    device: str, N: int, V: int, d: int, dtype: torch.dtype, temperature: float, masked: bool
) -> None:
    mask = torch.arange(N, device=device) * 7 % 5 < 3 if masked else None  # row 0 stays
    check_against_float64(*inputs(N, V, d, dtype, device, temperature), mask, temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.3])
def test_ratio_is_one_before_any_update(device: str, temperature: float) -> None:
    """Against the log-probabilities that the sampler reports for the same logits."""
    x, weight, codes, _, _ = inputs(65, 1025, 64, torch.float32, device)
    logits = torch.nn.functional.linear(x * 4, weight)
    settings = sampling.SamplingSettings(temperature=temperature)
    old = sampling.log_probability(logits, codes, settings)
    losses, logprobs = policy_loss(x * 4, weight, codes, old, torch.ones_like(old), temperature=temperature)
    assert (losses + 1).abs().max() < 1e-5
    assert (logprobs - old).abs().max() < 1e-5


def test_log_probabilities_are_those_of_linear_logprob(device: str) -> None:
    """Bit for bit: a rollout scored by one operation has ratio 1 in the other, and gradient -A * d logprob."""
    for dtype in DTYPES:
        x, weight, codes, _, advantages = inputs(65, 33, 33, dtype, device)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        old, _ = linear_logprob(x, weight, codes)
        losses, logprobs = policy_loss(x, weight, codes, old.detach(), advantages)
        assert torch.equal(logprobs, old) and torch.equal(losses, -advantages)
        ours = torch.autograd.grad(losses.sum(), (x, weight))
        plain = torch.autograd.grad((linear_cross_entropy(x, weight, codes) * advantages).sum(), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def one_row(device: str, old: float, advantages: Tensor, epsilon: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    """Losses and slopes, d loss / d logprob, of one row repeated with each of the advantages."""
    x, weight, codes, _, _ = inputs(1, 5, 3, torch.float32, device)
    N = len(advantages)
    arguments = (x.expand(N, 3), weight, codes.expand(N), torch.full((N,), old, device=device), advantages, None, 1.0)
    losses, _, _, slopes = torch.ops.siren.policy_loss(*arguments, epsilon, epsilon_high)
    return losses, slopes


def one_ratio(device: str, old: float) -> float:
    """The ratio of that row as the kernel computes it: with A = -1 the larger of r and its clip is the loss."""
    return one_row(device, old, torch.full((1,), -1.0, device=device), 1.0, 1e30)[0].item()


def check_kinks(device: str, old: float, epsilon: float, epsilon_high: float) -> Tensor:
    """Losses and slopes of one ratio and many advantages are those of PyTorch's autograd; returns slopes / (-A r)."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30])
    advantages = torch.cat((special, torch.rand(200, generator=generator), -torch.rand(200, generator=generator)))
    advantages = advantages.to(device)
    losses, slopes = one_row(device, old, advantages, epsilon, epsilon_high)
    ratio = torch.full_like(advantages, one_ratio(device, old)).requires_grad_()
    expected = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    (slope,) = torch.autograd.grad(expected.sum(), ratio)
    assert torch.equal(losses, expected.detach())
    assert torch.equal(slopes, slope * ratio.detach())
    return (slopes / -(ratio.detach() * advantages))[2:]


def test_slopes_are_those_of_autograd(device: str) -> None:
    """Inside the bounds, outside on both sides, at each bound, and one unit in the last place beside each."""
    x, weight, codes, _, _ = inputs(1, 5, 3, torch.float32, device)
    logprob = linear_logprob(x, weight, codes)[0].item()
    assert one_ratio(device, logprob) == 1
    for ratio in (0.5, 0.9, 1.0, 1.1, 2.0, 1e-20, 1e20):
        check_kinks(device, logprob - math.log(ratio), 0.2, 0.28)
    assert (check_kinks(device, logprob, 0.0, 0.0) == 1).all()  # r = 1 is both bounds
    assert (check_kinks(device, logprob, 0.0, 0.28) == 1).all()
    halves = 0
    for old in (logprob - 0.3, logprob + 0.3, logprob - 0.01):
        r = torch.tensor(one_ratio(device, old))
        for bound in (r, r.nextafter(torch.tensor(0.0)), r.nextafter(torch.tensor(9.0))):
            if bound > 1:
                shares = check_kinks(device, old, 0.2, bound.item() - 1)
            else:
                shares = check_kinks(device, old, 1 - bound.item(), 0.28)
            assert bound != r or (shares == 1).all()
            halves += int((shares == 0.5).sum())
    assert halves  # products that rounding makes equal were among them


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinities meant here
def test_infinite_ratio(device: str) -> None:
    """Clipped where the advantage is positive, with slope 0, where autograd would give NaN; the loss is bounded."""
    advantages = torch.tensor([2.0, -2.0], device=device)
    losses, slopes = one_row(device, -1000.0, advantages, 0.2, 0.28)
    torch.testing.assert_close(losses, torch.tensor([-2.56, math.inf], device=device))
    assert slopes.tolist() == [0.0, math.inf]


def test_nan_is_not_hidden(device: str) -> None:
    for old, advantage in ((math.nan, 1.0), (-1.0, math.nan)):
        losses, slopes = one_row(device, old, torch.tensor([advantage], device=device), 0.2, 0.28)
        assert losses.isnan().all() and slopes.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_may_hold_anything(device: str, small_tiles: None, dtype: torch.dtype) -> None:
    """Bit for bit, nothing depends on what a masked row or any of its arguments holds."""
    x, weight, codes, old, advantages = inputs(70, 33, 33, dtype, device)
    mask = torch.arange(70, device=device) % 4 != 1
    mask[32:64] = False  # a whole chunk
    first: list[Tensor] = []
    for poison, code in ((0.0, 0), (math.nan, -100), (math.inf, 2**40)):
        x[~mask], old[~mask], advantages[~mask], codes[~mask] = poison, poison, poison, code
        results = with_gradients(policy_loss, x, weight, codes, old, advantages, mask)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
        losses, logprobs, d_x, d_weight = results
        assert not losses[~mask].any() and not logprobs[~mask].any() and not d_x[~mask].any()
        assert losses[mask].all() and d_weight.isfinite().all() and d_weight.any()


def test_poisoned_upstream_gradient_of_masked_rows(device: str) -> None:
    x, weight, codes, old, advantages = inputs(9, 5, 3, torch.float32, device)
    mask = torch.arange(9, device=device) % 3 > 0
    losses, _ = policy_loss(x.requires_grad_(), weight.requires_grad_(), codes, old, advantages, mask)
    poisoned = torch.where(mask, 1.0, math.nan)
    for a, b in zip(
        torch.autograd.grad(losses, (x, weight), poisoned, retain_graph=True),
        torch.autograd.grad(losses, (x, weight), mask.float()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_equation_10(device: str) -> None:
    """Two heads, sequences of different length, one of them filtered by gamma: as the docstring says."""
    G, T, V, d, gamma = 3, 8, 33, 9, 0.1
    lengths, A = torch.tensor([8, 5, 6], device=device), torch.tensor([1.2, -0.7, 0.05], device=device)
    frames = torch.arange(T, device=device) < lengths[:, None]
    mask = frames & (A.abs() >= gamma)[:, None]
    objective, total = torch.zeros(G, dtype=torch.double, device=device), torch.zeros(G, T, device=device)
    for head in range(2):
        x, weight, codes, old, _ = inputs(G * T, V, d + head, torch.float32, device)
        total += policy_loss(x, weight, codes, old, A.repeat_interleave(T), mask.flatten())[0].view(G, T)
        for i in range(G):
            for t in range(lengths[i]):
                row = i * T + t
                p = (x[row].double() @ weight.double().T).softmax(-1)[codes[row]]
                r = p / old[row].double().exp()
                v = r.clamp(0.8, 1.28)
                if A[i].abs() >= gamma:
                    objective[i] += torch.minimum(r * A[i], v * A[i]) / lengths[i] / 2
    loss = (total.sum(1) / 2 / lengths).mean()
    torch.testing.assert_close(loss.double(), -objective.mean(), rtol=0, atol=1e-6)  # a mean of terms of order 1


def test_runs_agree_bit_for_bit(device: str, small_tiles: None) -> None:
    arguments = inputs(65, 33, 33, torch.bfloat16, device)
    first, second = (with_gradients(policy_loss, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(device: str) -> None:
    x, weight, codes, old, advantages = inputs(0, 5, 3, torch.bfloat16, device)
    losses, logprobs, d_x, d_weight = with_gradients(policy_loss, x, weight, codes, old, advantages)
    assert losses.shape == logprobs.shape == (0,) and d_x.shape == (0, 3) and not d_weight.any()


def test_code_out_of_range(device: str) -> None:
    """On a CPU an error; the kernel, which sees it on a GPU, gives NaN."""
    x, weight, codes, old, advantages = inputs(5, 33, 3, torch.float32, device)
    codes[2] = 33
    if device == "cpu":
        with pytest.raises(ValueError, match=r"codes must be 0\.\.32, not .*33"):
            policy_loss(x, weight, codes, old, advantages)
    for values in module.forward(x, weight, codes, None, 1.0, (old, advantages, 0.8, 1.28)):
        assert values.isnan().any(dim=0).nonzero()[-1] == 2 if values.ndim == 2 else values[2].isnan()


@pytest.mark.parametrize("masked", [False, True])
def test_registration(device: str, masked: bool) -> None:
    x, weight, codes, old, advantages = inputs(5, 7, 3, torch.float32, device)
    mask = torch.tensor([True, False, True, True, False], device=device) if masked else None
    arguments = (x.requires_grad_(), weight.requires_grad_(), codes, old, advantages, mask, 0.7, 0.2, 0.28)
    library.opcheck(torch.ops.siren.policy_loss.default, arguments)


def test_compiles_to_one_graph(device: str) -> None:
    x, weight, codes, old, advantages = inputs(33, 33, 3, torch.float32, device)
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    for mask in (None, codes > 5):
        plain = with_gradients(policy_loss, x, weight, codes, old, advantages, mask)
        for a, b in zip(with_gradients(compiled, x, weight, codes, old, advantages, mask), plain, strict=True):
            assert torch.equal(a, b)


def test_arguments(device: str) -> None:
    x, weight, codes, old, advantages = inputs(5, 7, 3, torch.float32, device)
    good = {"x": x, "weight": weight, "codes": codes, "old_logprobs": old, "advantages": advantages}
    wrong: dict[str, dict[str, object]] = {
        r"x must be .*\[N, d\]": {"x": x[0]},
        "weight must be torch.float32 as x is": {"weight": weight.half()},
        "codes must be int32 or int64": {"codes": codes.float()},
        r"codes must be \[N=5\]": {"codes": codes[:2]},
        "old_logprobs must be float32": {"old_logprobs": old.double()},
        r"old_logprobs must be float32 \[N=5\]": {"old_logprobs": old[:2]},
        r"advantages must be float32 \[N=5\]": {"advantages": advantages[:1]},
        "advantages must be on": {"advantages": advantages.to("meta")},
        "mask must be bool": {"mask": codes},
        "temperature must be 0 or at least": {"temperature": -0.5},
        "epsilon must be from 0 to 1, not 1.5": {"epsilon": 1.5},
        "epsilon must be from 0 to 1, not nan": {"epsilon": math.nan},
        "epsilon_high must be finite and at least 0, not -0.1": {"epsilon_high": -0.1},
        "epsilon_high must be finite and at least 0, not inf": {"epsilon_high": math.inf},
    }
    for message, changed in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            policy_loss(**{**good, **changed})
