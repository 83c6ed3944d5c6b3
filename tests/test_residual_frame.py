"""The residual decoders and draws of one frame, as small kernels and as one persistent kernel."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import library

pytest.importorskip("triton")

from decode_inputs import relative_error, residual_arguments
from siren.kernels import residual_frame as module
from siren.kernels.gumbel_noise import gumbel_noise_reference
from siren.kernels.residual_frame import residual_frame, residual_frame_reference

SMALL = {
    "experts": 3,
    "codes": 2,
    "blocks": 2,
    "batch": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 5,
    "hidden": 33,
    "entries": 37,
}
both = pytest.mark.parametrize("persistent", [False, True], ids=["kernels", "persistent"])


@st.composite
def shapes(take: st.DrawFn) -> dict[str, Any]:
    kv_heads = take(st.integers(1, 2))
    experts, codes = take(st.sampled_from([(1, 3), (2, 1), (2, 2)]))
    blocks = take(st.integers(0, 2))
    return {
        "experts": experts,
        "codes": codes,
        "blocks": blocks,
        "batch": take(st.sampled_from([1, 2, 17])),
        "heads": kv_heads * take(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "head_dim": take(st.sampled_from([1, 3, 8])),
        "hidden": take(st.sampled_from([1, 7, 33])),
        "entries": take(st.sampled_from([2, 9, 17])),
        "guided": take(st.booleans()),
        "conditioning": take(st.sampled_from(["none", "residual", "accumulated"])) if blocks else "none",
        "temperature": take(st.sampled_from([0.0, 0.7])),
        "top_k": take(st.sampled_from([0, 2])),
        "top_p": take(st.sampled_from([1.0, 0.8])),
        "seed": take(st.integers(0, 99)),
    }


@hypothesis.settings(max_examples=8)
@hypothesis.given(shape=shapes(), weights=st.sampled_from(["fp32", "bf16", "int8"]), persistent=st.booleans())
def test_error_rule_and_draws(shape: dict[str, Any], weights: str, persistent: bool, device: str) -> None:
    """With the codes it drew given, logits and log-probabilities err at most twice as much as PyTorch's; the codes are
    those its logits give; the sums are those of its codes."""
    arguments = residual_arguments(device, weights, **shape)
    codes, logprobs, total, logits = residual_frame(**arguments, persistent=persistent)
    given = arguments | {"forced": codes}
    low = torch.float32 if weights == "fp32" else torch.bfloat16
    exact = residual_frame_reference(**given | {"h": arguments["h"].double()})
    plain = residual_frame_reference(**given | {"h": arguments["h"].to(low)})
    assert torch.equal(total, exact[2])
    # Guidance takes differences, and a handful of numbers may come out exact by luck.
    floor = 4 * torch.finfo(low).eps * (4 if shape["guided"] else 1)
    assert relative_error(logits, exact[3]) <= max(2 * relative_error(plain[3], exact[3]), floor)
    scaled = logits / (arguments["temperature"] or 1)
    expected = scaled.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=2e-6)

    seeds, frames = arguments["seeds"], arguments["frames"]
    noise = gumbel_noise_reference(seeds, frames, codes.shape[1], logits.shape[2]) if arguments["temperature"] else None
    for j in range(codes.shape[1]):
        zeros = torch.zeros(1, len(seeds), logits.shape[2], device=device)
        drawn = module.sample_heads.sample_heads_reference(
            logits[:, j], None, torch.eye(logits.shape[2], device=device), None,
            None if noise is None else noise[:, j], None, zeros[:, 0].unsqueeze(1).repeat(1, logits.shape[2], 1),
            zeros.clone(), zeros, zeros.clone(), "none", arguments["temperature"], arguments["top_k"],
            arguments["top_p"], 1.0, 1e-5,
        )[0]  # fmt: skip
        assert torch.equal(codes[:, j], drawn)


@both
def test_tiles_as_on_a_gpu(persistent: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 matrix rows, over sizes that no tile divides, and more rows than a tile of activations has."""
    from siren.kernels import residual_persistent

    sizes = module.tile_sizes
    for place in (module, residual_persistent):
        monkeypatch.setattr(place, "tile_sizes", lambda *given: {**sizes(*given), "BLOCK_N": 16})
    arguments = residual_arguments(device, "fp32", **SMALL | {"batch": 17, "experts": 2, "blocks": 1}, guided=True)
    results = residual_frame(**arguments, persistent=persistent)
    exact = residual_frame_reference(**arguments | {"h": arguments["h"].double()})
    plain = residual_frame_reference(**arguments)
    assert torch.equal(results[0], exact[0])
    assert relative_error(results[3], exact[3]) <= 2 * relative_error(plain[3], exact[3])


