"""CNN14 of PANNs: an embedding of 2048 numbers a clip and logits of AudioSet's 527 classes, for FD, IS and KL.

The network is that of Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern Recognition",
2020; names of tensors are theirs. There are two variants, which the lengths of their windows tell apart: 32 kHz
(Cnn14_mAP=0.431.pth: windows of 1024 samples, 50..14000 Hz) and 16 kHz (Cnn14_16k_mAP=0.438.pth: 512, 50..8000 Hz).
Windows, Fourier kernels and mel weights are tensors of the file too, and are taken from it. Their variants of CNN14
that pool otherwise (DecisionLevelMax) have the same names and shapes: use these two files only.

As in audioldm_eval the embedding is the layer before the classifier, after its ReLU; the logits are what a sigmoid
would follow, and softmax(logits) are the probabilities of IS and KL; and a clip below 32,000 samples is filled up with
silence. It also takes the mean off a clip, which no band here hears. A clip of more than a minute is heard in equal
parts here, and its embedding and logits are the means of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..conv_blocks import ConvBlocks, block_shapes, fold, norm_shapes
from ..errors import CheckpointError
from ..pretrained import check_weights, move
from .embedding import LONGEST, Embedded, check_wave, no_texts, pieces
from .weights import SOURCES, read_tensors

DIM = 2048
CLASSES = 527
_VARIANTS = {1024: (32000, 320), 512: (16000, 160)}  # window in samples: sample rate in Hz, hop in samples
_BANDS = 64
_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_LEAST = 32000  # samples; shorter clips are filled up
_REAL, _IMAGINARY = (f"spectrogram_extractor.stft.conv_{part}.weight" for part in ("real", "imag"))


class Cnn14(nn.Module):
    """Sound [N, samples] to embeddings [N, 2048] and logits [N, 527]. Raises CheckpointError for other tensors."""

    def __init__(self, state: Mapping[str, Tensor], where: object) -> None:
        super().__init__()
        kernel = state.get(_REAL)
        self.window = 0 if kernel is None else kernel.shape[-1]
        if self.window not in _VARIANTS:
            raise CheckpointError(
                f"{where} is not a CNN14 of 16 or 32 kHz: it lacks {_REAL} of a window of 512 or 1024 samples; "
                f"use {SOURCES['cnn14']}"
            )
        self.sample_rate, self.hop = _VARIANTS[self.window]
        kept = check_weights(state, wanted(self.window), where)
        self.fourier = nn.Parameter(torch.cat((kept[_REAL], kept[_IMAGINARY])))  # [2 * bins, 1, window]
        self.mel = nn.Parameter(kept["logmel_extractor.melW"])
        scale, shift = fold(kept, "bn0")
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)
        self.convolutions = ConvBlocks(kept, _CHANNELS, functional.avg_pool2d)
        self.hidden_weight, self.hidden_bias = nn.Parameter(kept["fc1.weight"]), nn.Parameter(kept["fc1.bias"])
        self.class_weight = nn.Parameter(kept["fc_audioset.weight"])
        self.class_bias = nn.Parameter(kept["fc_audioset.bias"])
        self.requires_grad_(False)

    def forward(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        x: Tensor = self.convolutions(self.features(waves)[:, None]).mean(dim=3)
        x = x.amax(dim=2) + x.mean(dim=2)
        embeddings = functional.linear(x, self.hidden_weight, self.hidden_bias).relu()
        return embeddings, functional.linear(embeddings, self.class_weight, self.class_bias)

    def features(self, waves: Tensor) -> Tensor:
        """Normalised log-mel frames [N, frames, 64], in dB before normalisation, of sound [N, samples]."""
        padded = functional.pad(waves[:, None], (self.window // 2, self.window // 2), mode="reflect")
        real, imaginary = functional.conv1d(padded, self.fourier, stride=self.hop).chunk(2, dim=1)
        power = (real.square() + imaginary.square()).transpose(1, 2)
        level = 10 * torch.log10((power @ self.mel).clamp(min=1e-10))
        return level * self.scale + self.shift


class Cnn14Embedder:
    """CNN14 with the tensors of a state dict. Raises CheckpointError for tensors that do not fit."""

    name = "cnn14"
    dim = DIM
    classes = CLASSES
    min_samples = 0
    text = False

    def __init__(self, state: Mapping[str, Tensor], identity: str, where: object, device: str = "cpu") -> None:
        self.model = Cnn14(state, where)
        self.sample_rate = self.model.sample_rate
        self.device = device
        self.identity = identity
        move(self.model, device)

    @classmethod
    def from_file(cls, path: Path, device: str = "cpu") -> Cnn14Embedder:
        """Of a file that `siren convert-embedder cnn14` made. Raises CheckpointError."""
        state, sha256 = read_tensors(path, cls.name)
        return cls(state, f"{cls.name} sha256:{sha256}", path, device)

    @torch.inference_mode()
    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        vectors, logits = [], np.zeros((len(waves), CLASSES), np.float32)
        for i, wave in enumerate(waves):
            rows = [self._run(part) for part in pieces(check_wave(wave, i), LONGEST * self.sample_rate)]
            vectors.append(np.mean([vector for vector, _ in rows], axis=0))
            logits[i] = np.mean([row[0] for _, row in rows], axis=0)
        return Embedded(vectors, logits)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        raise no_texts(self.name)

    def _run(self, wave: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        sound = torch.from_numpy(np.pad(wave, (0, max(0, _LEAST - len(wave)))))
        embedding, logits = self.model(sound[None].to(self.device))
        return embedding.cpu().numpy(), logits.cpu().numpy()


def wanted(window: int) -> dict[str, Tensor]:
    """Names and shapes of the tensors of the variant with this window, without memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    bins = window // 2 + 1
    return {
        _REAL: empty(bins, 1, window),
        _IMAGINARY: empty(bins, 1, window),
        "logmel_extractor.melW": empty(bins, _BANDS),
        **norm_shapes("bn0", _BANDS),
        **block_shapes(_CHANNELS),
        "fc1.weight": empty(DIM, _CHANNELS[-1]),
        "fc1.bias": empty(DIM),
        "fc_audioset.weight": empty(CLASSES, DIM),
        "fc_audioset.bias": empty(CLASSES),
    }
