"""What may be chosen freely does not change what is learnt: the real loop, on a 4-bit base, step by step."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import write_recipe
from in_process import column, metrics, prepared, script, train

from qlora_suite.adapter import add_adapter
from qlora_suite.batches import permutation
from qlora_suite.dataset import load_manifest
from qlora_suite.model import load_base
from qlora_suite.recipe_file import load

STEPS = 11
"""One epoch; the last step has empty rows."""
TOLERANCE = 1e-5
counter = itertools.count()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """Prepared once. The schedule moves, so that a step taken twice or left out would show."""
    overrides = ("train.max_steps=null", "optim.schedule=cosine", "optim.learning_rate=2e-2")
    return prepared(write_recipe(tmp_path_factory.mktemp("curve"), tiny_base, oasst_file, *overrides))


def run(recipe: Path, *overrides: str) -> Path:
    return train(recipe, f"output.dir={recipe.parent}/run{next(counter)}", *overrides)


@pytest.fixture(scope="module")
def plain(recipe: Path) -> list[dict]:
    """Two rows at a time and nothing beside learning."""
    return metrics(run(recipe, "train.micro_batch=2", "train.gradient_checkpointing=false"))


EVALUATION = ("evaluation.every_steps=2", "evaluation.budget_tokens=600")
PREVIEWS = ("previews.every_steps=2", "previews.max_new_tokens=6", "previews.prompts=[Hello, Say no.]")


@pytest.mark.parametrize(
    "free",
    [
        ("train.micro_batch=1",),
        ("train.micro_batch=8",),
        ("train.micro_batch=auto", "train.gradient_checkpointing=auto"),
        ("train.micro_batch=2", "train.gradient_checkpointing=true"),
        ("train.micro_batch=8", "train.gradient_checkpointing=true", *EVALUATION, *PREVIEWS),
        (*EVALUATION,),
        (*PREVIEWS, "checkpoints.every_steps=3"),
    ],
    ids=lambda free: " ".join(key.split(".")[1] for key in free),
)
def test_free_keys_do_not_change_the_curve(recipe: Path, plain: list[dict], free: tuple[str, ...]) -> None:
    other = metrics(run(recipe, *free))
    assert column(other, "step") == column(plain, "step") == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert column(other, key) == pytest.approx(column(plain, key), rel=TOLERANCE, abs=0), key


def test_evaluation_and_previews_do_not_disturb_dropout(recipe: Path) -> None:
    """Both draw nothing from the generators that the next step reads: the curves are equal to the last bit."""
    fixed = ("adapter.dropout=0.2", "train.micro_batch=4")
    quiet, busy = metrics(run(recipe, *fixed)), metrics(run(recipe, *fixed, *EVALUATION, *PREVIEWS))
    for key in ("loss", "grad_norm"):
        assert column(quiet, key) == column(busy, key)
    assert column(quiet, "loss") != column(metrics(run(recipe, *fixed, "seed=1")), "loss")


def test_the_curve_is_not_trivial(recipe: Path, plain: list[dict]) -> None:
    """Rows and steps have uneven numbers of supervised tokens, and rates and losses move: a mean of means would show."""
    rows = pa.ipc.open_stream(str(Path(load(recipe).data.prepared) / "train.arrow")).read_all()
    supervised = [sum(row) for row in rows["supervised"].to_pylist()]
    assert max(supervised) > 3 * min(supervised)
    assert max(rows["lengths"].combine_chunks().value_lengths().to_pylist()) > 1, "nothing is packed"
    assert len(set(column(plain, "supervised_tokens"))) > 5
    assert sum(column(plain, "supervised_tokens")) == sum(supervised)
    assert column(plain, "loss")[-1] < column(plain, "loss")[0] - 0.05
    assert column(plain, "learning_rate")[0] == 2e-2
    assert all(column(plain, "applied"))


def spread(lengths: list[int], size: int = 8) -> int:
    """Longest minus shortest, summed over groups."""
    groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(max(group) - min(group) for group in groups)


def test_unpacked_rows_train_in_groups_of_like_length(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.packing: false has curves of its own, which do not depend on the micro-batch either."""
    fixed = ("data.packing=false", f"data.prepared={recipe.parent}/unpacked", "train.max_steps=8")
    prepared(recipe, *fixed)
    seen = []
    module = script("train")
    collate = module.collate

    def noted(rows: list[Any], *args: Any, **options: Any) -> Any:
        seen.append([row["lengths"] for row in rows if row])
        return collate(rows, *args, **options)

    monkeypatch.setattr(module, "collate", noted)
    runs = [metrics(run(recipe, *fixed, f"train.micro_batch={size}")) for size in ("1", "4")]
    assert all(len(lengths) == 1 for batch in seen for lengths in batch)
    rows = pa.ipc.open_stream(f"{recipe.parent}/unpacked/train.arrow").read_all()
    lengths = [len(row) for row in rows["input_ids"].to_pylist()]
    grouped = [batch[0][0] for batch in seen if len(batch) == 1]
    shuffled = [lengths[i] for i in permutation(0, 0, len(lengths))][: len(grouped)]
    assert spread(grouped) < spread(shuffled) / 2, "the rows of a step are of like length"
    for key in ("loss", "grad_norm"):
        assert column(runs[0], key) == pytest.approx(column(runs[1], key), rel=TOLERANCE, abs=0)


def test_the_first_loss_is_the_one_computed_by_hand(recipe: Path, plain: list[dict]) -> None:
    """Each conversation of the first step alone through a fresh model: all token losses, one sum, divided once."""
    values = load(recipe)
    table = pa.ipc.open_stream(str(Path(values.data.prepared) / "train.arrow")).read_all().to_pylist()
    torch.manual_seed(values.seed)
    base = load_base(values.model, torch.float32, torch.device("cpu"))
    torch.manual_seed(values.seed)
    model = add_adapter(base, values.adapter, tuple(load_manifest(values)["role_markers"]["token_ids"]), False).eval()

    losses = []
    for number in permutation(values.seed, 0, len(table))[: values.train.rows_per_step]:
        row, start = table[number], 0
        for length in row["lengths"]:
            ids, flags = row["input_ids"][start : start + length], row["supervised"][start : start + length]
            start += length
            with torch.no_grad():
                log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            losses += [-log_probabilities[t - 1, ids[t]].item() for t in range(1, length) if flags[t]]
    assert plain[0]["supervised_tokens"] == len(losses)
    assert plain[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
