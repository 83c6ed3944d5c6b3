"""The residual decoder's Triton kernels, each and together: forward and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

import siren
from siren.layers import DecoderBlock, RMSNorm, sinusoidal_positions

pytest.importorskip("triton")
from siren.kernels import rms_norm as norm_module
from siren.kernels.residual_decoder import Block, residual_decoder, residual_decoder_reference
from siren.kernels.rms_norm import rms_norm, rms_norm_reference
from siren.kernels.short_attention import short_attention, short_attention_reference
from siren.kernels.swiglu import swiglu, swiglu_reference

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Outputs and the gradients of all inputs, for gradients of the outputs that the seed decides."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bfloat16, so that every precision gets the same.
    d_outputs = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, d_outputs)]


def assert_as_good(ours: Callable, theirs: Callable, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Each output's and gradient's error against float64 is at most twice PyTorch's.

    A tensor of a few numbers may come out of PyTorch nearly exact by luck. So what PyTorch's errors are typically, over
    all outputs and gradients, is allowed twice for each as well, and a unit in the last place always.
    """
    exact = run(theirs, [tensor.double() for tensor in inputs], seed)
    expected = run(theirs, inputs, seed)
    results = run(ours, inputs, seed)
    allowed = [relative_error(b, c) for b, c in zip(expected, exact, strict=True)]
    typical = (sum(error**2 for error in allowed) / len(allowed)) ** 0.5
    for index, (a, b, c) in enumerate(zip(results, expected, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, limit = relative_error(a, c), max(2 * allowed[index], 2 * typical, torch.finfo(a.dtype).eps)
        assert error <= limit, f"{index}: error {error:.3g}, PyTorch's {allowed[index]:.3g}, typical {typical:.3g}"
    return results


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def random(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 3), (3, 2, 63), (2, 13, 65), (1, 3, 1025)])
def test_rms_norm(size: tuple[int, int, int], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three sums, with one row a program of the backward kernel and with many."""
    x, delta = random(device, dtype, *size, seed=1), random(device, dtype, *size, seed=2)
    weight, positions = random(device, dtype, size[2], seed=3), random(device, dtype, 13, size[2], seed=4)
    for parts in (1, 4, norm_module.PARTS):
        monkeypatch.setattr(norm_module, "PARTS", parts)
        for table in (None, positions):
            assert_as_good(
                lambda x, w, delta, table=table: rms_norm(x, w, EPS, delta, table),
                lambda x, w, delta, table=table: rms_norm_reference(
                    x, w, EPS, delta, None if table is None else table.to(x.dtype)
                ),
                [x, weight, delta],
            )
        assert_as_good(
            lambda x, w: rms_norm(x, w, EPS, positions=positions),
            lambda x, w: rms_norm_reference(x, w, EPS, positions=positions.to(x.dtype)),
            [x, weight],
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_which_half_is_used(dtype: torch.dtype, device: str) -> None:
    """Only the normed rows have a gradient, as in the last norm; or only the total has."""
    x, delta = random(device, dtype, 4, 3, 17, seed=1), random(device, dtype, 4, 3, 17, seed=2)
    weight = random(device, dtype, 17, seed=3)
    assert_as_good(
        lambda x, w, delta: rms_norm(x, w, EPS, delta)[1],
        lambda x, w, delta: rms_norm_reference(x, w, EPS, delta)[1],
        [x, weight, delta],
    )
    leaves = [tensor.requires_grad_() for tensor in (x, delta, weight)]
    total, _ = rms_norm(x, weight, EPS, delta)
    d_total = torch.randn_like(total)
    d_x, d_delta, d_weight = torch.autograd.grad(total, leaves, d_total, allow_unused=True)
    assert torch.equal(d_x, d_total) and torch.equal(d_delta, d_total) and d_weight is None


def test_rms_norm_of_zeros_and_extremes(device: str) -> None:
    """Rows of zeros stay finite; large and small rows are normalised as by PyTorch."""
    x = random(device, torch.float32, 4, 2, 33) * torch.tensor([0.0, 1e-12, 1e12, 1.0], device=device)[:, None, None]
    weight = random(device, torch.float32, 33, seed=1)
    total, normed = rms_norm(x, weight, EPS, torch.zeros_like(x))
    assert torch.equal(total, x)
    for ours, row in zip(normed, x, strict=True):
        theirs, exact = (
            torch.nn.functional.rms_norm(r, (33,), w, EPS) for r, w in ((row, weight), (row.double(), weight.double()))
        )
        error, allowed = (ours.double() - exact).norm(), (theirs.double() - exact).norm()
        assert error <= max(2 * allowed, torch.finfo(torch.float32).eps * exact.norm())


# A program of the kernel takes 21 frames of 3 in bfloat16 and 10 in float32.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "S", "H", "KV", "head_dim"),
    [(1, 1, 1, 1, 1), (21, 3, 2, 2, 5), (22, 3, 4, 2, 3), (10, 3, 3, 1, 16), (43, 2, 2, 1, 17), (5, 13, 4, 4, 64),
     (3, 16, 2, 1, 65), (2, 7, 1, 1, 128)],
)  # fmt: skip
def test_short_attention(N: int, S: int, H: int, KV: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    assert_as_good(
        lambda qkv: short_attention(qkv, H, KV),
        lambda qkv: short_attention_reference(qkv, H, KV),
        [random(device, dtype, N, S, (H + 2 * KV) * head_dim, scale=2.0)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_attention_of_large_scores(dtype: torch.dtype, device: str) -> None:
    """The softmax takes off the maximum: scores of thousands give no infinity."""
    qkv = random(device, dtype, 4, 5, 4 * 8, scale=60.0)
    outputs = assert_as_good(
        lambda qkv: short_attention(qkv, 2, 1), lambda qkv: short_attention_reference(qkv, 2, 1), [qkv]
    )
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_and_positions_are_separate(dtype: torch.dtype, device: str) -> None:
    """Another frame, or a later position, does not change a bit; nor does how many frames there are."""
    qkv = random(device, dtype, 24, 4, 4 * 6)
    out = short_attention(qkv, 2, 1)
    other = qkv.clone()
    other[3] += 1
    other[:, 2:] *= 2
    changed = short_attention(other, 2, 1)
    kept = torch.ones(24, 4, dtype=torch.bool, device=device)
    kept[3], kept[:, 2:] = False, False
    assert torch.equal(changed[kept], out[kept])
    assert not torch.equal(changed[3, :2], out[3, :2]) and not torch.equal(changed[:, 2:], out[:, 2:])
    assert torch.equal(short_attention(qkv[:7], 2, 1), out[:7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 3, 2 * 63), (2, 5, 2 * 65), (2, 2 * 1025)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_as_good(swiglu, swiglu_reference, [random(device, dtype, *shape, scale=3.0)])


def test_swiglu_of_extremes(device: str) -> None:
    """A gate far from zero closes or opens: no overflow on the way."""
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    gate_value = torch.cat((gate, torch.full_like(gate, 3.0)))[None].requires_grad_()
    out = swiglu(gate_value)
    assert torch.equal(out, torch.tensor([[0.0, 0.0, 0.0, 300.0, 3e4]], device=device))
    (grad,) = torch.autograd.grad(out.sum(), gate_value)
    assert torch.equal(grad[0], torch.tensor([0, 0, 1.5, 3, 3, 0, 0, 0, 100, 1e4], device=device))


def weights(
    device: str, dtype: torch.dtype, count: int, H: int, KV: int, head_dim: int, h: int, seed: int
) -> list[Tensor]:
    """Of `count` blocks, six each, and the final norm's."""
    d, width = H * head_dim, (H + 2 * KV) * head_dim
    result = []
    for index in range(count):
        shapes = ((d,), (width, d), (d, d), (d,), (2 * h, d), (d, h))
        for place, shape in enumerate(shapes):
            tensor = random(device, torch.float32, *shape, seed=seed + 10 * index + place)
            result.append((1 + tensor / 4 if len(shape) == 1 else tensor * shape[1] ** -0.5).to(dtype))
    return [*result, (1 + random(device, torch.float32, d, seed=seed + 99) / 4).to(dtype)]


def pack(tensors: tuple[Tensor, ...]) -> tuple[list[Block], Tensor]:
    return [Block(*tensors[i : i + 6]) for i in range(0, len(tensors) - 1, 6)], tensors[-1]


def decoders(H: int, KV: int, positions: Tensor) -> tuple[Callable, Callable]:
    """The kernels and the reference as functions of x and all weights."""

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        return residual_decoder(x, *pack(tensors), positions, H, KV, EPS)

    def theirs(x: Tensor, *tensors: Tensor) -> Tensor:
        return residual_decoder_reference(x, *pack(tensors), positions.to(x.dtype), H, KV, EPS)

    return ours, theirs


@settings(max_examples=5)
@given(
    dtype=st.sampled_from(DTYPES),
    N=st.integers(1, 5),
    S=st.sampled_from([2, 3, 13]),
    KV=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 3, 5, 8, 17]),
    h=st.sampled_from([1, 3, 20, 33]),
    count=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_decoder(
    dtype: torch.dtype, N: int, S: int, KV: int, group: int, head_dim: int, h: int, count: int, seed: int, device: str
) -> None:
    """Output and the gradients of x and every weight, for random sizes.

    A model of a few numbers errs by luck, PyTorch's as ours. So the errors of all tensors of three models are taken
    together: their root mean square is at most twice PyTorch's.
    """
    H = KV * group
    positions = sinusoidal_positions(S + seed % 2, H * head_dim, device).to(dtype)
    errors: list[tuple[float, float]] = []
    for model in (seed, seed + 1, seed + 2):
        inputs = [
            random(device, dtype, N, S, H * head_dim, seed=model),
            *weights(device, dtype, count, H, KV, head_dim, h, model),
        ]
        ours, theirs = decoders(H, KV, positions)
        exact = run(theirs, [tensor.double() for tensor in inputs], model)
        results = zip(run(ours, inputs, model), run(theirs, inputs, model), exact, strict=True)
        errors += [(relative_error(a, c), relative_error(b, c)) for a, b, c in results]
    error, allowed = (torch.tensor(column).square().mean().sqrt() for column in zip(*errors, strict=True))
    assert error <= max(2 * allowed, torch.finfo(dtype).eps), f"error {error:.3g}, PyTorch's {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_of_the_model(dtype: torch.dtype, device: str) -> None:
    """The same as siren.layers with its parameters: the blocks as siren.expert calls them, outputs and gradients."""
    config = siren.SirenConfig(dim=48, n_heads=4, n_kv_heads=2, ffn_multiple_of=8, dropout=0.0, norm_eps=1e-3)
    layers = torch.nn.ModuleList([*(DecoderBlock(config) for _ in range(2)), RMSNorm(config.dim, config.norm_eps)])
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    layers = layers.to(device, dtype)
    x = random(device, dtype, 22, 3, config.dim)
    names = ("attention_norm.weight", "attention.qkv.weight", "attention.output.weight", "ffn_norm.weight")
    names += ("feed_forward.gate_value.weight", "feed_forward.down.weight")
    order = [f"{index}.{name}" for index in range(2) for name in names] + ["2.weight"]
    assert sorted(order) == sorted(name for name, _ in layers.named_parameters())

    def theirs(x: Tensor, *tensors: Tensor) -> Tensor:
        positions = sinusoidal_positions(3, config.dim, device).to(dtype).to(x.dtype)
        parameters = dict(zip(order, tensors, strict=True))
        for index in range(2):
            own = {name: parameters[f"{index}.{name}"] for name in names}
            x = torch.func.functional_call(layers[index], own, (x + positions,))
        return torch.func.functional_call(layers[2], {"weight": parameters["2.weight"]}, (x,))

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        positions = sinusoidal_positions(3, config.dim, device).to(dtype)
        return residual_decoder(x, *pack(tensors), positions, config.n_heads, config.n_kv_heads, config.norm_eps)

    assert_as_good(ours, theirs, [x, *(layers.get_parameter(name).detach() for name in order)])


