"""Evaluation of generated sound: Frechet distances, inception score, paired KL and text scores (paper, appendix C.1).

Names are imported when they are first used, as in the package itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compare import table
    from .run import evaluate
    from .settings import EvaluateSettings

__all__ = ["EvaluateSettings", "evaluate", "table"]

_MODULES = {"EvaluateSettings": "settings", "evaluate": "run", "table": "compare"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'siren.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
