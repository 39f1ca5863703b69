"""A run's best result survives a lost disk, a damaged file and a disk that is full for a while; what is damaged is never passed on."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MakeRecipe
from in_process import metrics, prepared, train

from qlora_suite import checkpoint
from qlora_suite.checkpoint import complaint_about_checkpoint
from qlora_suite.files import read_json
from qlora_suite.tracking import read_journal

SETTINGS = ("train.max_steps=6", "checkpoints.every_steps=1", "evaluation.every_steps=1")


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Path:
    return prepared(make_recipe(*SETTINGS))


def losses(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """The development losses that the coming evaluations shall find."""
    import in_process

    coming = iter(values)
    monkeypatch.setattr(in_process.script("train"), "dev_loss", lambda *_: [next(coming)])


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def test_the_best_checkpoint_comes_back_from_the_mirror_too(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = f"output.mirror={tmp_path / 'mirror'}"
    losses(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    run = train(recipe, mirror)
    (run / "status.json").unlink()
    wanted = (run / "final" / checkpoint.ADAPTER).read_bytes()
    shutil.rmtree(run)
    again = train(recipe, mirror)
    assert (again / "final" / checkpoint.ADAPTER).read_bytes() == wanted
    assert "lowest development loss" in read_json(again / "final" / "chosen.json")["chosen_by"]


def test_a_best_checkpoint_damaged_before_the_end_is_named_and_left_out(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_suite.run_folder import Run

    losses(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    real = Run.end

    def end(self: Run, *args: object) -> None:
        flip_a_bit(self.saves.folder / "step-000001" / checkpoint.ADAPTER)
        real(self, *args)

    monkeypatch.setattr(Run, "end", end)
    run = train(recipe)
    chosen = read_json(run / "final" / "chosen.json")
    assert chosen["step"] == 6
    assert "step-000001) is damaged" in chosen["chosen_by"]
    assert (run / "final" / checkpoint.ADAPTER).read_bytes() == (run / "checkpoints" / "step-000006" / checkpoint.ADAPTER).read_bytes()


def test_a_damaged_result_is_written_again(recipe: Path) -> None:
    run = train(recipe, "evaluation.every_steps=null")
    whole = (run / "final" / checkpoint.ADAPTER).read_bytes()
    flip_a_bit(run / "final" / checkpoint.ADAPTER)
    train(recipe, "evaluation.every_steps=null")
    assert (run / "final" / checkpoint.ADAPTER).read_bytes() == whole
    assert complaint_about_checkpoint(run / "final") is None


def test_a_loss_that_is_not_a_number_is_never_the_best(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, float("nan"), 3.0, 2.0, float("nan"), 2.5, 2.5)
    run = train(recipe, "checkpoints.keep=6")
    assert read_json(run / "final" / "chosen.json")["step"] == 3


def test_a_mirror_that_is_gone_does_not_end_the_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "not_a_folder").write_text("")
    run = train(recipe, "evaluation.every_steps=null", f"output.mirror={tmp_path / 'not_a_folder' / 'mirror'}")
    assert complaint_about_checkpoint(run / "final") is None
    assert "mirroring step-000001 FAILED" in capsys.readouterr().out


def test_an_answer_with_unicode_line_ends_does_not_cut_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "previews.jsonl"
    records = [{"step": n, "text": f"a{mark}b"} for n, mark in enumerate("\u2028\u2029\x85\x0c\x1c")]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    assert read_journal(path) == records


def test_a_loss_of_infinity_is_not_applied_though_its_gradient_is_finite(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import in_process

    module = in_process.script("train")
    real = module.summed_loss
    calls = []

    def summed_loss(*args: object) -> object:
        calls.append(1)
        loss = real(*args)
        return loss + float("inf") if len(calls) == 3 else loss  # the gradient stays what it was

    monkeypatch.setattr(module, "summed_loss", summed_loss)
    run = train(recipe, "evaluation.every_steps=null", "train.micro_batch=8", "checkpoints.keep=9")
    assert [r["applied"] for r in metrics(run)] == [True, True, False, True, True, True]
    two, three = (run / "checkpoints" / f"step-00000{n}" / checkpoint.ADAPTER for n in (2, 3))
    assert two.read_bytes() == three.read_bytes()


def test_a_missing_development_split_is_said_before_the_first_step(make_recipe: MakeRecipe) -> None:
    recipe = prepared(make_recipe("data.dev_share=0.0", "evaluation.every_steps=5"))
    with pytest.raises(ValueError, match=r"data\.dev_share"):
        train(recipe)
    assert not (recipe.parent / "run").exists()
