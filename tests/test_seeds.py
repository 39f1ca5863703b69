"""The published seeds run as they are written, their figures come out, and docs/seeds.md says what was measured."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import in_process
import pytest
from conftest import ROOT
from safetensors.torch import load_file
from tiny_models import tiny

from qlora_suite.adapter import coverage, linear_names
from qlora_suite.batches import Order
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import Excerpt
from qlora_suite.files import read_json
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected

FILES = sorted((ROOT / "recipes" / "seeds").glob("*.yaml"))
NAMES = [f"{seed}_{way}" for seed in ("000", "001", "003", "004") for way in ("corrected", "published")]


@pytest.fixture(scope="module")
def seeds() -> ModuleType:
    """benchmarks/seeds.py as a module."""
    spec = importlib.util.spec_from_file_location("seeds_benchmark", ROOT / "benchmarks" / "seeds.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(seeds: ModuleType) -> dict[str, Any]:
    return read_json(seeds.REPORT)


def recipe(name: str) -> Recipe:
    return load(ROOT / "recipes" / "seeds" / f"{name}.yaml")


# --- the files


def test_each_seed_has_two_files() -> None:
    assert [path.stem for path in FILES] == NAMES


def test_each_fault_stands_at_its_key() -> None:
    """A fault is named where it is made, in the published file alone."""
    found = {path.stem: re.findall(r"^ *(\w+): .*# fault", path.read_text(), re.MULTILINE) for path in FILES}
    assert found == {
        "000_published": [
            *("policy", "packing", "role_markers", "loss_on", "targets", "warmup_steps", "gradient_checkpointing", "every_steps"),
        ],
        "001_published": ["policy", "loss_on", "targets", "gradient_checkpointing"],
        "003_published": ["dev_share", "format", "loss_on", "schedule"],
        "004_published": ["dev_share", "max_length"],
        **{f"{seed}_corrected": [] for seed in ("000", "001", "003", "004")},
    }


@pytest.mark.parametrize("seed", ["000", "001", "003", "004"])
def test_the_corrected_recipe_keeps_what_was_no_fault(seed: str) -> None:
    published, corrected = recipe(f"{seed}_published"), recipe(f"{seed}_corrected")
    for keys in (("rank", "alpha", "dropout"), ("name", "learning_rate", "max_grad_norm", "weight_decay")):
        section = "adapter" if "rank" in keys else "optim"
        for key in keys:
            assert getattr(getattr(published, section), key) == getattr(getattr(corrected, section), key), key
    assert published.train.rows_per_step == corrected.train.rows_per_step
    assert published.chat.format == corrected.chat.format
    assert (published.chat.loss_on, corrected.chat.loss_on) == ("all", None)
    assert (published.data.packing, corrected.data.packing) == (False, True)
    assert corrected.evaluation.budget_tokens is not None
    assert not corrected.adapter.allow_partial


# --- every one runs


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_trains_on_the_embedded_model(name: str, tmp_path: Path) -> None:
    """Two steps in 4 bits with what the file says of evaluation and previews; the adapter is where the file's targets are."""
    path = ROOT / "recipes" / "seeds" / f"{name}.yaml"
    known = load(path)
    overrides = [
        f"model.base={ROOT / 'assets' / 'tiny_phi'}",
        f"data.source={ROOT / 'assets' / 'oasst1_en_validation.jsonl.gz'}",
        "data.split=by_hash",
        "data.max_examples=32",
        f"data.max_length={min(known.data.max_length, 192)}",
        f"data.prepared={tmp_path / 'prepared'}",
        "train.max_steps=2",
        "optim.warmup_steps=0",
        f"output.dir={tmp_path / 'run'}",
    ]
    overrides += ["previews.max_new_tokens=4"] if known.previews.prompts else []
    overrides += ["evaluation.budget_tokens=500"] if known.evaluation.every_steps else []
    in_process.prepared(path, *overrides)
    run = in_process.train(path, *overrides)
    assert read_json(run / "status.json")["state"] == "finished"
    losses = in_process.column(in_process.metrics(run), "loss")
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    evaluated = ["dev_loss" in record for record in in_process.lines(run / "metrics.jsonl")]
    assert any(evaluated) == (known.evaluation.every_steps is not None)
    weights = load_file(run / "final" / "adapter_model.safetensors")
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in weights}
    assert adapted == {
        "000_published": {"fc1", "fc2"},
        "001_published": {"q_proj", "k_proj", "v_proj", "dense"},
        "001_corrected": {"q_proj", "k_proj", "v_proj", "dense"},
    }.get(name, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"})


# --- the figures


def test_the_seeds_name_modules_that_phi_does_not_have() -> None:
    modules = linear_names(tiny())
    unmatched = {
        name: [target for target, found in coverage(modules, recipe(name).adapter.targets).matched.items() if not found] for name in NAMES
    }
    assert {name: found for name, found in unmatched.items() if found} == {
        "000_published": ["Wqkv"],
        "001_published": ["Wqkv", "out_proj"],
    }
    lines = [line.split() for line in coverage(modules, recipe("000_published").adapter.targets).table().splitlines()]
    assert ["self_attn.q_proj", "2", "-"] in lines
    assert ["mlp.fc2", "2", "fc2"] in lines


def test_what_001_named_is_refused(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "seeds" / "001_published.yaml"
    overrides = [
        f"model.base={ROOT / 'assets' / 'tiny_phi'}",
        f"data.source={ROOT / 'assets' / 'oasst1_en_validation.jsonl.gz'}",
        "data.split=by_hash",
        "data.max_examples=8",
        f"data.prepared={tmp_path / 'prepared'}",
        f"output.dir={tmp_path / 'run'}",
        "adapter.targets=[Wqkv, out_proj]",
    ]
    in_process.prepared(path, *overrides)
    with pytest.raises(ValueError, match=r"\['Wqkv', 'out_proj'\] match no linear module"):
        in_process.train(path, *overrides)


def test_the_numbers_of_parameters_on_phi_2(seeds: ModuleType) -> None:
    assert {name: seeds.shapes(recipe(name))["parameters"] for name in NAMES} == {
        "000_published": 26_214_400,
        "000_corrected": 47_185_920,
        "001_published": 41_943_040,
        "001_corrected": 41_943_040,
        "003_published": 94_371_840,
        "003_corrected": 94_371_840,
        "004_published": 47_185_920,
        "004_corrected": 47_185_920,
    }


@pytest.mark.parametrize(("name", "conversations", "steps"), [("000", 9_846, 1_231), ("003", 17_972, 700), ("004", 23_058, 1_442)])
def test_the_numbers_of_steps(seeds: ModuleType, name: str, conversations: int, steps: int) -> None:
    published = recipe(f"{name}_published")
    order = Order(0, [1] * conversations, published.train.rows_per_step, published.train.epochs, published.train.max_steps)
    assert order.num_steps == steps
    assert seeds.CONVERSATIONS[name] == conversations
    assert seeds.steps_of(published, conversations) == steps


def test_the_last_step_of_000_is_the_partial_one_that_its_trainer_dropped() -> None:
    order = Order(0, [1] * 9_846, 8, 1.0)
    assert [sum(row >= 0 for row in order.rows_for_step(step)) for step in (1_229, 1_230)] == [8, 6]


# --- the table


def test_no_run_is_trained_on_a_tree_of_the_common_set(seeds: ModuleType, tmp_path: Path) -> None:
    held_out, trained = {}, {}
    for name in NAMES:
        with selected(seeds.embedded(*name.split("_"), tmp_path)) as selection:
            held_out[name], trained[name] = ({c.group for c in selection.splits[split]} for split in ("validation", "train"))
    held_out = held_out["000_published"]
    assert len(held_out) == 44
    assert not held_out & set().union(*trained.values())
    assert len(set(map(frozenset, trained.values()))) == 1, "all runs learn from the same trees"


def test_later_answers_are_scored_with_and_without_their_history(seeds: ModuleType) -> None:
    turns = tuple(Turn(role, f"{role} {i}") for i, role in enumerate(["user", "assistant"] * 3))
    found = [Excerpt(Conversation("k", ("k",), "g", turns), 2)]
    with_history, without = seeds.later_answers(found)
    assert [[t.content for t in e.conversation.turns] for e in without] == [["user 2", "assistant 3"], ["user 4", "assistant 5"]]
    assert [len(e.conversation.turns) for e in with_history] == [4, 6]
    for e in (*with_history, *without):
        assert [t.learn for t in e.conversation.turns if t.role == "assistant"][-1]
        assert sum(t.learn for t in e.conversation.turns if t.role == "assistant") == 1
    assert [e.answers_before for e in with_history] == [2, 2]
    assert [e.answers_before for e in without] == [3, 4]


def test_the_page_holds_what_was_measured(seeds: ModuleType, report: dict[str, Any]) -> None:
    page = seeds.PAGE.read_text(encoding="utf-8")
    assert seeds.with_tables(page, report) == page, "run: python benchmarks/seeds.py --render"
    assert set(report["runs"]) == set(report["arithmetic"]) == set(NAMES)


def test_the_report_is_of_these_recipes(seeds: ModuleType, report: dict[str, Any], tmp_path: Path) -> None:
    """What needs no training comes out as it stands there; a recipe that was changed since has to be run again."""
    for name in NAMES:
        now = seeds.arithmetic(*name.split("_"), tmp_path)
        assert report["arithmetic"][name] == now, name
        assert report["runs"][name]["format"] == recipe(name).chat.format


def test_what_the_page_says_of_the_scores_is_what_was_measured(seeds: ModuleType, report: dict[str, Any]) -> None:
    page = seeds.PAGE.read_text(encoding="utf-8")
    said = page.partition("**What it shows.**")[2].partition("\n\n")[0]
    figures = re.findall(r"\d\.\d+", said)
    assert len(figures) >= 8
    assert [figure for figure in figures if figure not in seeds.tables(report)["scores"]] == []
    verdicts = {seed: report["runs"][f"{seed}_corrected"]["against_published"]["verdict"] for seed in seeds.SEEDS}
    assert verdicts == {"000": "better", "001": "better", "003": "not clearly different", "004": "better"}
    for seed in seeds.SEEDS:
        tokens = [report["runs"][f"{seed}_{way}"]["tokens_trained"] for way in seeds.WAYS]
        assert max(tokens) / min(tokens) < 1.15, "the page says: the same tokens, within 15 %"


def test_a_page_without_a_place_for_a_table_is_refused(seeds: ModuleType, report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no place for the part settings"):
        seeds.with_tables("# Seeds\n", report)


def test_every_recipe_is_linked_from_the_page(seeds: ModuleType) -> None:
    page = seeds.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"recipes/seeds/(\w+)\.yaml", page)) == set(NAMES)
