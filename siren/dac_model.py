"""DAC's architecture in a size of one's own, and how its weights must start so that it learns.

A small DAC has two traps. Drawn with DAC's standard deviation of 0.02 its sound vanishes (1e-5 at 2.5 M parameters) and
nothing is learned: `build_dac` draws by fan-in. And codes are looked up by direction alone, so nothing holds the scale
of what is looked up: it must match the codebooks' from the first quantised step, which `start_quantisers` sees to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError, InputError
from .pretrained import missing

_INPUT_GAIN = 5.0  # sounds have an RMS near 0.1; activations should start near 1, where Snake is not linear
_BRANCH_GAIN = 0.3  # of residual branches: 21 of them follow one another on the way through encoder and decoder
_OUTPUT_GAIN = 0.1  # the RMS of a sound
_KMEANS_ROUNDS = 10
_CHUNK = 8192  # vectors compared with a codebook at a time


@dataclass(frozen=True)
class DacSizes:
    """Sizes of a DAC for 16 kHz. The defaults make 2.5 M parameters; Descript's has encoder 64 and decoder 1536.

    encoder_width: channels of the encoder's first stage, doubled at every stride; the latent's width is the last.
    decoder_width: channels of the decoder's first stage, halved at every stride.
    strides: their product is the hop, in samples a frame.

    Raises ConfigError for sizes that do not fit together.
    """

    encoder_width: int = 16
    decoder_width: int = 192
    num_codebooks: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8
    strides: tuple[int, ...] = (2, 4, 5, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            for part in value if name == "strides" else (value,):
                if isinstance(part, bool) or not isinstance(part, int) or part < 1:
                    raise ConfigError(f"{name} must be whole numbers above 0, not {value!r}")
        if not 1 <= len(self.strides) <= 8 or not all(2 <= stride <= 64 for stride in self.strides):
            raise ConfigError(f"strides must be 1 to 8 whole numbers from 2 to 64, not {self.strides}")
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            raise ConfigError(f"codebook_size must be a power of 2 above 1, not {self.codebook_size}")
        if self.decoder_width % 2 ** len(self.strides):
            raise ConfigError(
                f"decoder_width must be a multiple of {2 ** len(self.strides)}, because it is halved at each of "
                f"{len(self.strides)} strides; it is {self.decoder_width}"
            )
        if not 2 <= self.codebook_dim <= self.latent_width:
            raise ConfigError(f"codebook_dim must be within 2..{self.latent_width}, not {self.codebook_dim}")

    @property
    def latent_width(self) -> int:
        return self.encoder_width * 2 ** len(self.strides)

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return math.prod(self.strides)


def build_dac(sizes: DacSizes, sample_rate: int, generator: torch.Generator) -> Any:
    """A transformers `DacModel`, ready to be trained as an autoencoder; its codebooks mean nothing yet.

    Convolutions are drawn with standard deviation gain / sqrt(fan in). Raises MissingDependencyError.
    """
    try:
        from transformers import DacConfig, DacModel
    except ImportError as error:
        raise missing("transformers", "dac") from error
    config = DacConfig(
        encoder_hidden_size=sizes.encoder_width,
        downsampling_ratios=list(sizes.strides),
        decoder_hidden_size=sizes.decoder_width,
        n_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        codebook_dim=sizes.codebook_dim,
        sampling_rate=sample_rate,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights from the global generator
        model = DacModel(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
                # Of a transposed convolution, a sample of output sees one tap in `stride`.
                taps = module.kernel_size[0] / (module.stride[0] if isinstance(module, torch.nn.ConvTranspose1d) else 1)
                gain = {"encoder.conv1": _INPUT_GAIN, "decoder.conv2": _OUTPUT_GAIN}.get(name, 1.0)
                if ".res_unit" in name and name.endswith("conv2"):
                    gain = _BRANCH_GAIN
                module.weight.normal_(std=gain / math.sqrt(module.in_channels * taps), generator=generator)
                assert module.bias is not None
                module.bias.zero_()
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_(generator=generator)
    return model.eval()  # in train mode its quantiser draws dropout from the global generator; `quantise` does not


def quantise(model: Any, latent: Tensor, active: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The residual quantiser with gradients: latent [B, D, T] -> quantised [B, D, T], codes [B, K, T], two losses.

    active: how many codebooks each of the B sounds is decoded from (quantiser dropout); all of them if None.
    "commitment" pulls what is looked up to its code, "codebook" the code to what is looked up: mean squares, summed
    over the codebooks and averaged over the sounds; those that a sound does not use are left out.
    """
    quantisers = model.quantizer.quantizers
    counts = torch.full((len(latent),), len(quantisers)) if active is None else torch.tensor(list(active))
    counts = counts.to(latent.device)
    residual, total = latent, torch.zeros_like(latent)
    commitment = codebook = torch.zeros((), device=latent.device)
    codes = []
    for i, part in enumerate(quantisers):
        projected = part.in_proj(residual)
        chosen, indices = part.decode_latents(projected)
        used = (counts > i).to(latent.dtype)[:, None, None]
        commitment = commitment + (used * (projected - chosen.detach()).square()).mean()
        codebook = codebook + (used * (chosen - projected.detach()).square()).mean()
        # The gradient passes the look-up as if it were not there.
        step = part.out_proj(projected + (chosen - projected).detach())
        total = total + used * step
        residual = residual - step
        codes.append(indices)
    return {"quantised": total, "codes": torch.stack(codes, 1), "commitment": commitment, "codebook": codebook}


