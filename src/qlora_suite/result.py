"""A run's result, final/: the adapter in PEFT's layout, or the whole model in that of transformers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate.utils.other
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from qlora_suite import checkpoint
from qlora_suite.base_config import load_config
from qlora_suite.files import errors_name, flush, write_json
from qlora_suite.recipe import Recipe
from qlora_suite.tracking import say


def write_result(
    run: Path, source: Path, recipe: Recipe, net: nn.Module, tokenizer: PreTrainedTokenizerBase, choice: Mapping[str, Any]
) -> None:
    """Write `run/final` from the checkpoint `source`; `net` may be sharded by now, and tells only how the weights are to be laid out.

    An older result makes way in one step, and what is no whole result is set aside. Raises OSError; nothing half stays.
    """
    final, aside, old = (run / name for name in ("final", ".final.tmp", ".final.old.tmp"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with errors_name(final):
            if isinstance(net, PeftModel):
                for name in (checkpoint.ADAPTER, CONFIG_NAME):
                    shutil.copyfile(source / name, aside / name)
                checkpoint.check_weights(aside / checkpoint.ADAPTER, load_file(source / checkpoint.ADAPTER), trained=True)
            else:
                dtype = getattr(torch, recipe.output.final_dtype or "float32")
                weights = {name: tensor.to(dtype) for name, tensor in load_file(source / checkpoint.WEIGHTS).items()}
                save_pretrained(net, aside, weights)
                config = load_config(recipe.model)  # as its maker wrote it: ours was changed for training
                config.architectures, config.dtype = [model_class(net).__name__], dtype
                config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            write_json(aside / "chosen.json", choice)
            checkpoint.seal(aside)
            if final.exists() and checkpoint.complaint_about_checkpoint(final) is None:
                final.rename(old)  # status.json was not written any more; half of a result must not stay in its place
            elif final.exists():  # damaged, or somebody's own
                say(f"{final} is set aside as {checkpoint.set_aside(final).name}: it is no whole result")
            aside.rename(final)
            flush(run)
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def model_class(net: nn.Module) -> type[nn.Module]:
    """The model's class; FSDP2 puts a subclass of its own in its place."""
    return next(kind for kind in type(net).__mro__ if not issubclass(kind, FSDPModule))


def save_pretrained(net: nn.Module, folder: Path, weights: dict[str, Tensor], **options: Any) -> None:
    """Without importing deepspeed, which accelerate does to unwrap a model wherever it is installed; this one is not wrapped."""
    known = accelerate.utils.other.is_deepspeed_available
    accelerate.utils.other.is_deepspeed_available = lambda: False
    try:
        net.save_pretrained(folder, state_dict=weights, **options)
    finally:
        accelerate.utils.other.is_deepspeed_available = known
