"""Batches that give NaN, infinite gradients or a spike: never learnt from in silence, and explained by a black box."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import poison
import pytest
from conftest import write_recipe
from in_process import column, lines, metrics, prepared
from processes import Started, run
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_suite import checkpoint
from qlora_suite.anomalies import LEAST, SCALE_SEARCH_STEPS
from qlora_suite.dataset import Rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = ("train={rows_per_step: 8, micro_batch: 2, max_steps: 6, epochs: 9}", "checkpoints={every_steps: 1, keep: 9}")
    return prepared(write_recipe(tmp_path_factory.mktemp("poisoned"), tiny_base, oasst_file, *overrides))


def trained(recipe: Path, folder: Path, *overrides: str, prelude: tuple | None = None, **env: str) -> Started:
    return run("train.py", recipe, f"output.dir={folder / 'run'}", *overrides, log=folder / "log", prelude=prelude, **env)


def weights(folder: Path, step: int) -> dict[str, Any]:
    return load_file(folder / "run" / "checkpoints" / f"step-{step:06d}" / checkpoint.ADAPTER)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(tensor.equal(other[name]) for name, tensor in one.items())


def events(folder: Path) -> list[dict[str, Any]]:
    return [record for record in lines(folder / "run" / "metrics.jsonl") if "event" in record]


def box(folder: Path, step: int) -> dict[str, Any]:
    def refused(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    return json.loads((folder / "run" / "black_box" / f"step-{step:06d}.json").read_text(), parse_constant=refused)


# --- 12: NaN


def test_a_loss_of_nan_is_not_learnt_and_its_conversations_are_named(recipe: Path, tmp_path: Path) -> None:
    """Fault 12: the weights after the step are those before it, and the black box says which micro-batch of which rows it was."""
    done = trained(recipe, tmp_path, prelude=(poison.losses, {3: math.nan}, 1))
    assert done.wait() == 0
    records = metrics(tmp_path / "run")
    assert column(records, "applied") == [True, True, False, True, True, True]
    assert records[2]["loss"] is None, "JSON has no word for NaN"
    assert column(records, "skipped_steps") == [0, 0, 1, 1, 1, 1]
    assert same(weights(tmp_path, 2), weights(tmp_path, 3))
    assert not same(weights(tmp_path, 3), weights(tmp_path, 4))
    assert [(e["step"], e["event"], e["applied"]) for e in events(tmp_path)] == [(3, "not finite", False)]
    assert "step 3: not finite" in done.output

    seen = box(tmp_path, 3)
    assert seen["loss"] == "nan"
    assert [m["loss"] == "nan" for m in seen["micro_batches"]] == [False, True, False, False]
    assert sorted(row["row"] for m in seen["micro_batches"] for row in m["rows"]) == sorted(records[2]["rows"])
    assert seen["layers"][0]["micro_batch"] == 2
    assert len(seen["layers"][0]["outputs"]) == 2, "of two layers"
    assert all(layer["largest output"] > 0 and layer["output not finite"] == 0 for layer in seen["layers"][0]["outputs"].values())
    assert any(tensor["gradient not finite"] > 0 for tensor in seen["tensors"].values())
    assert all(tensor["weight not finite"] == 0 and tensor["largest weight"] >= 0 for tensor in seen["tensors"].values())
    assert column(seen["last_steps"], "step") == [1, 2]
    assert seen["beside"]["loss_scale"] == 1

    # the keys and hashes lead back to the texts
    prepared_folder = recipe.parent / "prepared"
    rows, tokenizer = Rows(prepared_folder / "train.arrow"), AutoTokenizer.from_pretrained(prepared_folder / "tokenizer")
    named = seen["micro_batches"][1]["rows"][0]
    row = rows[named["row"]]
    first = tokenizer.decode(row["input_ids"][: row["lengths"][0]])
    assert named["conversations"][0]["key"] == rows.examples(named["row"])[0]
    assert named["conversations"][0]["sha256"] == hashlib.sha256(first.encode()).hexdigest()


def test_a_loss_of_infinity_is_not_learnt_though_its_gradient_is_finite(recipe: Path, tmp_path: Path) -> None:
    """Fault 12."""
    assert trained(recipe, tmp_path, prelude=(poison.constants, {3: math.inf})).wait() == 0
    assert column(metrics(tmp_path / "run"), "applied") == [True, True, False, True, True, True]
    assert same(weights(tmp_path, 2), weights(tmp_path, 3))
    assert all(tensor["gradient not finite"] == 0 for tensor in box(tmp_path, 3)["tensors"].values())


def test_a_few_in_a_row_end_the_run_with_the_last_good_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Fault 12: a sentence that names rows; the same command goes on once the cause is gone, and the events are still there."""
    done = trained(recipe, tmp_path, "train.max_skipped_steps=3", prelude=(poison.losses, dict.fromkeys((2, 4, 5, 6), math.nan)))
    assert done.wait() == 2
    assert re.search(r"error: 3 steps in a row were not applied, in the last of which, with rows \[\d+.*not finite", done.output)
    assert "Traceback" not in done.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 6)
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest.name == "step-000005"
    assert all(t.isfinite().all() for t in load_file(newest / checkpoint.ADAPTER).values())
    assert trained(recipe, tmp_path, "train.max_skipped_steps=3").wait() == 0
    assert column(metrics(tmp_path / "run"), "applied") == [True, False, True, False, False, True]
    assert [(e["step"], e["attempt"]) for e in events(tmp_path)] == [(2, 1), (4, 1), (5, 1), (6, 1)]