@torch.no_grad()
def start_quantisers(model: Any, frames: Tensor, generator: torch.Generator) -> float:
    """Set all projections and codebooks from latent frames [N, D] of a trained autoencoder.

    First the latent is brought to a variance of 1, in the encoder's last and the decoder's first convolution, which
    leaves their product as it is. Then, codebook after codebook, in_proj and out_proj are the first code_dim - 1
    principal components of what the codebooks before left over, and `spherical_kmeans` finds the codes. The last
    coordinate is a constant, as large as the others together (RMS), which out_proj ignores: by direction alone a faint
    residual cannot be told from a loud one, beside a constant it can. Measured on 4,000 latent frames of sound effects
    not used for it (autoencoder of 150 steps, encoder 8, 12 codebooks of 1024): 0.25 of the variance is left over, with
    code_dim components and no constant 0.39, and of the faintest fifth 0.01 instead of 0.60.

    Returns the share of the frames' variance that all codebooks together leave over. Raises InputError if the frames
    are all alike.
    """
    centred = frames - frames.mean(0)
    scale = centred.square().mean().sqrt()
    if not bool(scale > 1e-6):
        raise InputError("the encoder gives every frame the same latent; train the autoencoder longer, or on more")
    model.encoder.conv2.weight /= scale
    model.encoder.conv2.bias /= scale
    model.decoder.conv1.weight *= scale
    residual = frames / scale
    for part in model.quantizer.quantizers:
        count = part.codebook_dim - 1
        mean = residual.mean(0)
        centred = residual - mean
        basis = torch.linalg.eigh(centred.T @ centred)[1][:, -count:].flip(1).T  # [count, D]
        vectors = centred @ basis.T
        constant = vectors.square().sum(1).mean().sqrt()
        vectors = torch.cat([vectors, constant.expand(len(vectors), 1)], dim=1)
        codebook = spherical_kmeans(vectors, len(part.codebook.weight), generator)
        part.in_proj.weight.copy_(functional.pad(basis, (0, 0, 0, 1))[:, :, None])
        part.in_proj.bias.copy_(torch.cat([-basis @ mean, constant[None]]))
        part.out_proj.weight.copy_(functional.pad(basis.T, (0, 1))[:, :, None])
        part.out_proj.bias.copy_(mean)
        part.codebook.weight.copy_(codebook)
        residual = centred - codebook[nearest(vectors, codebook)][:, :count] @ basis
    return float(residual.square().mean())


def spherical_kmeans(vectors: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres [clusters, d] of vectors [N, d] that are told apart by direction alone.

    A centre is its members' mean, not of length 1, so that it has the vectors' scale as well. One that no vector
    chooses becomes a vector drawn at random, moved a little; there may be fewer vectors than clusters.
    """

    def draw(count: int) -> Tensor:
        picked = torch.randint(len(vectors), (count,), generator=generator).to(vectors.device)
        noise = torch.randn(count, vectors.shape[1], generator=generator).to(vectors.device)
        return vectors[picked] + 0.01 * vectors.std(0, correction=0) * noise

    centres = draw(clusters)
    for _ in range(_KMEANS_ROUNDS):
        index = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, index, vectors)
        counts = torch.bincount(index, minlength=clusters)
        centres = sums / counts.clamp(min=1)[:, None]
        centres[counts == 0] = draw(int((counts == 0).sum()))
    return centres


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The code of each vector [N, d], int64 [N]: the one of the smallest angle to it, as DAC looks them up."""
    directions = functional.normalize(codebook).T
    return torch.cat([(chunk @ directions).argmax(1) for chunk in vectors.split(_CHUNK)])
