"""Random weights and sounds for VGGish and CNN14, and what the libraries that they come from compute with them.

`python tests/golden_embedders.py` writes tests/data/embedders.npz. It needs torchvggish 0.2, panns_inference 0.1.1 and
torchlibrosa 0.1.0 with what they import; the tests need the file only. The sizes are those of the real networks.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "data" / "embedders.npz"
SAMPLES = {"vggish": (15600, 40001), "cnn14_16k": (32000, 40001), "cnn14_32k": (32000, 50001)}  # of two sounds
RATES = {"vggish": 16000, "cnn14_16k": 16000, "cnn14_32k": 32000}
FOURIER = ("spectrogram_extractor.", "logmel_extractor.")  # not random


def random_state(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep the size of what goes through them: He's uniform matrices, and mild normalisation."""
    rng = np.random.Generator(np.random.Philox(seed))
    state = {}
    for name, shape in sorted(shapes.items()):
        values = rng.random(tuple(shape), np.float32)
        if len(shape) > 1:
            low, high = -((6 / shape[1:].numel()) ** 0.5), (6 / shape[1:].numel()) ** 0.5
        elif name.startswith("bn0.running"):  # of log-mel frames in dB
            low, high = (-40, 0) if name.endswith("mean") else (100, 400)
        elif name.endswith("running_var") or (".bn" in f".{name}" and name.endswith("weight")):
            low, high = 0.5, 1.5
        else:
            low, high = -0.2, 0.2
        values *= high - low
        values += low
        state[name] = torch.from_numpy(values)
    return state


def sounds(kind: str) -> list[np.ndarray]:
    """A falling tone with noise, which is louder in the second."""
    rng = np.random.Generator(np.random.Philox(8))
    waves = []
    for i, samples in enumerate(SAMPLES[kind]):
        t = np.arange(samples) / RATES[kind]
        tone = np.sin(2 * np.pi * (3000 * t - 900 * t * t)) * np.exp(-t)
        waves.append((0.4 * tone + 0.05 * (i + 1) * rng.uniform(-1, 1, samples)).astype(np.float32))
    return waves


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    shapes = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(FOURIER)
    }
    model.load_state_dict(model.state_dict() | random_state(shapes, seed))
    return model.eval().requires_grad_(False)


def vggish_golden() -> dict[str, np.ndarray]:
    from torchvggish.torchvggish import _vgg
    from torchvggish.vggish_input import waveform_to_examples

    model = fill(_vgg(postprocess=False), seed=1)
    model.embeddings = model.embeddings[:-1]  # as audioldm_eval and frechet_audio_distance take the last ReLU away
    windows = [waveform_to_examples(wave, 16000).detach() for wave in sounds("vggish")]
    return {f"vggish_{i}": model(window).numpy() for i, window in enumerate(windows)}


def cnn14_golden(kind: str, window: int, hop: int, highest: int) -> dict[str, np.ndarray]:
    if "panns_inference" not in sys.modules:  # its own __init__ downloads things
        package = types.ModuleType("panns_inference")
        package.__path__ = list(find_spec("panns_inference").submodule_search_locations)
        sys.modules["panns_inference"] = package
    from panns_inference.models import Cnn14

    model = fill(Cnn14(RATES[kind], window, hop, 64, 50, highest, 527), seed=2)
    logits: list[np.ndarray] = []
    model.fc_audioset.register_forward_hook(lambda layer, given, out: logits.append(out.numpy().copy()))
    vectors = [model(torch.from_numpy(wave)[None])["embedding"].numpy() for wave in sounds(kind)]
    return {f"{kind}_vectors": np.concatenate(vectors), f"{kind}_logits": np.concatenate(logits)}


if __name__ == "__main__":
    found = vggish_golden()
    found |= cnn14_golden("cnn14_16k", 512, 160, 8000) | cnn14_golden("cnn14_32k", 1024, 320, 14000)
    np.savez_compressed(FILE, **found)
    for name, values in found.items():
        print(name, values.shape, f"mean {values.mean():.4g}, std {values.std():.4g}")
