"""CLAP similarity of sounds and captions: what is kept, what is set aside, and where crops may start (appendix A, B).

    CLAP-score = audio . text / (|audio| |text|)

Left out: laion-clap's own loader; its checkpoints are read in the transformers format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr
import torch

from ..errors import CheckpointError, InputError
from ..pretrained import CONFIG, check_weights, find_folder, move, read_config, read_weights
from ..text import CONFIG_KEYS, TOKENIZER_FILES, load_tokenizer, quiet_transformers, token_limit

THRESHOLD_1_6B = 0.40
THRESHOLD_3_1B = 0.35
CROP_THRESHOLD = 0.20
RESERVE = 1000  # clips

_CACHED_CAPTIONS = 1024  # 2 KB each
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_AUDIO_KEYS = (
    "window_size",
    "num_mel_bins",
    "spec_size",
    "hidden_act",
    "patch_size",
    "patch_stride",
    "num_classes",
    "hidden_size",
    "projection_dim",
    "depths",
    "num_attention_heads",
    "enable_fusion",
    "fusion_type",
    "patch_embed_input_channels",
    "flatten_patch_embeds",
    "patch_embeds_hidden_size",
    "enable_patch_layer_norm",
    "qkv_bias",
    "mlp_ratio",
    "aff_block_r",
    "num_hidden_layers",
    "projection_hidden_act",
    "layer_norm_eps",
)
_TEXT_KEYS = (*CONFIG_KEYS, "projection_dim", "projection_hidden_act")


class Similarity(Protocol):
    """What gives N sounds and N captions their cosine similarities, float32 [N]; ClapSimilarity does."""

    def similarity(self, waveforms: Sequence[np.ndarray], captions: Sequence[str], sample_rate: int) -> np.ndarray: ...


class ClapSimilarity:
    """A CLAP model in float32. Every sound and caption runs alone, so a score does not depend on the others' company.

    Built by `ClapSimilarity.from_pretrained`. `identity` is its name and the sha256 of its weights: scores of different
    models are not comparable. The thresholds of the paper are for the CLAP of Wu et al., such as
    laion/clap-htsat-unfused.
    """

    def __init__(self, model: Any, tokenizer: Any, extractor: Any, identity: str) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.identity = identity
        self._captions: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device = "cpu") -> ClapSimilarity:
        """Load a whole CLAP in the transformers format: a local folder, or a name on the model hub.

        Raises CheckpointError for what is missing, damaged or of another kind, MissingDependencyError without
        transformers.
        """
        folder = find_folder(name, "a CLAP model", (*TOKENIZER_FILES, *_PROCESSOR_FILES))
        values = read_config(folder)
        weights, sha256 = read_weights(folder)
        with quiet_transformers():
            model = _build_model(values, weights, folder)
            tokenizer = load_tokenizer(folder, model.config.text_config.vocab_size)
            extractor = _load_extractor(folder, model.config.audio_config)
        label = folder.resolve().name if folder == Path(name).expanduser() else str(name)
        move(model, device)
        return cls(model, tokenizer, extractor, f"{label} sha256:{sha256}")

    @property
    def max_seconds(self) -> float:
        """The longest sound it hears; CLAP's extractor would cut a random piece from a longer one."""
        return float(self.extractor.nb_max_samples / self.extractor.sampling_rate)

    def similarity(self, waveforms: Sequence[np.ndarray], captions: Sequence[str], sample_rate: int) -> np.ndarray:
        """Cosine similarity of waveform i, float [S], with caption i: float32 [N], within -1..1.

        Waveforms are resampled to CLAP's 48 kHz by soxr. Pass them without padding: CLAP repeats short ones. Captions
        are cut at the model's longest text. Raises InputError for a waveform that is empty, not finite or longer than
        `max_seconds`, for an empty caption, and for lists of different lengths.
        """
        if len(waveforms) != len(captions):
            raise InputError(f"there are {len(waveforms)} waveforms and {len(captions)} captions")
        pairs = zip(waveforms, captions, strict=True)
        scores = [self.embed_sound(wave, sample_rate) @ self.embed_caption(text) for wave, text in pairs]
        return np.array([float(score) for score in scores], np.float32).clip(-1, 1)

    @torch.no_grad()
    def embed_sound(self, waveform: np.ndarray, sample_rate: int) -> torch.Tensor:
        """Unit vector [D] of a waveform [S], as `similarity` takes it."""
        if (
            not isinstance(waveform, np.ndarray)
            or waveform.ndim != 1
            or waveform.dtype.kind != "f"
            or not len(waveform)
        ):
            raise InputError("a waveform must be a floating-point array of one or more samples")
        if not np.isfinite(waveform).all():
            raise InputError("a waveform holds NaN or infinity")
        if len(waveform) > self.max_seconds * sample_rate:
            seconds = len(waveform) / sample_rate
            raise InputError(f"CLAP hears {self.max_seconds:g} s at most, not {seconds:g} s; cut the sound first")
        rate = self.extractor.sampling_rate
        # soxr may give a sample more than the extractor takes.
        heard = soxr.resample(waveform.astype(np.float32), sample_rate, rate)[: self.extractor.nb_max_samples]
        inputs = self.extractor([heard], sampling_rate=rate, return_tensors="pt")
        # The extractor calls a random sound of a batch long where none is, which would change its score.
        longer = torch.zeros_like(torch.as_tensor(inputs["is_longer"]), dtype=torch.bool)
        features = inputs["input_features"].float().to(self.model.device)
        return _unit(self.model.get_audio_features(input_features=features, is_longer=longer.to(self.model.device)))

    @torch.no_grad()
    def embed_caption(self, caption: str) -> torch.Tensor:
        """Unit vector [D] of a caption."""
        if caption not in self._captions:
            if not isinstance(caption, str) or not caption.strip():
                raise InputError("a caption is empty; there is nothing to compare the sound with")
            limit = token_limit(self.model.config.text_config, self.tokenizer)
            ids = self.tokenizer(caption, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
            ids = ids.to(self.model.device)
            features = self.model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
            self._captions[caption] = _unit(features)
            if len(self._captions) > _CACHED_CAPTIONS:
                self._captions.popitem(last=False)
        return self._captions[caption]


def select(scores: Sequence[float] | np.ndarray, threshold: float) -> np.ndarray:
    """Indices, ascending int64, of the scores of at least `threshold` (appendix A); NaN never is."""
    return np.flatnonzero(np.asarray(scores, np.float64) >= threshold)


def reserve_top(scores: Sequence[float] | np.ndarray, count: int = RESERVE) -> np.ndarray:
    """Indices, ascending int64, of the `count` highest scores: the clips set aside for reinforcement learning.

    Of equal scores the earlier clip is taken. Raises InputError for NaN or a negative count.
    """
    values = np.asarray(scores, np.float64)
    if count < 0 or np.isnan(values).any():
        raise InputError("scores must be numbers, and count 0 or more")
    return np.sort(np.argsort(-values, kind="stable")[:count])


def crop_starts(
    clap: Similarity,
    waveform: np.ndarray,
    sample_rate: int,
    captions: str | Sequence[str],
    hop_length: int,
    crop_frames: int = 300,
    step_frames: int = 25,
    threshold: float = CROP_THRESHOLD,
) -> np.ndarray:
    """Frames, ascending int64, at which a crop still sounds like its caption (appendix B: crops of 6 s, above 0.20).

    A frame has `hop_length` samples. Crops of `crop_frames` start at every `step_frames`-th frame, and at the last at
    which one fits. With several captions the least similar decides, as training may draw any. A waveform of
    `crop_frames` or less has the one crop at 0. The default is 6 s in steps of half a second at 50 frames a second: 9
    crops of 10 s. Raises InputError.
    """
    if min(hop_length, crop_frames, step_frames) < 1:
        raise InputError("hop_length, crop_frames and step_frames must be above 0")
    texts = [captions] if isinstance(captions, str) else list(captions)
    if not texts:
        raise InputError("there is no caption to compare crops with")
    last = max(0, len(waveform) // hop_length - crop_frames)
    starts = np.unique([*range(0, last, step_frames), last]).astype(np.int64)
    kept = []
    for start in starts.tolist():
        crop = waveform[start * hop_length : (start + crop_frames) * hop_length]
        if clap.similarity([crop] * len(texts), texts, sample_rate).min() >= threshold:
            kept.append(start)
    return np.array(kept, np.int64)


def _unit(features: Any) -> torch.Tensor:
    vector = features if isinstance(features, torch.Tensor) else features.pooler_output  # transformers 4 and 5
    unit: torch.Tensor = torch.nn.functional.normalize(vector[0].float().cpu(), dim=0)
    return unit


def _build_model(values: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """The model of an untrusted config and its tensors. transformers' own loader makes up tensors that are missing."""
    from transformers import ClapConfig, ClapModel

    if values.get("model_type") != "clap":
        raise CheckpointError(f"{folder / CONFIG}: model_type must be clap, not {values.get('model_type')!r}")
    try:
        # Only sizes are taken over: other fields of a config can name code to fetch and run.
        text, audio = values.get("text_config") or {}, values.get("audio_config") or {}
        config = ClapConfig(
            text_config={key: text[key] for key in _TEXT_KEYS if key in text},
            audio_config={key: audio[key] for key in _AUDIO_KEYS if key in audio},
            **{key: values[key] for key in ("projection_dim", "projection_hidden_act") if key in values},
        )
        with torch.random.fork_rng(devices=[]):  # the model is filled with random numbers first
            model = ClapModel(config)
    except Exception as error:  # a wrong config fails in whichever line meets it first
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder / CONFIG} does not describe a CLAP model: {reason}") from error
    # Whole numbers are position tables and counters, which the model makes itself.
    wanted = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    model.load_state_dict(check_weights(floats, wanted, folder), strict=False)
    return model


def _load_extractor(folder: Path, config: Any) -> Any:
    from transformers import ClapFeatureExtractor

    try:
        extractor = ClapFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # missing and damaged files raise errors of several libraries
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder} has no usable {_PROCESSOR_FILES[0]}: {reason}") from error
    if extractor.feature_size != config.num_mel_bins:
        raise CheckpointError(
            f"{folder}: its extractor gives {extractor.feature_size} mel bands, its model has {config.num_mel_bins}"
        )
    return extractor
