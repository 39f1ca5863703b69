"""Attention in a packed row: each conversation by itself, instead of the whole row behind a mask.

Three conversations in a row of 8 places. The mask is computed in full, and two thirds of it thrown away; by itself each is causal:

      a a a b b c c c                      keys                        32 of 64 products
    a x . . . . . . .      plain: one product of 8 x 8 places,          are wasted here, and
    a x x . . . . . .      masked                                       more in longer rows
    a x x x . . . . .
    b . . . x . . . .      here: 3 x 3, 2 x 2 and 3 x 3, causal
    b . . . x x . . .
    c . . . . . x . .      boundaries  0 3 5 8
    c . . . . . x x .
    c . . . . . x x x

The boundaries travel as the attention mask: an int32 tensor [1, 1, 1, conversations + 1], counted through all rows of the batch.
transformers hands a mask of four dimensions to every layer as it is, through recomputation too; an attention that does not know
what it is given fails, for no mask has whole numbers.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_sdpa"
VARLEN_CAPABILITY = (8, 0)
"""Ampere: torch's varlen kernel is FlashAttention, which older cards lack."""


def boundaries_of(lengths: list[list[int]], places: int) -> Tensor:
    """Where conversations begin and end. `lengths`: of those in each row; what is left of `places` is padding, and one of its own."""
    ends, start = [0], 0
    for row in lengths:
        for length in row:
            start += length
            ends.append(start)
        if sum(row) < places:
            start += places - sum(row)
            ends.append(start)
    return torch.tensor(ends, dtype=torch.int32)[None, None, None]


def use(model: PreTrainedModel, dtype: torch.dtype, longest: int) -> bool:
    """Let the model's attention understand boundaries, if it may and if there is something to gain: on a CPU, and on cards that have
    the kernel for it. Where it says False everything is as it was. `longest`: tokens of the longest row.
    """
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    windows = [getattr(config, key, None) or longest for key in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation != "sdpa" or min(windows) < longest or getattr(config, "attn_logit_softcapping", None):
        return False
    if device.type == "cuda" and (torch.cuda.get_device_capability(device) < VARLEN_CAPABILITY or dtype == torch.float32):
        return False
    if device.type not in ("cpu", "cuda"):
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def stop_using(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")


def is_used_by(model: nn.Module) -> bool:
    """`model` may be wrapped by an adapter and an engine."""
    return next(m.config for m in model.modules() if hasattr(m, "config"))._attn_implementation == NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **kwargs
) -> tuple[Tensor, None]:
    """query [rows, heads, places, width], key and value [rows, key heads, places, width] -> [rows, places, heads, width]"""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    assert not dropout, "a base's own dropouts are off"
    scaling = kwargs.get("scaling")
    if query.device.type == "cuda":
        return _varlen(query, key, value, attention_mask.flatten(), scaling), None
    return _one_by_one(query, key, value, attention_mask.flatten().tolist(), scaling), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, places, _ = query.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [rows x places, heads, width]
    # a bound of the longest conversation, known without asking the GPU
    out = varlen_attn(*flat, boundaries, boundaries, places, places, scale=scaling, window_size=(-1, 0), enable_gqa=key.shape[1] != heads)
    return out.unflatten(0, (rows, places))


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], scaling: float | None) -> Tensor:
    rows, heads, places, _ = query.shape
    if key.shape[1] != heads:
        key, value = (repeat_kv(t, heads // key.shape[1]) for t in (key, value))
    lengths: list[list[int]] = [[] for _ in range(rows)]
    for start, end in pairwise(boundaries):
        lengths[start // places].append(end - start)
    attended = []
    for row in range(rows):  # split, not slices: its backward pass is one concatenation
        parts = zip(*(t[row : row + 1].split(lengths[row], dim=2) for t in (query, key, value)), strict=True)
        out = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
        attended.append(torch.cat(out, dim=2) if len(out) > 1 else out[0])
    return (torch.cat(attended) if rows > 1 else attended[0]).transpose(1, 2)
