"""A run writes and deletes in its own folder and nowhere else; a folder that cannot be written is said at once, a deleted one made anew."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_recipe
from in_process import lines, metrics, prepared
from processes import Started, run
from small_disk import enter, fill, small_disk

from qlora_suite import checkpoint
from qlora_suite.disk_space import need_of
from qlora_suite.files import read_json, write_json
from qlora_suite.recipe_file import load
from qlora_suite.run_place import check_mirror, check_path
from qlora_suite.subject import _file_name

STEPS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("run_folder")
    return prepared(write_recipe(folder, tiny_base, oasst_file, f"train.max_steps={STEPS}", "checkpoints.every_steps=2"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    done = run("train.py", recipe, f"output.dir={recipe.parent}/whole", log=recipe.parent / "log")
    assert done.wait() == 0, done.output
    return recipe.parent / "whole"


Train = Callable[..., Started]


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Train:
    """The recipe's run as a process that has ended."""

    def start(*overrides: str, prelude: tuple[Any, ...] | None = None) -> Started:
        return run("train.py", recipe, *overrides, log=tmp_path / "train.log", prelude=prelude)

    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adapter(folder: Path) -> bytes:
    return (folder / "final" / checkpoint.ADAPTER).read_bytes()


def refusal(done: Started) -> str:
    """Its one sentence, said before a base was loaded."""
    assert done.wait() == 2, done.output
    assert "Traceback" not in done.output
    assert "starts in" not in done.output
    error = done.output.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


# --- fault 23: what is not a run's


@pytest.mark.parametrize(
    "name", ["final/paper.tex", "thesis.tex", "checkpoints/mine/weights.bin", "notes/a.txt", "status.json", "final/manifest.json"]
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(train: Train, tmp_path: Path, name: str) -> None:
    """Fault 23: a run would replace `final`, prune `checkpoints` and write over files."""
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"state": "running", "job": 7}')
    before = contents(tmp_path / "mine")
    assert "holds what is of no run" in refusal(train(f"output.dir={tmp_path}/mine"))
    assert contents(tmp_path / "mine") == before


