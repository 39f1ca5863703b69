"""A recipe is typed, frozen and strict, and says everything that is wrong with it at once."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from pydantic import ValidationError

from qlora_suite.recipe import Recipe, curve_keys, flatten
from qlora_suite.recipe_file import FOREIGN, from_dict, load, to_yaml

MINIMAL = """\
model: {base: base}
data: {source: data.jsonl, prepared: prepared}
optim: {learning_rate: 1e-4}
train: {rows_per_step: 8}
output: {dir: run}
"""


PAIRS = ("data.policy=preference_pairs", "data.packing=false", "dpo={}")


def _words(text: str) -> list[str]:
    return text.split()


# Every option there is. One that is added, renamed or moved to the other list is so on purpose.
CURVE = _words("""
    seed
    model.base model.revision model.quantization model.double_quantization model.random_init
    data.source data.revision data.validation_source data.split data.validation_share data.dev_share data.policy
    data.form data.fields data.roles data.same_role data.tool_turns data.learn_after data.learn_until data.weight data.sets
    data.replies.min_words data.replies.max_words data.replies.weights
    data.filters.languages data.filters.drop_deleted data.filters.drop_synthetic data.filters.drop_failed_review
    data.filters.min_chars data.filters.max_chars data.pairs
    data.max_examples data.max_length data.too_long data.packing
    chat.format chat.role_markers chat.system_prompt chat.template_arguments chat.rewritten_history chat.loss_on chat.escape_markers
    adapter.rank adapter.alpha adapter.dropout adapter.start_from adapter.targets adapter.rslora adapter.dora adapter.neftune_noise_alpha
    adapter.init adapter.allow_partial
    optim.name optim.learning_rate optim.schedule optim.warmup_steps optim.min_learning_rate_ratio optim.weight_decay
    optim.betas optim.eps optim.max_grad_norm optim.spike_ratio optim.on_spike
    train.rows_per_step train.epochs train.max_steps dpo grpo
""")
FREE = _words("""
    data.prepared
    train.micro_batch train.gradient_checkpointing train.max_skipped_steps
    speed.attention speed.head speed.lora speed.gelu speed.dequantize_once speed.compile
    stop.after_minutes stop.hung_after_minutes
    evaluation.every_steps evaluation.budget_tokens evaluation.patience evaluation.bootstrap_samples evaluation.base_formats
    previews.prompts previews.every_steps previews.max_new_tokens
    checkpoints.every_steps checkpoints.every_minutes checkpoints.keep
    tracking.trackers tracking.project
    output.dir output.mirror output.final_dtype
