"""A codec of given features and token sets of given codes, for the tests of the pilot studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fake_data import FakeCodec, write_tokens

from siren.codec import DecodeEmbedding
from siren.data.shards import Clip
from siren.data.tokens import TokenSet

CODEBOOKS, SIZE = FakeCodec.num_codebooks, FakeCodec.codebook_size


class TableCodec(FakeCodec):
    """Code q of codebook j stands for tables[j, q]: [12, 1024, C]."""

    def __init__(self, tables: np.ndarray) -> None:
        super().__init__()
        self.tables = torch.from_numpy(np.asarray(tables, np.float32))

    def decode_embeddings(self) -> list[DecodeEmbedding]:
        width = self.tables.shape[2]
        return [DecodeEmbedding(table, torch.eye(width), torch.zeros(width)) for table in self.tables]


def token_set(folder: Path, codes: Sequence[np.ndarray], labels: Sequence[str | None] | None = None) -> TokenSet:
    """Clips of the codes [frames, 12] with these labels."""
    given = labels or [None] * len(codes)
    clips = [
        Clip(f"clip-{i}", np.asarray(part), ["a sound"], [np.ones((1, 8), np.float32)], label=label)
        for i, (part, label) in enumerate(zip(codes, given, strict=True))
    ]
    return TokenSet(write_tokens(folder, [clips]))