def test_logs_of_a_queue_and_a_report_of_the_base_are_no_hindrance(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 23: what slurm/submit.sh, a shell and scripts/evaluate.py leave before a run begins."""
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    for name in ("slurm-17.out", "slurm_starts.json", "train.log", "report-base.md", "evaluation/base.json"):
        (folder / name).write_text("{}")
    done = train(f"output.dir={folder}")
    assert done.wait() == 0, done.output
    assert adapter(folder) == adapter(whole)
    assert (folder / "slurm-17.out").read_text() == "{}"


def test_somebodys_own_final_in_a_runs_folder_is_set_aside_not_deleted(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 23: also what was damaged is kept."""
    folder = tmp_path / "run"
    assert train(f"output.dir={folder}", "stop.after_minutes=1e-6").wait() == 0
    (folder / "final").mkdir()
    (folder / "final" / "paper.tex").write_text("years of work")
    done = train(f"output.dir={folder}")
    assert done.wait() == 0, done.output
    assert adapter(folder) == adapter(whole)
    assert (folder / "final.corrupt" / "paper.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/step-000002", "final", ".final.tmp", "metrics.jsonl", ".lock", "checkpoints/.step-000004.tmp"]
)
def test_a_link_inside_a_run_leads_to_no_writing_or_deleting_outside(train: Train, tmp_path: Path, whole: Path, name: str) -> None:
    """Fault 23: refused at the start, by name."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(whole, folder)
    write_json(folder / "status.json", {**read_json(folder / "status.json"), "state": "running"})
    link = folder / name
    if link.exists():
        shutil.move(link, outside)
    else:
        outside.mkdir()
        (outside / "mine.txt").write_text("mine")
    link.symlink_to(outside)
    before = contents(outside) if outside.is_dir() else outside.read_bytes()
    error = refusal(train(f"output.dir={folder}"))
    assert f"{name} is a link to {outside}" in error
    assert (contents(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_a_link_made_while_a_run_trains_is_not_followed(train: Train, tmp_path: Path) -> None:
    """Fault 23: the save fails, loudly, as on a disk that does not take it; nothing outside is touched."""
    outside = tmp_path / "outside"
    (outside / "step-000001").mkdir(parents=True)
    (outside / "step-000001" / "mine.txt").write_text("mine")
    done = train(f"output.dir={tmp_path}/run", prelude=(at_step, 3, link_checkpoints, str(outside)))
    assert done.wait() == 2, done.output
    assert "checkpoint at step 3 FAILED" in done.output
    assert "is a link to" in done.output.strip().splitlines()[-1]
    assert list(contents(outside)) == ["step-000001/mine.txt"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("x" * 300, "has a name of 300 bytes"),
        ("ü" * 130, "has a name of 260 bytes"),
        ("/".join(["x" * 100] * 40), "has a name"),
        ("a\nb", "control character"),
        ("a\0b", "control character"),
        ("a\x1b[2Jb", "control character"),
        ("a\u2028b", "control character"),
        ("a\udc80b", "control character"),
    ],
)
def test_a_path_that_is_none_gets_a_sentence(name: str, words: str) -> None:
    """Fault 23: for each of the three keys that name a folder."""
    for key in ("output.dir", "output.mirror", "data.prepared"):
        with pytest.raises(ValueError, match=words) as caught:
            check_mirror(name, "run") if key == "output.mirror" else check_path(key, name)
        assert str(caught.value).startswith(key)
        assert "\n" not in str(caught.value)


def test_each_script_gives_the_sentence_and_writes_nothing(recipe: Path, train: Train, tmp_path: Path) -> None:
    """Fault 23: as the user meets it."""
    before = set(tmp_path.iterdir()) | {tmp_path / "train.log"}
    assert "has a name of 300 bytes" in refusal(train(f"output.dir={tmp_path}/{'x' * 300}"))
    assert "control character" in refusal(train(f'output.dir="{tmp_path}/a\\nb"'))
    assert "output.dir is empty" in refusal(train("output.dir=''"))
    assert "output.mirror: " in refusal(train(f"output.dir={tmp_path}/run", f"output.mirror={tmp_path}/run/mirror"))
    done = run("prepare_data.py", recipe, f"data.prepared={tmp_path}/{'x' * 300}", log=tmp_path / "train.log")
    assert "data.prepared: " in refusal(done)
    assert set(tmp_path.iterdir()) == before


def test_names_made_from_values_stay_inside() -> None:
    """Fault 23: a sweep's folders and a report's files."""
    spec = importlib.util.spec_from_file_location("job", ROOT / "slurm" / "job.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    hostile = ["../../etc", "a/b", "\0", "a\nb", "ü" * 300, "𝔘" * 300, ".", "x" * 5000, "-rf", "~"]
    for value in hostile:
        for name in (job.folder_name([f"model.base={value}"]), f"report-{_file_name(value)}.html"):
            assert Path(name).parts == (name,)
            assert len(os.fsencode(name)) <= 200
            check_path("output.dir", name)
    assert _file_name("a" * 150 + "1") != _file_name("a" * 150 + "2")


def test_paths_that_a_person_may_name_work(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 23: absolute, unicode, spaces, `..`; and a folder that is itself a link to another disk, as on clusters."""
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    elsewhere = scratch / f"qlora-suite-test-{os.getpid()}"
    link = tmp_path / "läufe 微调 №1"
    link.symlink_to(elsewhere)
    elsewhere.mkdir()
    try:
        done = train(f"output.dir='{link}'")
        assert done.wait() == 0, done.output
        assert adapter(elsewhere) == adapter(whole)
        assert link.is_symlink()
        assert train(f"output.dir={os.path.relpath(tmp_path, ROOT)}/../{tmp_path.name}/beside").wait() == 0
        assert adapter(tmp_path / "beside") == adapter(whole)
    finally:
        shutil.rmtree(elsewhere)


# --- fault 23: data.prepared and output.mirror


