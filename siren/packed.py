"""A padded batch as rows: the valid frames (or prompt tokens) of all sequences one after another, [N, width].

Everything but attention treats frames one by one, so a training step that works on rows spends nothing on padding.
Attention takes each sequence's rows for themselves. Causal attention then needs no mask, wherever the padding was: what
a valid frame may see is exactly the valid frames before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .errors import InputError, MissingDependencyError

ATTENTIONS = ("sdpa", "flash")


@dataclass(frozen=True)
class Packing:
    """Which places (b, t) of a batch [B, T] are rows, in this order."""

    sequence: Tensor  # [N] int64, b
    time: Tensor  # [N] int64, t
    lengths: Tensor  # [B] int64, rows of each sequence
    counts: list[int]  # the same on the host; on a GPU only the largest

    @classmethod
    def of(cls, batch: int, length: int, mask: Tensor | None, device: torch.device) -> Packing:
        """mask [batch, length] bool, True = a row, at least one a sequence; None: all are. Waits for the device."""
        if mask is None:
            every = torch.arange(batch * length, device=device)
            lengths = torch.full((batch,), length, device=device)
            return cls(every // length, every % length, lengths, [length] * batch)
        sequence, time = mask.nonzero(as_tuple=True)
        lengths = mask.sum(1)
        counts = lengths.tolist() if device.type == "cpu" else [int(lengths.max())]
        return cls(sequence, time, lengths, counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def take(self, batch: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        return batch[self.sequence, self.time]

    def ends(self) -> Tensor:
        """Where sequences begin and end among the rows, [B + 1] int32."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    def pad(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, longest, ...]: each sequence's rows from the left, then zeros."""
        batch, longest = len(self.lengths), self.longest
        if batch * longest != len(rows):
            rows = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, self._slots(), rows)
        return rows.view(batch, longest, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, longest, ...] -> [N, ...]."""
        rows = padded.flatten(0, 1)
        return rows if len(rows) == len(self.time) else rows.index_select(0, self._slots())

    def valid(self) -> Tensor | None:
        """[B, longest] bool, True where `pad` puts a row; None where it puts one everywhere."""
        if len(self.lengths) * self.longest == len(self.time):
            return None
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths.unsqueeze(1)

    def _slots(self) -> Tensor:
        begins = self.ends()[:-1].long()
        rank = torch.arange(len(self.time), device=self.time.device) - begins[self.sequence]
        return self.sequence * self.longest + rank


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, causal: bool, dropout: float, attention: str
) -> Tensor:
    """Scaled dot-product attention within each sequence: q [N, heads, head_dim], k and v [M, kv_heads, head_dim] -> as q.

    causal: queries and keys are the same rows, and a row sees none after it. attention: see ATTENTIONS.
    """
    grouped = k.shape[1] < q.shape[1]
    if attention == "flash":
        sizes = (queries.ends(), keys.ends(), queries.longest, keys.longest)
        return flash_attention()(q, k, v, *sizes, dropout_p=dropout, causal=causal)
    if q.device.type == "cpu":
        # In float32: PyTorch's backward pass takes half as long again in bfloat16 (16 x 200 frames, 5 heads of 32: 47
        # ms and 31). One sequence at a time: no padding, and its scores stay in the cache.
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
        parts = zip(*(x.split(p.counts) for x, p in zip(wide, (queries, keys, keys), strict=True)), strict=True)
        mixed = [
            scaled_dot_product_attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in part), None, dropout, causal, enable_gqa=grouped
            )
            for part in parts
        ]
        return torch.cat([x[0].transpose(0, 1) for x in mixed]).to(q.dtype)
    padded = [p.pad(x).transpose(1, 2) for x, p in zip((q, k, v), (queries, keys, keys), strict=True)]
    valid = None if causal else keys.valid()
    mask = None if valid is None else valid[:, None, None]
    mixed_batch = scaled_dot_product_attention(*padded, mask, dropout, causal, enable_gqa=grouped)
    return queries.unpad(mixed_batch.transpose(1, 2))


def check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError or MissingDependencyError where this attention cannot run."""
    if attention not in ATTENTIONS:
        raise InputError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if attention == "flash":
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            raise InputError(f"flash attention needs a GPU and bfloat16 or float16, not {device.type} and {dtype}")
        flash_attention()


def flash_attention() -> Callable[..., Tensor]:
    """flash-attn's function for sequences of different lengths. Raises MissingDependencyError."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise MissingDependencyError(
            "flash-attn is not installed (or does not import): pip install 'siren[flash]'"
        ) from error
    return flash_attn_varlen_func
