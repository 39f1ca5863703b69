"""A base that scripts/quantize_base.py quantised once is the base that is quantised at every start: the same bits, other files."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import MakeRecipe, run_script, write_recipe
from in_process import column, metrics, prepared, script, train
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from qlora_suite import model as models
from qlora_suite.adapter import add_adapter
from qlora_suite.base_config import load_tokenizer
from qlora_suite.files import read_json, write_json
from qlora_suite.loss import collate, summed_loss
from qlora_suite.model import base_fingerprint, load_base
from qlora_suite.preparation import tokenizer_hash
from qlora_suite.prequantized import RECORD
from qlora_suite.recipe import Adapter, Model
from qlora_suite.recipe_file import load as load_recipe
from qlora_suite.subject import unquantised_base

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """Bases as they are published: weights in fp32, or in fp16 as Phi-2's, with a tokenizer."""
    root = tmp_path_factory.mktemp("published")
    found = {}
    for name, dtype in (*((name, torch.float32) for name in CONFIGS), ("phi_fp16", torch.float16)):
        found[name] = root / name
        tiny(name.removesuffix("_fp16")).to(dtype).save_pretrained(found[name])
        for path in tiny_base.glob("*token*"):
            shutil.copy(path, found[name])
    return found


Quantize = Callable[..., Path]


@pytest.fixture
def quantize(tmp_path: Path) -> Quantize:
    """quantize(base, storage=..., precision=..., quantization=...) -> the folder that scripts/quantize_base.py makes."""

    def make(base: Path, storage: str | None = None, precision: str | None = None, name: str = "quantized", **section: Any) -> Path:
        script("quantize_base").run(Model(base=str(base), **section), tmp_path / name, storage, precision)
        return tmp_path / name

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32, storage: torch.dtype | None = None, **section: Any) -> PreTrainedModel:
    return load_base(Model(base=str(folder), **section), dtype, CPU, storage)


