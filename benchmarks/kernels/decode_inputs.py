"""Random arguments for the operations of the decode path, of any size, on any device (meta tensors too)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from siren.kernels import backbone_step, residual_frame
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def random_tensor(device: str, *shape: int, seed: int = 0) -> Tensor:
    if device == "meta":
        return torch.empty(shape, device="meta")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def random_weights(
    device: str, weights: str, dims: Mapping[str, str], matrices: Sequence[str], sizes: Mapping[str, int], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights in the order of `dims` that keep the size of activations, and the scales of int8 ones."""
    tensors, scales = [], []
    for i, (name, dim) in enumerate(dims.items()):
        shape = [sizes[part.rpartition("*")[2]] * int(part.rpartition("*")[0] or 1) for part in dim.split()]
        values = random_tensor(device, *shape, seed=1000 * seed + i)
        if name in matrices:
            values = values * shape[-1] ** -0.5
            if weights == "int8":
                scale = values.abs().amax(-1) / 127
                scales.append(scale)
                values = (values / scale.unsqueeze(-1)).round()
            values = values.to(DTYPES[weights])
        elif name == "tables":
            values = values.to(torch.float32 if weights == "fp32" else torch.bfloat16)
        elif "norm" in name:
            values = 1 + 0.1 * values
        tensors.append(values)
    return tensors, scales


def backbone_arguments(
    device: str,
    weights: str,
    experts: int = 6,
    blocks: int = 14,
    rows: int = 1,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 64,
    hidden: int = 2816,
    prompts: int = 1,
    tokens: int = 20,
    capacity: int = 512,
    frame: int = 250,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of backbone_step; the prompt's last token is padding unless it is the only one."""
    d = heads * head_dim
    sizes = {"L": blocks, "K": experts, "d": d, "n": d + 2 * kv_heads * head_dim, "hidden": hidden}
    matrices = backbone_step.MATRICES
    tensors, scales = random_weights(device, weights, backbone_step.WEIGHTS, matrices, sizes, seed)
    cache = torch.float32 if weights == "fp32" else torch.bfloat16
    mask = torch.ones(prompts, tokens, dtype=torch.bool, device=device)
    mask[:, 1:][:, -1:] = False
    prompt = (blocks, experts, prompts, heads, tokens, head_dim)
    past = (blocks, experts, rows, kv_heads, capacity, head_dim)
    return {
        "inputs": random_tensor(device, experts, rows, d, seed=seed + 1),
        "frame": torch.tensor([frame], device=device),
        "positions": random_tensor(device, capacity, d, seed=seed + 2),
        "prompt_keys": random_tensor(device, *prompt, seed=seed + 3).to(cache),
        "prompt_values": random_tensor(device, *prompt, seed=seed + 4).to(cache),
        "prompt_mask": mask,
        "prompt_index": (torch.arange(rows, device=device) % prompts).int(),
        "keys": random_tensor(device, *past, seed=seed + 5).to(cache),
        "values": random_tensor(device, *past, seed=seed + 6).to(cache),
        "weights": tensors,
        "scales": scales,
        "heads": heads,
        "eps": 1e-5,
    }


def residual_arguments(
    device: str,
    weights: str,
    experts: int = 6,
    codes: int = 2,
    blocks: int = 2,
    batch: int = 1,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 64,
    hidden: int = 2816,
    entries: int = 1024,
    guided: bool = False,
    seed: int = 0,
    conditioning: str = "accumulated",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[str, Any]:
    """Arguments of residual_frame, but for `persistent`."""
    d, rows = heads * head_dim, batch * (2 if guided else 1)
    sizes = {"L": blocks, "K": experts, "d": d, "n": d + 2 * kv_heads * head_dim, "hidden": hidden}
    sizes |= {"J": experts * codes, "V": entries, "p": codes + 1}
    matrices = residual_frame.MATRICES
    tensors, scales = random_weights(device, weights, residual_frame.WEIGHTS, matrices, sizes, seed)
    return {
        "h": random_tensor(device, experts, rows, d, seed=seed + 1),
        "start": random_tensor(device, experts, rows, d, seed=seed + 2),
        "seeds": torch.arange(batch, device=device) + seed,
        "frames": torch.arange(batch, device=device),
        "forced": None,
        "weights": tensors,
        "scales": scales,
        "heads": heads,
        "conditioning": conditioning,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": 2.0 if guided else 1.0,
        "eps": 1e-5,
    }


def weight_bytes(arguments: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in [*arguments["weights"], *arguments["scales"]])


def in_bf16(arguments: Mapping[str, Any], names: Sequence[str], matrices: Sequence[str]) -> dict[str, Any]:
    """The arguments with all weights in bfloat16 and no scales, so that PyTorch has nothing to convert."""
    scale_of = dict(zip(matrices, arguments["scales"], strict=True)) if arguments["scales"] else {}
    weights = []
    for name, weight in zip(names, arguments["weights"], strict=True):
        value = weight.bfloat16() * scale_of[name].unsqueeze(-1) if name in scale_of else weight
        weights.append(value.bfloat16())
    return {**arguments, "weights": weights, "scales": []}


def as_replayed(device: str, function: Callable[[], object]) -> Callable[[], object]:
    """On a GPU the function as a captured CUDA graph, which is how a frame runs; elsewhere the function itself."""
    if device != "cuda":
        return function
    replay: Callable[[], object] | None = None

    def run() -> object:
        nonlocal replay
        if replay is None:
            function()  # compiles, which a capture cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            replay = graph.replay
        return replay()

    return run


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())
