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

On a card without the kernel for it (a T4) the mask stays, but it is made once a batch, and without asking the GPU whether there is
something to mask, as transformers does in each forward pass.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_ITSELF, MASKED = "packed_sdpa", "masked_sdpa"
"""Names under which transformers knows the two."""
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


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Can conversations be taken one by one there? By a loop on a CPU, by torch's varlen kernel on a GPU."""
    if device.type != "cuda":
        return device.type == "cpu"
    return dtype != torch.float32 and torch.cuda.get_device_capability(device) >= VARLEN_CAPABILITY


def use(model: PreTrainedModel, longest: int, by_itself: bool) -> str:
    """Let the model's attention take what `mask_for` gives. `longest`: tokens of the longest row; `by_itself`: needs `has_kernel`.

    Returns in a few words what it does; nothing if it has a window or a cap, or is none of torch's: then all is as it was.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, key, None) or longest for key in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation != "sdpa" or min(windows) < longest or getattr(config, "attn_logit_softcapping", None):
        return ""
    name, function = (BY_ITSELF, _attention) if by_itself else (MASKED, sdpa_attention_forward)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return "each conversation by itself" if by_itself else "a mask made once a batch"


def stop_using(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")


def mask_for(model: nn.Module, boundaries: Tensor, position_ids: Tensor) -> Tensor | None:
    """What to give to this model as its attention mask. `model` may be wrapped by an adapter and an engine.

    The mask of a T4: [rows, 1, places, places], 0 where the place of the row may look at that of the column and -inf elsewhere, in the
    type that is computed in: a mask of true and false would be turned into one of these in every layer, and kept there.
    """
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    name = base.config.get_text_config()._attn_implementation
    if name == BY_ITSELF:
        return boundaries
    if name != MASKED:
        return None
    conversation, place = (position_ids == 0).cumsum(dim=1), torch.arange(position_ids.shape[1], device=position_ids.device)
    allowed = (conversation[:, :, None] == conversation[:, None, :]) & (place[:, None] >= place)
    return torch.zeros_like(allowed, dtype=base.dtype).masked_fill_(~allowed, -torch.inf)[:, None]


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
    return _one_by_one(query, key, value, attention_mask, scaling), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, places, _ = query.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [rows x places, heads, width]
    if torch.is_autocast_enabled("cuda"):  # which knows torch's other attention, and not this one
        flat = [t.to(torch.get_autocast_dtype("cuda")) for t in flat]
    # `places` twice: a bound of the longest conversation, known without asking the GPU
    out = varlen_attn(*flat, boundaries, boundaries, places, places, scale=scaling, window_size=(-1, 0), enable_gqa=key.shape[1] != heads)
    return out.unflatten(0, (rows, places))


@torch.compiler.disable  # the lengths are another loop in each batch
def _one_by_one(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None) -> Tensor:
    rows, heads, places, _ = query.shape
    if key.shape[1] != heads:
        key, value = (repeat_kv(t, heads // key.shape[1]) for t in (key, value))
    lengths: list[list[int]] = [[] for _ in range(rows)]
    for start, end in pairwise(boundaries.tolist()[0][0][0]):
        lengths[start // places].append(end - start)
    attended = []
    for row in range(rows):  # split, not slices: its backward pass is one concatenation
        parts = zip(*(t[row : row + 1].split(lengths[row], dim=2) for t in (query, key, value)), strict=True)
        out = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
        attended.append(torch.cat(out, dim=2) if len(out) > 1 else out[0])
    return (torch.cat(attended) if rows > 1 else attended[0]).transpose(1, 2)
