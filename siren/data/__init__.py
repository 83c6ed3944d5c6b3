"""Training data: from sound files and captions to sharded token sets.

Names are imported when they are first used, as in the package itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import Report, tokenize
    from .tokens import TokenSet, check_codec, check_encoder, open_tokens, split

__all__ = ["Report", "TokenSet", "check_codec", "check_encoder", "open_tokens", "split", "tokenize"]

_MODULES = {"Report": "pipeline", "tokenize": "pipeline"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'siren.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'tokens')}", __name__), name)
