"""The stack of convolutions that aiSFX and PANNs' CNN14 share: blocks of two 3x3 convolutions on [time, bands].

The names of tensors are those of Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern
Recognition", 2020: conv_block1.conv1.weight, conv_block1.bn1.weight and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-5  # of the batch normalisation


class ConvBlocks(nn.Module):
    """Frames [N, 1, time, bands] to [N, channels of the last block, time // 2^(blocks - 1), bands // 2^(blocks - 1)].

    A block is two 3x3 convolutions with batch normalisation (folded into the convolutions) and ReLU. `pool` is called
    with (x, 2) after each block but the last. `state` has the tensors of `block_shapes`.
    """

    def __init__(
        self, state: Mapping[str, Tensor], channels: Sequence[int], pool: Callable[..., Any], prefix: str = ""
    ) -> None:
        super().__init__()
        self.pool = pool
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for block in range(1, len(channels) + 1):
            for layer in (1, 2):
                scale, shift = fold(state, f"{prefix}conv_block{block}.bn{layer}")
                weight = state[f"{prefix}conv_block{block}.conv{layer}.weight"] * scale[:, None, None, None]
                self.weights.append(weight.contiguous(memory_format=torch.channels_last))
                self.biases.append(shift)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            x = functional.conv2d(x, weight, bias, padding=1).relu_()
            if i % 2 == 0 and i < len(self.weights):
                x = self.pool(x, 2)
        return x


def fold(state: Mapping[str, Tensor], norm: str) -> tuple[Tensor, Tensor]:
    """Batch normalisation of frozen statistics as y = scale * x + shift: (scale, shift), each [channels]."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
    return scale, state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale


def norm_shapes(norm: str, channels: int) -> dict[str, Tensor]:
    """Names and shapes of a batch normalisation, without memory; its counter of batches is not one of them."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{norm}.{name}": torch.empty(channels, device="meta") for name in names}


def block_shapes(channels: Sequence[int], prefix: str = "") -> dict[str, Tensor]:
    """Names and shapes of the tensors of blocks with so many channels, without memory."""
    shapes = {}
    inputs = 1
    for block, outputs in enumerate(channels, start=1):
        for layer in (1, 2):
            shapes[f"{prefix}conv_block{block}.conv{layer}.weight"] = torch.empty(outputs, inputs, 3, 3, device="meta")
            shapes |= norm_shapes(f"{prefix}conv_block{block}.bn{layer}", outputs)
            inputs = outputs
    return shapes