@both
def test_forced_and_free_agree(persistent: bool, device: str) -> None:
    """Codes that were drawn, given back, lead to the same logits, log-probabilities and sums, bit for bit; another run
    too."""
    arguments = residual_arguments(device, "fp32", **SMALL)
    free = residual_frame(**arguments, persistent=persistent)
    again = residual_frame(**arguments, persistent=persistent)
    assert all(torch.equal(a, b) for a, b in zip(free, again, strict=True))
    forced = residual_frame(**arguments | {"forced": free[0]}, persistent=False)
    if not persistent:
        assert all(torch.equal(a, b) for a, b in zip(free, forced, strict=True))
    given = arguments | {"forced": free[0]}
    exact = residual_frame_reference(**given | {"h": arguments["h"].double()})[3]
    allowed = 2 * relative_error(residual_frame_reference(**given)[3], exact)
    assert max(relative_error(forced[3], exact), relative_error(free[3], exact)) <= allowed


@both
def test_alone_and_together(persistent: bool, device: str) -> None:
    """A sequence's frame does not depend on the sequences beside it, bit for bit, though one of them holds NaN."""
    arguments = residual_arguments(device, "bf16", **SMALL | {"batch": 18, "experts": 2, "blocks": 1}, guided=True)
    arguments["h"][0, 4] = math.nan
    codes, logprobs, total, logits = residual_frame(**arguments, persistent=persistent)
    assert codes[4, 0] == 0
    assert logprobs[4].isnan()[:2].all() and logits[4, :2].isnan().all()
    others = [b for b in range(18) if b != 4]
    assert logprobs[others].isfinite().all()
    for b in (0, 3, 17):
        rows = [b, b + 18]
        alone = arguments | {name: arguments[name][:, rows].contiguous() for name in ("h", "start")}
        alone |= {name: arguments[name][[b]] for name in ("seeds", "frames")}
        one = residual_frame(**alone, persistent=persistent)
        together = (codes[b], logprobs[b], total[:, b], logits[b])
        assert all(torch.equal(a.squeeze(1 if a is one[2] else 0), b) for a, b in zip(one, together, strict=True))


