"""The critic: from the first frames of a sound, the reward that the whole sound will get.

    v_t = expected reward, given the prompt and the codes of frames 1..t

It chooses the prefixes that are worth finishing (prune.py), after a published idea whose details are not public: the
design is this project's own. A frame enters as the sum of its codes' embeddings in the codec, which for the spectral
codec is the log-mel frame; they are the codec's, frozen, and not stored. A linear layer and a GRU over time follow,
and the prompt comes before the first frame. Trained by critic_training.py; left out: sounds of several lengths, whose
rewards it would have to tell apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import replace_folder, sync
from .codec import Codec
from .errors import CheckpointError, InputError
from .manifest import GENERATION
from .pretrained import CONFIG, WEIGHTS, check_weights, find_folder, read_config, read_weights, write_weights

MODEL_TYPE = "siren-critic"
# Lowest and highest value of each size, so that a hostile config cannot ask for terabytes.
_LIMITS = {"prompt_dim": (1, 16384), "dim": (1, 1024), "layers": (1, 8)}
_FLOOR = 1e-6  # least standard deviation of a feature or of rewards that is divided by
_DESCRIBED = 256  # sounds whose frames' means and spreads are taken


@dataclass(frozen=True)
class CriticConfig:
    """Sizes of a critic. prompt_dim: of the prompt encoder's token states. dim: width, and layers of the GRU."""

    prompt_dim: int
    dim: int = 128
    layers: int = 1

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