""")


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_option_list_is_frozen(minimal: Path) -> None:
    recipe = load(minimal)
    assert sorted(flatten(recipe)) == sorted(CURVE + FREE)
    assert sorted(curve_keys(recipe)) == sorted(CURVE)


def test_curve_keys_of_sections_that_are_a_word_or_null(minimal: Path) -> None:
    keys = curve_keys(load(minimal, ["adapter=none", "model.quantization=none", "data.filters=null"]))
    assert (keys["adapter"], keys["data.filters"]) == ("none", None)
    keys = curve_keys(load(minimal, [*PAIRS, "data.pairs.choose=adjacent"]))
    assert {key: keys[key] for key in keys if key.startswith(("dpo", "data.pairs"))} == {
        "dpo.beta": 0.1,
        "dpo.length_normalized": False,
        "data.pairs.choose": "adjacent",
        "data.pairs.margin": 1,
        "data.pairs.within": 1,
        "data.pairs.shorter": 0.8,
    }


def test_every_complaint_comes_at_once_with_its_key(minimal: Path) -> None:
    wrong = ["modle.base=x", "adapter.rnk=4", "optim.learning_rate=fast", "train.rows_per_step=0", "data.split=some", "output=null"]
    with pytest.raises(ValueError, match="has 6 problems") as caught:
        load(minimal, wrong)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().partition(":")[0] for line in lines] == sorted(
        ["modle", "adapter.rnk", "optim.learning_rate", "train.rows_per_step", "data.split", "output"]
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("modle.base=x", "modle: unknown key; did you mean model?"),
        ("adapter.rnk=4", "adapter.rnk: unknown key; did you mean adapter.rank?"),
        ("optim.zzz=1", "optim.zzz: unknown key; known here: name, learning_rate, schedule"),
        ("data.filters.language=[en]", "data.filters.language: unknown key; did you mean data.filters.languages?"),
        ("optim.learnin_rate=1", "optim.learnin_rate: unknown key; did you mean optim.learning_rate?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(minimal: Path, override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="has 1 problem:") as caught:
        load(minimal, [override])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.device_map=auto", "model.device_map: unknown key; the base goes whole to each process's device.*fsdp.yaml"),
        ("train.bf16=true", "train.bf16: unknown key; it stands in the accelerate config"),
        ("lora_r=16", "lora_r: unknown key; here it is adapter.rank"),
    ],
)
def test_a_key_of_another_suite_is_answered_with_where_it_lives_here(minimal: Path, override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(minimal, [override])


def test_an_accelerate_config_is_no_recipe() -> None:
    with pytest.raises(ValueError, match=r"ddp\.yaml is an accelerate config, not a recipe"):
        load(ROOT / "accelerate_configs" / "ddp.yaml")


def test_no_key_of_ours_is_called_foreign() -> None:
    assert not FOREIGN.keys() & {part for key in CURVE + FREE for part in key.split(".")}


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="has 3 problems") as caught:
        from_dict({"model": {}, "data": {"source": "s", "prepared": "p"}, "output": {"dir": "o"}})
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == ["model.base: missing", "optim: missing", "train: missing"]


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5e-3", 5e-4), ("+2e-4", 2e-4), ("1.0e-4", 1e-4), ("1", 1.0)]
)
def test_a_number_is_a_number_in_the_file_and_on_the_command_line(minimal: Path, written: str, value: float) -> None:
    assert load(minimal, [f"optim.learning_rate={written}"]).optim.learning_rate == value
    minimal.write_text(MINIMAL.replace("1e-4", written))
    assert load(minimal).optim.learning_rate == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.learning_rate='1e-4'", 'optim.learning_rate: input should be a valid number (found "1e-4")'),
        ("optim.learning_rate=.inf", "optim.learning_rate: input should be a finite number"),
        ("optim.learning_rate=.nan", "optim.learning_rate: input should be a finite number"),
        ("optim.learning_rate=0", "optim.learning_rate: input should be greater than 0 (found 0)"),
        ("optim.betas=[2, 0.9]", "optim.betas.0: input should be less than 1 (found 2)"),
        ("optim.betas=[0.9]", "optim.betas.1: missing"),
        ("train.rows_per_step=4.0", "train.rows_per_step: input should be a valid integer (found 4.0)"),
        ("train.rows_per_step=true", "train.rows_per_step: input should be a valid integer (found true)"),
        ("train.micro_batch=0", "train.micro_batch: input should be 'auto' or greater than 0 (found 0)"),
        (
            "train.gradient_checkpointing=maybe",
            "train.gradient_checkpointing: input should be 'auto' or a valid boolean or a valid number (found \"maybe\")",
        ),
        ("adapter.targets=q_proj", "adapter.targets: input should be 'all-linear' or a valid list (found \"q_proj\")"),
        ("adapter.rank=x", 'adapter.rank: input should be a valid integer (found "x")'),
        ("adapter=lora", "adapter: input should be 'none' or a valid section of keys (found \"lora\")"),
        ("data.source=5", "data.source: input should be a valid list or a valid string (found 5)"),
        ("data=null", "data: input should be a valid section of keys (found null)"),
        ("previews.prompts=[1]", "previews.prompts.0: input should be a valid string (found 1)"),
        ("model.quantization=nf8", "model.quantization: input should be 'nf4', 'int8' or 'none' (found \"nf8\")"),
        ("seed=2147483648", "seed: input should be less than 2147483648 (found 2147483648)"),
        ("dpo.beta=0", "dpo.beta: input should be greater than 0 (found 0)"),
        ("data.pairs.margin=0", "data.pairs.margin: input should be greater than 0 (found 0)"),
        ("data.pairs.within=-1", "data.pairs.within: input should be greater than or equal to 0 (found -1)"),
        ("data.pairs.shorter=1", "data.pairs.shorter: input should be less than 1 (found 1)"),
        ("data.pairs.choose=some", "data.pairs.choose: input should be 'all', 'adjacent' or 'best_worst' (found \"some\")"),
        ("checkpoints.keep=1", "checkpoints.keep: input should be greater than or equal to 2 (found 1)"),
    ],
)
def test_a_wrong_type_or_value_is_one_sentence_about_its_key(minimal: Path, override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="has") as caught:
        load(minimal, [override])
    assert sentence in str(caught.value)
    assert not re.search(r"pydantic|tuple|dictionary|None", str(caught.value))


WHOLE = ("adapter=none", "model.quantization=none")
TEXT = ("chat.format=text",)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.quantization=int8", "model.double_quantization=true"), "model: double_quantization has no effect with quantization: int8"),
        (("model.random_init=true",), "model: random_init needs quantization: none"),
        (("model.random_init=true", "model.quantization=none"), "model.random_init makes sense with adapter: none alone"),
        (("data.validation_share=0.1",), "data: validation_share has no effect with split: published"),
        (("data.validation_source=x", "data.split=by_hash"), "data: validation_source has no effect with split: by_hash"),
        (("chat.format=llama2", "chat.role_markers=special"), "chat: role_markers: special has no effect with format: llama2"),
        (("chat.system_prompt=Be kind.",), "chat: format: oasst has no place for a system_prompt"),
        ((*TEXT, "chat.escape_markers=true"), "chat: escape_markers has no effect with format: text"),
        ((*TEXT, "chat.loss_on=assistant"), "chat: loss_on: assistant has no meaning with format: text"),
        (("optim.schedule=constant", "optim.min_learning_rate_ratio=0.1"), "optim: min_learning_rate_ratio has no effect"),
        (("evaluation.patience=3",), "evaluation: patience has no effect without every_steps"),
        (("evaluation.budget_tokens=300",), "evaluation: budget_tokens has no effect without every_steps"),
        (("adapter=none",), "adapter: none trains every weight, which nf4 forbids"),
        (("output.final_dtype=float16",), "output.final_dtype has an effect with adapter: none alone"),
        ((*TEXT, "evaluation.base_formats=trained"), "evaluation.base_formats has no effect with chat.format: text"),
        (
            ("adapter=none", "model.quantization=none", "model.random_init=true", "evaluation.base_formats=trained"),
            "evaluation.base_formats has no effect with model.random_init",
        ),
        (("adapter.init=pissa",), "adapter.init: pissa needs an unquantised base"),
        (("adapter.init=olora", "model.quantization=int8"), "adapter.init: olora needs an unquantised base"),
        (("adapter.init=orthogonal",), "adapter.init: orthogonal needs an unquantised base"),
        (("data.too_long=split",), "data.too_long: split is for chat.format: text"),
        (("data.policy=each_message",), "data.policy: each_message gives plain texts; set chat.format: text"),
        (("chat.template_arguments={enable_thinking: false}",), "chat: template_arguments has no effect with format: oasst"),
        (("chat.rewritten_history=refuse",), "chat: rewritten_history has no effect with format: oasst"),
        (("chat.format=chatml", "chat.escape_markers=true"), "chat: escape_markers has no effect with format: chatml"),
        (("data.policy=all_paths", "data.form=alpaca"), "data: policy has no effect on rows of form: alpaca"),
        (("data.form=oasst", "data.roles={customer: user}"), "data: roles has no effect on rows of form: oasst"),
        ((*TEXT, "data.form=text", "data.same_role=keep"), "data: same_role has no effect on rows of form: text"),
        (("data.form=alpaca", "data.learn_after=['A:']"), "data: learn_after has no effect on rows of form: alpaca"),
        (("data.learn_after=['A:']",), "data.learn_after is for chat.format: text"),
        ((*TEXT, "data.learn_until=['Q:']"), "data: learn_until has no effect without learn_after"),
        (
            ("data.form=alpaca", "data.fields={prompt: question}"),
            "data: fields: prompt is no part of a row of form: alpaca; known: history",
        ),
        (("data.form=text",), "data.form: text does not go with chat.format: oasst"),
        ((*TEXT, "data.form=messages"), "data.form: messages does not go with chat.format: text"),
        (("data.tool_turns=keep",), "data.tool_turns: keep needs chat.format: model"),
        (("data.replies={min_words: 9, max_words: 3}",), "data.replies: max_words is 3, below min_words: 9"),
        (("data.replies.weights=[{weight: 2}, {up_to_words: 9, weight: 1}]",), "data.replies: weights must stand in rising order"),
        (("data.sets=[{source: a}]",), "data: source: has no effect beside data.sets"),
        (("data.source=null",), "data: source: missing"),
        (("data.source=null", "data.sets=[{weight: 2.0}]"), "data: sets.0.source: missing"),
        (PAIRS[:2], "data.policy: preference_pairs gives pairs of a chosen and a rejected answer; add dpo: {}"),
        (("data.form=pairs",), "data.form: pairs gives pairs of a chosen and a rejected answer; add dpo: {}"),
        (("data.sets=[{source: a, form: pairs}]", "data.source=null"), "data.sets.0.form: pairs gives pairs"),
        ((*PAIRS[1:], "data.policy=all_paths"), "dpo needs pairs, and data.policy: all_paths gives none"),
        ((*PAIRS[1:], "data.form=messages"), "dpo needs pairs, and data.form: messages gives none"),
        (("dpo={}", "data.policy=preference_pairs"), "dpo takes one pair a row; set data.packing: false"),
        ((*PAIRS, "adapter=none", "model.quantization=none"), "dpo compares with the weights it starts from, which adapter: none"),
        ((*PAIRS, "chat.loss_on=all"), "dpo compares the answers alone, so chat.loss_on: all has no meaning"),
        ((*PAIRS[1:], *TEXT), "dpo compares two answers to one prompt, and chat.format: text has no roles"),
        (("data.pairs={}",), "data: pairs has no effect with policy: null; it is for preference_pairs and conciseness_pairs"),
        (("data.policy=all_paths", "data.pairs={}"), "data: pairs has no effect with policy: all_paths"),
        ((*PAIRS, "data.pairs.within=2"), "data: pairs.within has no effect with policy: preference_pairs; remove it"),
        ((*PAIRS, "data.pairs.shorter=0.5"), "data: pairs.shorter has no effect with policy: preference_pairs; remove it"),
        ((*PAIRS[1:], "data.policy=conciseness_pairs", "data.pairs.margin=2"), "pairs.margin has no effect with policy: conciseness_pairs"),
        ((*PAIRS, "data.sets=[{source: a, form: pairs}]"), "data: source, policy: has no effect beside data.sets"),
        ((*TEXT, "data.policy=all_paths"), "chat.format: text has no roles; data.policy: all_paths gives conversations"),
    ],
)
def test_an_impossible_combination_is_refused(minimal: Path, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match="has 1 problem:") as caught:
        load(minimal, overrides)
    assert words in str(caught.value)


def test_impossible_combinations_are_told_together(minimal: Path) -> None:
    with pytest.raises(ValueError, match="has 3 problems"):
        load(minimal, ["adapter=none", "data.too_long=split", "data.policy=each_message"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: &m {base: b}\ndata: *m\n", "aliases"),
        ("model: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("model: !!python/name:os.system\n", "could not determine a constructor"),
        ("- a\n- b\n", "does not hold keys and values"),
        ("", "does not hold keys and values"),
        ("just words", "does not hold keys and values"),
        ("a: [", "is not valid YAML"),
        ("a: 2020-99-99\n", "is not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 2000, "nested too deep"),
        ("#" * 1_000_001, "1,000,001 bytes; a recipe has a few thousand"),
        (MINIMAL + "seed: 1\nseed: 2\n", "the key seed stands twice"),
        (MINIMAL + "1: 2\n", "1: keys should be strings"),
    ],
)
def test_what_is_no_recipe_is_one_sentence(minimal: Path, text: str, words: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(minimal)
    assert str(minimal) in str(caught.value)


def test_a_missing_and_a_binary_file_are_named(minimal: Path) -> None:
    minimal.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        load(minimal)
    with pytest.raises(ValueError, match=r"there is no recipe at .*missing.yaml \(working folder: "):
        load(minimal.with_name("missing.yaml"))


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", "a b=1", "seed=[", "seed=!!python/name:os.system"])
def test_what_is_no_override_is_one_sentence(minimal: Path, override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(override)):
        load(minimal, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.quantization=int8",),
        ("model.double_quantization=false", "adapter.targets=[q_proj, fc1]", "adapter.alpha=0.3", "optim.eps=1e-12"),
        (*WHOLE, *TEXT, "output.final_dtype=float16", "data.too_long=split", "data.filters=null", "data.policy=each_message"),
        ("data.source=[a, b]", "data.filters.languages=[en, de]", "chat.format=llama2", "chat.system_prompt='Sei nett: ja\n\n#'"),
        (*PAIRS, "data.pairs.choose=best_worst", "data.pairs.margin=2", "dpo.beta=0.3"),
        (*PAIRS[1:], "data.policy=conciseness_pairs", "data.pairs.shorter=0.5", "dpo.length_normalized=true"),
        ("previews.prompts=['1e-4', 'yes', 'null', 'é', '2020-01-01']", "tracking.trackers=[wandb]", "train.micro_batch=4"),
    ],
)
def test_a_written_recipe_reads_back_the_same(minimal: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = load(minimal, overrides)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(recipe), encoding="utf-8")
    assert flatten(load(written)) == flatten(recipe)


def test_a_recipe_is_frozen_all_the_way_down(minimal: Path) -> None:
    recipe = load(minimal, ["data.source=[a, b]", "adapter.targets=[q_proj]"])
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.optim.learning_rate = 1.0
    assert all(isinstance(hash(value), int) for value in flatten(recipe).values())


# --- the files in the repository

SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_recipes_were_found() -> None:
    assert len(SHIPPED) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert isinstance(load(path), Recipe)


def test_what_to_train_and_where_to_run_share_no_key() -> None:
    def names(tree: Any) -> set[str]:
        return {key for k, v in tree.items() for key in (k, *names(v))} if isinstance(tree, dict) else set()

    files = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))
    assert len(files) >= 2
    # "adapter" and "filters" may be a word or null, so their keys stand in CURVE rather than in some recipe.
    mine = {part for key in CURVE + FREE for part in key.split(".")}
    for path in files:
        assert not names(yaml.safe_load(path.read_text())) & mine, path.name


@pytest.mark.parametrize("value", ["[]", "''", "['']"])
def test_a_source_that_names_nothing_is_refused(minimal, value: str) -> None:
    with pytest.raises(ValueError, match=r"data\.source.*: (value|string) should have at least 1"):
        load(minimal, [f"data.source={value}"])
