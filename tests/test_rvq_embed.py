"""The Triton embedding sum and its gradient: equal to plain PyTorch, at sizes that fit no block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, library

import siren
from siren.expert import CodeEmbedding

pytest.importorskip("triton")
from siren.kernels import rvq_embed as module
from siren.kernels.rvq_embed import project_tables, rvq_embed, rvq_embed_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 3, 2), (2, 2, 9, 300, 2, 13), (6, 12, 3, 65, 1, 1), (1, 2, 1, 17, 9, 1)]


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(K: int, J: int, V: int, d: int, B: int, T: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)
    tables = torch.randn(K, J, V, d, generator=generator).to(device, dtype)
    return tables, torch.randint(V, (B, J, T), generator=generator).to(device)


def gradient(function: Callable[..., Tensor], tables: Tensor, codes: Tensor, d_sums: Tensor) -> Tensor:
    tables = tables.detach().requires_grad_()
    return torch.autograd.grad(function(tables, codes), tables, d_sums)[0]


def exact_gradient(tables: Tensor, codes: Tensor, d_sums: Tensor) -> Tensor:
    """In float64, codebook after codebook."""
    K, J, _, d = tables.shape
    result = torch.zeros(tables.shape, dtype=torch.float64, device=tables.device)
    for j in range(J):
        result[:, j].index_add_(1, codes[:, j].flatten().long(), d_sums.double().view(K, -1, d))
    return result


def assert_as_good(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The error of ours is at most twice that of theirs, or half a unit in the last place where that is more."""
    error, allowed = ((value.double() - exact).norm().item() for value in (ours, theirs))
    floor = torch.finfo(ours.dtype).eps / 2 * exact.norm().item()
    assert error <= max(2 * allowed, floor), f"error {error:.3g}, PyTorch's {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sums(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Equal to the reference bit for bit, whatever the codes' type and layout."""
    tables, codes = inputs(*size, dtype, device)
    expected = rvq_embed_reference(tables, codes)
    for variant in (codes, codes.int(), codes.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        assert torch.equal(rvq_embed(tables, variant), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gradient(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Codes that do not occur get zeros; the same bits in every run and for every type and layout of the codes."""
    tables, codes = inputs(*size, dtype, device)
    d_sums = torch.randn(size[0], size[4], size[5], size[3], device=device)
    ours = gradient(rvq_embed, tables, codes, d_sums)
    assert ours.dtype == dtype
    assert_as_good(ours, gradient(rvq_embed_reference, tables, codes, d_sums), exact_gradient(tables, codes, d_sums))
    for variant in (codes, codes.int(), codes.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        assert torch.equal(gradient(rvq_embed, tables, variant, d_sums), ours)
    unused = torch.ones(size[1], size[2], dtype=torch.bool, device=device)
    for j in range(size[1]):
        unused[j, codes[:, j].flatten()] = False
    assert (ours[:, unused] == 0).all()


@given(
    size=st.tuples(*(st.integers(1, high) for high in (2, 4, 20, 300, 3, 40))),
    dtype=st.sampled_from(DTYPES),
    dropped=st.integers(0, 3),
    skewed=st.booleans(),
)
@example(size=(1, 2, 2, 2, 3, 37), dtype=torch.float32, dropped=2, skewed=True)
def test_random_sizes(size: tuple[int, ...], dtype: torch.dtype, dropped: int, skewed: bool, device: str) -> None:
    """Sums and gradient, of all codebooks or of a slice of them, with codes spread evenly or nearly all the same."""
    tables, codes = inputs(*size, dtype, device)
    if skewed:
        codes = codes * (torch.rand(codes.shape, device=device) < 0.1)
    kept = max(size[1] - dropped, 1)
    part, codes = tables[:, :kept], codes[:, :kept]
    assert torch.equal(rvq_embed(part, codes), rvq_embed_reference(part, codes))
    draws = -(-64 // part.numel())  # in a sum or two PyTorch's error may be small by luck
    found = []
    for _ in range(draws):
        d_sums = torch.randn(size[0], size[4], size[5], size[3], device=device)
        theirs = gradient(rvq_embed_reference, part, codes, d_sums)
        found.append((gradient(rvq_embed, part, codes, d_sums), theirs, exact_gradient(part, codes, d_sums)))
    assert_as_good(*(torch.stack(values) for values in zip(*found, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_code_in_every_frame(dtype: torch.dtype, device: str) -> None:
    """A long segment, and one that ends in the middle of a block of rows."""
    tables, codes = torch.randn(2, 2, 3, 5, device=device).to(dtype), torch.ones(5, 2, 205, dtype=torch.int64)
    codes[:, 1] = torch.arange(205) % 2 * 2
    codes = codes.to(device)
    d_sums = torch.randn(2, 5, 205, 5, device=device)
    ours, theirs = (gradient(function, tables, codes, d_sums) for function in (rvq_embed, rvq_embed_reference))
    assert_as_good(ours, theirs, exact_gradient(tables, codes, d_sums))
    assert (ours[:, 0, [0, 2]] == 0).all() and (ours[:, 1, 1] == 0).all()


def test_slices_of_tables(device: str) -> None:
    """Any strides between experts and codebooks, read in place; the gradient reaches the tables sliced from."""
    tables = torch.randn(4, 3, 5, 7, device=device).requires_grad_()
    codes = torch.randint(5, (2, 4, 6), device=device)
    slices = {
        "codebooks": lambda t: t[:, :2],
        "codebook": lambda t: t[:, 1:2],
        "expert": lambda t: t[2:3, 1:],
        "every second": lambda t: t[::2, ::2],
        "transposed": lambda t: t.transpose(0, 1),
        "expanded": lambda t: t[:1].expand(6, 3, 5, 7),
    }
    for name, take in slices.items():
        part = take(tables)
        used = codes[:, : part.shape[1]]
        sums = rvq_embed(part, used)
        expected = rvq_embed_reference(part, used)
        assert torch.equal(sums, expected), name
        d_sums = torch.randn_like(sums)
        (theirs,) = torch.autograd.grad(expected, tables, d_sums)
        (ours,) = torch.autograd.grad(sums, tables, d_sums)
        exact = torch.zeros_like(tables, dtype=torch.float64, requires_grad=True)
        take(exact).backward(exact_gradient(part, used, d_sums))
        assert_as_good(ours, theirs, exact.grad)


def test_gradient_of_a_broadcast_sum(device: str) -> None:
    """sum().backward() gives gradients without strides."""
    tables, codes = inputs(2, 3, 5, 7, 3, 2, torch.float32, device)
    tables.requires_grad_()
    rvq_embed(tables, codes).sum().backward()
    counts = torch.stack([codes[:, j].flatten().bincount(minlength=5) for j in range(3)])
    assert torch.equal(tables.grad, counts[None, :, :, None].expand(2, 3, 5, 7).float())


def test_empty(device: str) -> None:
    tables, codes = inputs(2, 3, 5, 7, 4, 6, torch.float32, device)
    assert rvq_embed(tables, codes[:, :, :0]).shape == (2, 4, 0, 7)
    d_tables = gradient(rvq_embed, tables, codes[:, :, :0], torch.empty(2, 4, 0, 7, device=device))
    assert torch.equal(d_tables, torch.zeros_like(tables))
    sums = rvq_embed(tables[:, :0], codes[:, :0])
    assert torch.equal(sums, torch.zeros(2, 4, 6, 7, device=device))
    assert gradient(rvq_embed, tables[:, :0], codes[:, :0], sums).shape == (2, 0, 5, 7)


def test_neighbours_untouched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before or after the results."""
    tables, codes = inputs(2, 4, 3, 7, 3, 5, torch.float32, device)
    expected = (
        rvq_embed_reference(tables, codes),
        module._backward(torch.ones(2, 3, 5, 7, device=device), codes, 3, tables.dtype),
    )
    buffers, margin = [], 512

    def guarded(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(torch.full((torch.Size(shape).numel() + 2 * margin,), -1.0, dtype=dtype, device=device))
        return buffers[-1][margin:-margin].view(shape)

    ones = torch.ones(2, 3, 5, 7, device=device)
    monkeypatch.setattr(torch, "empty", guarded)
    results = module._forward(tables, codes), module._backward(ones, codes, 3, tables.dtype)
    monkeypatch.undo()
    assert len(buffers) == 2
    for buffer, result, value in zip(buffers, results, expected, strict=True):
        assert torch.equal(result, value)
        assert (buffer[:margin] == -1).all() and (buffer[-margin:] == -1).all()


@pytest.mark.parametrize("bad", [-1, 3, 2**31 + 1, 2**40, -(2**40)])
def test_codes_out_of_range(bad: int, device: str) -> None:
    """An error for CPU tensors; in the kernels NaN for their frame and nothing for the gradient."""
    tables, codes = inputs(2, 4, 3, 8, 5, 6, torch.float32, device)
    outside = codes.clone()
    outside[1, 2, 3] = bad
    if device == "cpu":
        with pytest.raises(ValueError, match=r"codes must be 0\.\.2, not "):
            rvq_embed(tables, outside)
    sums = module._forward(tables, outside)
    assert sums[:, 1, 3].isnan().all()
    assert sums.isnan().sum() == 2 * 8
    d_sums = torch.randint(-9, 10, (2, 5, 6, 8), device=device).float()  # whole numbers: the sums are exact
    expected = exact_gradient(tables, codes, d_sums)
    expected[:, 2, codes[1, 2, 3]] -= d_sums[:, 1, 3]
    assert torch.equal(module._backward(d_sums, outside, 3, torch.float32), expected.float())


def test_arguments(device: str) -> None:
    tables, codes = torch.ones(2, 4, 3, 8, device=device), torch.ones(5, 4, 6, dtype=torch.long, device=device)
    wrong = {
        r"tables must be \[K, J, V, d\], not \[4, 3, 8\]": (tables[0], codes),
        "tables must be float32, bfloat16 or float16, not torch.int64": (tables.long(), codes),
        "tables must be float32, bfloat16 or float16, not torch.float64": (tables.double(), codes),
        "tables must have contiguous rows": (tables[..., ::2], codes),
        r"rows, one after another, not strides \(96, 24, 16, 1\)": (tables[:, :, ::2], codes),
        r"codes must be \[B, J=4, T\]": (tables, codes[:, :3]),
        "codes must be int32 or int64": (tables, codes.float()),
        "codes must be on": (tables, codes.to("meta")),
    }
    for message, arguments in wrong.items():
        for function in (rvq_embed, rvq_embed_reference):
            with pytest.raises((ValueError, TypeError), match=message):
                function(*arguments)


def test_registered(device: str) -> None:
    """What PyTorch promises of an operation: schema, fake tensors, gradients through the dispatcher."""
    tables, codes = inputs(2, 3, 5, 7, 3, 2, torch.bfloat16, device)
    library.opcheck(torch.ops.siren.rvq_embed.default, (tables, codes))
    library.opcheck(torch.ops.siren.rvq_embed.default, (tables[:, :2].requires_grad_(), codes[:, :2].int()))
    d_sums = torch.randn(2, 3, 2, 7, device=device)
    library.opcheck(torch.ops.siren.rvq_embed_backward.default, (d_sums, codes, 5, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, device: str) -> None:
    """One graph, the same bits."""
    tables, codes = inputs(2, 3, 5, 7, 3, 2, torch.float32, device)
    weight = torch.randn(2, 3, 2, 7, device=device)

    def loss(tables: Tensor, codes: Tensor) -> Tensor:
        return rvq_embed(tables, codes) * weight

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert torch.equal(compiled(tables, codes), loss(tables, codes))
    ones = torch.ones_like(weight)
    assert torch.equal(gradient(compiled, tables, codes, ones), gradient(loss, tables, codes, ones))


def projection(K: int, J: int, V: int, c: int, f: int, d: int, device: str) -> list[Tensor]:
    """codebooks, out_weight, out_bias, proj_weight, proj_bias"""
    shapes = [(J, V, c), (J, f, c), (J, f), (K, J, d, f), (K, J, d)]
    return [torch.randn(shape, device=device) * 0.3 for shape in shapes]


def unfolded(codes: Tensor, weights: list[Tensor]) -> Tensor:
    """Proj(out_proj(Z[code])) of every token, summed over the codebooks: [K, B, T, d]."""
    codebooks, out_weight, out_bias, proj_weight, proj_bias = weights
    total = torch.zeros((), dtype=codebooks.dtype, device=codes.device)
    for j in range(codes.shape[1]):
        features = codebooks[j, codes[:, j]] @ out_weight[j].T + out_bias[j]  # [B, T, f]
        total = total + torch.einsum("btf,kdf->kbtd", features, proj_weight[:, j]) + proj_bias[:, None, None, j]
    return total


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (2, 3, 9, 4, 17, 5), (3, 2, 33, 8, 40, 65)])
def test_projected_tables(size: tuple[int, ...], device: str) -> None:
    """Fold, gather and sum: values and all gradients as those of projecting every token."""
    weights = projection(*size, device)
    codes = torch.randint(size[2], (3, size[1], 21), device=device)
    mixed = torch.randn(size[0], 3, 21, size[5], device=device)

    def run(function: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [weight.to(dtype).requires_grad_() for weight in weights]
        sums = function(leaves)
        return [sums.detach(), *torch.autograd.grad((sums * mixed.to(sums.dtype)).sum(), leaves)]

    exact = run(lambda leaves: unfolded(codes, leaves), torch.float64)
    theirs = run(lambda leaves: unfolded(codes, leaves), torch.float32)
    ours = run(lambda leaves: rvq_embed(project_tables(*leaves), codes), torch.float32)
    # A gradient of a few numbers may come out of PyTorch nearly exact by luck: its typical error is allowed as well.
    allowed = [((b - c).norm() / c.norm()).item() for b, c in zip(theirs, exact, strict=True)]
    typical = (sum(error**2 for error in allowed) / len(allowed)) ** 0.5
    for a, c, own in zip(ours, exact, allowed, strict=True):
        error = ((a - c).norm() / c.norm()).item()
        assert error <= max(2 * own, 2 * typical, torch.finfo(torch.float32).eps)


def test_projected_tables_are_the_expert_s(device: str) -> None:
    """siren.expert folds one codebook at a time."""
    config = siren.SirenConfig.preset("tiny")
    layers = [CodeEmbedding(config).to(device) for _ in range(3)]
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    stacks = [
        torch.stack([layer.get_parameter(name) for layer in layers])
        for name in ("codebook.weight", "dac_out.weight", "dac_out.bias", "projector.weight", "projector.bias")
    ]
    ours = project_tables(*stacks[:3], stacks[3].unsqueeze(0), stacks[4].unsqueeze(0))
    assert ours.is_contiguous()
    theirs = torch.stack([layer.table() for layer in layers]).unsqueeze(0)
    assert_as_good(ours, theirs, torch.stack([layer.double().table() for layer in layers]).unsqueeze(0))


def test_projection_arguments(device: str) -> None:
    weights = projection(2, 3, 9, 4, 17, 5, device)
    for index, name in enumerate(("codebooks", "out_weight", "out_bias", "proj_weight", "proj_bias")):
        wrong = list(weights)
        wrong[index] = weights[index][0]
        with pytest.raises(ValueError, match=rf"{name} must be \["):
            project_tables(*wrong)
    with pytest.raises(ValueError, match=r"proj_weight must be \[2, 3, 5, 17\]"):
        project_tables(*weights[:3], weights[3][:, :2], weights[4])


def test_package_needs_no_triton(tmp_path: Path) -> None:
    """`siren.kernels` imports without triton, and does not bring it in."""
    script = "import sys; sys.modules['triton'] = None; import siren.kernels"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)
