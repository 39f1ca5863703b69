"""Checkpoints that were damaged, or made by somebody who means harm: set aside with a word, never trusted, never started over."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from conftest import write_recipe
from in_process import prepared, train
from safetensors.torch import load_file, save_file
from same_run import assert_same, snapshot, state_of

from qlora_suite import checkpoint
from qlora_suite.checkpoint import ADAPTER, MANIFEST, OPTIMIZER, STATE

STEPS = 14
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = (f"train={{max_steps: {STEPS}, rows_per_step: 2, micro_batch: 2}}", "checkpoints={every_steps: 1, keep: 20}")
    return prepared(write_recipe(tmp_path_factory.mktemp("damaged"), tiny_base, oasst_file, *overrides))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return train(recipe, f"output.dir={recipe.parent}/whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The whole run, as if it had been killed before it wrote its result."""
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(copy / "final")
    (copy / "status.json").unlink()
    return copy


def start(recipe: Path, run: Path) -> processes.Started:
    process = processes.run("train.py", recipe, f"output.dir={run}", log=run.parent / "log")
    assert "Traceback" not in process.output, process.output
    return process


def newest_first(run: Path) -> list[Path]:
    return [run / "checkpoints" / f"step-{step:06d}" for step in reversed(checkpoint.steps(run / "checkpoints"))]