# --- 13: infinite gradients


def test_an_infinite_gradient_under_fp16_lowers_the_scale_and_is_no_alarm(recipe: Path, tmp_path: Path) -> None:
    """Fault 13: neither optimiser nor schedule have moved; the search for a scale fills no disk with black boxes."""
    done = trained(recipe, tmp_path, prelude=(poison.gradients, [1, 2, 3]), ACCELERATE_MIXED_PRECISION="fp16")
    assert done.wait() == 0
    assert column(metrics(tmp_path / "run"), "applied") == [False, False, False, True, True, True]
    states = [json.loads((tmp_path / "run" / "checkpoints" / f"step-{n:06d}" / "state.json").read_text()) for n in range(1, 7)]
    assert [state["scaler"]["scale"] for state in states] == [2.0**15, 2.0**14, *[2.0**13] * 4]
    assert not any(t.any() for name, t in weights(tmp_path, 3).items() if "lora_B" in name)
    assert any(t.any() for name, t in weights(tmp_path, 4).items() if "lora_B" in name)
    assert not events(tmp_path)
    assert not (tmp_path / "run" / "black_box").exists()


def test_a_scale_that_is_never_found_ends_the_run(recipe: Path, tmp_path: Path) -> None:
    """Fault 13: at the floor, with a black box of the steps that a smaller scale did not mend."""
    steps = list(range(1, 40))
    overrides = ("train.max_steps=40", "train.max_skipped_steps=2", "checkpoints.every_steps=100")
    done = trained(recipe, tmp_path, *overrides, prelude=(poison.gradients, steps), ACCELERATE_MIXED_PRECISION="fp16")
    assert done.wait() == 2
    assert "not finite" in done.output.splitlines()[-1]
    ended = len(metrics(tmp_path / "run"))
    assert ended == SCALE_SEARCH_STEPS + 1, "the scale is below 1 then, and is no longer searched for"
    assert [e["step"] for e in events(tmp_path)] == list(range(SCALE_SEARCH_STEPS + 1, ended + 1))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_an_infinite_gradient_without_a_scale_is_an_alarm(recipe: Path, tmp_path: Path) -> None:
    """Fault 13, in fp32 and bf16."""
    assert trained(recipe, tmp_path, prelude=(poison.gradients, [3])).wait() == 0
    assert column(metrics(tmp_path / "run"), "applied") == [True, True, False, True, True, True]
    assert [(e["step"], e["event"]) for e in events(tmp_path)] == [(3, "not finite")]


