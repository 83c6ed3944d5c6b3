"""Fixtures that several test files share. Random models are in random_models.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, in which Triton's interpreter computes; read at import

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import siren

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "kernels"))  # decode_inputs: arguments of operations

torch.set_num_threads(1)  # the models here are tiny: PyTorch's threads would only wait for one another

hypothesis.settings.register_profile("siren", deadline=None, print_blob=True, max_examples=25)
hypothesis.settings.load_profile("siren")


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: a GPU, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """A checkpoint that the official code wrote, with random weights, and vectors.npz, what that code computes."""
    return Path(__file__).parent / "data" / "official-tiny"


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> dict[str, torch.Tensor]:
    with np.load(golden_folder / "vectors.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="session")
def golden_model(golden_folder: Path) -> siren.Siren:
    return siren.Siren.from_pretrained(golden_folder)
