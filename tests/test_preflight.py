"""scripts/preflight.py: what would fail is red, on one page, before a queue slot is spent; and each check can be made to say so."""

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, MakeRecipe, run_script, write_recipe
from in_process import metrics, prepared, script, train

from qlora_suite import cards, grpo, module_table, preflight_checks, preflight_page
from qlora_suite.base_config import load_config
from qlora_suite.batches import Order
from qlora_suite.dataset import Rows, load_manifest
from qlora_suite.disk_space import need_of
from qlora_suite.files import read_json, write_json
from qlora_suite.memory_estimate import Component, Estimate, Limit, Step
from qlora_suite.module_table import Skeleton, Stored
from qlora_suite.preflight_checks import Finding, Place
from qlora_suite.recipe import Recipe, Speed
from qlora_suite.recipe_file import load

T4 = ROOT / "accelerate_configs" / "single_t4.yaml"
CPU = ROOT / "accelerate_configs" / "cpu.yaml"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """A recipe whose data is prepared, in a folder of its own."""
    return prepared(write_recipe(tmp_path_factory.mktemp("ready"), tiny_base, oasst_file, "previews.prompts=[]"))


@pytest.fixture(scope="module")
def finished(ready: Path) -> Path:
    """Its run, in a folder beside: eight steps, with a checkpoint in the middle."""
    overrides = ("train.max_steps=8", "checkpoints.every_steps=4", f"output.dir={ready.parent / 'finished'}")
    return train(ready, *overrides)


Look = Callable[..., tuple[bool, dict[str, Finding], dict[str, Any]]]


@pytest.fixture
def look(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """look("key=value", config=..., card_name=...) -> (nothing is red, findings by their name, the JSON): the page in this process."""

    def of(*overrides: str, recipe: Path = ready, config: Path = T4, card_name: str | None = "t4", **kwargs: Any):
        where = [] if any(o.startswith("output.dir=") for o in overrides) else [f"output.dir={tmp_path / 'run'}"]
        values = load(recipe, [*overrides, *where])
        good = script("preflight").preflight(values, config, card_name, json_file=tmp_path / "page.json", **kwargs)
        page = read_json(tmp_path / "page.json")
        found: dict[str, Finding] = {}
        for finding in (Finding(**f) for f in page["findings"]):
            found.setdefault(finding.what, finding)
        return good, found, page

    return of


def config_file(folder: Path, **values: Any) -> Path:
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# ---- the page ---------------------------------------------------------------------------------------------------------------------


def test_what_is_ready_is_green_and_everything_is_on_one_page(look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    good, found, page = look()
    assert good
    assert {f.level for f in found.values()} <= {"ok", "look"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= preflight_page.WIDTH
    assert page["memory"]["total"] == sum(c["bytes"] for c in page["memory"]["components"])
    assert {m["pattern"] for m in page["modules"]} >= {"model.embed_tokens", "model.layers.*.self_attn.q_proj", "lm_head"}
    wanted = {"engine", "hardware", "precision", "step", "base", "adapter", "template", "end token", "supervised", "rows", "cut"}
    assert found.keys() >= wanted | {"servable", "memory", "disk", "time", "output"}


def test_the_command_says_it_with_its_exit_code_and_leaves_the_output_folder_alone(ready: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    red = run_script("preflight.py", ready, "adapter.targets=[Wqkv]", f"output.dir={run}", "--config", T4, "--card", "t4")
    assert red.returncode == 1, red.stderr
    assert "FAIL adapter" in red.stdout
    assert "Tesla T4" in red.stdout
    assert "1 thing will fail" in red.stdout
    assert not run.exists()


def test_hostile_names_are_shown_as_they_are(look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    look("output.dir='/nowhere/[bold]x[/bold]'", "model.base='[red]none[/red]'")
    assert "[red]none[/red]" in capsys.readouterr().out


# ---- where it runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "processes", "override", "what", "sentence"),
    [
        ({"distributed_type": "NO"}, 2, "seed=0", "config", "runs one process"),
        ({"nothing": 1}, None, "seed=0", "config", "no accelerate config"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}, "num_processes": 2}, None, "seed=0", "config", "FSDP1"),
        ({"distributed_type": "MEGATRON_LM"}, None, "seed=0", "engine", "no engine here does"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "gradient_accumulation_steps": 4}, None, "seed=0", "engine", "accumul"),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 1}},
            None,
            "seed=0",
            "engine",
            "zero_stage",
        ),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"}},
            *(None, "seed=0", "engine", "offload_optimizer_device"),
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
            *(None, "seed=0", "engine", "fsdp_offload_params"),
        ),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {}},
            None,
            "optim.name=adamw_8bit",
            "engine",
            "adamw_8bit",
        ),
        ({"distributed_type": "MULTI_GPU"}, 3, "seed=0", "step", "cannot be shared out"),
        ({"distributed_type": "NO", "mixed_precision": "bf16"}, None, "seed=0", "precision", "no bf16 units"),
        ({"distributed_type": "NO", "mixed_precision": "fp8"}, None, "seed=0", "precision", "fp8 is not supported"),
        ({"distributed_type": "NO"}, None, "tracking.trackers=[clearml]", "trackers", "clearml not installed"),
    ],
)
def test_what_the_launch_would_refuse_is_red(
    look: Look, tmp_path: Path, config: dict[str, Any], processes: int | None, override: str, what: str, sentence: str
) -> None:
    good, found, _ = look(override, config=config_file(tmp_path, **config), processes=processes)
    assert not good
    assert found[what].level == "fail"
    assert sentence in found[what].text