def test_empty(device: str) -> None:
    """No frames: empty results, and zeros for the weights."""
    inputs = [torch.empty(0, 3, 10, device=device), *weights(device, torch.float32, 1, 2, 1, 5, 7, 0)]
    out, d_x, *gradients = run(decoders(2, 1, torch.zeros(3, 10, device=device))[0], inputs, 0)
    assert out.shape == d_x.shape == (0, 3, 10)
    assert all(not gradient.any() for gradient in gradients)


def test_decoder_arguments(device: str) -> None:
    blocks, final = pack(tuple(weights(device, torch.float32, 2, 4, 2, 3, 5, 0)))
    x, positions = torch.zeros(6, 3, 12, device=device), torch.zeros(3, 12, device=device)
    good = {"x": x, "blocks": blocks, "final_norm": final, "positions": positions, "n_heads": 4, "n_kv_heads": 2}
    residual_decoder(**good, eps=EPS)

    def with_weight(name: str, tensor: Tensor) -> list[Block]:
        return [blocks[0], blocks[1]._replace(**{name: tensor})]

    wrong = {
        r"x must be \[N, S, d\], not \[18, 12\]": {"x": x.flatten(0, 1)},
        "x must be float32 or bfloat16": {"x": x.double(), "blocks": [Block(*(w.double() for w in blocks[0]))]},
        "x must be contiguous": {"x": torch.zeros(3, 6, 12, device=device).transpose(0, 1)},
        "blocks must hold at least one": {"blocks": []},
        "n_heads must divide d = 12": {"n_heads": 5},
        "be a multiple of n_kv_heads": {"n_kv_heads": 3},
        r"qkv of block 1 must be \[24, 12\]": {"blocks": with_weight("qkv", blocks[0].qkv[1:])},
        r"output of block 1 must be \[12, 12\]": {"blocks": with_weight("output", blocks[0].qkv)},
        r"gate_value of block 1 must be \[10, 12\]": {"blocks": with_weight("gate_value", blocks[0].qkv)},
        r"down of block 1 must be \[12, 5\]": {"blocks": with_weight("down", blocks[0].down[1:])},
        "down of block 1 must be torch.float32 on": {"blocks": with_weight("down", blocks[0].down.bfloat16())},
        r"weight must be \[12\]": {"final_norm": final[1:]},
        "weight must be torch.float32 as x is": {"final_norm": final.bfloat16()},
        r"positions must be \[at least 3, 12\]": {"positions": positions[:2]},
        "positions must be on": {"positions": positions.to("meta")},
        "positions must not require a gradient": {"positions": positions.clone().requires_grad_()},
        r"S from 1 to 16, not \[6, 17": {"x": torch.zeros(6, 17, 12), "positions": torch.zeros(17, 12)},
        "eps must be above 0": {"eps": 0.0},
    }
    for message, changes in wrong.items():
        if device != "cpu" and "17" in message:
            changes = {name: tensor.to(device) for name, tensor in changes.items()}
        with pytest.raises((ValueError, TypeError), match=message):
            residual_decoder(**{"eps": EPS, **good, **changes})


