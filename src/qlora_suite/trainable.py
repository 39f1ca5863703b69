"""The model to train: base, adapter and trained role markers, as a recipe and its prepared data describe them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_suite import start_from
from qlora_suite.adapter import add_adapter, neftune
from qlora_suite.loss import check_separates_packed_rows
from qlora_suite.model import load_base
from qlora_suite.recipe import Recipe


def build_model(
    recipe: Recipe, manifest: Mapping[str, Any], dtype: torch.dtype, device: torch.device, sharded: bool = False
) -> tuple[nn.Module, PreTrainedModel]:
    """(the module to train, the base inside it). The same module, if every weight is trained.

    `sharded`: FSDP2 will spread the weights over the ranks. It can only cut floating-point storage, and leaves bytes whole without a
    word, so 4-bit weights are then stored as (bit patterns of) numbers of the compute type.

    Raises ValueError if the base cannot be loaded, the adapter does not cover it or cannot start from another, or it would
    mix packed conversations.
    """
    torch.manual_seed(recipe.seed)  # decides lora_A, or every weight of a model made from nothing
    fused_gelu = recipe.speed.gelu == "auto"
    if recipe.adapter == "none":
        base = load_base(recipe.model, torch.float32, device, fused_gelu=fused_gelu)
        base.requires_grad_(True)
        check_separates_packed_rows(base)
        return base, base
    base = load_base(recipe.model, dtype, device, quant_storage=dtype if sharded else None, fused_gelu=fused_gelu)
    if recipe.several_in_a_row:
        check_separates_packed_rows(base)
    markers = manifest["role_markers"]
    markers_are_targets = recipe.chat.loss_on == "all" or markers["predicted"]
    torch.manual_seed(recipe.seed)
    net = add_adapter(base, recipe.adapter, tuple(markers["token_ids"]), markers_are_targets)
    if recipe.adapter.start_from is not None:
        start_from.load(net, base, recipe.adapter.start_from)
    if recipe.adapter.neftune_noise_alpha is not None:
        neftune(base, recipe.adapter.neftune_noise_alpha)
    return net, base