def dequantized(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every weight as it is computed with."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif hasattr(module, "state") and hasattr(module.weight, "SCB"):
            found[f"{name}.weight"] = dequantize_bnb_weight(module.weight, SimpleNamespace(SCB=module.weight.SCB))
    return found


def logits(model: PreTrainedModel, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model.eval()(IDS).logits


def assert_the_same(a: PreTrainedModel, b: PreTrainedModel, dtype: torch.dtype) -> None:
    ours, theirs = dequantized(a), dequantized(b)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype, name
        assert torch.equal(weight, theirs[name]), name
    assert torch.equal(logits(a, dtype), logits(b, dtype))


# --- the same bits


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4bit_weights_are_those_of_quantising_at_the_start(
    bases: dict[str, Path], quantize: Quantize, storage: str, double: bool | None, dtype: torch.dtype
) -> None:
    folder = quantize(bases["phi"], storage, str(dtype).removeprefix("torch."), double_quantization=double)
    packed = getattr(torch, storage)
    ours = load(folder, dtype, packed, double_quantization=double)
    theirs = load(bases["phi"], dtype, double_quantization=double)
    weight = ours.model.layers[0].mlp.fc1.weight
    assert weight.dtype == packed
    assert torch.equal(weight.data.view(torch.uint8).flatten(), theirs.model.layers[0].mlp.fc1.weight.data.flatten())
    assert load(bases["phi"], dtype, packed, double_quantization=double).model.layers[0].mlp.fc1.weight.dtype == packed
    assert_the_same(ours, theirs, dtype)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_every_architecture_comes_back_bit_for_bit(
    bases: dict[str, Path], quantize: Quantize, architecture: str, quantization: str
) -> None:
    folder = quantize(bases[architecture], quantization=quantization)
    ours, theirs = load(folder, quantization=quantization), load(bases[architecture], quantization=quantization)
    assert_the_same(ours, theirs, torch.float32)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


@pytest.mark.parametrize(("storage", "precision"), [(None, "float16"), ("bfloat16", "bfloat16")])
def test_without_a_precision_it_is_the_storages_or_that_of_the_published_weights(
    bases: dict[str, Path], quantize: Quantize, storage: str | None, precision: str
) -> None:
    folder = quantize(bases["phi_fp16"], storage)
    assert read_json(folder / RECORD)["precision"] == precision
    dtype = getattr(torch, precision)
    assert_the_same(load(folder, dtype), load(bases["phi_fp16"], dtype), dtype)
    if storage is None:  # fp32 holds fp16 exactly, so a run on a CPU quantises the same numbers
        assert_the_same(load(folder, torch.float32), load(bases["phi_fp16"], torch.float32), torch.float32)


def test_the_run_decides_what_is_computed_in_not_who_quantised(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"], precision="float32")
    model = load(folder, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}  # transformers leaves every `weight` as it was saved
    layer = model.model.layers[0].mlp.fc1
    assert (layer.compute_dtype, layer.weight.quant_state.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = dequantized(load(folder, torch.float32))
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in dequantized(model).items())


def test_what_a_model_wants_in_fp32_stays_in_fp32(bases: dict[str, Path], quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PhiForCausalLM

    monkeypatch.setattr(PhiForCausalLM, "_keep_in_fp32_modules_strict", {"final_layernorm"})
    model = load(quantize(bases["phi"], precision="float32"), torch.bfloat16)
    assert model.model.final_layernorm.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_an_adapter_learns_on_it_and_a_preview_leaves_it_alone(bases: dict[str, Path], quantize: Quantize) -> None:
    model = load(quantize(bases["phi"], "bfloat16"), torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    net = add_adapter(model, Adapter(rank=4), (), train_head_rows=False)
    row = {"input_ids": list(range(12)), "supervised": [False] + [True] * 11, "lengths": [12]}
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            summed_loss(net.eval(), collate([row], 0))
        summed_loss(net.train(), collate([row], 0)).backward()
    assert any(p.grad is not None and p.grad.any() for p in net.parameters())
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in net.named_parameters()}
    # as bytes, for some of those that are packed are NaN as numbers
    assert all(torch.equal(weight.view(torch.uint8), after[name].detach().view(torch.uint8)) for name, weight in before.items())


# --- what is in the folder


def test_the_folder_is_whole_and_as_published_beside_its_weights(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    config, published = read_json(folder / "config.json"), read_json(bases["phi"] / "config.json")
    assert config["hidden_act"] == published["hidden_act"] == "gelu_new"  # load_base sets another one, for training alone
    assert (folder / "generation_config.json").is_file()
    assert tokenizer_hash(load_tokenizer(Model(base=str(folder)))) == tokenizer_hash(load_tokenizer(Model(base=str(bases["phi"]))))
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 0.55 * (bases["phi"] / "model.safetensors").stat().st_size  # of a model that is half embeddings
    assert weights.stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777
    assert not list(folder.parent.glob(".*.tmp"))


def test_a_failure_leaves_nothing_behind(
    bases: dict[str, Path], quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        quantize(bases["phi"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "storage", "sentence"),
    [
        ({"quantization": "none"}, None, "nothing to quantise; add model.quantization=nf4 or int8"),
        ({"quantization": "int8"}, "bfloat16", "leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    bases: dict[str, Path], quantize: Quantize, section: dict[str, str], storage: str | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        quantize(bases["phi"], storage, **section)


def test_nothing_is_overwritten_or_quantised_twice(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    with pytest.raises(ValueError, match="is there already"):
        quantize(bases["phi"])
    with pytest.raises(ValueError, match=r"is quantised already \(nf4\)"):
        quantize(folder, name="again")


def test_memory_that_is_short_while_quantising_is_not_taken_for_something_else(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers swallows what goes wrong in quantising one weight, and raises a RuntimeError that does not say what it was."""
    counts = iter([0, 1])
    monkeypatch.setattr(models, "_times_memory_was_short", lambda device: next(counts))
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="does not fit into the memory of cpu"):
        load(bases["phi"])


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


# --- what does not fit is refused


@pytest.mark.parametrize(
    ("made", "wanted", "storage", "words"),
    [
        ({}, {"quantization": "int8"}, None, ["nf4 with double quantisation, packed in uint8", "int8 is wanted"]),
        ({}, {"double_quantization": False}, None, ["nf4 without double quantisation, packed in uint8 is wanted"]),
        ({"double_quantization": False}, {}, None, ["(nf4 without double", "nf4 with double quantisation, packed in uint8 is wanted"]),
        ({}, {}, torch.bfloat16, ["packed in uint8)", "packed in bfloat16 is wanted", "--storage bfloat16"]),
        ({"quantization": "int8"}, {}, None, ["(int8)", "nf4 with double quantisation", "model.quantization=nf4"]),
    ],
)
def test_another_quantisation_than_is_wanted_is_refused_with_what_to_do(
    bases: dict[str, Path], quantize: Quantize, made: dict[str, Any], wanted: dict[str, Any], storage: torch.dtype | None, words: list[str]
) -> None:
    folder = quantize(bases["phi"], **made)
    with pytest.raises(ValueError, match="is quantised already") as caught:
        load(folder, storage=storage, **wanted)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    command = shlex.split(said.partition("make another one: ")[2])
    assert command[:3] == ["python", "scripts/quantize_base.py", "RECIPE"]
    assert f"model.base={bases['phi']}" in command
    # and what the sentence says to do gives what was wanted
    section = {word.partition("=")[0].removeprefix("model."): word.partition("=")[2] for word in command if word.startswith("model.")}
    section["double_quantization"] = False if section.get("double_quantization") == "false" else None
    packed = command[command.index("--storage") + 1] if "--storage" in command else None
    script("quantize_base").run(Model(**section), Path(command[3]), packed, None)
    load(Path(command[3]), storage=storage, **wanted)


def test_unquantised_weights_are_not_found_in_a_quantised_base(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    with pytest.raises(ValueError, match=re.escape(f"give the base that it was made from, {bases['phi']}")):
        load(folder, quantization="none")
    (folder / RECORD).unlink()
    with pytest.raises(ValueError, match=r"give the base that it was made from$"):
        load(folder, quantization="none")


def test_a_base_quantised_by_another_method_is_refused(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    config = read_json(folder / "config.json")
    for change, name in (({"bnb_4bit_quant_type": "fp4"}, "fp4"), ({"load_in_4bit": False, "quant_method": "gptq"}, "gptq")):
        write_json(folder / "config.json", {**config, "quantization_config": {**config["quantization_config"], **change}})
        with pytest.raises(ValueError, match=rf"is quantised already \({name}\)"):
            load(folder)


def test_it_loads_without_its_record_too(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    (folder / RECORD).unlink()
    assert_the_same(load(folder), load(bases["phi"]), torch.float32)
    assert base_fingerprint(Model(base=str(folder))) != base_fingerprint(Model(base=str(bases["phi"])))


@pytest.mark.parametrize(
    "lost", ["fc1.weight", "fc1.weight.absmax", "fc1.weight.quant_state.bitsandbytes__nf4", "input_layernorm.weight", "fc1.bias"]
)
def test_weights_that_are_missing_or_left_over_are_refused(bases: dict[str, Path], quantize: Quantize, lost: str) -> None:
    folder = quantize(bases["phi"])
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("model.layers.1.") and name.endswith(lost))
    kept = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*layers\.1|are not whole"):
        load(folder)
    save_file({**weights, name: kept, "stray": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected keys: stray"):
        load(folder)


# --- the same base to a run and to an evaluation


def test_the_fingerprint_is_that_of_the_published_weights_however_they_are_packed(bases: dict[str, Path], quantize: Quantize) -> None:
    published = base_fingerprint(Model(base=str(bases["phi"])))
    folders = [quantize(bases["phi"]), quantize(bases["phi"], "bfloat16", name="packed"), quantize(bases["llama"], name="other")]
    assert [base_fingerprint(Model(base=str(f))) == published for f in folders] == [True, True, False]


def test_a_folder_whose_weights_have_changed_has_no_fingerprint(bases: dict[str, Path], quantize: Quantize) -> None:
    folder = quantize(bases["phi"])
    (folder / "tokenizer_config.json").write_text("{}")  # a person may change the template: it is no part of the weights
    base_fingerprint(Model(base=str(folder)))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"is damaged \(model.safetensors does not have the hash .* make it again"):
        base_fingerprint(Model(base=str(folder)))


def test_a_run_that_quantised_at_its_start_goes_on_with_the_folder_bit_for_bit(
    make_recipe: MakeRecipe, tiny_base: Path, quantize: Quantize, tmp_path: Path
) -> None:
    whole = train(prepared(make_recipe("train.max_steps=6")), f"output.dir={tmp_path / 'whole'}")
    recipe, run = make_recipe("train.max_steps=6"), f"output.dir={tmp_path / 'parts'}"
    train(recipe, run, "checkpoints.every_steps=3")
    for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "parts" / "final")
    folder = quantize(tiny_base)
    again = [f"model.base={folder}", f"data.prepared={tmp_path / 'again'}"]
    prepared(recipe, *again)
    parts = train(recipe, run, *again)
    ours, theirs = (column(metrics(folder), "loss") for folder in (whole, parts))
    assert ours == theirs
    assert len(ours) == 6


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(the recipe on the published base, a copy of that base to quantise, the report of the published one)."""
    folder = tmp_path_factory.mktemp("evaluated")
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    recipe = prepared(write_recipe(folder, base, oasst_file))
    return recipe, base, evaluate(recipe)


def evaluate(recipe: Path, *overrides: str) -> dict[str, Any]:
    try:
        script("evaluate").run(recipe, list(overrides))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return read_json(Path(load_recipe(recipe, overrides).output.dir) / "report-base.json")


def test_the_evaluation_finds_the_published_base_or_says_why_not(evaluated: tuple, quantize: Quantize, tmp_path: Path) -> None:
    recipe, base, published = evaluated
    folder = quantize(base)
    values = [f"model.base={folder}", f"data.prepared={tmp_path / 'prepared'}", f"output.dir={tmp_path / 'out'}"]
    prepared(recipe, *values)
    report = evaluate(recipe, *values)
    assert report["left_out"] == []
    assert report["formats"] == published["formats"]

    values_of = load_recipe(recipe, values).model
    weights = load_file(base / "model.safetensors")
    weights["lm_head.bias"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert unquantised_base(values_of)[1] == f"{folder} is quantised, and {base}, which it was made from, has changed since"
    (base / "model.safetensors").unlink()
    why = unquantised_base(values_of)[1]
    assert f"{folder} is quantised, and what it was made from is not at hand: cannot load the base model from folder {base}" in why
    shutil.rmtree(base)
    report = evaluate(recipe, *values)
    assert [left["column"] for left in report["left_out"]] == ["base_unquantised"]
    assert report["formats"]["oasst"] == {"base_quantised": published["formats"]["oasst"]["base_quantised"]}
    assert report["base"]["column"] == "base_quantised"
    why = report["left_out"][0]["why"]
    assert why.startswith(f"base, fp32: {folder} is quantised, and what it was made from is not at hand")
    assert f"{base} (neither a folder here nor reachable on the hub)" in why
    assert why in (tmp_path / "out" / "report-base.md").read_text()
    (folder / RECORD).unlink()
    assert unquantised_base(values_of)[1] == f"{folder} is quantised and does not say what it was made from"


def test_scores_are_kept_apart_by_what_was_quantised(bases: dict[str, Path], quantize: Quantize) -> None:
    """Weights that were rounded before they were quantised are not quite those that were not."""
    quantized_from = script("evaluate").quantized_from
    model = Model(base=str(quantize(bases["phi"], precision="bfloat16")))
    assert quantized_from(model, torch.float32) == quantized_from(model, torch.float16) == "bfloat16"
    at_load = Model(base=str(bases["phi"]))
    assert (quantized_from(at_load, torch.float32), quantized_from(at_load, torch.float16)) == ("float32", "float16")
    assert quantized_from(Model(base=str(bases["phi"]), quantization="none"), torch.float16) is None


def test_the_command_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, folder = make_recipe(), tmp_path / "bases" / "nf4"
    done = run_script("quantize_base.py", recipe, folder, "model.double_quantization=false", "--storage", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert f"use it with model.base={folder}" in done.stdout
    record = json.loads((folder / RECORD).read_text())
    assert (record["storage"], record["precision"], record["double_quantization"]) == ("bfloat16", "bfloat16", False)
    assert set(record["files"]) == {path.name for path in folder.iterdir()} - {RECORD}
    done = run_script("quantize_base.py", recipe, folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is there already" in done.stderr
