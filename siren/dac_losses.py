"""What a codec's reconstruction is trained on: log-mel distances at several resolutions, and the waveform itself.

Left out: the commitment and codebook losses (see dac_model.quantise) and the adversarial ones (dac_discriminator).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError
from .mel import mel_filterbank

# Window in samples and mel bands of each scale, at 16 kHz from 4 to 128 ms. DAC's bands at 44.1 kHz are twice as many;
# at 16 kHz the lowest of those would hold no bin.
MEL_SCALES = ((64, 5), (128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))
MIN_SAMPLES = max(window for window, _ in MEL_SCALES) // 2 + 1  # the windows at the ends read a reflection
_FLOOR = 1e-5  # mel magnitudes below it count as equally silent; a full-scale sine has 1.0


class ReconstructionLoss(torch.nn.Module):
    """(reference, estimate), both [B, 1, S] -> {"mel", "wave"}, each a scalar that is 0 for equal sounds.

    mel:  mean over the scales of |log10 M(reference) - log10 M(estimate)|, M the mel bands of the magnitude spectrum
          (DAC's multi-scale mel loss; 1.0 means that bands are off by 20 dB).
    wave: mean |reference - estimate|, which alone holds the phase.

    Raises InputError for sounds shorter than MIN_SAMPLES, or of different shapes.
    """

    def __init__(self, sample_rate: int, scales: Sequence[tuple[int, int]] = MEL_SCALES) -> None:
        super().__init__()
        self.windows = [window for window, _ in scales]
        for window, bands in scales:
            hann = torch.hann_window(window)
            # Scaled so that a sine of amplitude 1 has a peak of 1 in any window.
            self.register_buffer(f"window_{window}", hann * (2 / hann.sum()), persistent=False)
            bank = torch.from_numpy(mel_filterbank(bands, window, sample_rate, scale="slaney"))
            self.register_buffer(f"bank_{window}", bank, persistent=False)

    def forward(self, reference: Tensor, estimate: Tensor) -> dict[str, Tensor]:
        if reference.shape != estimate.shape or reference.dim() != 3 or reference.shape[-1] < MIN_SAMPLES:
            raise InputError(
                f"sounds must have one shape [batch, 1, samples] with {MIN_SAMPLES} samples or more, "
                f"not {list(reference.shape)} and {list(estimate.shape)}"
            )
        reference, estimate = reference[:, 0], estimate[:, 0]
        mel = torch.zeros((), device=reference.device)
        for window in self.windows:
            mel = mel + (self._log_mel(reference, window) - self._log_mel(estimate, window)).abs().mean()
        return {"mel": mel / len(self.windows), "wave": (reference - estimate).abs().mean()}

    def _log_mel(self, sound: Tensor, window: int) -> Tensor:
        hann, bank = self.get_buffer(f"window_{window}"), self.get_buffer(f"bank_{window}")
        spectrum = torch.stft(sound, window, window // 4, window=hann, return_complex=True)
        return (bank @ spectrum.abs()).clamp(min=_FLOOR).log10()