def test_a_config_that_is_not_there_is_red(look: Look, tmp_path: Path) -> None:
    good, found, _ = look(config=tmp_path / "none.yaml")
    assert not good
    assert "there is no accelerate config" in found["config"].text


def test_precision_follows_the_card(look: Look, tmp_path: Path) -> None:
    plain = config_file(tmp_path, distributed_type="NO")
    assert "float16" in look(config=plain, card_name="v100")[1]["precision"].text
    assert "bfloat16" in look(config=plain, card_name="a100")[1]["precision"].text
    assert look(card_name="a100")[1]["precision"].level == "look"  # the config says fp16
    assert "float32" in look(config=CPU, card_name=None)[1]["precision"].text


def test_fewer_gpus_than_processes_are_red_on_the_machine_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    where = Place({"distributed_type": "MULTI_GPU"}, "DDP", 4, cpu=False)
    assert preflight_checks.gpus_finding(where, cards.named("a100"), named=False).level == "fail"
    assert preflight_checks.gpus_finding(where, cards.named("a100"), named=True).level == "ok"


def test_a_card_for_a_run_on_the_cpu_is_a_mistake(look: Look) -> None:
    with pytest.raises(ValueError, match="no effect on a run on the CPU"):
        look(config=CPU)


def test_no_card_is_said_and_no_rate_is_invented(look: Look) -> None:
    _, found, page = look(card_name=None)
    assert found["hardware"].level == "look"
    assert "memory" not in found
    assert page["memory"]["total"] > 0
    assert "no rate is known" in found["time"].text