def test_kernel_arguments(device: str) -> None:
    x, weight = torch.zeros(6, 3, 12, device=device), torch.ones(12, device=device)
    with pytest.raises(ValueError, match="delta or positions must be given"):
        rms_norm(x, weight, EPS)
    with pytest.raises(ValueError, match=r"delta must be \[6, 3, 12\]"):
        rms_norm(x, weight, EPS, x[1:])
    with pytest.raises(ValueError, match="d at most 8192"):
        rms_norm(torch.zeros(1, 1, 8193, device=device), torch.ones(8193, device=device), EPS, x)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads"):
        short_attention(x, 3, 2)
    with pytest.raises(ValueError, match="qkv must hold 5 heads"):
        short_attention(x, 3, 1)
    with pytest.raises(ValueError, match="qkv must hold 3 heads of 1 to 128 columns"):
        short_attention(torch.zeros(1, 2, 129 * 3, device=device), 1, 1)
    with pytest.raises(TypeError, match="qkv must be float32 or bfloat16"):
        short_attention(x.double(), 2, 1)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        short_attention(x[:, :2], 2, 1)
    with pytest.raises(ValueError, match=r"gate_value must be \[..., 2h\]"):
        swiglu(x[..., :11])
    with pytest.raises(ValueError, match="gate_value must be contiguous"):
        swiglu(x[..., :10])
    with pytest.raises(TypeError, match="gate_value must be float32 or bfloat16"):
        swiglu(x.half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_registered(dtype: torch.dtype, device: str) -> None:
    """What PyTorch promises of every operation: schema, fake tensors, gradients through the dispatcher."""
    ops = torch.ops.siren
    x, weight, positions = random(device, dtype, 2, 3, 8), random(device, dtype, 8), random(device, dtype, 3, 8)
    check = library.opcheck
    check(ops.rms_norm.default, (x.requires_grad_(), weight.requires_grad_(), EPS, x.detach().requires_grad_(), None))
    check(ops.rms_norm.default, (x, weight, EPS, None, positions))
    x, weight = x.detach(), weight.detach()
    check(ops.rms_norm_backward.default, (x, x, x, weight, EPS))
    check(ops.rms_norm_backward.default, (None, x, x, weight, EPS))
    check(ops.short_attention.default, (x.clone().requires_grad_(), 2, 1))
    check(ops.short_attention_backward.default, (x[..., :4].contiguous(), x, 2, 1))
    check(ops.swiglu.default, (x.clone().requires_grad_(),))
    check(ops.swiglu_backward.default, (x[..., :4].contiguous(), x))


def test_deterministic(device: str) -> None:
    """Two runs give the same bits: sums over programs and over the heads of a group have one order."""
    positions = sinusoidal_positions(3, 20, device).bfloat16()
    inputs = [random(device, torch.bfloat16, 22, 3, 20), *weights(device, torch.bfloat16, 1, 4, 2, 5, 33, 0)]
    ours, _ = decoders(4, 2, positions)
    for a, b in zip(run(ours, inputs, 0), run(ours, inputs, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, device: str) -> None:
    """The whole decoder in one graph, forward and backward."""
    H, KV, head_dim = 2, 1, 5
    positions = sinusoidal_positions(3, H * head_dim, device)
    inputs = [
        random(device, torch.float32, 4, 3, H * head_dim),
        *weights(device, torch.float32, 2, H, KV, head_dim, 7, 0),
    ]
    ours, theirs = decoders(H, KV, positions)
    assert_as_good(torch.compile(ours, fullgraph=True, backend=backend), theirs, inputs)
