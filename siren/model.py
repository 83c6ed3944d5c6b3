"""Siren: the experts as one module. Forward and loss for training, checkpoints, and text to sound.

The experts share nothing and never look at one another's activations, only at codes (paper, section 4.1), so each can
also be trained alone: see `Siren.experts` and `Expert.loss`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .audio import Audio
from .checkpoint import iter_tensors, read_manifest, save_checkpoint
from .codec import Codec
from .config import SirenConfig
from .errors import InputError
from .expert import Expert, check_inputs
from .generate import generate


class Siren(nn.Module):
    """`config.num_experts` isolated transformers that predict `config.num_codebooks` codes a frame.

    A new model has random weights. `codec_path` and `prompt_encoder_name` say where a checkpoint keeps its codec and
    which prompt encoder it was trained with, None if it does not say; `generation` how it is best sampled.
    """

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.config = config
        starts = range(0, config.num_codebooks, config.codes_per_expert)
        self.experts = nn.ModuleList(Expert(config, start) for start in starts)
        self.codec_path: Path | None = None
        self.prompt_encoder_name: str | None = None
        self.generation: dict[str, float] = {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Siren:
        """Load a checkpoint folder in the official stage-1 format, or "siren-mini", in eval mode.

        Tensors are read, checked and converted one by one, so memory holds one copy of the model. Raises
        CheckpointError or ConfigError for a folder that is missing, damaged, altered or does not fit its config.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
        manifest = read_manifest(folder)
        with torch.device("meta"):
            model = cls(manifest.config)
        for expert, entry in zip(model.experts, manifest.experts, strict=True):
            tensors = iter_tensors(entry, manifest.config)
            expert.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors}, assign=True)
        model.codec_path, model.prompt_encoder_name = manifest.codec, manifest.prompt_encoder
        model.generation = dict(manifest.generation)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, codec: Codec | str | Path | None = None, prompt_encoder: str | Path | None = None
    ) -> None:
        """Write a checkpoint folder, whole or not at all.

        `codec` (a Codec or its folder) is copied into it, by default the one this model was loaded with.
        `prompt_encoder` is a name for PromptEncoder.from_pretrained, or a folder (a Path), which is copied. Raises
        CheckpointError.
        """
        experts = ((expert.start_codebook, expert.state_dict()) for expert in self._experts())
        codec = codec if codec is not None else self.codec_path
        prompt_encoder = prompt_encoder if prompt_encoder is not None else self.prompt_encoder_name
        with tempfile.TemporaryDirectory() as temporary:
            if isinstance(codec, Codec):
                codec.save_pretrained(Path(temporary) / "codec")
                codec = Path(temporary) / "codec"
            save_checkpoint(folder, self.config, experts, codec, prompt_encoder, self.generation)

    def set_decode_embeddings(self, embeddings: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Give all experts a codec's frozen decode embeddings, those of `Codec.decode_embeddings()`.

        See Expert.set_decode_embeddings for the shapes.
        """
        for expert in self._experts():
            expert.set_decode_embeddings(embeddings)

    def forward(
        self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None = None, sequence_mask: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits [B, num_codebooks, T, codebook_size]; frame t sees the codes of frames < t.

        codes [B, num_codebooks, T] integers; prompt [B, P, prompt_dim]; prompt_mask [B, P] and sequence_mask [B, T]
        bool, True = token or frame. Raises InputError where an argument does not fit.
        """
        self._check(codes, prompt, prompt_mask, sequence_mask)
        logits = [expert.logits(codes, prompt, prompt_mask, sequence_mask) for expert in self._experts()]
        return torch.cat(logits, dim=1)

    def loss(
        self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None = None, sequence_mask: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of every codebook, a mean over the frames of sequence_mask (paper, eq. 6).

        Arguments as in `forward`. Returns [num_experts, codes_per_expert]; expert k is trained on the sum of row k.
        """
        self._check(codes, prompt, prompt_mask, sequence_mask)
        return torch.stack([expert.losses(codes, prompt, prompt_mask, sequence_mask) for expert in self._experts()])

    def generate(
        self,
        prompts: str | Sequence[str],
        seconds: float | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        num_return_sequences: int = 1,
        progress: bool = True,
        **options: Any,
    ) -> Audio:
        """Text to sound; `options` and what the arguments mean: see siren.generate.generate."""
        return generate(
            self,
            prompts,
            seconds=seconds,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
            num_return_sequences=num_return_sequences,
            progress=progress,
            **options,
        )

    def _experts(self) -> Sequence[Expert]:
        return list(self.experts)  # type: ignore[arg-type]

    def _check(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None, sequence_mask: Tensor | None) -> None:
        check_inputs(self.config, self._experts()[0].sos, codes, prompt, prompt_mask, sequence_mask)
