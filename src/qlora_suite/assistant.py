"""A run's result, a base, or something trained elsewhere: loaded, and asked in the format that it was trained in.

    assistant = load(subject_of(Path("runs/quickstart"), []), device, dtype)
    ids = assistant.renderer.prompt([Turn("user", "Who are you?")])
    with assistant.as_base():
        ...                                                  # the same weights without the adapter

It needs the run's folder and its base, and neither prepared data nor the validation split.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from qlora_suite.adapter import load_adapter
from qlora_suite.chat import Renderer
from qlora_suite.model import load_base, load_config
from qlora_suite.recipe import Model, Recipe
from qlora_suite.subject import Subject, renderer_of


@dataclass(frozen=True)
class Assistant:
    net: nn.Module
    """In eval mode, on its device; a PeftModel if there is an adapter."""
    renderer: Renderer
    recipe: Recipe
    subject: Subject
    device: torch.device
    dtype: torch.dtype
    """Of the computation, under autocast."""
    window: int
    """The longest prompt and answer together, in tokens: what it was trained on, and no more than the base can take."""

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.net, PeftModel)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within, the net answers without its adapter. Raises ValueError if it has none."""
        if not self.has_adapter:
            raise ValueError(f"{self.subject.folder} has no adapter to be taken off; every weight was trained, or it is a base")
        with self.net.disable_adapter():
            yield


def load(subject: Subject, device: torch.device, dtype: torch.dtype) -> Assistant:
    """Base and adapter, or the full model, as scripts/evaluate.py scores it. Raises ValueError if it is not whole or does not fit."""
    recipe = subject.recipe
    renderer = renderer_of(subject)
    model = Model(base=subject.model, quantization="none") if subject.model else recipe.model
    net: nn.Module = load_base(model, dtype, device)
    if subject.adapter:
        net = load_adapter(net, subject.adapter)
    context = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    window = min(filter(None, [recipe.data.max_length, context]))
    return Assistant(net.eval(), renderer, recipe, subject, device, dtype, window)
