"""A run's result, a base, or something trained elsewhere: loaded, and asked in the format that it was trained in.

    assistant = load(subject_of(Path("runs/quickstart"), []), device, dtype)
    ids = assistant.renderer.prompt([Turn("user", "Who are you?")])
    with assistant.as_base():
        ...                                                  # the same weights without the adapter

It needs the run's folder and its base, and neither prepared data nor the validation split.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from qlora_suite.adapter import adapter_folder, load_adapter
from qlora_suite.base_config import load_config
from qlora_suite.chat import Renderer
from qlora_suite.files import hash_of, read_json, sha256
from qlora_suite.model import base_fingerprint, load_base
from qlora_suite.prequantized import source_of
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
    """The longest prompt and answer together, in tokens: what it was trained on, in this run or the ones that it goes on from, and no
    more than the base can take."""
    context: int | None = None
    """What the base can take; None if it does not say."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held by whoever makes it answer: without its adapter it is without it for everybody."""

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.net, PeftModel)

    @property
    def name(self) -> Literal["adapter", "model", "base"]:
        """What answers: a base under its adapter, a model all of whose weights were trained, or a base alone."""
        return "adapter" if self.has_adapter else "model" if self.subject.model else "base"

    @property
    def takes_system(self) -> bool:
        """Has the format a place of its own for a system prompt?"""
        if self.renderer.template:
            return self.renderer.template.system != "none"
        return self.renderer.layout is not None and self.renderer.layout.system_block is not None

    @contextlib.contextmanager
    def answering(self, base: bool) -> Iterator[None]:
        """Within, nobody else is answered; with `base`, without the adapter."""
        with self.lock, self.as_base() if base else contextlib.nullcontext():
            yield

    def about(self, base: bool) -> dict[str, Any]:
        """Who answers, for a record: names for people and `weights`, a hash, for machines."""
        model, subject = self.recipe.model, self.subject
        published = source_of(model.base) or model
        chosen = subject.folder / "final" / "chosen.json"
        run = not subject.elsewhere and (subject.adapter or subject.model)
        path = None if base else subject.adapter
        return {
            "answers": "base" if base else self.name,
            "run": str(subject.folder) if run else None,
            "step": read_json(chosen)["step"] if run and not base else None,
            "adapter": path if subject.elsewhere else None,
            "model": subject.model if subject.elsewhere else None,
            "base": None if self.name == "model" else published.base,
            "revision": None if self.name == "model" else published.revision,
            "quantization": "none" if self.name == "model" else model.quantization,
            "format": subject.format,
            "precision": str(self.dtype).removeprefix("torch."),
            "weights": hash_of(
                [
                    base_fingerprint(Model(base=subject.model) if subject.model else model),
                    sha256(adapter_folder(path) / "adapter_model.safetensors") if path else None,
                ]
            )[:16],
        }

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within, the net answers without its adapter. Raises ValueError if it has none."""
        self.check_base()
        with self.net.disable_adapter():
            yield

    def check_base(self) -> None:
        """Raises ValueError if there is no adapter to be taken off."""
        if not self.has_adapter:
            raise ValueError(f"{self.subject.folder} has no adapter to be taken off; every weight was trained, or it is a base")


def load(subject: Subject, device: torch.device, dtype: torch.dtype) -> Assistant:
    """Base and adapter, or the full model, as scripts/evaluate.py scores it. Raises ValueError if it is not whole or does not fit."""
    recipe = subject.recipe
    renderer = renderer_of(subject)
    model = Model(base=subject.model, quantization="none") if subject.model else recipe.model
    net: nn.Module = load_base(model, dtype, device)
    if subject.adapter:
        net = load_adapter(net, subject.adapter)
    context = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
    window = min(filter(None, [subject.asked_within, context]))
    return Assistant(net.eval(), renderer, recipe, subject, device, dtype, window, context)


def headline_of(about: dict[str, Any]) -> str:
    """`about` in a line: runs/quickstart, adapter of step 67 on assets/tiny_phi (nf4), oasst, float32"""
    step = f" of step {about['step']}" if about["step"] is not None else ""
    what = about["adapter"] or about["model"] or (about["run"] if about["answers"] != "base" else None)
    base = f"{about['base']} ({about['quantization']})" if about["base"] else ""
    on = f"the base {base}" if about["answers"] == "base" else f"{about['answers']}{step}" + (f" on {base}" if base else "")
    return ", ".join(filter(None, [what, on, f"chat format {about['format']}", about["precision"]]))
