"""The same command goes on; with another recipe, other data or another base it is refused, field by field, and nothing is written."""

import re
import shutil
from pathlib import Path

import processes
import pytest
from conftest import write_recipe
from in_process import column, metrics, prepared, train
from same_run import assert_same, snapshot, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_suite import checkpoint

STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = (
        f"train.max_steps={STEPS}",
        "adapter={rank: 8, alpha: 8, dropout: 0.05}",
        "optim.schedule=cosine",
        "checkpoints.every_steps=2",
        "previews={prompts: [Hello], every_steps: 4, max_new_tokens: 8}",
    )
    return prepared(write_recipe(tmp_path_factory.mktemp("changed"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return train(recipe, f"output.dir={recipe.parent}/whole")


@pytest.fixture(scope="module")
def stopped(recipe: Path) -> Path:
    """A run that was ended after its first step."""
    return train(recipe, f"output.dir={recipe.parent}/stopped", "stop.after_minutes=1e-6")


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_changed_curve_key_is_refused_field_by_field(recipe: Path, whole: Path, copy: Path) -> None:
    """Fault 9, as a person sees it: both differences, what to do, exit code 2, no traceback, nothing written but the status."""
    before = snapshot(copy, "status.json", ".lock")
    done = processes.run("train.py", recipe, f"output.dir={copy}", "optim.learning_rate=1e-5", "seed=7", log=copy.parent / "log")
    assert done.process.exitcode == 2
    assert "optim.learning_rate: was 0.002, is now 1e-05" in done.output
    assert "seed: was 0, is now 7" in done.output
    assert len(re.findall(r": was ", done.output)) == 2, "only what differs"
    assert "choose another output.dir" in done.output
    assert "Traceback" not in done.output
    assert snapshot(copy, "status.json", ".lock") == before
    assert state_of(copy) == ("failed", 1)
    train(recipe, f"output.dir={copy}")
    assert_same(copy, whole)


@pytest.mark.parametrize(
    "changed",
    [
        "seed=1",
        "optim.learning_rate=1e-3",
        "adapter.rank=32",
        "adapter.dropout=0",
        "train.rows_per_step=4",
        "train.max_steps=7",
        "optim.name=adamw_8bit",
        "optim.max_grad_norm=2",
    ],
)
def test_each_curve_key_is_refused(recipe: Path, copy: Path, changed: str) -> None:
    """Fault 9."""
    before = snapshot(copy, "status.json", ".lock")
    with pytest.raises(ValueError, match=rf"cannot go on.*\n  {re.escape(changed.partition('=')[0])}: was .*\n"):
        train(recipe, f"output.dir={copy}", changed)
    assert snapshot(copy, "status.json", ".lock") == before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("data.policy", "best_path", "data.policy: was 'all_paths'"), ("data.max_length", "128", "data.max_length: was 256, is now 128")],
)
def test_other_data_is_refused(recipe: Path, copy: Path, key: str, value: str, words: str) -> None:
    """Fault 9: prepared with another policy or length."""
    other = (f"{key}={value}", f"data.prepared={copy.parent}/other")
    prepared(recipe, *other)
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        train(recipe, f"output.dir={copy}", *other)
    assert "data (hash of rows and tokenizer): was" in str(refusal.value)


def test_another_base_is_refused(recipe: Path, copy: Path, tiny_base: Path) -> None:
    """Fault 9: the weights count, not the folder's name: one that was only moved is the same."""
    moved, other = copy.parent / "moved", copy.parent / "other"
    shutil.copytree(tiny_base, moved)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.lm_head.bias.data += 0.1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(other)
    overrides = [f"output.dir={copy}", f"data.prepared={copy.parent}/rows"]
    for base in (other, moved):
        prepared(recipe, f"model.base={base}", *overrides)
        if base == other:
            with pytest.raises(ValueError, match=r"base \(commit, or hash of its files\): was") as refusal:
                train(recipe, f"model.base={base}", *overrides)
            assert str(refusal.value).count(": was ") == 1
        shutil.rmtree(copy.parent / "rows")
    prepared(recipe, f"model.base={moved}", *overrides)
    train(recipe, f"model.base={moved}", *overrides)
    assert state_of(copy) == ("finished", STEPS)


def test_free_keys_may_change(recipe: Path, copy: Path, whole: Path) -> None:
    """What is shown, saved and held at once; the curve goes on within the rounding of another micro-batch."""
    free = (
        "previews.prompts=[Say no.]",
        "checkpoints={every_steps: 3, keep: 3}",
        "train.micro_batch=2",
        "train.gradient_checkpointing=true",
        "evaluation={every_steps: 5, budget_tokens: 300}",
        f"output.mirror={copy.parent}/mirror",
    )
    train(recipe, f"output.dir={copy}", *free)
    assert state_of(copy) == ("finished", STEPS)
    # Dropout draws per micro-batch, so beyond the first step only the data and the rates are the same.
    for key in ("step", "learning_rate", "supervised_tokens"):
        assert column(metrics(copy), key) == column(metrics(whole), key)
    assert checkpoint.steps(copy.parent / "mirror" / "checkpoints") == checkpoint.steps(copy / "checkpoints")


def test_a_key_that_is_younger_than_the_run_counts_as_its_default(tmp_path: Path) -> None:
    """Fault 9: an update of the suite must not end every run that it finds; a value that the run cannot have had does."""
    now = {"optim.spike_ratio": 10.0, "optim.betas": [0.9, 0.999], "optim.learning_rate": 1e-4}
    checkpoint.check_identity({"optim.learning_rate": 1e-4}, now, tmp_path)
    with pytest.raises(ValueError, match=r"optim\.spike_ratio: was None, is now 5\.0"):
        checkpoint.check_identity({"optim.learning_rate": 1e-4}, {**now, "optim.spike_ratio": 5.0}, tmp_path)
    with pytest.raises(ValueError, match=r"optim\.learning_rate: was None"):
        checkpoint.check_identity({}, now, tmp_path)
    with pytest.raises(ValueError, match=r"optim\.gone: was 1, is now None"):
        checkpoint.check_identity({**now, "optim.gone": 1}, now, tmp_path)
