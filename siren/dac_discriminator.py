"""The discriminators that make a codec's sound less blurred: of DAC's two kinds, with few channels. For GPUs.

Each gives its features, layer by layer; the last is its judgement, near 1 for real sound and near 0 for decoded sound.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
WINDOWS = (1024, 512, 256)  # samples
_SLOPE = 0.1

Features = list[list[Tensor]]  # of each discriminator, of each layer


class _Layers(nn.Module):
    def __init__(self, convolutions: list[nn.Module], judge: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(map(weight_norm, convolutions))
        self.judge = weight_norm(judge)

    def forward(self, picture: Tensor) -> list[Tensor]:
        features = []
        for convolution in self.convolutions:
            picture = functional.leaky_relu(convolution(picture), _SLOPE)
            features.append(picture)
        return [*features, self.judge(picture)]


class Discriminators(nn.Module):
    """Sound [B, 1, S] -> Features of one discriminator for each of PERIODS, then one for each of WINDOWS.

    A period p looks at the sound folded into rows of p samples, a window at the complex spectrum.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.by_period = nn.ModuleList(_period_layers(width) for _ in PERIODS)
        self.by_window = nn.ModuleList(_window_layers(width) for _ in WINDOWS)

    def forward(self, sound: Tensor) -> Features:
        return [layers(_fold(sound, period)) for layers, period in zip(self.by_period, PERIODS, strict=True)] + [
            layers(_spectrum(sound, window)) for layers, window in zip(self.by_window, WINDOWS, strict=True)
        ]


def _period_layers(width: int) -> _Layers:
    sizes = [1, width, 2 * width, 4 * width, 8 * width]
    convolutions: list[nn.Module] = [
        nn.Conv2d(before, after, (5, 1), (3, 1), (2, 0)) for before, after in pairwise(sizes)
    ]
    return _Layers(convolutions, nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))


def _window_layers(width: int) -> _Layers:
    convolutions: list[nn.Module] = [nn.Conv2d(2, width, (3, 9), padding=(1, 4))]
    convolutions += [nn.Conv2d(width, width, (3, 9), (1, 2), (1, 4)) for _ in range(3)]
    return _Layers(convolutions, nn.Conv2d(width, 1, (3, 3), padding=1))


def _fold(sound: Tensor, period: int) -> Tensor:
    padded = functional.pad(sound, (0, -sound.shape[-1] % period), mode="reflect")
    return padded.unflatten(-1, (-1, period))


def _spectrum(sound: Tensor, window: int) -> Tensor:
    hann = torch.hann_window(window, device=sound.device)
    spectrum = torch.stft(sound[:, 0], window, window // 4, window=hann, normalized=True, return_complex=True)
    return torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, T, F]


def discriminator_loss(real: Features, decoded: Features) -> Tensor:
    """What the discriminators minimise, a scalar: least squares to 1 for real sound and to 0 for decoded sound."""
    losses = [(1 - r[-1]).square().mean() + d[-1].square().mean() for r, d in zip(real, decoded, strict=True)]
    return torch.stack(losses).mean()


def generator_losses(real: Features, decoded: Features) -> dict[str, Tensor]:
    """What the codec minimises: "adversarial", decoded sound judged as 1, and "feature", decoded features as real ones.

    Each is a mean over discriminators (and layers), where DAC has sums.
    """
    adversarial = [(1 - d[-1]).square().mean() for d in decoded]
    feature = [
        (a.detach() - b).abs().mean()
        for r, d in zip(real, decoded, strict=True)
        for a, b in zip(r[:-1], d[:-1], strict=True)
    ]
    return {"adversarial": torch.stack(adversarial).mean(), "feature": torch.stack(feature).mean()}
