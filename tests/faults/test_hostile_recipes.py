"""Fault 22: recipes, overrides and accelerate configs that are anything but: one sentence with the key's path, never a traceback.

tests/test_recipe.py has the complaints one by one; here are the files and trees that nobody would think of.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeRecipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run

from qlora_suite.accelerate_config import check_config, engine_of, objections
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import from_dict, load, to_yaml

MINIMAL: dict[str, Any] = {
    "model": {"base": "someone/model"},
    "data": {"source": "someone/data", "prepared": "prepared", "form": "messages"},
    "adapter": {"rank": 4},
    "optim": {"learning_rate": 1e-4},
    "train": {"rows_per_step": 8},
    "output": {"dir": "run"},
}
OFTEN = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def anchor_bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines).encode()


BEGINNING = yaml.safe_dump(MINIMAL).encode()
FILES: dict[str, tuple[bytes, str]] = {
    "python object": (BEGINNING + b"seed: !!python/object/apply:os.system ['touch MARKER']\n", "could not determine a constructor"),
    "python module": (BEGINNING + b"seed: !!python/module:MARKER\n", "could not determine a constructor"),
    "python new": (b"!!python/object/new:subprocess.Popen [[touch, MARKER]]\n", "could not determine a constructor"),
    "a tag of its own": (BEGINNING + b"seed: !include /etc/passwd\n", "could not determine a constructor"),
    "10 MB": (b"a: b\n" * 2_000_000, "10,000,000 bytes; a recipe has a few thousand"),
    "anchor bomb": (anchor_bomb(), "aliases"),
    "merge key bomb": (b"a: &a {x: 1}\nb: {<<: *a}\n", "aliases"),
    "deep lists": (b"a: " + b"[" * 100_000, "nested too deep"),
    "deep maps": (b"a: " + b"{a: " * 50_000, "nested too deep"),
    "deep by indent": ("".join(" " * i + "a:\n" for i in range(900)).encode(), "is nested too deep"),
    "twice": (BEGINNING + b"seed: 1\nseed: 2\n", "the key seed stands twice (first in line"),
    "twice inside": (BEGINNING + b"previews: {prompts: [a], prompts: [b]}\n", "the key prompts stands twice"),
    "NUL": (BEGINNING + b"seed: 1\x00\n", "is not valid YAML"),
    "escape codes": (BEGINNING + b"seed: \x1b[2J\n", "is not valid YAML"),
    "UTF-16": (BEGINNING.decode().encode("utf-16"), "is not a text file in UTF-8"),
    "Latin-1": ("# Größe\n".encode("latin-1") + BEGINNING, "is not a text file in UTF-8"),
    "empty": (b"", "does not hold keys and values"),
    "two documents": (BEGINNING + b"---\nseed: 1\n", "is not valid YAML"),
    "a number of a million digits": (BEGINNING + b"seed: " + b"9" * 900_000 + b"\n", "is not valid YAML"),
    "a number in base 60": (BEGINNING + b"seed: 1:30:00.5\n", "seed: "),
    "a list as a key": (BEGINNING + b"? [a, b]\n: 1\n", ""),
    "a map as a key": (BEGINNING + b"? {a: b}\n: 1\n", "is not valid YAML"),
    "only a tab": (b"model:\n\tbase: x\n", "is not valid YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_one_sentence_and_runs_nothing(name: str, tmp_path: Path) -> None:
    """Fault 22."""
    content, complaint = FILES[name]
    recipe, marker = tmp_path / "recipe.yaml", tmp_path / "marker"
    recipe.write_bytes(content.replace(b"MARKER", str(marker).encode()))
    with pytest.raises(ValueError, match=r"recipe\.yaml") as caught:
        load(recipe)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not marker.exists()


def test_the_scripts_say_it_without_a_traceback(tmp_path: Path) -> None:
    """Fault 22: the worst of them through a real process, and what is no file at all."""
    (tmp_path / "run.yaml").write_bytes(b"seed: !!python/object/apply:os.system ['touch marker']\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for script, path in (
        ("train.py", tmp_path / "run.yaml"),
        ("prepare_data.py", tmp_path),
        ("train.py", tmp_path / "pipe.yaml"),
        ("prepare_data.py", tmp_path / "loop.yaml"),
        ("train.py", Path("/dev/zero")),
        ("train.py", tmp_path / ("x" * 300)),
    ):
        done = run(script, path, log=tmp_path / "log", seconds=60)
        assert done.process.exitcode == 2, done.output
        assert "Traceback" not in done.output
    assert done.output.count("error: ") == 6
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "override",
    [
        *("", "=", "=1", "seed", "seed =1", ".seed=1", "seed.=1", "a..b=1", "-seed=1", "../seed=1", "__class__=1", "model.__init__.x=1"),
        *("seed=!!python/object/apply:os.system [ls]", "seed=*a", "seed={", "seed=[", "seed='", "seed=\x00", "seed=\x1b[2J"),
        *(
            "seed=-1",
            "seed=1e999",
            "seed=.nan",
            "seed=.inf",
            "seed=null",
            "seed=[1]",
            "seed={a: 1}",
            "seed=2020-99-99",
            "seed=0x",
            "seed=1_0x",
        ),
        *("optim.learning_rate=-1e-4", "optim.learning_rate=1e-4x", "optim.learning_rate=1e400", "optim.learning_rate='1e-4'"),
        *("model=x", "model.base={}", "model.base.x=1", "train=[]", "output.dir=null", "data.sets=1"),
        "seed=" + "[" * 100_000,
        "seed=" + "9" * 5000,
        "x" * 10_000 + "=1",
        ".".join("a" * 3000) + "=1",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_hostile_override_is_one_complaint(override: str, tmp_path: Path) -> None:
    """Fault 22: a ValueError, and the recipe is as it was where there is none."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(BEGINNING)
    with pytest.raises(ValueError, match=r"\S"):
        load(recipe, [override])


