"""A padded batch as rows: the valid frames (or prompt tokens) of all sequences one after another, [N, width].

Everything but attention treats frames one by one, so a training step that works on rows spends nothing on padding.
Attention takes each sequence's rows for themselves. Causal attention then needs no mask, wherever the padding was: what
a valid frame may see is exactly the valid frames before it.
"""

from __future__ import annotations

import importlib
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
    """Attention within each sequence: q [N, heads, head_dim], k and v [M, kv_heads, head_dim] -> [N, heads, head_dim].

    causal: queries and keys are the same rows, and a row sees none after it. attention: see ATTENTIONS.
    """
    if attention == "flash":
        sizes = (queries.ends(), keys.ends(), queries.longest, keys.longest)
        return flash_attention()(q, k, v, *sizes, dropout_p=dropout, causal=causal)
    if q.device.type != "cpu":
        return _attend_padded(q, k, v, queries, keys, causal, dropout)
    # In float32: in bfloat16 PyTorch's backward pass is slower (16 x 200 frames, 5 heads of 32, forward and backward on
    # a core of Zen 4: 47 ms and 31).
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if len(set(queries.counts)) == len(set(keys.counts)) == 1:
        return _attend_padded(q, k, v, queries, keys, causal, dropout).to(dtype)
    return _attend_one_by_one(q, k, v, queries, keys, causal, dropout).to(dtype)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, causal: bool, dropout: float
) -> Tensor:
    """All sequences at once, side by side from the left."""
    valid = None if causal else keys.valid()
    mask = None if valid is None else valid.unsqueeze(1).unsqueeze(1)
    q, k, v = (packing.pad(x).transpose(1, 2) for x, packing in ((q, queries), (k, keys), (v, keys)))
    mixed = scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] < q.shape[1])
    return queries.unpad(mixed.transpose(1, 2))


def _attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, causal: bool, dropout: float
) -> Tensor:
    """Sequence after sequence: nothing is padded, and a sequence's scores stay in the cache."""
    parts = (x.split(packing.counts) for x, packing in ((q, queries), (k, keys), (v, keys)))
    mixed = []
    for part in zip(*parts, strict=True):
        one_q, one_k, one_v = (x.transpose(0, 1).unsqueeze(0) for x in part)
        grouped = one_k.shape[1] < one_q.shape[1]
        one = scaled_dot_product_attention(one_q, one_k, one_v, None, dropout, causal, enable_gqa=grouped)
        mixed.append(one.squeeze(0).transpose(0, 1))
    return torch.cat(mixed)


def check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError or MissingDependencyError where this attention cannot run."""
    if attention not in ATTENTIONS:
        raise InputError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
    if attention == "flash":
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"flash attention needs a GPU and bfloat16 or float16, not {device.type} and {kind}")
        flash_attention()


def flash_attention() -> Callable[..., Tensor]:
    """flash-attn's function for sequences of different lengths. Raises MissingDependencyError."""
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise MissingDependencyError(
            "flash-attn is not installed (or does not import): pip install 'siren[flash]'"
        ) from error