def test_deepspeed_wants_itself_and_on_cpus_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = (Place({}, "DeepSpeed ZeRO-2", 2, cpu=on_cpu) for on_cpu in (False, True))
    monkeypatch.setattr(preflight_checks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight_checks.shutil, "which", lambda tool: None)
    assert preflight_checks.compiler_finding(gpu).level == "ok"
    assert preflight_checks.compiler_finding(cpu).level == "fail"
    monkeypatch.setattr(preflight_checks.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert preflight_checks.compiler_finding(cpu).level == "ok"
    monkeypatch.setattr(preflight_checks.importlib.util, "find_spec", lambda name: None)
    assert preflight_checks.compiler_finding(gpu).level == "fail"
    assert preflight_checks.compiler_finding(Place({}, "DDP", 2, cpu=False)) is None


# ---- the base and the adapter -------------------------------------------------------------------------------------------------------


def test_a_hub_base_that_is_not_in_the_cache_is_red_with_the_command_that_fetches_it(look: Look) -> None:
    good, found, _ = look("model.base=nobody/nothing")
    assert not good
    assert found["base"].level == "fail"
    assert "prefetch.sh" in found["base"].remedy


def test_a_base_without_its_weights_is_red_and_still_estimated(look: Look, tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # a copy that was cut short
    assert "is damaged" in look(f"model.base={tmp_path / 'base'}")[1]["base"].text
    weights.unlink()
    good, found, page = look(f"model.base={tmp_path / 'base'}")
    assert not good
    assert "not all here" in found["base"].text
    assert page["memory"]["total"] > 0


def test_a_base_that_is_quantised_otherwise_is_red(look: Look, tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    config = read_json(tmp_path / "base" / "config.json")
    write_json(tmp_path / "base" / "config.json", {**config, "quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}})
    good, found, _ = look(f"model.base={tmp_path / 'base'}")
    assert not good
    assert "is quantised already" in found["base"].text


def test_targets_that_match_nothing_are_red_and_partly_matching_ones_yellow(look: Look) -> None:
    good, found, _ = look("adapter.targets=[Wqkv]")
    assert not good
    assert "match no linear module" in found["adapter"].text
    good, found, page = look("adapter.targets=[fc1,Wqkv]", "adapter.allow_partial=true")
    assert good
    assert found["adapter"].level == "look"
    assert "Wqkv match nothing" in found["adapter"].text
    assert [m["pattern"] for m in page["modules"] if m["adapted"]] == ["model.embed_tokens", "model.layers.*.mlp.fc1"]
    assert look("adapter.targets=[q_proj]")[1]["adapter"].level == "look"


# ---- the data -----------------------------------------------------------------------------------------------------------------------


def test_data_that_is_missing_or_stale_is_red_with_the_command_that_prepares_it(look: Look, tmp_path: Path) -> None:
    for override in (f"data.prepared={tmp_path / 'none'}", "data.max_length=128"):
        good, found, page = look(override)
        assert not good
        assert found["data"].level == "fail"
        assert "scripts/prepare_data.py" in found["data"].remedy
        assert page["memory"]["total"] > 0  # of max_length


def changed(recipe: Recipe, **values: Any) -> tuple[dict[str, Any], Rows, Rows]:
    """(manifest, rows, dev) of the prepared data, with some counts of its manifest changed."""
    folder = Path(recipe.data.prepared)
    manifest = json.loads(json.dumps(load_manifest(recipe)))
    manifest["counts"]["train"].update({k: v for k, v in values.items() if k in manifest["counts"]["train"]})
    manifest.update({k: v for k, v in values.items() if k in manifest})
    return manifest, Rows(folder / "train.arrow"), Rows(folder / "dev.arrow")


def test_what_the_data_would_not_teach_is_said(ready: Path) -> None:
    recipe = load(ready)
    config = load_config(recipe.model)

    def found(recipe: Recipe = recipe, rows: Rows | None = None, **values: Any) -> dict[str, Finding]:
        manifest, real, dev = changed(recipe, **values)
        return {f.what: f for f in preflight_checks.data_findings(recipe, manifest, rows or real, dev, config)}

    assert {what for what, f in found().items() if f.level != "ok"} <= {"end token", "cut"}  # the tests' rows are short
    assert found(chat_template={"checked": 10, "agreed": 0})["template"].level == "fail"
    assert found(chat_template={"checked": 10, "agreed": 9})["template"].level == "look"
    assert found(cut_conversations=10**6)["cut"].level == "look"
    assert found(padding_share=0.5)["rows"].level == "look"
    config.max_position_embeddings = 64
    assert "made for 64" in found()["rows"].text

    class Unlearnt(Rows):
        """The same rows, of which nothing is learnt."""

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.learnt, self.num_supervised = self.num_supervised, self.num_supervised * 0

        def __getitem__(self, row: int) -> dict[str, Any]:
            self.num_supervised = self.learnt  # with which a row is compared as it is read
            found = super().__getitem__(row)
            self.num_supervised = self.learnt * 0
            return {**found, "supervised": found["supervised"] & False}

    nothing = found(rows=Unlearnt(Path(recipe.data.prepared) / "train.arrow"))
    assert nothing["supervised"].level == "fail"
    assert nothing["end token"].level == "fail"


class WithoutEnds(Rows):
    """The same rows, in which the end token is no part of what is learnt."""

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = super().__getitem__(row)
        return {**found, "supervised": found["supervised"] & (found["input_ids"] != 0)}


def test_an_end_token_that_is_never_learnt_is_red(ready: Path) -> None:
    recipe = load(ready)
    manifest, rows, _ = changed(recipe)
    assert preflight_checks._ends(recipe, manifest, rows).level != "fail"
    without = WithoutEnds(Path(recipe.data.prepared) / "train.arrow")
    assert "never stop" in preflight_checks._ends(recipe, manifest, without).text


def test_an_evaluation_without_a_development_split_is_red(ready: Path, tmp_path: Path) -> None:
    recipe = load(ready, ["evaluation.every_steps=5"])
    manifest, rows, _ = changed(recipe)

    class Empty(Rows):
        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return 0

    found = preflight_checks.data_findings(recipe, manifest, rows, Empty(), load_config(recipe.model))
    assert next(f for f in found if f.what == "development").level == "fail"


def test_remarks_of_the_start_stand_on_the_page(look: Look) -> None:
    assert "warm-up" in look("optim.warmup_steps=1000", "train.max_steps=5")[1]["note"].text


# ---- answers that are sampled -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """A recipe of GRPO whose data is prepared."""
    folder = tmp_path_factory.mktemp("asks")
    own = folder / "own.py"
    own.write_text("def letters(answer):\n    return len(set(answer.text)) % 7 / 7\n")  # a random model's answers differ in it
    grpo = f"grpo={{rewards: [{{path: '{own}:letters'}}], group_size: 4, max_new_tokens: 12}}"
    ours = ("data.packing=false", "chat.role_markers=text", "previews.prompts=[]", "train={rows_per_step: 4, max_steps: 8}", grpo)
    return prepared(write_recipe(folder, tiny_base, oasst_file, *ours))


@pytest.fixture(scope="module")
def has_asked(asks: Path) -> Path:
    """Its run."""
    return train(asks, f"output.dir={asks.parent / 'run'}", by="train_grpo")


@pytest.mark.parametrize(
    "overrides", [(), ("grpo.group_size=6", "grpo.max_new_tokens=200"), ("train.rows_per_step=8", "grpo.temperature=0.7")]
)
def test_memory_of_grpo_is_of_the_answers_that_train_grpo_tries(
    look: Look, asks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    tried, estimated = [], []
    suggested = script("preflight").memory_estimate.suggested

    def chooses(_: Any, answers: int, longest: int, *rest: Any) -> Any:
        tried.append((answers, longest))
        raise KeyboardInterrupt

    def suggests(skeleton: Any, parts: Any, recipe: Any, answers: int, longest: int, *rest: Any) -> Any:
        estimated.append((answers, longest))
        return suggested(skeleton, parts, recipe, answers, longest, *rest)

    monkeypatch.setattr(script("train_grpo"), "choose", chooses)
    monkeypatch.setattr(script("preflight").memory_estimate, "suggested", suggests)
    with pytest.raises(KeyboardInterrupt):
        train(asks, *overrides, f"output.dir={tmp_path / 'tried'}", by="train_grpo")
    temperatures, log_probabilities = set(), grpo.log_probabilities
    monkeypatch.setattr(grpo, "log_probabilities", lambda *given: temperatures.add(given[-1]) or log_probabilities(*given))
    good, found, page = look(*overrides, recipe=asks, config=CPU, card_name=None)
    assert good
    assert estimated == tried
    assert temperatures == {load(asks, overrides).grpo.temperature}
    answers, longest = tried[0]
    assert page["sampling"]["answers"] == answers
    assert f"{answers} answers of up to {longest} tokens at once" in found["sampling"].text
    assert found.keys().isdisjoint({"supervised", "end token", "cut"}), "of answers that nobody learns"


def test_the_reference_is_a_copy_of_what_is_trained_and_there_is_none_without_a_beta(look: Look, asks: Path, has_asked: Path) -> None:
    with_beta, without = (look(f"grpo.beta={beta}", recipe=asks, config=CPU, card_name=None)[2]["memory"] for beta in (0.04, 0))
    parts = {part["name"]: part["bytes"] for part in with_beta["components"]}
    assert parts["reference"] == 4 * read_json(has_asked / "run.json")["parameters"]["trainable"]
    assert "reference" not in {part["name"] for part in without["components"]}
    assert with_beta["total"] - without["total"] == parts["reference"]


def test_a_step_of_grpo_is_measured_where_the_hardware_is(look: Look, asks: Path) -> None:
    page = look(recipe=asks, config=CPU, card_name=None, measure=True)[2]
    guess = look(recipe=asks, config=CPU, card_name=None)[2]
    assert (page["how"], guess["how"]) == ("measured", "estimated")
    assert page["memory"]["limit"]["tokens"] == guess["memory"]["limit"]["tokens"]
    assert guess["memory"]["total"] == pytest.approx(page["memory"]["total"], rel=0.05)


def test_fewer_answers_are_sampled_at_once_on_a_small_card_and_none_on_one_that_is_too_small(look: Look, asks: Path) -> None:
    whole = look(recipe=asks)[2]["sampling"]
    more = ("grpo.max_new_tokens=200", "grpo.group_size=32")
    all_of_them = look(*more, recipe=asks)[2]["sampling"]
    assert (whole["answers"], all_of_them["answers"]) == (16, 128)
    small = f"{(whole['total'] + all_of_them['total']) / 2 / 2**30}GiB"
    _, found, page = look(*more, recipe=asks, card_name=small)
    assert page["sampling"]["answers"] in (64, 32)
    assert page["sampling"]["total"] <= 0.92 * page["memory_of_card"]
    assert found["sampling"].level == "look"
    assert f"{page['sampling']['answers']} of 128 answers" in found["sampling"].text
    good, found, page = look(recipe=asks, card_name="0.0005GiB")
    assert not good
    assert (found["sampling"].level, page["sampling"]["answers"]) == ("fail", 1)
    assert "grpo.max_new_tokens=6" in found["sampling"].remedy
    assert "grpo.max_new_tokens=6" in found["memory"].remedy


def test_hours_of_grpo_come_from_a_run_of_it(look: Look, asks: Path, has_asked: Path, finished: Path, ready: Path) -> None:
    here = {"recipe": asks, "config": CPU, "card_name": None}
    assert "8 steps x 16 answers of up to" in look(**here)[1]["time"].text
    assert "no rate is known" in look(**here)[1]["time"].text
    found = look(**here, rate_of=has_asked, time_limit="4:00:00")[1]
    assert (found["time"].level, found["time limit"].level) == ("ok", "ok")
    estimated = int(re.search(r"tokens = ([\d,]+)", found["time"].text)[1].replace(",", ""))
    assert estimated == pytest.approx(metrics(has_asked)[-1]["tokens"], rel=0.1)
    assert look(**here, rate_of=has_asked)[1]["time"].text.startswith("1 min for 8 steps x 16 answers")
    alone = look(**here, rate_of=finished, time_limit="4:00:00")[1]  # it has learnt answers that were there
    assert "what sampling takes is not known" in alone["time"].text
    assert (alone["time"].level, alone["time limit"].level) == ("look", "look")
    assert "sampled its answers" in look(recipe=ready, config=CPU, card_name=None, rate_of=has_asked)[1]["time"].remedy


def test_training_passes_of_grpo_are_counted(asks: Path) -> None:
    """Two updates, and the reference's forward pass: a half of a step without recomputing, a third of one with."""
    recipe = load(asks, ["grpo.updates=2", "train.max_steps=100", "train.epochs=1000"])
    order = Order(0, [50] * 40, 4, 1000.0, 100)
    where = Place({}, "one process", 1, cpu=True)
    rate = preflight_checks.Rate(62 * 16 * 100 / 3600, "x", "CPU")  # an hour for one pass over all answers
    for beta, checkpointing, hours in ((0.0, 0.0, "2 h 00 min"), (0.04, 0.0, "2 h 30 min"), (0.04, 1.0, "2 h 20 min")):
        config = recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update={"beta": beta})})
        seconds, finding = preflight_checks.sampled_time_finding(config, order, rate, where, None, checkpointing)
        assert seconds is None
        assert f"up to {hours} for the training passes of 100 steps x 16 answers" in finding.text


def test_prompts_and_micro_batches_that_train_grpo_refuses_are_red(look: Look, asks: Path) -> None:
    assert look("train.micro_batch=16", recipe=asks)[1]["step"].text == "4 prompts x 4 answers = 16"
    good, found, _ = look("train.micro_batch=17", recipe=asks)
    assert (good, found["step"].level) == (False, "fail")
    good, found, page = look("grpo.max_new_tokens=255", recipe=asks)
    assert (good, found["prompts"].level) == (False, "fail")
    assert "lower grpo.max_new_tokens" in found["prompts"].remedy
    assert page["memory"]["total"] > 0
    assert look("grpo.max_new_tokens=200", recipe=asks)[1]["prompts"].level == "look", "many have no room for such an answer"
    assert look(recipe=asks)[1]["prompts"].level == "ok"


# ---- memory, time, disk --------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_red_with_what_to_change(look: Look) -> None:
    good, found, _ = look(card_name="0.001GiB")
    assert not good
    assert found["memory"].level == "fail"
    assert "data.max_length" in found["memory"].remedy
    _, found, _ = look("train.gradient_checkpointing=false", "model.quantization=none", card_name="0.001GiB")
    assert "train.gradient_checkpointing=auto" in found["memory"].remedy


def test_memory_that_is_nearly_used_up_is_yellow(ready: Path) -> None:
    total = 100 * 2**20
    estimate = Estimate((Component("all", total, ""),), Step(0, 0, 0), Limit(1, 100), False)
    levels = [preflight_checks.memory_finding(estimate, int(total / share), False, load(ready)).level for share in (0.95, 0.915, 0.5)]
    assert levels == ["fail", "look", "ok"]


def test_the_step_is_measured_where_the_hardware_is(look: Look) -> None:
    good, found, page = look(config=CPU, card_name=None, measure=True)
    assert good
    assert page["how"] == "measured"
    assert "measured" in found["memory"].text
    guess = look(config=CPU, card_name=None)[2]
    assert guess["how"] == "estimated"
    assert guess["memory"]["step"]["activations"] == pytest.approx(page["memory"]["step"]["activations"], rel=0.02)
    assert guess["memory"]["total"] == pytest.approx(page["memory"]["total"], rel=0.05)
    assert "no effect" in look(measure=True)[1]["measure"].text  # on a card that is not here


def test_hours_come_from_an_earlier_run_and_other_hardware_is_said(look: Look, finished: Path, ready: Path) -> None:
    assert "no rate is known" in look()[1]["time"].text  # the table is of models that keep a card busy
    other = look(rate_of=finished)[1]["time"]
    assert other.level == "look"
    assert str(finished) in other.text
    own = look(rate_of=finished, config=CPU, card_name=None)[1]["time"]
    assert own.level == "ok"
    found = look("train.max_steps=8", "checkpoints.every_steps=4", f"output.dir={finished}", config=CPU, card_name=None)[1]["time"]
    assert str(finished) in found.text  # of the run in output.dir, without being asked
    assert "no rate is known" in look("train.max_steps=8", f"output.dir={finished}")[1]["time"].text  # but not for a T4
    with pytest.raises(ValueError, match="has no rate"):
        look(rate_of=ready.parent)


def test_a_tabled_rate_is_of_models_of_its_size_and_names_its_source() -> None:
    def skeleton(width: int) -> Skeleton:
        trained = {"layers.0.lora_A.default.weight": (16, width)}
        weights = (Stored("layers.0.fc1", (width, width), "nf4", 0),)
        return Skeleton(torch.nn.Module(), None, weights, 0, trained, torch.float16, Speed())

    kept, recomputed = (preflight_checks.tabled_rate(skeleton(51_200), cards.named("t4"), on) for on in (False, True))
    assert "notebook" in kept.source
    assert kept.tokens == pytest.approx(10.6e12 / (4 * 51_200**2), rel=0.01)
    assert recomputed.tokens == pytest.approx(kept.tokens * 4 / 6, rel=0.01)
    assert preflight_checks.tabled_rate(skeleton(1000), cards.named("t4"), False) is None
    assert preflight_checks.tabled_rate(skeleton(51_200), cards.named("h100"), False) is None


@pytest.mark.parametrize(
    ("device", "card", "same"),
    [
        ("Tesla T4", "t4", True),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", True),
        ("NVIDIA A100-SXM4-40GB", "a100-80gb", False),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("Tesla T4", "l4", False),
        ("CPU (2 threads)", "t4", False),
    ],
)
def test_a_rate_is_of_the_card_that_made_it(device: str, card: str, same: bool) -> None:
    where = Place({}, "one process", 1, cpu=False)
    assert preflight_checks.Rate(1.0, "x", device).is_of(where, cards.named(card)) is same


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("4:00:00", 14400), ("2-12", 216000), ("1-00:30", 88200), ("1-00:00:10", 86410)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert preflight_checks.limit_seconds(text) == seconds


def test_a_jobs_limit_is_enough_or_takes_requeues_or_is_hopeless(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight_checks.limit_finding(3600, 7200).level == "ok"
    twice = preflight_checks.limit_finding(3 * 3600, 2 * 3600)
    assert twice.level == "look"
    assert "2 jobs" in twice.text
    assert preflight_checks.limit_finding(None, 7200).level == "look"
    good, found, _ = look(time_limit="5")
    assert not good
    assert found["time limit"].level == "fail"
    assert preflight_checks.limit_finding(3600, 300).level == "fail"
    with pytest.raises(ValueError, match="is no time"):
        preflight_checks.limit_seconds("soon")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert preflight_checks.slurm_limit() == pytest.approx(1000, abs=5)
    assert "time limit" in look()[1]


def test_a_disk_that_is_too_small_is_red(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(preflight_checks.shutil, "disk_usage", lambda _: usage._replace(free=10 * 2**20))
    good, found, _ = look()
    assert not good
    assert found["disk"].level == "fail"


def test_the_disk_that_is_asked_for_is_the_disk_that_a_run_takes(ready: Path, finished: Path) -> None:
    recipe = load(ready)
    skeleton = module_table.build(recipe, load_manifest(recipe)["role_markers"], torch.float32)
    for folder in (finished / "checkpoints").iterdir():
        taken = sum(path.stat().st_size for path in folder.iterdir())
        assert need_of(recipe, skeleton.num_trained).one == pytest.approx(taken, rel=0.15)


# ---- the output folder ----------------------------------------------------------------------------------------------------------------


def test_the_output_folder_is_new_foreign_in_use_or_this_runs(look: Look, tmp_path: Path, finished: Path) -> None:
    assert "is new" in look()[1]["output"].text
    (tmp_path / "file").write_text("x")
    assert look(f"output.dir={tmp_path / 'file' / 'run'}")[1]["output"].level == "fail"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    assert "of no run" in look(f"output.dir={tmp_path / 'foreign'}")[1]["output"].text

    shutil.copytree(finished, tmp_path / "again")
    again = ("train.max_steps=8", "checkpoints.every_steps=4", f"output.dir={tmp_path / 'again'}")
    assert "is finished" in look(*again)[1]["output"].text
    status = read_json(tmp_path / "again" / "status.json")
    write_json(tmp_path / "again" / "status.json", {**status, "state": "stopped"})
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "again").rglob("*"))
    assert "goes on from step 8" in look(*again)[1]["output"].text
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "again").rglob("*")) == before

    good, found, _ = look(*again, "optim.learning_rate=0.5")
    assert not good
    assert "optim.learning_rate: was" in found["output"].text
    with (tmp_path / "again" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        good, found, _ = look(*again)
        assert not good
        assert "is writing to" in found["output"].text
    for path in (tmp_path / "again" / "checkpoints").glob("*/adapter_model.safetensors"):
        path.write_bytes(b"damaged")
    assert "every checkpoint" in look(*again)[1]["output"].text
    assert not list((tmp_path / "again" / "checkpoints").glob("*.corrupt"))  # setting aside is for train.py


def test_a_folder_that_may_not_be_written_is_red(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_checks.os, "access", lambda *_: False)  # root may write everywhere
    good, found, _ = look()
    assert not good
    assert "may not be written" in found["output"].text


# ---- cards ----------------------------------------------------------------------------------------------------------------------------


def test_cards_are_found_by_the_names_that_people_use() -> None:
    assert cards.named("T4") is cards.named("Tesla T4") is cards.named("nvidia-t4")
    assert cards.named("A100") is cards.named("a100-80gb")
    assert cards.named("24GiB").memory == 24 * 2**30
    assert cards.named("t4").dtype == torch.float16
    assert all(card.memory < 150 * 2**30 and bool(card.teraflops) == bool(card.source) for card in map(cards.named, cards.KNOWN))
    with pytest.raises(ValueError, match="known: t4"):
        cards.named("voodoo2")


def test_a_remedy_stands_below_each_line_that_is_not_green(capsys: pytest.CaptureFixture[str]) -> None:
    found = Finding("fail", "x", "it [red]breaks[/red]", "mend it")
    preflight_page.show_findings(preflight_page.page_console(), [found, replace(found, level="ok")])
    out = capsys.readouterr().out
    assert out.count("-> mend it") == 1
    assert "[red]breaks[/red]" in out
    assert "red: 1 thing will fail" in out


def test_what_a_run_starts_from_is_looked_at(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Before it waits in a queue to fail on it."""
    recipe = load(prepared(make_recipe()), [f"adapter.start_from={tmp_path / 'nothing'}"])
    manifest = {"role_markers": {"token_ids": []}}
    found = preflight_checks.caught("start", lambda: preflight_checks.start_finding(recipe, manifest))
    assert found.level == "fail"
    assert "adapter.start_from: there is no folder" in found.text
    assert preflight_checks.start_finding(load(make_recipe()), manifest) is None


def test_rewards_are_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def mine(answer):\n    return 1.0\n")
    grpo = f"grpo={{rewards: [{{path: '{own}:mine'}}], max_new_tokens: 16}}"
    recipe = load(make_recipe("data.packing=false", grpo))
    assert f"runs {own}" in preflight_checks.rewards_finding(recipe).text
    own.write_text("def other(answer):\n    return 1.0\n")
    assert "has no function mine" in preflight_checks.caught("rewards", lambda: preflight_checks.rewards_finding(recipe)).text
    assert preflight_checks.rewards_finding(load(make_recipe())) is None
