"""The fused head: log-probabilities, cross-entropy and their gradients against float64, and what masking excludes.

The error rule here: an error against float64 is at most twice that of plain PyTorch at the same precision. At tiny
sizes PyTorch can be exact by luck, so the bound has a floor of rounding errors: `floors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import siren.kernels.linear_logprob as module
from siren.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from siren.kernels.linear_logprob import linear_logprob, linear_logprob_reference

FEW = [(N, V, d) for N in (3, 65) for V in (5, 33) for d in (1, 33)]
SIZES = [(N, V, d) for N in (1, 3, 63, 65) for V in (2, 5, 33) for d in (1, 3, 33, 64)] + [(3, 1025, 33)]
DTYPES = [torch.float32, torch.bfloat16]


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


def inputs(N: int, V: int, d: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> tuple[Tensor, ...]:
    """x, weight and targets, and a gradient of the log-probabilities; logits are of order `scale`."""
    generator = torch.Generator().manual_seed(N * 10_000 + V * 100 + d)
    x, weight = torch.randn(N, d, generator=generator), torch.randn(V, d, generator=generator) * scale / d**0.5
    targets, gradient = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype), targets.to(device), gradient.to(device)


def with_gradients(function: Callable[..., Tensor], x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    """function(x, weight) and its gradients in both."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    values = function(x, weight)
    return [values.detach(), *torch.autograd.grad(values, (x, weight), gradient.to(values.dtype))]


def floors(x: Tensor, weight: Tensor, gradient: Tensor) -> list[float]:
    """Rounding errors that values, d_x and d_weight may have where PyTorch happens to have none.

    Two float32 roundings of the largest logit (at least 1), which a gradient's softmax turns into relative errors; and
    one unit in the last place of the result's dtype. A gradient is measured by the factors that it is a sum of.
    """
    x, weight = x.double(), weight.double()
    logit = 2**-23 * max(1.0, (x.abs() @ weight.abs().T).max().item())
    relative, slope = logit + torch.finfo(gradient.dtype).eps, gradient.abs().max().item()
    return [logit, relative * slope * weight.abs().max().item(), relative * slope * x.abs().max().item()]


def check_errors(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], floor: list[float]) -> None:
    for name, a, b, c, least in zip(("values", "d_x", "d_weight"), ours, theirs, exact, floor, strict=True):
        assert a.shape == c.shape and a.dtype == b.dtype, name
        error, allowed = ((result.double() - c).abs().max().item() for result in (a, b))
        assert error <= max(2 * allowed, least), (
            f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}, floor {least:.3g}"
        )


