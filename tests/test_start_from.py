"""adapter.start_from: a run that goes on with the adapter of another."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from in_process import metrics, prepared, train
from safetensors.torch import load_file, save_file

from qlora_suite import start_from
from qlora_suite.checkpoint import ADAPTER
from qlora_suite.dataset import load_manifest
from qlora_suite.recipe_file import load
from qlora_suite.trainable import build_model

CPU = torch.device("cpu")
FEW = ("train.max_steps=6", "optim.learning_rate=1e-2")


@pytest.fixture
def first(make_recipe: MakeRecipe, tmp_path: Path) -> tuple[Path, Path]:
    """(recipe, folder of a finished run)"""
    recipe = prepared(make_recipe(*FEW))
    return recipe, train(recipe, f"output.dir={tmp_path / 'first'}")


def model_of(recipe: Path, *overrides: str) -> dict[str, torch.Tensor]:
    values = load(recipe, overrides)
    net, _ = build_model(values, load_manifest(values), torch.float32, CPU)
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("place", ["run", "final"])
def test_training_begins_with_the_weights_of_the_adapter_token_rows_included(first: tuple[Path, Path], place: str) -> None:
    recipe, run = first
    new, found = model_of(recipe), model_of(recipe, f"adapter.start_from={run if place == 'run' else run / 'final'}")
    saved = load_file(run / "final" / ADAPTER)
    assert len(saved) == len(found) == len(new)
    assert sorted(float(t.double().sum()) for t in saved.values()) == pytest.approx(sorted(float(t.double().sum()) for t in found.values()))
    assert any("trainable_tokens" in name for name in found), "role markers are trained rows of the tiny base"
    assert all(not torch.equal(found[name], new[name]) for name in found), "of a new one every lora_B is zero"


def test_the_curve_goes_on_where_it_was(first: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = first
    again = train(recipe, f"output.dir={tmp_path / 'second'}", f"adapter.start_from={run}")
    before, after = metrics(run), metrics(again)
    assert after[0]["loss"] < before[0]["loss"] - 0.05, "the same rows, which it has learnt from"
    assert (again / "final" / ADAPTER).is_file()


def test_another_adapter_is_another_run_and_a_moved_one_is_not(first: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = first
    dir = f"output.dir={tmp_path / 'second'}"
    train(recipe, dir, f"adapter.start_from={run}", "checkpoints.every_steps=2", "stop.after_minutes=0.00001")
    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    tensors = load_file(moved / "final" / ADAPTER)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes((moved / "final" / "adapter_config.json").read_bytes())
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / ADAPTER)
    with pytest.raises(ValueError, match="hash of its weights"):
        train(recipe, dir, f"adapter.start_from={copy}")
    train(recipe, dir, f"adapter.start_from={moved}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.rank=8", "adapter.rank: there 4, here 8"),
        ("adapter.alpha=3", "adapter.alpha"),
        ("adapter.rslora=true", "adapter.rslora"),
        ("adapter.targets=[q_proj,v_proj]", "adapter.targets"),
    ],
)
def test_an_adapter_of_another_function_is_refused_by_key(first: tuple[Path, Path], override: str, words: str) -> None:
    recipe, run = first
    with pytest.raises(ValueError, match="cannot be gone on from: .*" + words):
        model_of(recipe, f"adapter.start_from={run}", override, "adapter.allow_partial=true")


def test_a_run_that_is_not_finished_and_a_folder_without_an_adapter_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = prepared(make_recipe(*FEW))
    run = train(recipe, f"output.dir={tmp_path / 'stopped'}", "stop.after_minutes=0.00001")
    with pytest.raises(ValueError, match=r"is not finished and has no final/"):
        start_from.folder_of(str(run))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is no adapter that can be read"):
        start_from.folder_of(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"has no effect with adapter.start_from"):
        load(recipe, ["adapter.start_from=x", "adapter.init=gaussian"])


def changed(run: Path, folder: Path, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """A copy of a run's adapter, with other settings or stored in another type."""
    folder.mkdir()
    values = json.loads((run / "final" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save_file({name: t.to(dtype or t.dtype) for name, t in load_file(run / "final" / ADAPTER).items()}, folder / ADAPTER)
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "begun with adapter.init: pissa, which changed its base"),
        ({"init_lora_weights": "olora"}, "begun with adapter.init: olora, which changed its base"),
        ({"alpha_pattern": {"q_proj": 256}}, "an alpha of its own for some modules"),
        ({"peft_type": "IA3"}, "has peft_type: IA3; what is read here is LORA"),
    ],
)
def test_an_adapter_whose_weights_do_not_say_what_it_computes_is_refused(
    first: tuple[Path, Path], tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    recipe, run = first
    other = changed(run, tmp_path / "other", **config)
    with pytest.raises(ValueError, match=f"cannot be gone on from: .*{words}"):
        start_from.fingerprint(str(other))
    with pytest.raises(ValueError, match=f"cannot be gone on from: .*{words}"):
        model_of(recipe, f"adapter.start_from={other}")


def test_an_adapter_in_16_bits_is_trained_in_32(first: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = first
    found = model_of(recipe, f"adapter.start_from={changed(run, tmp_path / 'half', torch.bfloat16)}")
    exact = model_of(recipe, f"adapter.start_from={run}")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(tensor.equal(exact[name].bfloat16().float()) for name, tensor in found.items())


def base_like(base: Path, folder: Path, factor: float) -> Path:
    """A copy of a base, every weight of which is multiplied."""
    shutil.copytree(base, folder)
    weights = {name: tensor * factor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("place", ["", "final", "checkpoints/step-000006"])
def test_an_adapter_of_a_run_on_another_base_is_refused_and_a_base_may_be_moved(
    first: tuple[Path, Path], tmp_path: Path, tiny_base: Path, place: str
) -> None:
    """Of the same shape, so that nothing else would tell."""
    recipe, run = first
    begun = (f"adapter.start_from={run / place}", "train.max_steps=1")

    def on(base: Path) -> tuple[str, ...]:
        keys = (f"model.base={base}", f"data.prepared={base}-prepared")
        prepared(recipe, *keys)
        return (*keys, *begun, f"output.dir={base}-run")

    with pytest.raises(ValueError, match=r"stood on another base .* set model\.base .* to what it had"):
        train(recipe, *on(base_like(tiny_base, tmp_path / "other", 1.01)))
    train(recipe, *on(base_like(tiny_base, tmp_path / "moved", 1)))


def test_bases_are_told_apart_by_commit_or_by_files_and_not_one_by_the_other(first: tuple[Path, Path]) -> None:
    _, run = first
    about = json.loads((run / "run.json").read_text())
    start_from.check_base(str(run), about["base"])
    start_from.check_base(str(run), "someone/model@abc")
    (run / "run.json").write_text(json.dumps(about | {"base": "someone/model@abd"}))
    start_from.check_base(str(run), about["base"])
    with pytest.raises(ValueError, match=r"stood on another base \(someone/model@abd\) than this one \(someone/model@abc\)"):
        start_from.check_base(str(run), "someone/model@abc")
    (run / "run.json").unlink()
    start_from.check_base(str(run), "someone/model@abc")


def test_of_an_adapter_without_its_run_another_name_of_the_base_is_remarked_on(first: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = first
    manifest = {"role_markers": {"token_ids": []}}
    for name, said in (("someone/else", "says that it was trained on someone/else"), (None, ""), (load(recipe).model.base, "")):
        plain = changed(run, tmp_path / f"{name}".replace("/", "-"), base_model_name_or_path=name)
        found = start_from.check_recipe(load(recipe, [f"adapter.start_from={plain}"]), manifest)
        assert bool(found) == bool(said)
        assert said in found
    hashed = load(recipe, [f"adapter.start_from={run / 'final'}", "model.base=someone/else"])
    assert start_from.check_recipe(hashed, manifest) == "", "there the hash will tell"
    start_from.check_base(str(plain), "of another base, for all that is known")


def test_a_run_of_another_format_is_refused_and_one_of_another_split_remarked_on(first: tuple[Path, Path]) -> None:
    recipe, run = first
    manifest = {"role_markers": {"token_ids": []}}
    start = f"adapter.start_from={run}"
    assert start_from.check_recipe(load(recipe, [start]), manifest) == ""
    said = r"trained with another chat\.format \(there oasst, here chatml\) and chat\.system_prompt \(there none, here Be brief\.\); give"
    with pytest.raises(ValueError, match=said):
        start_from.check_recipe(load(recipe, [start, "chat.format=chatml", "chat.system_prompt=Be brief."]), manifest)
    said = start_from.check_recipe(load(recipe, [start, "data.validation_share=0.5"]), manifest)
    assert "what is held out here may have been learnt there" in said


def test_a_mistyped_folder_is_said_to_be_missing_and_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "first").mkdir(parents=True)
    for name in ("./first", str(tmp_path / "first"), "runs/first", "first", "mine/furst", "a/b/c", "~/first", "../first"):
        with pytest.raises(ValueError, match=rf"adapter\.start_from: there is no folder {re.escape(name)} \(working folder: "):
            start_from.folder_of(name)
    with pytest.raises(ValueError, match=r"did you mean mine/first\?"):
        start_from.folder_of("mine/furst")
    for name in ("someone/adapter", "someone/adapter@v2", "someone/adapter@refs/pr/1"):
        with pytest.raises(ValueError, match="neither a folder here nor reachable on the hub"):
            start_from.folder_of(name)


def test_a_finished_run_is_finished_without_what_it_began_with(first: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    recipe, run = first
    dir, begun = f"output.dir={tmp_path / 'second'}", f"adapter.start_from={run}"
    train(recipe, dir, begun)
    stopped = (f"output.dir={tmp_path / 'third'}", "checkpoints.every_steps=2", "stop.after_minutes=0.00001")
    train(recipe, *stopped, begun)
    shutil.rmtree(run)
    capsys.readouterr()
    train(recipe, dir, begun)
    assert "second is finished: 6 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cannot go on, for these would change its curve:\n  optim\.learning_rate"):
        train(recipe, dir, begun, "optim.learning_rate=1e-3")
    with pytest.raises(ValueError, match=r"adapter\.start_from: there is no folder"):
        train(recipe, stopped[0], begun)
    assert (tmp_path / "second" / "final" / ADAPTER).is_file()
    (tmp_path / "second" / "status.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter\.start_from: there is no folder"):
        train(recipe, dir, begun)
