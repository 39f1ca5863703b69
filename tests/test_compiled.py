"""speed.compile: the decoder layers compiled, the curve and the files as without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from in_process import lines, prepared, train
from safetensors.torch import load_file
from tiny_models import CONFIGS, tiny
from torch import nn
from torch._dynamo.utils import counters

from qlora_suite.checkpoint import ADAPTER
from qlora_suite.compiled import check_compiler, compile_layers
from qlora_suite.launched_runs import difference
from qlora_suite.recipe_file import load

CPU = torch.device("cpu")


def test_compiled_layers_learn_the_same_from_a_few_graphs_for_all_shapes(make_recipe: MakeRecipe) -> None:
    """A real run, with dropout and half of the layers recomputing: micro-batches of one row and of several, evaluations, previews."""
    recipe = prepared(
        make_recipe(
            "train={rows_per_step: 8, max_steps: 4, micro_batch: auto, gradient_checkpointing: 0.5}",
            "adapter.dropout=0.1",
            "evaluation.every_steps=2",
            "previews={prompts: [Hello], every_steps: 4, max_new_tokens: 8}",
        )
    )
    folder = Path(load(recipe, []).output.dir).parent
    plain = train(recipe, f"output.dir={folder / 'plain'}")
    torch._dynamo.reset()
    counters.clear()
    # a mask, for a CPU's loop over conversations is no part of a graph
    compiled = train(recipe, f"output.dir={folder / 'compiled'}", "speed.compile=true", "speed.attention=plain")
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4, "two layers, of which one recomputes; for one row, and for more"
    assert not counters["graph_break"]
    assert difference(plain, compiled).within(1e-5)
    ours, its = (load_file(run / "final" / ADAPTER) for run in (compiled, plain))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in its.items()}
    answers = [[record["answers"] for record in lines(run / "previews.jsonl")] for run in (plain, compiled)]
    assert answers[0] == answers[1]


class Seen(list):
    """Stands for torch.compile: the compiled forward notes that it ran."""

    def __call__(self, forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            self.append(forward.__self__)
            return forward(*args, **kwargs)

        return compiled


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    monkeypatch.setattr(torch, "compile", seen)
    return seen


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_only_training_is_compiled_and_names_stay(architecture: str, seen: Seen) -> None:
    model, ids = tiny(architecture), torch.arange(8)[None]
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    before = model(ids).logits
    compile_layers(model)
    assert names == ([name for name, _ in model.named_modules()], list(model.state_dict()))
    torch.testing.assert_close(model(ids).logits, before)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    model.train()
    with torch.no_grad():
        model(ids)
    assert seen == []
    torch.testing.assert_close(model(ids).logits, before)
    assert [id(layer) for layer in seen] == [id(layer) for layer in model.model.layers]


def test_hooks_around_a_layer_are_called(seen: Seen) -> None:
    """FSDP2 gathers a layer's weights in one, the black box looks in one."""
    model, called = tiny().train(), []
    compile_layers(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: called.append(len(seen)))
    model(torch.arange(8)[None])
    assert called == [1, 2]


def test_without_a_compiler_or_layers_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"speed\.compile found no decoder layers in Linear"):
        compile_layers(nn.Linear(1, 1))
    check_compiler(CPU)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(ValueError, match=r"speed\.compile needs Python's header files"):
        check_compiler(CPU)
    monkeypatch.setattr("shutil.which", lambda _: None)
    for device, name in (("cpu", r"g\+\+"), ("cuda", "gcc")):
        with pytest.raises(ValueError, match=rf"speed\.compile needs a compiler on this machine \({name};"):
            check_compiler(torch.device(device))