class CriticModel(nn.Module):
    """Codes [B, C, T] and a prompt to values [B, T]. Weights are drawn from torch's global generator.

    `frame_mean` and `frame_spread` [feature_dim], `reward_mean` and `reward_spread` are of the training sounds: inside,
    frames and values are in standard deviations from the mean.
    """

    tables: Tensor  # [num_codebooks, codebook_size, feature_dim]
    frame_mean: Tensor
    frame_spread: Tensor
    reward_mean: Tensor
    reward_spread: Tensor

    def __init__(self, config: CriticConfig, codec: Codec) -> None:
        super().__init__()
        self.config = config
        tables = torch.stack([embedding.table() for embedding in codec.decode_embeddings()])
        self.register_buffer("tables", tables, persistent=False)
        width = tables.shape[2]
        self.register_buffer("frame_mean", torch.zeros(width))
        self.register_buffer("frame_spread", torch.ones(width))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_spread", torch.ones(()))
        self.weighting = nn.Linear(config.prompt_dim, 1)
        nn.init.zeros_(self.weighting.weight)
        self.prompt = nn.Linear(config.prompt_dim, config.dim)
        self.frame = nn.Linear(width, config.dim)
        self.dropout = nn.Dropout(0.1)
        self.recurrent = nn.GRU(config.dim, config.dim, config.layers, batch_first=True)
        self.value = nn.Linear(2 * config.dim, 1)

    def frames(self, codes: Tensor) -> Tensor:
        """Sum of the embeddings of each frame's codes: int64 [B, C, T] -> float32 [B, T, feature_dim]."""
        total = self.tables[0][codes[:, 0]]
        for table, row in zip(self.tables[1:], codes.unbind(1)[1:], strict=True):
            total = total + table[row]
        return total

    @torch.no_grad()
    def standardise(self, codes: Tensor, rewards: Tensor) -> None:
        """Take over means and spreads of sounds, codes int64 [N, C, T] and rewards float32 [N]; N is 2 at least."""
        frames = self.frames(codes[:_DESCRIBED]).flatten(0, 1)
        self.frame_mean.copy_(frames.mean(0))
        self.frame_spread.copy_(frames.std(0).clamp(min=_FLOOR))
        self.reward_mean.copy_(rewards.mean())
        self.reward_spread.copy_(rewards.std().clamp(min=_FLOOR))

    def forward(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """codes int64 [B, C, T], prompt [B, P, prompt_dim], prompt_mask bool [B, P] -> values [B, T].

        Value t has seen frames 0..t and is what the whole sound is expected to be rewarded with.
        """
        # What padding holds counts for nothing, NaN too.
        states = prompt.masked_fill(~prompt_mask[..., None], 0)
        scores = self.weighting(states)[..., 0].masked_fill(~prompt_mask, -torch.inf)
        wanted = self.prompt((scores.softmax(dim=1)[..., None] * states).sum(dim=1))
        heard = self.frame((self.frames(codes) - self.frame_mean) / self.frame_spread)
        inputs = self.dropout(torch.cat((wanted[:, None], heard), dim=1))
        states, _ = self.recurrent(inputs)
        states = states[:, 1:]
        both = torch.cat((states, states * wanted[:, None]), dim=2)
        return self.reward_mean + self.reward_spread * self.value(self.dropout(both))[..., 0]


class Critic:
    """A frozen critic in float32 on the CPU: `Critic.from_pretrained`, or `Critic(model, codec)`.

    `codec` is the one the model was built with. `sampling`: length and settings of the sounds it was trained on, the
    only ones it knows, under the names of siren.manifest.GENERATION; nothing checks that it is used for such sounds.
    Every sound runs alone, so a score does not depend on the others' company, nor on a prompt's padding. Threads may
    share one.
    """

    def __init__(self, model: CriticModel, codec: Codec, sampling: Mapping[str, float] = GENERATION) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.codec_identity = codec.identity
        self.sampling = dict(sampling)

    @classmethod
    def from_pretrained(cls, name: str | Path, codec: Codec) -> Critic:
        """Load a critic folder (config.json, model.safetensors), or one of that name on the model hub.

        Raises CheckpointError for what is missing, damaged or does not fit, also if `codec` is another one than the
        critic was trained with.
        """
        folder = find_folder(name, "a critic")
        config, identity, sampling = _check_config(read_config(folder), str(folder / CONFIG))
        if identity != codec.identity:
            raise CheckpointError(f"{folder}: the critic was trained with the codec {identity}, not {codec.identity}")
        weights, _ = read_weights(folder)
        with torch.random.fork_rng(devices=[]):
            model = CriticModel(config, codec)
        model.load_state_dict(check_weights(weights, model.state_dict(), folder))
        if not bool((model.frame_spread > 0).all()) or not bool(model.reward_spread > 0):
            raise CheckpointError(f"{folder}: a standard deviation is not above 0; the model cannot be used")
        return cls(model, codec, sampling)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a critic folder. It appears whole or not at all; a critic that is there is replaced.

        Raises CheckpointError, also for a folder that holds anything else.
        """
        replace_folder(Path(folder), CONFIG, _check_replaceable, self._write)

    @property
    def config(self) -> CriticConfig:
        return self.model.config

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"Critic({count / 1e6:.2f} M parameters, prompts of {self.config.prompt_dim} values)"

    def check(self, codec: Codec, prompt_dim: int) -> None:
        """Raise InputError unless it was trained for this codec and prompts of this width."""
        if self.codec_identity != codec.identity:
            raise InputError(
                f"the critic was trained with the codec {self.codec_identity}, and the model's is {codec.identity}: "
                "train one for this model (siren train-critic)"
            )
        if self.config.prompt_dim != prompt_dim:
            raise InputError(
                f"the critic reads prompts of {self.config.prompt_dim} values and the model has {prompt_dim}: train "
                "one for this model (siren train-critic)"
            )

    @torch.no_grad()
    def values(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """The value at every frame, float32 [B, T]: codes int64 [B, C, T], prompt [B, P, prompt_dim], mask [B, P].

        Raises InputError for arguments of other shapes or with codes that the codec does not have.
        """
        self._check_arguments(codes, prompt, prompt_mask)
        rows = zip(codes, prompt, prompt_mask, strict=True)
        return torch.cat([self.model(c[None], p[m][None].float(), m[m][None]) for c, p, m in rows])

    def score(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """The expected reward of the sounds that begin with these codes, float32 [B]; arguments as in `values`."""
        return self.values(codes, prompt, prompt_mask)[:, -1]

    def _check_arguments(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor) -> None:
        count, size, _ = self.model.tables.shape
        if codes.dim() != 3 or codes.shape[1] != count or not codes.shape[0] or not codes.shape[2]:
            raise InputError(f"codes must have shape [batch, {count}, frames], not {list(codes.shape)}")
        if codes.dtype != torch.int64 or int(codes.min()) < 0 or int(codes.max()) >= size:
            raise InputError(f"codes must be int64 and from 0 to {size - 1}")
        batch, width = len(codes), self.config.prompt_dim
        if prompt.dim() != 3 or prompt.shape[0] != batch or prompt.shape[2] != width:
            raise InputError(f"prompt must have shape [{batch}, tokens, {width}], not {list(prompt.shape)}")
        if prompt_mask.dtype != torch.bool or prompt_mask.shape != prompt.shape[:2]:
            raise InputError(f"prompt_mask must be bool {list(prompt.shape[:2])}, not {list(prompt_mask.shape)}")
        if not bool(prompt_mask.any(dim=1).all()):
            raise InputError("every prompt needs a token")

    def _write(self, folder: Path) -> None:
        values = {"model_type": MODEL_TYPE, "codec": self.codec_identity, "sampling": self.sampling}
        values |= asdict(self.config)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_weights(folder, self.model.state_dict())
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # newer safetensors write for the owner only
        for path in (folder / CONFIG, folder / WEIGHTS, folder):
            sync(path)


def _check_config(values: dict[str, Any], where: str) -> tuple[CriticConfig, str, dict[str, float]]:
    """The config of untrusted values, the codec's identity, and what it was trained on."""
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type must be '{MODEL_TYPE}', not {values.get('model_type')!r}")
    sizes = {field.name for field in fields(CriticConfig)}
    for title, names in (
        ("lacks", sizes - values.keys()),
        ("unknown fields", values.keys() - sizes - {"model_type", "codec", "sampling"}),
    ):
        if names:
            raise CheckpointError(f"{where}: {title} {', '.join(sorted(names))}")
    identity = values.get("codec")
    if not isinstance(identity, str):
        raise CheckpointError(f"{where}: codec must be the identity of a codec, not {identity!r}")
    sampling = values.get("sampling")
    if (
        not isinstance(sampling, dict)
        or sampling.keys() != GENERATION.keys()
        or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in sampling.values())
    ):
        raise CheckpointError(f"{where}: sampling must have numbers for {', '.join(GENERATION)}, not {sampling!r}")
    try:
        return CriticConfig(**{name: values[name] for name in sizes}), identity, sampling
    except InputError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_replaceable(target: Path) -> None:
    others = {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS} if target.exists() else set()
    if others:
        raise CheckpointError(f"{target} also holds {min(others)!r}; choose another folder for the critic")
