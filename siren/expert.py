"""One expert: a backbone over frames and a residual decoder over the codes of a frame, teacher forced.

Paper, section 4.1: backbone eq. 3, residual decoder eq. 4 and 5, loss eq. 6. Parameter names are those of the
official stage-1 code, so its files load unchanged. Expert k (0-based) owns the m = codes_per_expert codebooks that
begin at start_codebook = k * m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import SirenConfig
from .errors import InputError
from .inputs import check_inputs
from .layers import BackboneBlock, DecoderBlock, Paths, RMSNorm, sinusoidal_positions
from .packed import Packing, check_attention
from .row_operations import check_kernels, linear_cross_entropy, linear_logprob, sum_rows, unit_norm


class CodeEmbedding(nn.Module):
    """One codebook's decode embedding (frozen: codebook, dac_out) and its trainable projector."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.codebook = nn.Embedding.from_pretrained(torch.empty(config.codebook_size, config.dac_code_dim))
        self.dac_out = nn.Linear(config.dac_code_dim, config.dac_feature_dim)
        self.projector = nn.Linear(config.dac_feature_dim, config.dim)
        self.dac_out.requires_grad_(False)

    def table(self) -> Tensor:
        """Embeddings of all codes [codebook_size, dim].

        Both maps are linear, so they are folded first: the work is that of codebook_size codes, not of B * T tokens.
        """
        weight = self.projector.weight @ self.dac_out.weight
        bias = self.projector.weight @ self.dac_out.bias + self.projector.bias
        return self.codebook.weight @ weight.T + bias


