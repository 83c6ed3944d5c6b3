"""AdamW as this project uses it, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .distributed import take_over, whole

_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
    sharded: bool = False,
) -> torch.optim.AdamW:
    """AdamW with weight decay on parameters of two dimensions or more, fused where PyTorch can."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda") and not (sharded and device.type == "cpu")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Its state as "exp_avg/NAME" and so on, whole, on the CPU; nothing before its first step. All processes call."""
    return {
        f"{key}/{name}": whole(value).cpu()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Take over what `optimizer_tensors` gave; all processes call."""
    if not tensors:
        return
    fused = optimizer.param_groups[0]["fused"]
    for name, parameter in parameters.items():
        slots: dict[str, Tensor] = {}
        for key in _SLOTS:
            saved = tensors[f"{key}/{name}"]
            if key == "step":
                slots[key] = saved.to(parameter.device if fused else "cpu")
            else:
                slots[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                take_over(slots[key], saved)
        optimizer.state[parameter] = slots
