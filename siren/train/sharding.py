"""FSDP2: weights, gradients and optimiser spread over the processes. Imported when it is used: that takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, blocks: Sequence[nn.Module], method: str, kind: str, processes: int) -> None:
    """Shard in place over processes with one kind of device, "cpu" or "cuda". Gradients are averaged.

    Each block is a unit, entered through its `method`, and the rest of the module another.
    """
    mesh = init_device_mesh(kind, (processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, method)
    fully_shard(module, mesh=mesh)


def like(target: Tensor, values: Tensor) -> Tensor:
    """`values`, whole, spread as `target` is; all processes must call."""
    spread = cast(DTensor, target)
    return distribute_tensor(values.to(target.device), spread.device_mesh, spread.placements)