def assert_set_aside_one_by_one(recipe: Path, run: Path, whole: Path, words: dict[Path, str]) -> None:
    """Each of the newest checkpoints is named in a warning, with what is wrong, and kept; the run goes on from the one before them."""
    process = start(recipe, run)
    for folder, word in words.items():
        assert f"checkpoint {folder} is damaged ({word}" in process.output
        assert os.path.lexists(folder.with_name(f"{folder.name}.corrupt"))
    assert f"goes on from {run / 'checkpoints'}/step-{STEPS - len(words):06d}" in process.output
    assert process.process.exitcode == 0, process.output
    assert_same(run, whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_each_file_of_the_newest(recipe: Path, whole: Path, run: Path, damage: Damage) -> None:
    """Faults 4 and 5: each file of a checkpoint truncated, with one flipped bit, and missing, in a newest checkpoint of its own."""
    names = sorted(path.name for path in newest_first(run)[0].iterdir())
    assert {ADAPTER, OPTIMIZER, STATE, MANIFEST, "adapter_config.json", "recipe.yaml", "tokenizer.json"} < set(names)
    damaged = dict(zip(newest_first(run), names, strict=False))
    for folder, name in damaged.items():
        damage(folder / name)
    assert_set_aside_one_by_one(recipe, run, whole, damaged)


def test_no_flipped_bit_of_a_manifest_passes_or_ends_the_run(run: Path) -> None:
    """Fault 5: a bit makes a 3 of format 1; a manifest is not of a newer version unless its own hash says so."""
    folder = newest_first(run)[0]
    path = folder / MANIFEST
    good = path.read_bytes()
    flips = [(place, place % 8) for place in range(len(good))]
    flips += [(good.index(b'"format_version": ') + len(b'"format_version": '), bit) for bit in range(8)]
    for place, bit in flips:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        assert checkpoint.complaint_about_checkpoint(folder), (place, bit)
    path.write_bytes(good)
    assert checkpoint.complaint_about_checkpoint(folder) is None


# --- by somebody who can write the manifest as well


def reseal(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    checkpoint.seal(folder)


def state(**values: Any) -> Damage:
    """A value of the state is another one."""

    def damage(folder: Path) -> None:
        (folder / STATE).write_text(json.dumps({**json.loads((folder / STATE).read_text()), **values}))
        reseal(folder)

    return damage


def text(name: str, content: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)
        if name != MANIFEST:
            reseal(folder)

    return damage


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)
        reseal(folder)

    return damage


def first(found: dict[str, torch.Tensor], part: str = "") -> str:
    return next(name for name in found if part in name)


def nested(folder: Path) -> None:
    """As `cp -r` leaves it, where the target is there already."""
    shutil.move(folder, folder.parent / "moved")
    folder.mkdir()
    shutil.move(folder.parent / "moved", folder / folder.name)


def linked_file(folder: Path) -> None:
    outside = folder.parents[2] / "optimizer"
    (folder / OPTIMIZER).rename(outside)
    (folder / OPTIMIZER).symlink_to(outside)


def unlisted(folder: Path) -> None:
    """The manifest promises nothing, so that nothing is missing."""
    (folder / OPTIMIZER).unlink()
    (folder / MANIFEST).write_text('{"format_version": 1, "files": {}}')


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


TREACHEROUS: list[list[tuple[Damage, str]]] = [
    [
        (state(step=3), "state.json is that of step 3"),
        (state(step="14"), "state.json: step is '14'"),
        (state(step=-1), "state.json: step is '-1'"),
        (state(tokens=1e400), "state.json: tokens is 'inf'"),
        (state(seconds=float("nan")), "state.json: seconds is 'nan'"),
        (state(skipped_steps=True), "state.json: skipped_steps is 'True'"),
        (state(best={"step": "../../etc", "loss": 1.0}), "state.json: best is"),
        (state(best=[1, 2]), "state.json: best is"),
        (state(evaluated=None), "state.json: evaluated is 'None'"),
        (state(micro_batch={"rows": 0, "tokens": 1, "checkpointing": False}), "state.json: micro_batch is"),
        (state(micro_batch={"rows": 1, "tokens": 1, "checkpointing": 1.5}), "state.json: micro_batch is"),
        (state(micro_batch={"rows": 1, "tokens": 1, "checkpointing": False, "more": 1}), "state.json: micro_batch is"),
        (state(identity="mine"), "state.json: identity is 'mine'"),
    ],
    [
        (state(scaler={"scale": "x"}), "state.json: scaler is"),
        (state(optimizer_numbers={"a:step": []}), "state.json: optimizer_numbers is"),
        (text(STATE, "[]"), "state.json holds no state"),
        (text(STATE, "[" * 100_000), "state.json) is damaged"),
        (text(STATE, "9" * 5_000), "state.json) is damaged"),
        (text(MANIFEST, "[]"), "manifest.json is damaged"),
        (text(MANIFEST, '{"format_version": 1e999, "files": {}}'), "manifest.json is damaged"),
        (text(MANIFEST, '{"format_version": 1, "files": [1]}'), "the table of its files is damaged"),
        (text(MANIFEST, '{"format_version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}'), "../x is not in the folder"),
        (text(MANIFEST, '{"format_version": 1, "files": {"/dev/zero": {"bytes": 0, "sha256": ""}}}'), "/dev/zero is not in the folder"),
        (unlisted, "optimizer.safetensors is missing"),
        (nested, "manifest.json is missing"),
    ],
    [
        (tensors(ADAPTER, lambda found: found[first(found)].view(-1)[3:4].fill_(float("nan"))), "adapter_model.safetensors: base_model"),
        (tensors(OPTIMIZER, lambda found: found[first(found, "exp_avg_sq")].fill_(float("inf"))), "optimizer.safetensors: base_model"),
        (text(ADAPTER, "not a tensor"), "adapter_model.safetensors cannot be read"),
        (text(OPTIMIZER, "\xff" * 8), "optimizer.safetensors cannot be read"),
        (linked_file, "optimizer.safetensors is a symbolic link"),
        (as_file, "manifest.json is missing"),
    ],
]


@pytest.mark.parametrize("damages", TREACHEROUS, ids=["state", "manifest", "tensors and links"])
def test_what_no_run_writes_is_set_aside_though_its_hash_fits(
    recipe: Path, whole: Path, run: Path, damages: list[tuple[Damage, str]]
) -> None:
    """Faults 4, 5 and 23: wrong types, hostile values, paths that lead out; outside the run nothing is touched."""
    words = {}
    for folder, (damage, word) in zip(newest_first(run), damages, strict=False):
        damage(folder)
        words[folder] = word.replace("state.json)", f"{folder / STATE} is damaged").removesuffix(" is damaged") if ")" in word else word
    outside = run.parent / "outside"
    before = snapshot(outside) if outside.exists() else None
    assert_set_aside_one_by_one(recipe, run, whole, words)
    assert before is None or snapshot(outside) == before


def drop(found: dict[str, torch.Tensor]) -> None:
    found.pop(first(found, "exp_avg_sq"))


def reshape(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        name = first(found, part)
        found[name] = found[name].reshape(1, -1).contiguous()

    return change


def halve(found: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        found[name] = tensor.half()


REFUSED = {
    "weights of another shape": (tensors(ADAPTER, reshape("lora_A")), "do not fit this model"),
    "weights of another type": (tensors(ADAPTER, halve), "do not fit this model"),
    "a moment of another shape": (tensors(OPTIMIZER, reshape("exp_avg")), "does not fit this run"),
    "a moment that is not there": (tensors(OPTIMIZER, drop), "does not fit this run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_the_model_end_in_a_sentence(recipe: Path, run: Path, case: str) -> None:
    """Faults 4 and 5: they were written for something else, and so, perhaps, were the older ones; nothing is changed."""
    damage, words = REFUSED[case]
    damage(newest_first(run)[0])
    before = snapshot(run / "checkpoints")
    process = start(recipe, run)
    assert process.process.exitcode == 2
    assert words in process.output
    assert state_of(run)[0] == "failed"
    assert snapshot(run / "checkpoints") == before


def test_no_good_one_is_left(recipe: Path, run: Path) -> None:
    """Fault 6: exit code 2 and a sentence, at every start; nothing is deleted, nothing starts afresh."""
    for folder in newest_first(run):
        flip_a_bit(folder / ADAPTER)
    before, journal = sorted(snapshot(run / "checkpoints").values()), (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        process = start(recipe, run)
        assert process.process.exitcode == 2
        assert f"error: every checkpoint in {run / 'checkpoints'} is damaged" in process.output
        assert "starts in" not in process.output
        assert sorted(snapshot(run / "checkpoints").values()) == before
        assert (run / "metrics.jsonl").read_bytes() == journal
    assert not (run / "final").exists()


def test_a_linked_checkpoint_is_pruned_without_what_it_leads_to(recipe: Path, run: Path, tmp_path: Path) -> None:
    """Fault 23: an old one that was moved to another disk; only the link goes."""
    oldest = newest_first(run)[-1]
    oldest.rename(tmp_path / "elsewhere")
    oldest.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    checkpoint.prune(run / "checkpoints", keep=2, best=None)
    assert checkpoint.steps(run / "checkpoints") == [STEPS - 1, STEPS]
    assert not os.path.lexists(oldest)
    assert snapshot(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(("damage", "name"), [(truncate, ADAPTER), (flip_a_bit, "chosen.json"), (Path.unlink, MANIFEST)])
def test_a_damaged_result_is_written_again(recipe: Path, whole: Path, tmp_path: Path, damage: Damage, name: str) -> None:
    """Faults 4 and 5, in final/ of a finished run: from the last checkpoint, without training."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damage(run / "final" / name)
    train(recipe, f"output.dir={run}")
    assert_same(run, whole)
    assert snapshot(run / "final") == snapshot(whole / "final")
