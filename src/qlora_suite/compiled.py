"""torch.compile of the decoder layers, one by one: pointwise operations are fused, and layers that are alike share what was compiled
(regional compilation, as diffusers' and accelerate's `compile_regions`).

Only what a layer computes is compiled. Hooks around it (FSDP2's, the black box's), its name and its weights stay as they are, so that
what is saved is the same. Evaluation and previews, whose shapes are many and steps few, run as before.

The compiler also chooses what to keep for the backward pass, and computes pointwise results again: layers of a tiny Phi with LoRA
dropout keep 38 % less.
"""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 24
"""For one class of layers, after which torch would quietly go on without compiling. Each of these doubles their number: a micro-batch of
one row, a first layer whose input wants no gradient, a share of the layers that recompute, masks of two kinds (Gemma's sliding window).
"""


def compile_layers(base: nn.Module) -> None:
    """Compile the forward and backward pass of each decoder layer when training first comes to it; sizes of micro-batches may vary.

    After the engine has wrapped the model: FSDP2 gives layers another class, and with it another forward. Dropout draws as it does
    uncompiled. Raises ValueError if the model has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # the class of every decoder layer

    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"speed.compile found no decoder layers in {type(base).__name__}; set it to false")
    for layer in layers:
        layer.forward = _in_training(layer, layer.forward)


def _in_training(layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's forward, compiled where a backward pass will follow."""
    compiled = torch.compile(plain, dynamic=True, recompile_limit=MOST_GRAPHS, options={"fallback_random": True})

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def check_compiler(device: torch.device) -> None:
    """Raises ValueError, in a sentence, where torch.compile would fail with a long one in the first step."""
    names = [os.environ.get("CXX"), "g++", "clang++"] if device.type == "cpu" else [os.environ.get("CC"), "gcc", "clang"]
    if not any(name and shutil.which(name) for name in names):
        raise ValueError(
            f"speed.compile needs a compiler on this machine ({names[1]}; apt-get install g++, or module load gcc); install it, or set "
            "speed.compile: false"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise ValueError(
            "speed.compile needs Python's header files (Python.h; apt-get install python3-dev); install them, or set speed.compile: false"
        )