def check_against_float64(
    x: Tensor, weight: Tensor, targets: Tensor, gradient: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> None:
    def run(function: Callable[..., tuple[Tensor, Tensor]], *operands: Tensor) -> list[Tensor]:
        return with_gradients(lambda x, w: function(x, w, targets, mask, temperature)[0], *operands, gradient)

    exact = run(linear_logprob_reference, x.double(), weight.double())
    ours, theirs = run(linear_logprob, x, weight), run(linear_logprob_reference, x, weight)
    visible = x if mask is None else x[mask]
    scaled = weight / (temperature or 1.0)
    if len(visible) == 0:
        assert not any(tensor.any() for tensor in ours)
        return
    check_errors(ours, theirs, exact, floors(visible, scaled, gradient.to(x.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", ["own tiles", "small tiles"])
def test_log_probabilities_and_gradients(
    request: pytest.FixtureRequest, device: str, tiles: str, dtype: torch.dtype
) -> None:
    if tiles == "small tiles":
        request.getfixturevalue("small_tiles")
    for N, V, d in FEW if tiles == "small tiles" else SIZES:
        check_against_float64(*inputs(N, V, d, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(device: str, dtype: torch.dtype) -> None:
    """Several of the tiles that a real head takes, in every direction, the last one nearly empty."""
    check_against_float64(*inputs(65, 1025, 65, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 65])
def test_cross_entropy(device: str, dtype: torch.dtype, N: int) -> None:
    """The public loss, with PyTorch's own cross-entropy as the reference."""
    x, weight, targets, gradient = inputs(N, 33, 33, dtype, device)

    def run(function: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
        return with_gradients(lambda x, w: function(x, w, targets), *operands, gradient)

    exact = run(linear_cross_entropy_reference, x.double(), weight.double())
    ours, theirs = run(linear_cross_entropy, x, weight), run(linear_cross_entropy_reference, x, weight)
    check_errors(ours, theirs, exact, floors(x, weight, gradient.to(dtype)))


def test_cross_entropy_is_equation_6(device: str) -> None:
    """The masked mean that siren.Expert takes of its logits."""
    x, weight, targets, _ = inputs(20, 33, 33, torch.float32, device)
    mask = torch.arange(20, device=device) % 3 > 0
    losses = torch.nn.functional.cross_entropy(x.double() @ weight.double().T, targets, reduction="none")
    expected = (losses * mask).sum() / mask.sum()
    loss = linear_cross_entropy(x, weight, targets, mask).sum() / mask.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@given(
    N=st.integers(1, 40),
    V=st.integers(1, 40),
    d=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    masked=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
)
def test_random_configurations(
    device: str, N: int, V: int, d: int, dtype: torch.dtype, temperature: float, masked: bool, layout: str
) -> None:
    x, weight, targets, gradient = inputs(N, V, d, dtype, device)
    mask = (torch.arange(N, device=device) * 7 % 5 < 3) if masked else None
    if layout == "transposed":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    elif layout == "sliced":
        x = torch.stack((x, torch.full_like(x, float("nan"))), dim=1)[:, 0]
        targets = torch.stack((targets, targets.new_full((N,), -1)), dim=1).int()[:, 0]
        mask = None if mask is None else torch.stack((mask, ~mask), dim=1)[:, 0]
    check_against_float64(x, weight, targets, gradient, mask, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(device: str, small_tiles: None, dtype: torch.dtype) -> None:
    """Logits of order 1e4: nothing overflows, and the softmax is as sharp as PyTorch's."""
    x, weight, targets, gradient = inputs(33, 40, 3, dtype, device, scale=1e4)
    assert (x.float() @ weight.float().T).abs().max() > 1e4
    targets[::2] = (x.float() @ weight.float().T).argmax(dim=1)[::2]
    check_against_float64(x, weight, targets, gradient)
    logprob, lse = linear_logprob(x, weight, targets)
    assert logprob.isfinite().all() and lse.isfinite().all() and logprob[::2].max() == 0


def test_large_logits_close_to_one_another(device: str) -> None:
    """Logits that float32 holds exactly: their size costs no digits, as a rounded log-sum-exp near 1e4 would."""
    x, weight = torch.ones(3, 1, device=device), torch.tensor([[1e4], [9999.0], [9998.5]], device=device)
    targets, gradient = torch.arange(3, device=device), torch.tensor([1.0, 2.0, -1.5], device=device)
    weight_gradients, values = [], []
    for function, w in ((linear_logprob, weight), (linear_logprob_reference, weight.double())):
        results = with_gradients(lambda x, w: function(x, w, targets)[0], x.to(w.dtype), w, gradient)  # noqa: B023
        values.append(results[0])
        weight_gradients.append(results[2])
    for ours, exact in (values, weight_gradients):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=8 * 2**-24)  # a few roundings of numbers near 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the infinities meant here
def test_infinite_logits(device: str, small_tiles: None) -> None:
    """Minus infinity is a probability of 0, wherever it stands; a row of nothing else has no distribution."""
    x, weight = torch.full((2, 1), 3e38, device=device), torch.full((40, 1), -2.0, device=device)
    targets = torch.tensor([39, 0], device=device)
    weight[39] = 1.0
    logprob, _ = linear_logprob(x, weight, targets)
    assert logprob.tolist() == [0.0, -float("inf")]
    logprob, _ = linear_logprob(x, weight[:39], targets * 0)
    assert logprob.isnan().all()


def test_log_sum_exp(device: str) -> None:
    for temperature in (0.0, 0.7, 1.0):
        x, weight, targets, gradient = inputs(65, 33, 33, torch.float32, device)
        _, exact = linear_logprob_reference(x.double(), weight.double(), targets, None, temperature)
        _, theirs = linear_logprob_reference(x, weight, targets, None, temperature)
        _, lse = linear_logprob(x.requires_grad_(), weight, targets, None, temperature)
        assert lse.dtype == torch.float32 and not lse.requires_grad
        least = floors(x.detach(), weight / (temperature or 1.0), gradient)[0]
        assert (lse - exact).abs().max() <= max(2 * (theirs - exact).abs().max().item(), least)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_may_hold_anything(device: str, small_tiles: None, dtype: torch.dtype) -> None:
    """Bit for bit, nothing depends on what a masked row, its target or its incoming gradient holds."""
    x, weight, targets, gradient = inputs(70, 33, 33, dtype, device)
    mask = torch.arange(70, device=device) % 4 != 1
    mask[32:64] = False  # a whole chunk
    results = []
    for poison, code in ((0.0, 0), (float("nan"), -100), (float("inf"), 2**40)):
        x[~mask], targets[~mask], gradient[~mask] = poison, code, poison
        results.append(with_gradients(lambda x, w: linear_logprob(x, w, targets, mask)[0], x, weight, gradient))
        values, d_x, d_weight = results[-1]
        assert not values[~mask].any() and not d_x[~mask].any()
        assert values[mask].all() and d_weight.isfinite().all() and d_weight.any()
        assert all(torch.equal(a, b) for a, b in zip(results[-1], results[0], strict=True))
    kept = with_gradients(lambda x, w: linear_logprob(x, w, targets[mask])[0], x[mask], weight, gradient[mask])
    assert torch.equal(kept[0], results[0][0][mask])


def test_everything_masked(device: str) -> None:
    x, weight, targets, gradient = inputs(5, 33, 3, torch.float32, device)
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    results = with_gradients(lambda x, w: linear_cross_entropy(x, w, targets, mask), x * float("nan"), weight, gradient)
    assert not any(tensor.any() for tensor in results)


def test_unmasked_nan_spreads(device: str) -> None:
    """A NaN that no mask excludes is not hidden."""
    x, weight, targets, gradient = inputs(5, 33, 3, torch.float32, device)
    x[2, 1] = float("nan")
    values, d_x, d_weight = with_gradients(lambda x, w: linear_cross_entropy(x, w, targets), x, weight, gradient)
    assert values.isnan().nonzero().tolist() == [[2]] and d_weight.isnan().all()
    assert d_x.isnan().any(dim=1).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_no_row(device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Rows just below, at and above a chunk's end; d_x is that of one chunk, and d_weight follows the error rule."""
    for N in (31, 32, 33, 64, 65):
        x, weight, targets, gradient = inputs(N, 33, 33, dtype, device)
        monkeypatch.setattr(module, "CHUNK", 8192)
        whole = with_gradients(lambda x, w: linear_logprob(x, w, targets)[0], x, weight, gradient)  # noqa: B023
        monkeypatch.setattr(module, "CHUNK", 32)
        parts = with_gradients(lambda x, w: linear_logprob(x, w, targets)[0], x, weight, gradient)  # noqa: B023
        torch.testing.assert_close(parts[1], whole[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        check_against_float64(x, weight, targets, gradient)


def test_many_chunks_are_summed_in_float32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one sign from 80 chunks: a bfloat16 sum of them would stop growing."""
    monkeypatch.setattr(module, "CHUNK", 1)
    x, weight, targets, gradient = inputs(80, 2, 3, torch.bfloat16, device)
    check_against_float64(x.abs() + 1, weight, targets * 0, gradient.abs() + 1)


def test_runs_agree_bit_for_bit(device: str, small_tiles: None) -> None:
    x, weight, targets, gradient = inputs(65, 33, 33, torch.bfloat16, device)
    first, second = (
        with_gradients(lambda x, w: linear_logprob(x, w, targets)[0], x, weight, gradient) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(device: str) -> None:
    x, weight, targets, gradient = inputs(0, 5, 3, torch.bfloat16, device)
    for mask in (None, targets.bool()):
        values, d_x, d_weight = with_gradients(
            lambda x, w: linear_cross_entropy(x, w, targets, mask),  # noqa: B023
            x,
            weight,
            gradient,
        )
        assert values.shape == (0,) and d_x.shape == (0, 3)
        assert d_weight.shape == (5, 3) and not d_weight.any()


def test_target_out_of_range(device: str) -> None:
    """On a CPU an error. The kernels, which see it on a GPU, give NaN for its row and for all that it reaches."""
    x, weight, targets, gradient = inputs(5, 33, 3, torch.float32, device)
    for bad in (-1, 33, 2**32, 2**40):
        targets[2] = bad
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"targets must be 0\.\.32, not .*{bad}"):
                linear_logprob(x, weight, targets)
        logprob, norms, _, _ = module.forward(x, weight, targets, None, 1.0)
        assert logprob.isnan().nonzero().tolist() == [[2]]
        d_x, d_weight = module.backward(x, weight, targets, None, norms, gradient, 1.0)
        assert d_x.isnan().any(dim=1).nonzero().tolist() == [[2]] and d_weight.isnan().all()


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that PyTorch makes. The interpreter copies its arguments: they count too."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.nbytes = max([self.nbytes, *(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))])
        return result


def test_memory(device: str, small_tiles: None) -> None:
    """Forward nothing is larger than three floats a row and tile; backward the d_logits are those of one chunk."""
    N, V, d, tiles = 200, 50, 3, 4
    x, weight, targets, gradient = inputs(N, V, d, torch.float32, device)
    mask = targets > 3
    with LargestTensor() as largest:
        _, norms, _, _ = module.forward(x, weight, targets, mask, 1.0)
    assert largest.nbytes == 3 * tiles * N * 4 < N * V * 4
    with LargestTensor() as largest:
        module.backward(x, weight, targets, mask, norms, gradient, 1.0)
    assert largest.nbytes == module.CHUNK * V * 4 < N * V * 4
    with LargestTensor() as largest:
        linear_logprob_reference(x, weight, targets)
    assert largest.nbytes == N * V * 4  # the measure sees what PyTorch does


@pytest.mark.parametrize("masked", [False, True])
def test_registration(device: str, masked: bool) -> None:
    x, weight, targets, gradient = inputs(5, 7, 3, torch.float32, device)
    mask = torch.tensor([True, False, True, True, False], device=device) if masked else None
    leaves = x.requires_grad_(), weight.requires_grad_()
    library.opcheck(torch.ops.siren.linear_logprob.default, (*leaves, targets, mask, 0.7))
    arguments = (x.detach(), weight.detach(), targets, mask, torch.rand(2, 5, device=device), gradient, 0.7)
    library.opcheck(torch.ops.siren.linear_logprob_backward.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(device: str, backend: str) -> None:
    x, weight, targets, gradient = inputs(33, 33, 3, torch.float32, device)
    mask = targets > 5

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2, weight, targets, mask) * 3

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for a, b in zip(
        with_gradients(compiled, x, weight, gradient), with_gradients(loss, x, weight, gradient), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_arguments(device: str) -> None:
    x, weight, targets, _ = inputs(5, 7, 3, torch.float32, device)
    mask = targets > 0
    wrong = {
        r"x must be bfloat16, float16 or float32 \[N, d\], not torch.float64": (x.double(), weight, targets),
        r"x must be .*\[1, 5, 3\]": (x[None], weight, targets),
        r"weight must be \[V, d=3\]": (x, weight.T, targets),
        "V and d at least 1": (x, weight[:0], targets),
        "weight must be torch.float32 as x is, not torch.bfloat16": (x, weight.bfloat16(), targets),
        "weight must be on": (x, weight.to("meta"), targets),
        "targets must be int32 or int64": (x, weight, targets.float()),
        r"targets must be \[N=5\] as x is \[5, 3\], not \[4\]": (x, weight, targets[:4]),
        "mask must be bool, not torch.int64": (x, weight, targets, targets),
        r"mask must be \[N=5\]": (x, weight, targets, mask[None]),
        "temperature must be 0 or at least 1e-06, not -1": (x, weight, targets, None, -1.0),
        "temperature must be 0 or at least 1e-06, not 1e-07": (x, weight, targets, None, 1e-7),
        "temperature must be 0 or at least 1e-06, not nan": (x, weight, targets, None, float("nan")),
        "temperature must be 0 or at least 1e-06, not inf": (x, weight, targets, None, float("inf")),
    }
    for message, arguments in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            linear_logprob(*arguments)