# --- 14: a spike


SPIKE = LEAST + 3


@pytest.mark.parametrize("policy", ["clip", "skip"])
def test_a_spike_is_clipped_or_skipped_as_the_recipe_says(recipe: Path, tmp_path: Path, policy: str) -> None:
    """Fault 14: a thousandfold loss in one batch. Recorded in either case, resumed with the same memory of usual norms."""
    overrides = (f"train.max_steps={SPIKE + 2}", f"optim.on_spike={policy}", "optim.max_grad_norm=0.05")
    stopped = trained(recipe, tmp_path, *overrides, "stop.after_minutes=1e-6")  # step by step: the memory of norms is in the state
    assert stopped.wait() == 0
    done = trained(recipe, tmp_path, *overrides, prelude=(poison.losses, {SPIKE: 1000.0}))
    assert done.wait() == 0
    records = metrics(tmp_path / "run")
    assert column(records, "applied") == [n != SPIKE or policy == "clip" for n in range(1, SPIKE + 3)]
    (event,) = events(tmp_path)
    assert (event["step"], event["event"], event["applied"]) == (SPIKE, "spike", policy == "clip")
    assert event["grad_norm"] > 100 * event["median_grad_norm"]
    assert f"step {SPIKE}: spike" in done.output
    assert ("clipped" if policy == "clip" else "not applied") in done.output
    assert same(weights(tmp_path, SPIKE - 1), weights(tmp_path, SPIKE)) == (policy == "skip")
    seen = box(tmp_path, SPIKE)
    worst = max(seen["micro_batches"], key=lambda m: m["loss"])
    assert worst["micro_batch"] == 1
    assert seen["layers"][0]["micro_batch"] == 1
    assert len(seen["last_steps"]) == 20
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{SPIKE + 2:06d}" / "state.json").read_text())
    assert len(state["norms"]) == sum(column(records, "applied"))
    assert state["norms"] == [r["grad_norm"] for r in records if r["applied"]]


def test_spikes_that_do_not_end_are_no_spikes(recipe: Path, tmp_path: Path) -> None:
    """Fault 14: under `skip` a run whose gradients stay high ends with a sentence instead of leaving out every step."""
    steps = dict.fromkeys(range(SPIKE, SPIKE + 9), 1000.0)
    overrides = (f"train.max_steps={SPIKE + 9}", "optim.on_spike=skip", "train.max_skipped_steps=4", "checkpoints.every_steps=100")
    done = trained(recipe, tmp_path, *overrides, prelude=(poison.losses, steps))
    assert done.wait() == 2
    assert "4 steps in a row were not applied" in done.output
    assert "optim.on_spike: skip" in done.output
    assert len(metrics(tmp_path / "run")) == SPIKE + 3


def test_the_report_shows_what_went_wrong(recipe: Path, tmp_path: Path) -> None:
    """In the Markdown and on the page."""
    assert trained(recipe, tmp_path, prelude=(poison.losses, {3: math.nan})).wait() == 0
    assert run("evaluate.py", tmp_path / "run", "--answers", "0", log=tmp_path / "log").wait() == 0
    assert "| not finite, not applied | 1 | step 3 |" in (tmp_path / "run" / "report.md").read_text()
    assert "<td>not finite, not applied</td>" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_in_which_everything_goes_wrong_does_not_fill_the_disk(recipe: Path, tmp_path: Path) -> None:
    """A bounded number of black boxes; every event is noted."""
    steps = dict.fromkeys(range(1, 40), math.nan)
    overrides = ("train.max_steps=30", "train.max_skipped_steps=99", "checkpoints.every_steps=100")
    trained(recipe, tmp_path, *overrides, prelude=(poison.losses, steps))
    assert len(events(tmp_path)) == 30
    assert len(list((tmp_path / "run" / "black_box").iterdir())) == 20
