"""Rewards by models: the cosine of what is heard and what was asked for (eq. 8), by three kinds of embedding.

    R = cosine(audio(sound), text(prompt))

Each is a reward function, see rewards.py; a sound that cannot be scored, such as one with NaN, gets None and the others
their values. Nothing of ImageBind is copied here (its licence is CC BY-NC-SA): the user's own installation is called.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..aligner import Aligner
from ..data.similarity import ClapSimilarity
from ..errors import CheckpointError, InputError, MissingDependencyError
from ..manifest import MINI

_IMAGEBIND = "pip install git+https://github.com/facebookresearch/ImageBind"
_BATCH = 8  # sounds in ImageBind at once: 1.2 G parameters, three pieces of each sound


class AlignerReward:
    """Cosine by the offline aligner."""

    __name__ = "aligner"

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        self.identity = aligner.identity

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, device: str | torch.device = "cpu") -> AlignerReward:
        """The aligner of siren-mini, or of a folder or hub name. Raises CheckpointError."""
        aligner = Aligner.from_pretrained(MINI if folder is None else folder, device)
        _ = aligner.encoder  # what is missing is said now and not after the first rollouts
        return cls(aligner)

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], *, sample_rate: int, **_: Any
    ) -> list[float | None]:
        def score(prompt: str, wave: np.ndarray) -> float:
            return float(self.aligner.similarity([prompt], [wave], sample_rate)[0])

        return _score_each(prompts, completions, score)


class ClapReward:
    """Cosine by a CLAP in the transformers format. A sound longer than CLAP hears (10 s) is cut into equal pieces, and
    the mean of theirs is its reward.
    """

    __name__ = "clap"

    def __init__(self, clap: ClapSimilarity) -> None:
        self.clap = clap
        self.identity = clap.identity

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device = "cpu") -> ClapReward:
        """Raises CheckpointError and MissingDependencyError, as `ClapSimilarity.from_pretrained`."""
        return cls(ClapSimilarity.from_pretrained(name, device))

    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], *, sample_rate: int, **_: Any
    ) -> list[float | None]:
        longest = int(self.clap.max_seconds * sample_rate)

        def score(prompt: str, wave: np.ndarray) -> float:
            pieces = np.array_split(wave, max(1, -(-len(wave) // longest)))
            return float(np.mean(self.clap.similarity(pieces, [prompt] * len(pieces), sample_rate)))

        return _score_each(prompts, completions, score)


class ImageBindReward:
    """Cosine by ImageBind, the paper's reward. Sounds go through its own loading, by way of temporary files.

    `model` is its model; `data` its module imagebind.data; `modality` its ModalityType.
    """

    __name__ = "imagebind"

    def __init__(self, model: Any, data: Any, modality: Any, device: str | torch.device, identity: str) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.data, self.modality, self.device = data, modality, device
        self.identity = identity

    @classmethod
    def from_installed(
        cls, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> ImageBindReward:
        """ImageBind as it is installed here, with the weights of a file, or those it downloads itself (4.5 GB).

        Nothing in the file is run. Raises MissingDependencyError without ImageBind, CheckpointError for a file that is
        not its weights.
        """
        try:
            from imagebind import data
            from imagebind.models import imagebind_model
        except ImportError as error:
            raise MissingDependencyError(
                f"ImageBind does not import ({error}); install it: {_IMAGEBIND} (imagebind on the package index is an "
                "empty placeholder)"
            ) from error
        model = imagebind_model.imagebind_huge(pretrained=checkpoint is None)
        if checkpoint is not None:
            try:
                state = torch.load(Path(checkpoint).expanduser(), map_location="cpu", weights_only=True)
                model.load_state_dict(state)
            except Exception as error:  # missing, damaged, unsafe and other files raise errors of several libraries
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise CheckpointError(f"{checkpoint} does not hold ImageBind's weights: {reason}") from error
        identity = f"imagebind {'its own weights' if checkpoint is None else Path(checkpoint).name}"
        return cls(model, data, imagebind_model.ModalityType, device, identity)

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], completions: list[np.ndarray], *, sample_rate: int, **_: Any
    ) -> list[float | None]:
        heard = [i for i, wave in enumerate(completions) if len(wave) and np.isfinite(wave).all()]
        values: list[float | None] = [None] * len(completions)
        texts = self._texts([prompts[i] for i in heard])
        for first in range(0, len(heard), _BATCH):
            rows = heard[first : first + _BATCH]
            sounds = self._sounds([completions[i] for i in rows], sample_rate)
            wanted = torch.stack([texts[prompts[i]] for i in rows])
            cosines = torch.nn.functional.cosine_similarity(sounds.float(), wanted.float())
            for i, value in zip(rows, cosines.tolist(), strict=True):
                values[i] = value
        return values

    def _texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The embedding of each distinct prompt: the rollouts of a group share theirs."""
        distinct = list(dict.fromkeys(prompts))
        if not distinct:
            return {}
        inputs = self.data.load_and_transform_text(distinct, self.device)
        return dict(zip(distinct, self.model({self.modality.TEXT: inputs})[self.modality.TEXT], strict=True))

    def _sounds(self, waves: Sequence[np.ndarray], sample_rate: int) -> torch.Tensor:
        import soundfile

        with tempfile.TemporaryDirectory(prefix="siren-") as folder:
            paths = [str(Path(folder) / f"{i}.wav") for i in range(len(waves))]
            for path, wave in zip(paths, waves, strict=True):
                soundfile.write(path, np.clip(wave, -1, 1), sample_rate, subtype="PCM_16")
            inputs = self.data.load_and_transform_audio_data(paths, self.device)
        found: torch.Tensor = self.model({self.modality.AUDIO: inputs})[self.modality.AUDIO]
        return found


def _score_each(
    prompts: list[str], completions: list[np.ndarray], score: Callable[[str, np.ndarray], float]
) -> list[float | None]:
    """The score of each sound; None for one that the model refuses (silence without a sample, NaN, a text too long)."""
    values: list[float | None] = []
    for prompt, wave in zip(prompts, completions, strict=True):
        try:
            values.append(score(prompt, wave))
        except InputError:
            values.append(None)
    return values
