"""Captions for sounds that have none (paper, appendix A): five candidates a clip, then a polish, then rules.

A captioner is any callable `captioner(waveforms, sample_rate) -> list[list[str]]`, candidates for each waveform
float32 [S]; a polisher any callable from a list of captions to as many. Qwen2AudioCaptioner and QwenPolisher are those
of the paper, through transformers. They were tested with tiny models of the same classes and random weights, and never
run with the real ones (some 16 GB each in bfloat16), so how well those captions read was not seen.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from ..errors import CheckpointError, InputError
from ..pretrained import find_folder, missing, move, read_config
from ..text import quiet_transformers
from .captions import clean_captions

Captioner = Callable[[Sequence[np.ndarray], int], list[list[str]]]
Polisher = Callable[[list[str]], list[str]]

CANDIDATES = 5
PROMPT = "Please describe this audio in detail, including events, timbres, temporal structure, and emotional tone."
POLISH = (
    "Rewrite this description of a sound as one concise, objective English caption of at most 20 words. Keep only what"
    " is heard. Leave out transcribed speech, moods and opinions. Answer with the caption alone.\n\n"
)
_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")


def describe(
    captioner: Captioner, waveforms: Sequence[np.ndarray], sample_rate: int, polisher: Polisher | None = None
) -> list[tuple[list[str], list[str]]]:
    """For each waveform its clean captions, distinct and in order, and why other candidates were dropped.

    A clip may be left without captions. Raises InputError if a captioner or polisher does not give what it should.
    """
    candidates = captioner(waveforms, sample_rate)
    _check(candidates, len(waveforms), list, "the captioner")
    described = []
    for texts in candidates:
        _check(texts, len(texts), str, "the captioner")
        if polisher is not None:
            polished = polisher(texts)
            _check(polished, len(texts), str, "the polisher")
            texts = polished
        described.append(clean_captions(texts))
    return described


def load_captioner(name: str | Path, device: str | torch.device = "cpu") -> Captioner:
    """A captioner by name: "module:function" imports one of your own, all else is a folder or name of Qwen2-Audio.

    Raises InputError for a module or function that is not there, and what `Qwen2AudioCaptioner.from_pretrained` raises.
    """
    module, separator, function = str(name).partition(":")
    if not separator or not all(part.isidentifier() for part in module.split(".")):
        return Qwen2AudioCaptioner.from_pretrained(name, device)
    try:
        captioner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"there is no captioner {name}: {error}") from error
    if not callable(captioner):
        raise InputError(f"{name} is no captioner: it cannot be called")
    found: Captioner = captioner
    return found


class Qwen2AudioCaptioner:
    """Qwen2-Audio as captioner, with the paper's prompt. `max_new_tokens` limits a candidate's length.

    Candidates are sampled, from a seed made of the waveform and `seed`: a clip gets the same ones in any batch and in
    any process. Clips run one at a time.
    """

    def __init__(
        self, model: Any, processor: Any, candidates: int = CANDIDATES, max_new_tokens: int = 128, seed: int = 0
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.candidates = candidates
        self.max_new_tokens = max_new_tokens
        self.seed = seed

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "Qwen/Qwen2-Audio-7B-Instruct", device: str | torch.device = "cpu", **options: int
    ) -> Qwen2AudioCaptioner:
        """Load a folder in the transformers format, or one of that name on the hub; bfloat16 unless on the CPU.

        `options` are those of the class. Raises CheckpointError for what is missing or of another kind,
        MissingDependencyError without transformers.
        """
        model, processor = _load(name, "Qwen2AudioForConditionalGeneration", "AutoProcessor", "a captioner", device)
        return cls(model, processor, **options)

    def __call__(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> list[list[str]]:
        """Candidate captions, as the model wrote them, for each waveform float [S]."""
        return [self._caption(waveform, sample_rate) for waveform in waveforms]

    @torch.no_grad()
    def _caption(self, waveform: np.ndarray, sample_rate: int) -> list[str]:
        content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": PROMPT}]
        turns = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rate = self.processor.feature_extractor.sampling_rate
        heard = soxr.resample(waveform.astype(np.float32), sample_rate, rate)
        known = inspect.signature(self.processor.__call__).parameters
        sounds = {"audio" if "audio" in known else "audios": [heard]}  # renamed within transformers 4
        inputs = self.processor(text=[text], **sounds, sampling_rate=rate, return_tensors="pt", padding=True)
        digest = hashlib.sha256(self.seed.to_bytes(16, "little", signed=True) + heard.tobytes()).digest()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # generate knows no generator of its own
            torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            return _generate(
                self.model,
                self.processor,
                inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_p=0.9,
                num_return_sequences=self.candidates,
            )


class QwenPolisher:
    """Qwen-2.5 as polisher: every caption is rewritten, alone and greedily, to a concise and objective one."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int = 64) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "Qwen/Qwen2.5-7B-Instruct", device: str | torch.device = "cpu", **options: int
    ) -> QwenPolisher:
        """As `Qwen2AudioCaptioner.from_pretrained`."""
        model, tokenizer = _load(name, "AutoModelForCausalLM", "AutoTokenizer", "a polisher", device)
        return cls(model, tokenizer, **options)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[str]:
        """One caption for each, as the model wrote it."""
        polished = []
        for caption in captions:
            turns = [{"role": "user", "content": POLISH + caption}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            inputs = self.tokenizer([text], return_tensors="pt")
            polished += _generate(
                self.model, self.tokenizer, inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
        return polished


def _generate(model: Any, decoder: Any, inputs: Any, **options: Any) -> list[str]:
    """The texts a model adds to one prompt, whose special tokens are left out."""
    inputs = {
        name: tensor.to(model.device, model.dtype) if tensor.is_floating_point() else tensor.to(model.device)
        for name, tensor in inputs.items()
    }
    tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = decoder.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _load(name: str | Path, model_class: str, reader_class: str, what: str, device: str | torch.device) -> Any:
    """A model and what prepares its inputs. transformers by itself makes up tensors that are missing."""
    try:
        import transformers
    except ImportError as error:
        raise missing("transformers", "text") from error
    folder = find_folder(name, what, _FILES)
    kind = read_config(folder).get("model_type")
    if model_class == "Qwen2AudioForConditionalGeneration" and kind != "qwen2_audio":
        # Checked here, because transformers would make up a whole model of 8 billion numbers first.
        raise CheckpointError(f"{folder} does not hold {what}: model_type must be qwen2_audio, not {kind!r}")
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with quiet_transformers():
        try:
            model, about = getattr(transformers, model_class).from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,  # never a pickle
                attn_implementation="sdpa",  # a config's own choice can name code on the hub
                torch_dtype=dtype,
                output_loading_info=True,
            )
            reader = getattr(transformers, reader_class).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # missing, damaged and unsafe files raise errors of several libraries
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise CheckpointError(f"{folder} does not hold {what} in the transformers format: {reason}") from error
    if about["missing_keys"] or about["mismatched_keys"]:
        lacking = sorted(map(str, (*about["missing_keys"], *about["mismatched_keys"])))
        raise CheckpointError(f"{folder} lacks {lacking[0]} and {len(lacking) - 1} more; it does not hold {what}")
    move(model, device)
    return model, reader


def _check(values: Any, length: int, kind: type, who: str) -> None:
    if not isinstance(values, list) or len(values) != length or not all(isinstance(value, kind) for value in values):
        raise InputError(f"{who} must give a list of {length} {kind.__name__}, not {str(values)[:80]!r}")
