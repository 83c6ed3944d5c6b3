"""VGGish, the embedding of the Frechet audio distance (FAD): 128 numbers for each 0.96 s of sound at 16 kHz.

The network is that of Hershey et al., "CNN Architectures for Large-Scale Audio Classification", ICASSP 2017. Names of
tensors are those of its PyTorch port torchvggish. Tools for FAD differ; here it is as in audioldm_eval and the package
frechet_audio_distance, whose figures text-to-sound papers print:

- Sound within -1..1 as it is. Google's first tool scaled each clip to a peak of 1 (by 20 dB at most).
- Windows of 96 frames that do not overlap. What is left after the last is dropped, and a clip without a whole window
  (0.975 s) has no embedding. Google's tool took windows of a second.
- The embedding is the output of the last linear layer, before its ReLU, and without the PCA and the rounding to 8 bits
  that AudioSet's published embeddings have.
- Resampling differs among them too (resampy there, soxr here), and moves a figure a little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..mel import hertz_to_mel
from ..pretrained import check_weights, move
from .embedding import Embedded, check_wave, no_texts
from .weights import read_tensors

SAMPLE_RATE = 16000
DIM = 128
MIN_SAMPLES = 15600  # one whole window: 95 hops and a frame
_FRAME, _HOP, _FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
_BANDS, _LOWEST, _HIGHEST = 64, 125.0, 7500.0  # bands, Hz, Hz
_OFFSET = 0.01  # added to a band before the logarithm
_WINDOW = 96  # frames
_BATCH = 16  # windows at once; the largest layer holds 25 MB of each
_CHANNELS = ((64,), (128,), (256, 256), (512, 512))  # of the convolutions between poolings
_HIDDEN = 4096
_HANN = 0.5 - 0.5 * np.cos(2 * np.pi / _FRAME * np.arange(_FRAME))  # periodic


class Vggish(nn.Module):
    """Windows of log-mel frames [N, 96, 64] to embeddings [N, 128]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for stage in _CHANNELS:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = inputs * (_WINDOW >> len(_CHANNELS)) * (_BANDS >> len(_CHANNELS))
        self.embeddings = nn.Sequential(
            nn.Linear(flat, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, DIM)
        )

    def forward(self, windows: Tensor) -> Tensor:
        x = self.features(windows[:, None])
        x = x.permute(0, 2, 3, 1).flatten(start_dim=1)  # the linear layers came from TensorFlow: channels last
        embeddings: Tensor = self.embeddings(x)
        return embeddings


class VggishEmbedder:
    """VGGish with the tensors of a state dict. Raises CheckpointError for tensors that do not fit."""

    name = "vggish"
    sample_rate = SAMPLE_RATE
    dim = DIM
    classes = 0
    min_samples = MIN_SAMPLES
    text = False

    def __init__(self, state: Mapping[str, Tensor], identity: str, where: object, device: str = "cpu") -> None:
        with torch.device("meta"):
            model = Vggish()
        model.load_state_dict(check_weights(state, model.state_dict(), where), assign=True)
        self.model = model.eval().requires_grad_(False)
        self.device = device
        self.identity = identity
        self._filters = _mel_weights()
        move(model, device)

    @classmethod
    def from_file(cls, path: Path, device: str = "cpu") -> VggishEmbedder:
        """Of a file that `siren convert-embedder vggish` made. Raises CheckpointError."""
        state, sha256 = read_tensors(path, cls.name)
        return cls(state, f"{cls.name} sha256:{sha256}", path, device)

    @torch.inference_mode()
    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        vectors = []
        for i, wave in enumerate(waves):
            rows = [self.model(windows).cpu().numpy() for windows in self._windows(check_wave(wave, i, MIN_SAMPLES))]
            vectors.append(np.concatenate(rows))
        return Embedded(vectors, None)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        raise no_texts(self.name)

    def _windows(self, wave: npt.NDArray[np.float32]) -> Iterator[Tensor]:
        """The whole windows of a clip in batches [n, 96, 64], n <= 16, of log-mel frames."""
        frames = 1 + (len(wave) - _FRAME) // _HOP
        for first in range(0, frames // _WINDOW, _BATCH):
            count = min(_BATCH, frames // _WINDOW - first) * _WINDOW
            start = first * _WINDOW * _HOP
            part = wave[start : start + (count - 1) * _HOP + _FRAME].astype(np.float64)
            cut = np.lib.stride_tricks.sliding_window_view(part, _FRAME)[::_HOP]
            bands = np.abs(np.fft.rfft(cut * _HANN, _FFT)) @ self._filters
            windows = np.log(bands + _OFFSET).reshape(-1, _WINDOW, _BANDS)
            yield torch.from_numpy(windows.astype(np.float32)).to(self.device)


def _mel_weights() -> npt.NDArray[np.float64]:
    """Weights [257, 64] that turn magnitudes into bands. Triangles over mel, where those of mel.py are over Hz."""
    bins = hertz_to_mel(np.arange(_FFT // 2 + 1) * (SAMPLE_RATE / _FFT))[:, None]
    lowest, highest = hertz_to_mel([_LOWEST, _HIGHEST])
    points = np.linspace(lowest, highest, _BANDS + 2)
    widths = np.diff(points)
    rising = (bins - points[:-2]) / widths[:-1]
    falling = (points[2:] - bins) / widths[1:]
    weights: npt.NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return weights