def test_preparing_deletes_no_run_and_no_checkpoint(recipe: Path, tmp_path: Path, whole: Path) -> None:
    """Fault 23: a checkpoint has a manifest as prepared data has, and a run may lie in an old data folder."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(recipe.parent / "prepared", tmp_path / "data")
    shutil.copytree(whole, tmp_path / "data" / "run")
    before = contents(tmp_path)
    for folder in ("run/final", "run/checkpoints/step-000006", "run", "data"):
        done = run(
            "prepare_data.py", recipe, f"data.prepared={tmp_path}/{folder}", "data.max_length=200", log=recipe.parent / "prepare.log"
        )
        assert "holds something else, which would be overwritten" in refusal(done)
        (recipe.parent / "prepare.log").unlink()
    assert contents(tmp_path) == before


def test_prepared_data_behind_a_link_is_replaced_there(recipe: Path, tmp_path: Path) -> None:
    """Fault 23: the link stays one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "prepared").symlink_to(tmp_path / "disk")
    for length in (200, 150):
        done = run("prepare_data.py", recipe, f"data.prepared={tmp_path}/prepared", f"data.max_length={length}", log=tmp_path / "log")
        assert done.wait() == 0, done.output
        assert read_json(tmp_path / "disk" / "manifest.json")["recipe"]["data"]["max_length"] == length
    assert (tmp_path / "prepared").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_a_mirror_of_another_run_is_refused_and_not_pruned(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 23: two runs with one mirror would prune each other's checkpoints."""
    shutil.copytree(whole / "checkpoints", tmp_path / "mirror" / "checkpoints")
    before = contents(tmp_path / "mirror" / "checkpoints")
    done = train(f"output.dir={tmp_path}/run", f"output.mirror={tmp_path}/mirror", "optim.learning_rate=1e-5")
    assert done.wait() == 2, done.output
    assert "holds checkpoints of another run (its optim.learning_rate differ)" in done.output
    assert contents(tmp_path / "mirror" / "checkpoints") == before


# --- fault 8: a folder that cannot be written


@pytest.mark.parametrize("what", ["a file", "below a file", "a link to nothing"])
def test_a_folder_that_cannot_be_made_is_said_before_the_base_is_loaded(train: Train, tmp_path: Path, what: str) -> None:
    """Fault 8."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    place = {"a file": "file", "below a file": "file/run", "a link to nothing": "link"}[what]
    assert f"output.dir: {'nothing can be written to ' * (what == 'below a file')}{tmp_path}/{place}" in refusal(
        train(f"output.dir={tmp_path}/{place}")
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("options", "words"), [(("ro",), "Read-only file system"), ((), "No space left on device")])
def test_a_disk_that_takes_nothing_is_said_before_the_base_is_loaded(
    train: Train, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    """Fault 8: read-only, and full from the start."""
    with small_disk(tmp_path / "disk", "40m", *options) as disk:
        if not options:
            (disk.seen_from_here / "run").mkdir()
            fill(disk.seen_from_here)
        error = refusal(train(f"output.dir={disk.folder}/run", prelude=(enter, disk.holder)))
    assert f"output.dir: nothing can be written to {disk.folder}/run (" in error
    assert words in error


# --- fault 8: deleted while it trains


def at_step(step: int, act: Callable, *args: Any) -> None:
    """A prelude: `act(folder, *args)` in the run, before its metrics of that step are written."""
    from qlora_suite import run_folder
    from qlora_suite.run_folder import Run

    run_folder.LOOK_PAUSE = 0  # or a busy machine, on which a look takes long, would look a step later
    real = Run.add_metrics

    def add_metrics(self: Run, step: int, **values: Any) -> None:
        if step == wanted:
            act(self.path, *args)
        real(self, step, **values)

    wanted, Run.add_metrics = step, add_metrics


def delete(folder: Path) -> None:
    shutil.rmtree(folder.resolve())


def delete_what_is_not_hidden(folder: Path) -> None:
    """As `rm -rf run/*` does."""
    for path in folder.glob("[!.]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def delete_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def link_checkpoints(folder: Path, target: str) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(target)


@pytest.mark.parametrize("act", [delete, delete_what_is_not_hidden, delete_checkpoints])
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_deleted_while_it_trains_is_made_anew_with_a_checkpoint(
    train: Train, tmp_path: Path, whole: Path, act: Callable, linked: bool
) -> None:
    """Fault 8: all that is known is written again and a checkpoint follows at once, not at the next multiple of every_steps."""
    folder = tmp_path / "run"
    if linked:
        (tmp_path / "scratch").mkdir()
        folder.symlink_to(tmp_path / "scratch")
    done = train(f"output.dir={folder}", "checkpoints.every_steps=4", "checkpoints.keep=9", prelude=(at_step, 5, act))
    assert done.wait() == 0, done.output
    assert "WERE DELETED" in done.output
    assert [record["step"] for record in metrics(folder)] == list(range(1, STEPS + 1))
    (event,) = [record for record in lines(folder / "metrics.jsonl") if "event" in record]
    assert (event["step"], event["event"]) == (5, "files of the run were deleted")
    assert "step-000004" in event["files"]
    assert checkpoint.steps(folder / "checkpoints") == [5, 6], "the one of step 5 was made at once"
    assert adapter(folder) == adapter(whole)
    assert {"run.json", "recipe.yaml", "status.json", ".lock"} <= {path.name for path in folder.iterdir()}
    assert read_json(folder / "status.json")["state"] == "finished"
    assert read_json(folder / "run.json")["precision"] == "float32"
    again = train(f"output.dir={folder}", "checkpoints.every_steps=4")
    assert again.wait() == 0
    assert "is finished" in again.output


def test_a_folder_that_cannot_be_made_anew_is_said_and_tried_again(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 8: something is in its place for some steps."""
    folder = tmp_path / "place" / "run"
    done = train(f"output.dir={folder}", "checkpoints.every_steps=2", prelude=(blocked, 3, 5))
    assert done.wait() == 0, done.output
    assert "IS GONE" in done.output
    assert "checkpoint at step 3 FAILED" in done.output
    assert [record["step"] for record in metrics(folder)] == list(range(1, STEPS + 1))
    assert checkpoint.steps(folder / "checkpoints") == [5, 6]
    assert adapter(folder) == adapter(whole)


def blocked(from_step: int, to_step: int) -> None:
    at_step(from_step, block)
    at_step(to_step, unblock)


def block(folder: Path) -> None:
    shutil.rmtree(folder.parent)
    folder.parent.write_text("")


def unblock(folder: Path) -> None:
    folder.parent.unlink()


@pytest.mark.parametrize(
    "damaged", ['{"state": "run', "[]", '{"state": 3}', '{"state": "running", "reason": "", "step": "4", "attempt": 1}', ""]
)
def test_a_damaged_status_is_made_anew(train: Train, tmp_path: Path, whole: Path, damaged: str) -> None:
    """Fault 5: it follows from the checkpoints, so a queue's next start must not fail on it."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text(damaged)
    done = train(f"output.dir={tmp_path / 'run'}")
    assert done.wait() == 0, done.output
    assert "status.json is made anew, for it is damaged" in done.output
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"
    assert adapter(tmp_path / "run") == adapter(whole)


@pytest.mark.parametrize("damaged", ['{"state": "run', "[]"])
def test_a_queue_goes_on_with_a_run_whose_notes_are_damaged(recipe: Path, tmp_path: Path, whole: Path, damaged: str) -> None:
    """Fault 5: status.json, the count of starts and the note of a step out of memory, as slurm/job.py reads them."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("status.json", "slurm_starts.json", "out_of_memory.json"):
        (folder / name).write_text(damaged)
    job = [sys.executable, str(ROOT / "slurm" / "job.py")]
    begun = subprocess.run(
        [*job, "begin", str(recipe), "accelerate_configs/cpu.yaml", f"output.dir={folder}"], capture_output=True, text=True, cwd=ROOT
    )
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.startswith("train")
    ended = subprocess.run([*job, "end", str(folder), "before"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("damaged")


def test_a_tracker_s_folder_beside_a_damaged_status_is_no_hindrance(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 23: what a run is, its run.json says as well; a tracker's folder has whatever name the project has."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "qlora-suite").mkdir()
    (tmp_path / "run" / "status.json").write_text("{")
    assert train(f"output.dir={tmp_path / 'run'}").wait() == 0


def test_a_mirror_keeps_what_is_not_ours(train: Train, tmp_path: Path) -> None:
    """Fault 23: the leftovers that a start removes are those of a run, in a mirror as in the run's folder."""
    for name in ("mirror/.editor-cache.tmp/mine", "mirror/checkpoints/.notes.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert train(f"output.dir={tmp_path / 'run'}", f"output.mirror={tmp_path / 'mirror'}").wait() == 0
    assert (tmp_path / "mirror" / ".editor-cache.tmp" / "mine").read_text() == "mine"
    assert (tmp_path / "mirror" / "checkpoints" / ".notes.tmp").read_text() == "mine"


def test_a_good_mirror_stands_in_for_damaged_checkpoints_at_once(train: Train, tmp_path: Path, whole: Path) -> None:
    """Fault 6: and a best one that is damaged in the mirror is left behind with a word."""
    places = (f"output.dir={tmp_path / 'run'}", f"output.mirror={tmp_path / 'mirror'}", "evaluation.every_steps=2")
    assert train(*places, "checkpoints.keep=2").wait() == 0
    wanted = adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    done = train(*places)
    assert done.wait() == 0, done.output
    assert "from the mirror" in done.output
    assert adapter(tmp_path / "run") == wanted


def test_keeping_all_needs_no_more_room_than_can_be_made(recipe: Path) -> None:
    """Fault 7: `keep: 1000` in a run of six steps is six checkpoints and the one that is being written."""
    assert need_of(load(recipe, ["checkpoints.keep=1000", "checkpoints.every_steps=1"]), 10**6, STEPS).checkpoints <= STEPS + 1
    assert need_of(load(recipe, ["checkpoints.keep=3"]), 10**6, 10_000).checkpoints == 4