def test_1e_4_is_a_number(tmp_path: Path) -> None:
    """Fault 22: YAML 1.1 reads it as a text, which some suites then hand to the optimiser."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(BEGINNING.replace(b"learning_rate: 0.0001", b"learning_rate: 1e-4"))
    assert load(recipe).optim.learning_rate == 1e-4


# ---- anything


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["nf4", "none", "auto", "1e-4", "published", "by_hash", "oasst", "model", "text", "yes", "~", "0x1F", "1:30", "<<", "="]
    ),
    st.dates(),
    st.binary(max_size=8),
)
KEYS = st.one_of(
    st.sampled_from([key for name, field in Recipe.model_fields.items() for key in (name, *getattr(field.annotation, "model_fields", ()))]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    st.integers(),
    st.booleans(),
    st.none(),
)
TREES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6)), max_leaves=25)


def recipe_or_complaint(read: Callable[[], Recipe]) -> None:
    try:
        found: Recipe | None = read()
    except ValueError:
        return
    assert isinstance(found, Recipe)


@OFTEN
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_a_recipe_or_a_complaint(content: bytes, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    recipe_or_complaint(lambda: load(recipe))


@OFTEN
@given(seed=st.integers(0, 2**32))
def test_a_recipe_with_bytes_changed_is_a_recipe_or_a_complaint(seed: int, tmp_path: Path) -> None:
    draw, content = random.Random(seed), bytearray(BEGINNING)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(content))
        if draw.random() < 0.5:
            content[at] = draw.choice(b"\x00\t\n :-[]{}&*!|>'\"%@#,?0\xff" + bytes([draw.randrange(256)]))
        else:
            del content[at : at + draw.randint(1, 8)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    recipe_or_complaint(lambda: load(recipe))


@OFTEN
@given(tree=st.dictionaries(KEYS, TREES, max_size=8))
def test_any_tree_is_a_recipe_or_a_complaint(tree: dict[Any, Any], tmp_path: Path) -> None:
    recipe_or_complaint(lambda: from_dict(tree))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    recipe_or_complaint(lambda: load(recipe))


@OFTEN
@given(section=st.sampled_from(sorted(MINIMAL)), key=KEYS, value=TREES)
def test_any_value_at_any_place_of_a_recipe_is_a_recipe_or_a_complaint(section: str, key: Any, value: Any) -> None:
    recipe_or_complaint(lambda: from_dict({**MINIMAL, section: {**MINIMAL[section], key: value}}))


@OFTEN
@given(override=st.one_of(st.text(max_size=60), st.tuples(KEYS.map(str), st.text(max_size=20)).map("=".join)))
def test_any_override_is_a_recipe_or_a_complaint(override: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(BEGINNING)
    recipe_or_complaint(lambda: load(recipe, [override]))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
VALID = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"base": TEXTS}, optional={"revision": TEXTS, "double_quantization": st.booleans()}),
        "data": st.fixed_dictionaries(
            {"source": st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), "prepared": TEXTS, "form": st.just("messages")},
            optional={
                "roles": st.dictionaries(TEXTS, st.sampled_from(["system", "user", "assistant"]), max_size=3),
                "fields": st.dictionaries(st.sampled_from(["messages", "role", "content"]), TEXTS, max_size=3),
                "max_length": st.integers(1, 10**6),
                "dev_share": st.floats(0, 1, exclude_max=True),
                "weight": st.floats(1e-300, 1e300),
            },
        ),
        "chat": st.fixed_dictionaries({"format": st.just("llama2")}, optional={"system_prompt": TEXTS}),
        "adapter": st.fixed_dictionaries(
            {"rank": st.integers(1, 4096)}, optional={"targets": st.lists(TEXTS, min_size=1, max_size=4), "alpha": st.floats(1e-9, 1e9)}
        ),
        "optim": st.fixed_dictionaries({"learning_rate": st.floats(5e-324, 1e300)}),
        "train": st.fixed_dictionaries({"rows_per_step": st.integers(1, 10**6)}),
        "output": st.fixed_dictionaries({"dir": TEXTS}),
    },
    optional={"seed": st.integers(0, 2**31 - 1), "previews": st.fixed_dictionaries({"prompts": st.lists(TEXTS, max_size=3)})},
)


@OFTEN
@given(tree=VALID)
def test_a_recipe_that_is_written_is_read_as_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = from_dict(tree)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8", newline="")
    assert load(tmp_path / "recipe.yaml").model_dump() == recipe.model_dump()
    assert to_yaml(load(tmp_path / "recipe.yaml")) == to_yaml(recipe)


# ---- accelerate configs, as far as they are read here


def outcome_of(config: Path) -> list[str]:
    """What is said of it: a complaint, or objections."""
    try:
        values = check_config(config, 1, 1)
        engine_of(values)
        return objections(values)
    except ValueError as error:
        return [str(error)]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"distributed_type", b"\xff\xfe", b"\x00", b"a: [", b"distributed_type: !!python/object/apply:os.system [ls]"),
        *(
            b"distributed_type: []",
            b"distributed_type: {a: 1}",
            b"distributed_type: null",
            b"distributed_type: EVIL",
            b"distributed_type: 7",
        ),
        *(b"distributed_type: FSDP\nfsdp_config: 7", b"distributed_type: FSDP\nfsdp_config: [a]", b"distributed_type: FSDP"),
        *(b"distributed_type: DEEPSPEED\ndeepspeed_config: x", b"distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: [3]}"),
        *(b"distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 9}", b"distributed_type: NO\ngradient_accumulation_steps: {}"),
        b"distributed_type: " + b"[" * 50_000,
        anchor_bomb(),
        b"distributed_type: NO\n" + b"a: b\n" * 400_000,
    ],
    ids=lambda content: repr(content[:60]),
)
def test_an_accelerate_config_of_nonsense_is_told_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    said = outcome_of(config)
    assert said
    assert all(one.strip() and "\n" not in one and len(one) < 1000 for one in said)


@OFTEN
@given(values=st.dictionaries(st.sampled_from(["distributed_type", "fsdp_config", "deepspeed_config", "num_processes", "use_cpu"]), TREES))
def test_any_accelerate_config_is_read_or_told(values: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    assert isinstance(outcome_of(config), list)


def test_preflight_tells_an_accelerate_config_of_nonsense_in_a_sentence(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Fault 22, through a script that reads the config before anything is launched."""
    config = tmp_path / "config.yaml"
    for i, text in enumerate(
        ("distributed_type: [", "distributed_type: FSDP\nfsdp_config: 7\n", "distributed_type: NO\nnum_processes: x\n")
    ):
        config.write_text(text)
        done = run("preflight.py", make_recipe(), "--config", config, log=tmp_path / f"log{i}")
        assert "Traceback" not in done.output, done.output
        assert done.process.exitcode in (1, 2) or "num_processes" in text, done.output


def test_no_recipe_says_what_a_token_is(tmp_path: Path) -> None:
    """Secrets: refused with the key's path, and not repeated; nor where the file is no YAML, or the override no override."""
    token = "hf_" + "planted" * 4
    recipe = tmp_path / "recipe.yaml"
    for tree in ({**MINIMAL, "output": {"dir": token}}, {**MINIMAL, "previews": {"prompts": [f"say {token}"]}}, {**MINIMAL, token: 1}):
        recipe.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=r"holds what looks like a token") as caught:
            load(recipe)
        assert token not in str(caught.value)
    recipe.write_bytes(BEGINNING)
    for override in (f"output.dir={token}", f"hf_token={token}", token):
        with pytest.raises(ValueError, match=r"does not belong on the command line") as caught:
            load(recipe, [override])
        assert token not in str(caught.value)