@both
def test_poisoned_scratch(persistent: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before it was written, and every output is: all new memory holds NaN, or impossible codes."""
    arguments = residual_arguments(device, "fp32", **SMALL | {"experts": 2})
    expected = residual_frame(**arguments, persistent=persistent)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *given, **options: poisoned(new_empty(*given, **options)))
    launched = (arguments | {}).items()
    if persistent:
        from siren.kernels import residual_persistent

        result = residual_persistent.launch(**{name: value for name, value in launched if name != "forced"})
    else:
        result = module.launch(**dict(launched))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# One process a program, on memory that they share: the barrier waits for programs that really run beside it.
PROGRAM = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from triton.runtime import interpreter
from decode_inputs import residual_arguments
from siren.kernels import residual_persistent

program, programs, shape, folder = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
torch.set_num_threads(1)
made = 0

def shared(*shape, dtype=torch.float32, fill=None, **_):
    # Tensors come in the same order in every process: number n of one is number n of the others.
    global made
    made += 1
    shape = shape[0] if shape and not isinstance(shape[0], int) else shape
    size = max(1, torch.Size(shape).numel())
    flat = torch.from_file(f"{folder}/{made}", shared=True, size=size, dtype=dtype)
    return flat[: torch.Size(shape).numel()].view(shape)

arguments = residual_arguments("cpu", "fp32", **shape)
del arguments["forced"]
torch.empty = torch.zeros = shared
new_empty = torch.Tensor.new_empty  # the interpreter calls it too, with a device
torch.Tensor.new_empty = lambda self, *shape, **more: new_empty(self, *shape, **more) if more else shared(*shape)
place = interpreter.interpreter_builder.set_grid_idx
dims = interpreter.interpreter_builder.set_grid_dim
interpreter.interpreter_builder.set_grid_idx = lambda x, y, z: place(program, y, z)
interpreter.interpreter_builder.set_grid_dim = lambda x, y, z: dims(programs, y, z)
sizes = residual_persistent.tile_sizes
residual_persistent.tile_sizes = lambda *given: {**sizes(*given), "BLOCK_N": 16}
result = residual_persistent.launch(**arguments)
torch.save([tensor.clone() for tensor in result], f"{folder}/result-{program}.pt")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the programs run side by side as they are")
@pytest.mark.parametrize("programs", [2, 3])
def test_programs_side_by_side(programs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent kernel's programs, each in a process of its own, wait for one another at its barriers and together
    compute what one program does alone, bit for bit with its tiles. The interpreter itself would run them one after
    another."""
    from siren.kernels import residual_persistent

    shape = SMALL | {"experts": 2, "blocks": 1, "batch": 2, "guided": True}
    paths = json.dumps([path for path in sys.path if path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Every tensor's file is there, all zeros, before the first process looks: 64 KB hold each of them.
    for number in range(1, 40):
        (tmp_path / str(number)).write_bytes(bytes(1 << 16))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, paths, str(program), str(programs), json.dumps(shape), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for program in range(programs)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    arguments = residual_arguments("cpu", "fp32", **shape)
    expected = residual_frame(**arguments, persistent=True)
    sizes = residual_persistent.tile_sizes
    monkeypatch.setattr(residual_persistent, "tile_sizes", lambda *given: {**sizes(*given), "BLOCK_N": 16})
    alone = residual_frame(**arguments, persistent=True)
    for program in range(programs):
        result = torch.load(tmp_path / f"result-{program}.pt", weights_only=True)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[2], expected[2])
        torch.testing.assert_close(result[3], expected[3], rtol=1e-5, atol=1e-5)
        assert torch.equal(result[3], alone[3])


def test_operation(device: str) -> None:
    """opcheck accepts it, and it survives torch.compile."""
    arguments = residual_arguments(device, "fp32", **SMALL | {"experts": 1, "blocks": 1})
    for persistent in (False, True):
        values = (*arguments.values(), persistent)
        library.opcheck(residual_frame, values)
        function = torch.compile(lambda *given: residual_frame(*given)[3] * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(function(*values), residual_frame(*values)[3] * 2)


def test_arguments(device: str) -> None:
    """What does not fit is named, before anything is launched."""
    good = residual_arguments(device, "fp32", **SMALL) | {"persistent": False}
    weights = good["weights"]
    heads = list(module.WEIGHTS).index("heads")
    wide = torch.zeros(6, 8193, 20, device=device)
    tables = torch.zeros(3, 6, 8193, 20, device=device)
    wrong = {
        r"h must be contiguous float32 \[K, R, d\]": {"h": good["h"].half()},
        r"start must be .*= \[3, 3, 20\]": {"start": good["start"][:, :2]},
        r"seeds must be contiguous int64": {"seeds": good["seeds"].int()},
        r"frames must be contiguous int64 \[B\] = \[3\]": {"frames": good["frames"][:2]},
        r"h must have a row for each of 2 sequences": {name: good[name][:2] for name in ("seeds", "frames")},
        r"forced must be contiguous int64 \[B, J\]": {"forced": torch.zeros(3, 5, dtype=torch.int64, device=device)},
        r"forced codes need persistent=False": {
            "forced": torch.zeros(3, 6, dtype=torch.int64, device=device),
            "persistent": True,
        },
        r"weights must be the 10 tensors attention_norm": {"weights": weights[1:]},
        r"tables must be .*\[K, J, V, d\]": {"weights": [*weights[:8], weights[8][:, :5], weights[9]]},
        r"4 positions, dim 20 and 4 heads do not fit": {
            "weights": [*weights[:9], torch.zeros(4, 20, device=device)],
        },
        r"dim 20 and 3 heads do not fit": {"heads": 3},
        r"heads have 8193 rows": {"weights": [*weights[:heads], wide, tables, weights[-1]]},
        r"conditioning must be one of": {"conditioning": ""},
    }
    for message, changed in wrong.items():
        with pytest.raises(ValueError, match=message):
            residual_frame(**good | changed)
    if device == "cpu":
        with pytest.raises(ValueError, match="forced codes must be from 0 to 36"):
            residual_frame(**good | {"forced": torch.full((3, 6), 37)})
