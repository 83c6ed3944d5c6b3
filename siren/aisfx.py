"""aiSFX, an embedding of sound events: 512 numbers a clip, close for sounds of one kind. It works offline.

The network is that of Ma and Lerch, "Representation Learning for the Automatic Indexing of Sound Effects Libraries",
ISMIR 2022 (X-Sequential-CE), trained on commercial libraries of sound effects. Its weights (CC BY 4.0) come with the
package aisfx 0.1.2. Only that package's checkpoint is read, after its hash has been checked; none of its code runs, so
that what it needs (old versions of librosa and numpy) is not needed here.

The network learned by naming the kinds of sound of nine libraries, with a classifier for each. One of them is here too,
that of the library soundstorm: it has most classes, and of the nine it says most about what is heard (240 procedural
clips of 40 kinds, their mean information on the kind as exp: 6.1 of 40; the others 1.2 to 5.6). The checkpoint has no
names of classes, so that a class is a number; for how sure and how varied classes are (IS), and how alike two clips'
are (KL), numbers will do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch
from torch.nn import functional
from tqdm import tqdm

from .conv_blocks import ConvBlocks, block_shapes
from .errors import CheckpointError, InputError, MissingDependencyError
from .mel import mel_filterbank
from .pretrained import check_weights, move

SAMPLE_RATE = 44100
DIM = 512
HEAD = "soundstorm"  # the library whose classes are told
CLASSES = 81
_SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"  # of aisfx 0.1.2's models/checkpoint.pth
_INSTALL = "pip install --no-deps aisfx==0.1.2"
_WINDOW, _HOP, _MELS = 2048, 1024, 96  # samples, samples, bands
_LARGEST = 9.457798957824707  # the largest log-mel value of the data it was trained on; maps its input to 0..1
_BLOCK, _BLOCK_HOP = 100, 50  # frames: 2.3 s and half of that
_CHANNELS = (64, 128, 256, 512)
_PREFIX = "embedding_net."  # in the checkpoint
_HEAD = "fc.3"  # in the checkpoint: the classifier of HEAD
_HEAD_SIZES = (DIM, 256, 128, CLASSES)


class SoundEvents(torch.nn.Module):
    """The embedding network. `SoundEvents.from_installed()` has the trained weights.

    Four blocks of two 3x3 convolutions with batch normalisation (folded into the convolutions) and ReLU, 2x2 max
    pooling after the first three; then the mean over frequency and the maximum over time. The classifier is three
    linear layers on that, with ReLU between them.

    `state`: tensors with the checkpoint's names; the classifiers of other libraries are not used. `identity` names
    the weights in results. Raises CheckpointError for tensors that do not fit.
    """

    filters: torch.Tensor  # [96, 1025]
    window: torch.Tensor  # [2048]

    def __init__(self, state: Mapping[str, torch.Tensor], identity: str, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.identity = identity
        kept = {
            name: tensor
            for name, tensor in state.items()
            if name.startswith((_PREFIX, f"{_HEAD}.")) and not name.endswith("num_batches_tracked")
        }
        kept = check_weights(kept, _wanted(), identity)
        self.convolutions = ConvBlocks(kept, _CHANNELS, functional.max_pool2d, _PREFIX)
        self.head_weights, self.head_biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for prefix in _head_layers():
            self.head_weights.append(kept[f"{prefix}.weight"])
            self.head_biases.append(kept[f"{prefix}.bias"])
        filters = mel_filterbank(_MELS, _WINDOW, SAMPLE_RATE, norm="l1")
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.requires_grad_(False)
        move(self, device)

    @classmethod
    def from_installed(cls, device: str | torch.device = "cpu") -> SoundEvents:
        """The network with the weights of the installed package aisfx.

        Raises MissingDependencyError if it is not installed, CheckpointError if its checkpoint is another than 0.1.2's.
        """
        package = importlib.util.find_spec("aisfx")  # found, not imported
        if package is None or not package.submodule_search_locations:
            raise MissingDependencyError(f"the sound-event embedding aisfx is not installed: {_INSTALL}")
        path = Path(next(iter(package.submodule_search_locations))) / "models" / "checkpoint.pth"
        return cls(_read(path), f"aisfx-0.1.2 sha256:{_SHA256}", device)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Embeddings [N, 512] of blocks of normalised log-mel frames [N, frames, 96]; at least 8 frames."""
        x: torch.Tensor = self.convolutions(blocks[:, None])
        return x.mean(dim=3).amax(dim=2)

    def classify(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits [N, 81] of the classes of embeddings [N, 512] of blocks."""
        x = embeddings
        for i, (weight, bias) in enumerate(zip(self.head_weights, self.head_biases, strict=True)):
            x = functional.linear(x.relu() if i else x, weight, bias)
        return x

    def embed(
        self, waveforms: Iterable[npt.ArrayLike], sample_rate: int, batch_size: int = 16, progress: bool = False
    ) -> npt.NDArray[np.float32]:
        """Embeddings float32 [N, 512] of N mono clips, each [samples] or [1, samples], of any lengths.

        A clip is resampled to 44.1 kHz, scaled to a peak of 1 (silence stays silent) and cut into blocks of 100 frames
        that overlap by half; its embedding is the mean over its blocks. A shorter clip is one block, padded with
        zeros; what is left after the last whole block of a longer one (under 1.2 s) is not seen. `batch_size` blocks go
        through the network at a time. `progress` shows a bar. Raises InputError for an empty clip, one that is not
        mono, and values that are not finite.
        """
        return self._means(waveforms, sample_rate, batch_size, progress, self)

    def embed_and_classify(
        self, waveforms: Iterable[npt.ArrayLike], sample_rate: int, batch_size: int = 16, progress: bool = False
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Embeddings [N, 512] as `embed` gives them, and class logits [N, 81]: the means of those of a clip's blocks.

        The classifier sees blocks, as it did in training.
        """

        def both(blocks: torch.Tensor) -> torch.Tensor:
            embeddings = self(blocks)
            return torch.cat((embeddings, self.classify(embeddings)), dim=1)

        means = self._means(waveforms, sample_rate, batch_size, progress, both, DIM + CLASSES)
        return means[:, :DIM], means[:, DIM:]

    @torch.inference_mode()
    def _means(
        self,
        waveforms: Iterable[npt.ArrayLike],
        sample_rate: int,
        batch_size: int,
        progress: bool,
        network: Callable[[torch.Tensor], torch.Tensor],
        width: int = DIM,
    ) -> npt.NDArray[np.float32]:
        """What `network` gives blocks [n, 100, 96], averaged over those of each clip: [N, width]."""
        if sample_rate < 1 or batch_size < 1:
            raise InputError(f"sample_rate and batch_size must be at least 1, not {sample_rate} and {batch_size}")
        sums: list[npt.NDArray[np.float64]] = []
        counts: list[int] = []
        waiting: list[tuple[int, torch.Tensor]] = []

        def run(least: int) -> None:
            while len(waiting) >= least:
                batch = waiting[:batch_size]
                del waiting[:batch_size]
                rows = network(torch.stack([block for _, block in batch])).cpu()
                for (clip, _), row in zip(batch, rows, strict=True):
                    sums[clip] += row.numpy()

        for i, waveform in enumerate(
            tqdm(waveforms, desc="embedding", unit="clip", disable=None if progress else True)
        ):
            blocks = self._blocks(_mono(waveform, i), sample_rate)
            sums.append(np.zeros(width))
            counts.append(len(blocks))
            waiting.extend((i, block) for block in blocks)
            run(batch_size)
        run(1)
        if not sums:
            return np.zeros((0, width), np.float32)
        return (np.stack(sums) / np.array(counts)[:, None]).astype(np.float32)

    def _blocks(self, wave: npt.NDArray[np.float32], sample_rate: int) -> torch.Tensor:
        """Log-mel blocks [n, 100, 96] of a clip [samples]."""
        if sample_rate != SAMPLE_RATE:
            wave = soxr.resample(wave, sample_rate, SAMPLE_RATE)
        signal = torch.from_numpy(wave).to(self.window.device)
        peak = signal.abs().max() if len(signal) else torch.zeros(())
        signal = signal / peak if peak > 0 else signal
        spectrum = torch.stft(signal, _WINDOW, _HOP, window=self.window, pad_mode="constant", return_complex=True)
        frames = torch.log10(1 + 10000 * (self.filters @ spectrum.abs().square())).T / _LARGEST
        if len(frames) < _BLOCK:
            return functional.pad(frames, (0, 0, 0, _BLOCK - len(frames)))[None]
        return frames.unfold(0, _BLOCK, _BLOCK_HOP).transpose(1, 2)


def _mono(waveform: npt.ArrayLike, index: int) -> npt.NDArray[np.float32]:
    wave = np.asarray(waveform, dtype=np.float32)
    wave = wave[0] if wave.ndim == 2 and len(wave) == 1 else wave
    if wave.ndim != 1 or not len(wave):
        raise InputError(f"clip {index} must have shape [samples] or [1, samples], not {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise InputError(f"clip {index} holds NaN or infinity")
    return np.ascontiguousarray(wave)


def _wanted() -> dict[str, torch.Tensor]:
    """Names and shapes of the tensors used, without memory."""
    shapes = block_shapes(_CHANNELS, _PREFIX)
    for prefix, (inputs, outputs) in zip(_head_layers(), pairwise(_HEAD_SIZES), strict=True):
        shapes[f"{prefix}.weight"] = torch.empty(outputs, inputs, device="meta")
        shapes[f"{prefix}.bias"] = torch.empty(outputs, device="meta")
    return shapes


def _head_layers() -> list[str]:
    return [f"{_HEAD}.{2 * i}" for i in range(len(_HEAD_SIZES) - 1)]  # ReLU has the odd numbers


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; install it again: {_INSTALL}") from error
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise CheckpointError(f"{path} is not the checkpoint of aisfx 0.1.2; install that version: {_INSTALL}")
    # Beside the tensors, the file holds its data sets' numbers of classes as numpy integers. Nothing else is allowed.
    scalar = np.int64(0).__reduce__()[0]
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype(np.int64))]
    with torch.serialization.safe_globals(allowed):
        state: Mapping[str, torch.Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)[0]
    return state