class CodeEmbeddings(nn.Module):
    """The embeddings of all codebooks as one expert sees them."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        layers = nn.ModuleList(CodeEmbedding(config) for _ in range(config.num_codebooks))
        self.layers = cast(Sequence[CodeEmbedding], layers)

    def tables(self) -> Tensor:
        """E_kj(q) for every codebook j and code q: [num_codebooks, codebook_size, dim]."""
        return torch.stack([layer.table() for layer in self.layers])


class Expert(nn.Module):
    """Predicts the codebooks start_codebook .. start_codebook + codes_per_expert - 1 of every frame."""

    def __init__(self, config: SirenConfig, start_codebook: int) -> None:
        super().__init__()
        if start_codebook not in range(0, config.num_codebooks, config.codes_per_expert):
            raise InputError(
                f"start_codebook must be a multiple of {config.codes_per_expert} below {config.num_codebooks}, "
                f"not {start_codebook!r}"
            )
        self.config = config
        self.start_codebook = start_codebook
        self.codebooks = CodeEmbeddings(config)
        self.sos = nn.Parameter(torch.empty(1, 1, config.dim))
        # The casts tell type checkers what a ModuleList holds.
        backbone = nn.ModuleList(BackboneBlock(config) for _ in range(config.spatial_layers))
        self.spatial_blocks = cast(Sequence[BackboneBlock], backbone)
        self.spatial_norm = RMSNorm(config.dim, config.norm_eps)
        if config.factorized_layers:
            if config.decoder_start == "prompt":
                self.prompt_summary = nn.Linear(config.prompt_dim, config.dim)
            else:
                self.start = nn.Parameter(torch.empty(1, 1, config.dim))
            self.factorized_norm = RMSNorm(config.dim, config.norm_eps)
        decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.factorized_layers))
        self.factorized_blocks = cast(Sequence[DecoderBlock], decoder)
        self.heads = nn.ModuleList(
            nn.Linear(config.dim, config.codebook_size, bias=False) for _ in range(config.codes_per_expert)
        )
        if self.sos.is_meta:
            return  # the weights come from a checkpoint; drawing normals on the meta device takes seconds of imports
        self.apply(self._initialize)
        for _, parameter in self.named_parameters(recurse=False):  # sos, and start where it is learned
            nn.init.normal_(parameter, std=config.initializer_range)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tables(self) -> Tensor:
        """Folded code embeddings [num_codebooks, codebook_size, dim], differentiable in the projectors."""
        return self.codebooks.tables()

    @torch.no_grad()
    def set_decode_embeddings(self, embeddings: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take over a codec's frozen decode embeddings.

        One triple a codebook: codebook [codebook_size, dac_code_dim], weight [dac_feature_dim, dac_code_dim] and bias
        [dac_feature_dim] of its output projection: code q stands for weight @ codebook[q] + bias.
        """
        if len(embeddings) != self.config.num_codebooks:
            raise InputError(f"expected {self.config.num_codebooks} decode embeddings, got {len(embeddings)}")
        for index, (layer, triple) in enumerate(zip(self.codebooks.layers, embeddings, strict=True)):
            names = ("codebook.weight", "dac_out.weight", "dac_out.bias")
            for name, source in zip(names, triple, strict=True):
                target = layer.get_parameter(name)
                if source.shape != target.shape or not bool(torch.isfinite(source).all()):
                    raise InputError(
                        f"decode embedding {index}, {name}: expected finite values of shape {tuple(target.shape)}, "
                        f"got shape {tuple(source.shape)}"
                    )
            for name, source in zip(names, triple, strict=True):
                layer.get_parameter(name).copy_(source)

    def decoder_start(self, prompt: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """The vector s_k that the residual decoder's conditions are added to: [B, 1, dim].

        prompt [B, P, prompt_dim]; the official code projects its masked mean, the paper (eq. 5) learns one vector.
        """
        if self.config.decoder_start == "learned":
            return self.start.expand(prompt.shape[0], -1, -1)
        if prompt_mask is None:
            return self.prompt_summary(prompt.mean(dim=1, keepdim=True))
        weight = prompt_mask.unsqueeze(-1).to(prompt.dtype)
        return self.prompt_summary((prompt * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True))

    def forward(
        self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None = None, sequence_mask: Tensor | None = None
    ) -> Tensor:
        """Teacher-forced logits [B, codes_per_expert, T, codebook_size]; frame t sees the codes of frames < t.

        codes [B, num_codebooks, T] integers; prompt [B, P, prompt_dim]; prompt_mask [B, P] and sequence_mask [B, T]
        bool, True = token or frame. Raises InputError where an argument does not fit.
        """
        check_inputs(self.config, self.sos, codes, prompt, prompt_mask, sequence_mask)
        return self.logits(codes, prompt, prompt_mask, sequence_mask)

    def logits(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None, sequence_mask: Tensor | None) -> Tensor:
        """`forward` after its checks."""
        prompt = prompt.to(self.sos.dtype)
        if prompt_mask is not None:
            prompt = prompt.masked_fill(~prompt_mask.unsqueeze(-1), 0)  # padding may hold anything, even NaN
        tables = self.tables()
        hidden = self._backbone(codes, tables, prompt, prompt_mask, sequence_mask)
        if not self.config.factorized_layers:
            return torch.stack([head(hidden) for head in self.heads], dim=1)
        return self._residual_decoder(hidden, codes, tables, self.decoder_start(prompt, prompt_mask))

    def _backbone(
        self, codes: Tensor, tables: Tensor, prompt: Tensor, prompt_mask: Tensor | None, sequence_mask: Tensor | None
    ) -> Tensor:
        batch, _, frames = codes.shape
        previous = codes[:, :, :-1].transpose(1, 2).reshape(-1, self.config.num_codebooks).long()
        embedded = sum_rows(tables, previous).view(batch, frames - 1, self.config.dim)
        x = torch.cat((self.sos.expand(batch, -1, -1), embedded), dim=1)
        positions = sinusoidal_positions(frames, self.config.dim, x.device).to(x.dtype)
        cross_mask = None if prompt_mask is None else prompt_mask[:, None, None, :]
        causal_mask = None if sequence_mask is None else _causal_mask(sequence_mask)
        for block in self.spatial_blocks:
            x = block(x + positions, prompt, cross_mask, causal_mask)
        return self.spatial_norm(x)

    def _residual_decoder(self, hidden: Tensor, codes: Tensor, tables: Tensor, start: Tensor) -> Tensor:
        """hidden [B, T, dim], start [B, 1, dim] -> logits [B, m, T, V] from the m + 1 positions of each frame."""
        batch, frames, dim = hidden.shape
        count = self.config.codes_per_expert
        rows = codes.transpose(1, 2).reshape(batch * frames, -1).long()
        x = self._decoder_inputs(hidden.flatten(0, 1), start.expand(-1, frames, -1).flatten(0, 1), rows, tables)
        positions = sinusoidal_positions(count + 1, dim, x.device).to(x.dtype)
        for block in self.factorized_blocks:
            x = block(x + positions)
        x = self.factorized_norm(x[:, 1:]).view(batch, frames, count, dim)
        return torch.stack([head(x[:, :, i]) for i, head in enumerate(self.heads)], dim=1)

    def _decoder_inputs(
        self, hidden: Tensor, start: Tensor, codes: Tensor, tables: Tensor, kernels: bool = False
    ) -> Tensor:
        """hidden and start [N, dim], codes [N, num_codebooks] of the same frames -> [N, m + 1, dim] (eq. 5)."""
        first, count = self.start_codebook, self.config.codes_per_expert
        rows = [hidden]
        condition: Tensor | None = None  # what position 1 + i knows of the present frame
        if self.config.conditioning == "accumulated" and first:
            condition = sum_rows(tables[:first], codes[:, :first], kernels)
        for codebook in range(first, first + count):
            if self.config.conditioning == "residual" and codebook:
                condition = nn.functional.embedding(codes[:, codebook - 1], tables[codebook - 1])
            elif self.config.conditioning == "accumulated" and codebook > first:
                embedded = nn.functional.embedding(codes[:, codebook - 1], tables[codebook - 1])
                condition = embedded if condition is None else condition + embedded
            rows.append(start if condition is None else start + condition)
        return torch.stack(rows, dim=1)

    def loss(
        self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None = None, sequence_mask: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of each owned codebook [codes_per_expert], a mean over the frames of sequence_mask (eq. 6)."""
        check_inputs(self.config, self.sos, codes, prompt, prompt_mask, sequence_mask)
        return self.losses(codes, prompt, prompt_mask, sequence_mask)

    def losses(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor | None, sequence_mask: Tensor | None) -> Tensor:
        """`loss` after its checks."""
        logits = self.logits(codes, prompt, prompt_mask, sequence_mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = codes[:, self.start_codebook : self.start_codebook + self.config.codes_per_expert].long()
        losses = nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(
            targets.shape
        )
        if sequence_mask is None:
            return losses.mean(dim=(0, 2))
        return (losses * sequence_mask.unsqueeze(1)).sum(dim=(0, 2)) / sequence_mask.sum()

    def loss_sums(
        self,
        codes: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
        *,
        checkpoint_activations: bool = False,
        attention: str = "sdpa",
        kernels: bool = False,
    ) -> Tensor:
        """Cross-entropy of each owned codebook, summed over the frames of sequence_mask: float32 [codes_per_expert].

        The training step's way to the numbers of `loss`, times the number of valid frames: frames of padding are not
        computed at all (siren.packed), and the logits never exist together. Arguments as in `forward`; under autocast
        matrix products take its type. checkpoint_activations computes each block again in the backward pass instead of
        keeping its activations. attention is the backbone's: "sdpa", or "flash" for flash-attn on a GPU in 16 bits.
        kernels takes the operations that siren.kernels has, in float32 or bfloat16. Raises InputError, BackendError for
        kernels where they cannot run, or MissingDependencyError for a package that is not there.
        """
        check_inputs(self.config, self.sos, codes, prompt, prompt_mask, sequence_mask)
        paths = self._paths(codes.device, attention, kernels)
        tables = self.tables()
        with torch.autocast(codes.device.type, enabled=False):  # from here on the types are written out
            rows = self._head_rows(
                tables, codes.long(), prompt, prompt_mask, sequence_mask, paths, checkpoint_activations
            )
            return torch.stack([linear_cross_entropy(*row, paths.kernels) for row in rows])

    def logprobs(
        self,
        codes: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None = None,
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        *,
        checkpoint_activations: bool = False,
        attention: str = "sdpa",
        kernels: bool = False,
    ) -> Tensor:
        """Log-probabilities of the owned codes, float32 [B, codes_per_expert, T], differentiable: the policy of eq. 7.

        They are those that the sampler reports for the same temperature (above 0) and guidance: the log-softmax of
        (uncond + guidance_scale * (cond - uncond)) / temperature, where uncond sees the null prompt, one zero token.
        Other arguments and errors as in `loss_sums`; the logits never exist together either.
        """
        check_inputs(self.config, self.sos, codes, prompt, prompt_mask, None)
        paths = self._paths(codes.device, attention, kernels)
        batch, _, frames = codes.shape
        tables, codes = self.tables(), codes.long()
        with torch.autocast(codes.device.type, enabled=False):
            rows = self._head_rows(tables, codes, prompt, prompt_mask, None, paths, checkpoint_activations)
            if guidance_scale != 1:
                null = prompt.new_zeros(batch, 1, prompt.shape[2])
                uncond = self._head_rows(tables, codes, null, None, None, paths, checkpoint_activations)
                # A head is linear, so guidance may mix its inputs in place of the logits.
                rows = [
                    (free + guidance_scale * (state - free), weight, targets)
                    for (state, weight, targets), (free, _, _) in zip(rows, uncond, strict=True)
                ]
            values = [linear_logprob(*row, temperature, paths.kernels) for row in rows]
            return torch.stack([value.view(batch, frames) for value in values], dim=1)

    def _paths(self, device: torch.device, attention: str, kernels: bool) -> Paths:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.sos.dtype
        check_attention(attention, device, dtype)
        if kernels:
            check_kernels(device, dtype)
        return Paths(dtype, attention, kernels)

    def _head_rows(
        self,
        tables: Tensor,
        codes: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        sequence_mask: Tensor | None,
        paths: Paths,
        checkpoint_activations: bool,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each head its inputs [N, dim] in all N valid frames, its weight [V, dim] and the codes [N] it is to say.

        The norm before the heads is without its weight, which is folded into theirs.
        """

        def run(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
            if not checkpoint_activations or not torch.is_grad_enabled():
                return function(*inputs)
            return checkpoint(function, *inputs, use_reentrant=False)

        batch, _, length = codes.shape
        tables = tables.to(torch.promote_types(self.sos.dtype, torch.float32))
        frames = Packing.of(batch, length, sequence_mask, codes.device)
        tokens = Packing.of(batch, prompt.shape[1], prompt_mask, codes.device)
        prompt = prompt.to(self.sos.dtype)
        if prompt_mask is not None:
            prompt = prompt.masked_fill(~prompt_mask.unsqueeze(-1), 0)
        prompt_rows = tokens.take(prompt).to(paths.dtype)
        previous = codes[frames.sequence, :, (frames.time - 1).clamp(min=0)]  # [N, num_codebooks]
        first_frame = (frames.time == 0).unsqueeze(1)
        x = torch.where(first_frame, self.sos[0].to(tables.dtype), sum_rows(tables, previous, paths.kernels))
        positions = sinusoidal_positions(length, self.config.dim, x.device).to(x.dtype)[frames.time]
        for block in self.spatial_blocks:
            x = run(block.packed, x + positions, prompt_rows, frames, tokens, paths)
        targets = frames.take(codes.transpose(1, 2))
        norm = self.spatial_norm
        if self.factorized_blocks:
            start = self.decoder_start(prompt, prompt_mask)[:, 0].to(x.dtype)[frames.sequence]
            hidden = unit_norm(x, norm.eps, x.dtype) * norm.weight.to(x.dtype)
            x = self._decoder_inputs(hidden, start, targets, tables, paths.kernels)
            positions = sinusoidal_positions(x.shape[1], self.config.dim, x.device).to(x.dtype)
            for i, decoder_block in enumerate(self.factorized_blocks):
                last = i + 1 == len(self.factorized_blocks)
                x = run(decoder_block.packed, x + positions, paths, int(last))  # no head reads position 0
            norm = self.factorized_norm
        x = unit_norm(x, norm.eps, paths.dtype)
        rows = []
        for i, head in enumerate(self.heads):
            state = x[:, i] if self.factorized_blocks else x
            weight = (cast(nn.Linear, head).weight * norm.weight).to(paths.dtype)
            rows.append((state, weight, targets[:, self.start_codebook + i]))
        return rows


def _causal_mask(sequence_mask: Tensor) -> Tensor:
    """[B, T] -> [B, 1, T, T]: a frame sees itself and earlier frames, except those outside the sequence."""
    frames = sequence_mask.shape[1]
    causal = torch.ones(frames, frames, dtype=torch.bool, device=sequence_mask.device).tril()
    allowed = causal & sequence_mask[:, None, :]
    # A frame before the first valid one would see nothing: let it see all earlier ones, so that it stays finite.
    return torch.where(allowed.any(-1, keepdim=True), allowed, causal).unsqueeze(1)
