"""The checks of a teacher-forced forward's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import SirenConfig
from .errors import InputError

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def check_inputs(
    config: SirenConfig,
    parameter: Tensor,
    codes: Tensor,
    prompt: Tensor,
    prompt_mask: Tensor | None,
    sequence_mask: Tensor | None,
) -> None:
    """Raise InputError unless the arguments of a teacher-forced forward fit the config and the parameters' device."""
    masks = (("prompt_mask", prompt_mask), ("sequence_mask", sequence_mask))
    for name, value in (("codes", codes), ("prompt", prompt), *masks):
        if not isinstance(value, Tensor) and (value is not None or name in ("codes", "prompt")):
            raise InputError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        if isinstance(value, Tensor) and value.device != parameter.device:
            raise InputError(f"{name} is on {value.device} and the model on {parameter.device}: move one of them")
    if codes.ndim != 3 or codes.shape[1] != config.num_codebooks or not codes.shape[0] or not codes.shape[2]:
        raise InputError(f"codes must have shape [batch, {config.num_codebooks}, frames], got {tuple(codes.shape)}")
    if codes.dtype not in _INTEGERS:
        raise InputError(f"codes must be integers, not {codes.dtype}")
    batch, _, frames = codes.shape
    if frames > config.max_seq_len:
        raise InputError(f"codes have {frames} frames; max_seq_len is {config.max_seq_len}")
    if prompt.ndim != 3 or prompt.shape[0] != batch or prompt.shape[2] != config.prompt_dim or not prompt.shape[1]:
        raise InputError(
            f"prompt must have shape [{batch}, tokens, {config.prompt_dim}] for these codes, got {tuple(prompt.shape)}"
        )
    if prompt.shape[1] > config.max_prompt_len:
        raise InputError(f"prompt has {prompt.shape[1]} tokens; max_prompt_len is {config.max_prompt_len}")
    if not prompt.is_floating_point():
        raise InputError(f"prompt must be floating point, not {prompt.dtype}")
    for (name, mask), length in zip(masks, (prompt.shape[1], frames), strict=True):
        if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
            raise InputError(f"{name} must be bool of shape [{batch}, {length}], got {mask.dtype} {tuple(mask.shape)}")
    if torch.compiler.is_compiling():
        return  # the checks below look at values and would split the graph
    low, high = (int(value) for value in torch.aminmax(codes))
    if low < 0 or high >= config.codebook_size:
        raise InputError(f"codes must be from 0 to {config.codebook_size - 1}, got {low if low < 0 else high}")
    for name, mask in masks:
        if mask is not None and not bool(mask.any(dim=1).all()):
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise InputError(f"{name} of sequence {row} holds no True: every sequence needs at least one")
