#!/usr/bin/env python
"""What the shell scripts beside this file ask about recipes and runs. It imports neither torch nor transformers: a quick answer.

    python slurm/job.py check [--nodes 2 --processes 8] RECIPE CONFIG [key=value ...]     before anything is submitted: what is wrong?
    python slurm/job.py fetch RECIPE [key=value ...]                                      on the login node: the base, into the hub's cache
    python slurm/job.py begin [--nodes 2 --processes 8] RECIPE CONFIG [key=value ...]     when a job starts: is there something to do?
    python slurm/job.py end RUN_DIR STAMP                                                 when it ends: how did it go?
    python slurm/job.py task [--sweep FILE] [--grid key=v1,v2] INDEX RECIPE [key=value ...]     what does this task of an array train?

Each prints lines for the shell; an error is one sentence on stderr and exit code 1.
"""

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_suite import compatibility
from qlora_suite.accelerate_config import check_base, check_config, engine_of
from qlora_suite.batches import check_division
from qlora_suite.dataset import load_manifest
from qlora_suite.files import read_json, write_json
from qlora_suite.micro_batch import NOTE
from qlora_suite.preemption import REQUEST
from qlora_suite.recipe import Recipe, curve_keys, names_files
from qlora_suite.recipe_file import load
from qlora_suite.run_place import check_path, check_run_folder

MAX_STARTS = 3
"""From one checkpoint: the first and two restarts. A run that then has made no new checkpoint will not make one by itself."""
STARTS = "slurm_starts.json"


# ---- before a job --------------------------------------------------------------------------------------------------------------


def check(recipe: Recipe, config: Path, nodes: int, processes: int | None) -> None:
    """Raises ValueError for what would only show after hours in the queue."""
    values = check_config(config, nodes, processes)
    compatibility.check(recipe, engine_of(values))
    check_path("output.dir", recipe.output.dir)
    run = Path(recipe.output.dir)
    check_run_folder(run)
    if (run / "recipe.yaml").is_file():
        then, now = (curve_keys(one) for one in (load(run / "recipe.yaml"), recipe))
        changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key) and not names_files(key))
        if changed:
            raise ValueError(f"the run in {run} was started with other values of {', '.join(changed)}; put them back, or set output.dir")
    if processes is not None:
        check_division(recipe.train.rows_per_step, processes, recipe.train.micro_batch)
    check_base(recipe)
    load_manifest(recipe)


def fetch(recipe: Recipe) -> str:
    """Download the base into the hub's cache; returns a sentence. Raises ValueError if the hub does not give it."""
    if Path(recipe.model.base).is_dir():
        return f"the base is the folder {recipe.model.base}"
    from huggingface_hub import HfApi, snapshot_download

    base, revision = recipe.model.base, recipe.model.revision
    try:
        names = [file.path for file in HfApi().list_repo_tree(base, revision=revision)]
        weights = "*.safetensors*" if any(name.endswith(".safetensors") for name in names) else "*.bin*"
        wanted = ["*.json", "*.txt", "*.model", "*.jinja", *([] if recipe.model.random_init else [weights])]
        snapshot_download(base, revision=revision, allow_patterns=wanted, ignore_patterns=["config.json", "*/*"])
        folder = snapshot_download(base, revision=revision, allow_patterns=["config.json"])
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        raise ValueError(f"{base} could not be fetched: {' '.join(str(error).split())}") from None
    return f"the base {base} is in {folder}"


# ---- a sweep -------------------------------------------------------------------------------------------------------------------


def tasks(recipe: Path, sweep: Path | None, grids: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every task: each line of the file with each point of the grid. A task's output.dir is named for what it varies.

    Raises ValueError if a grid is malformed or two tasks would write to one folder.
    """
    lines = [[]] if sweep is None else read_lines(sweep)
    axes = [grid_axis(grid) for grid in grids]
    varied = [[*line, *point] for line in lines for point in itertools.product(*axes)]
    found = []
    for own in varied:
        everything = [*overrides, *own]
        if not any(override.startswith("output.dir=") for override in own):
            everything.append(f"output.dir={load(recipe, overrides).output.dir}-sweep/{folder_name(own)}")
        found.append(everything)
    folders = [load(recipe, task).output.dir for task in found]
    if twice := next((folder for i, folder in enumerate(folders) if folder in folders[:i]), None):
        raise ValueError(f"two tasks of the sweep would write to {twice}: let them differ, or give each its own output.dir")
    return found


def read_lines(path: Path) -> list[list[str]]:
    """Overrides, those of one task in a line, quoted as in a shell; empty lines and # comments do not count."""
    if not path.is_file():
        raise ValueError(f"there is no sweep file at {path}")
    lines = [words for line in path.read_text(encoding="utf-8").splitlines() if (words := shlex.split(line, comments=True))]
    if not lines:
        raise ValueError(f"{path} holds no task: write key=value ... in a line for each")
    return lines


def grid_axis(text: str) -> list[str]:
    """`seed=0,1` -> ["seed=0", "seed=1"]; a comma inside brackets or quotes belongs to the value."""
    key, sign, values = text.partition("=")
    if not sign or not values:
        raise ValueError(f"{text!r} is not an axis of a grid; write key=value1,value2")
    return [f"{key}={value}" for value in re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)]


def folder_name(overrides: Sequence[str]) -> str:
    """["seed=1", "optim.learning_rate=1e-4"] -> "seed=1,learning_rate=1e-4" """
    short = ",".join(re.sub(r"^[\w.]*\.(?=\w+=)", "", override) for override in overrides)
    return re.sub(r"[^\w.,=+-]+", "_", short).encode()[:150].decode(errors="ignore")


# ---- when a job starts and ends ------------------------------------------------------------------------------------------------


def begin(recipe: Recipe) -> str:
    """`finished` if nothing is left to do, else the script that has to do it; counts the starts from the newest checkpoint.

    Raises ValueError if it was started MAX_STARTS times from there already.
    """
    run = Path(recipe.output.dir)
    if is_finished(run, recipe):
        return "finished"
    newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="no checkpoint")
    noted, status = read_if_whole(run / STARTS), read_if_whole(run / "status.json")
    starts = int(noted.get("starts", 0)) + 1 if noted.get("checkpoint") == newest else 1
    if starts > 1 and ran_out_of_memory(run, status):  # the next one tries less, which is not the same again
        starts -= 1
    if starts > MAX_STARTS:
        raise ValueError(
            f"{run} was started {MAX_STARTS} times from {newest} and made no new checkpoint, so it is not started again; "
            f"its log says why it ended, and `bash slurm/submit.sh` (or removing {run / STARTS}) gives it another chance"
        )
    write_json(run / STARTS, {"checkpoint": newest, "starts": starts})
    (run / REQUEST).unlink(missing_ok=True)  # of an earlier start that ended before it could honour it
    return script_of(recipe)


def script_of(recipe: Recipe) -> str:
    """The name in scripts/ of what trains it."""
    return "train" if recipe.grpo is None else "train_grpo"


def is_finished(run: Path, recipe: Recipe) -> bool:
    """Is it, and is it this recipe's? Another one is for train.py to refuse, which says what differs."""
    if read_if_whole(run / "status.json").get("state") != "finished":
        return False
    try:
        return curve_keys(load(run / "recipe.yaml")) == curve_keys(recipe)
    except ValueError:
        return False


def read_if_whole(path: Path) -> dict[str, Any]:
    """A JSON object; nothing if it is not there or damaged, as train.py takes it, which makes it anew."""
    try:
        found = read_json(path) if path.exists() else {}
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def ran_out_of_memory(run: Path, status: Mapping[str, Any]) -> bool:
    """Did the last start end because a step did not fit, and is there less to try?"""
    ended = read_if_whole(run / NOTE).get("ended_attempt")
    return ended is not None and ended == status.get("attempt")


def stamp(run: Path) -> str:
    """Changes whenever status.json is written."""
    try:
        found = os.stat(run / "status.json")
    except FileNotFoundError:
        return "none"
    return f"{found.st_ino}-{found.st_mtime_ns}"


def end(run: Path, before: str) -> tuple[str, str]:
    """How a start ended, and a sentence about it. `accelerate launch` turns every exit code into 1, so only status.json can say."""
    if stamp(run) == before:
        return "silent", "the run ended before it opened its folder; the lines above say why"
    status = read_if_whole(run / "status.json")
    state, reason = status.get("state", "damaged"), status.get("reason", "")
    where = f"at step {status.get('step', '?')} of {status.get('num_steps', '?')}"
    if state in ("running", "failed") and ran_out_of_memory(run, status):
        return "stopped", f"out of memory {where}; it goes on with smaller micro-batches"
    if state == "running":
        return state, f"the run died {where} without a word: killed, out of memory, or a lost node"
    return state, f"{state} {where}" + (f" ({reason})" if reason else "")


# ---- command line --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "fetch", "begin", "end", "task"))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    try:
        for line in answer(args):
            print(line)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def answer(args: argparse.Namespace) -> list[str]:
    if args.command == "end":
        run, before = args.words
        return list(end(Path(run), before))
    if args.command == "task":
        index, recipe_file, *overrides = args.words
        found = tasks(Path(recipe_file), args.sweep, args.grid, overrides)
        if int(index) >= len(found):
            raise ValueError(f"the sweep has {len(found)} tasks, numbered from 0; the array asks for number {index}")
        return found[int(index)]
    if args.command == "fetch":
        recipe_file, *overrides = args.words
        return [fetch(load(recipe_file, overrides))]
    recipe_file, config, *overrides = args.words
    if args.command == "begin":
        recipe = load(recipe_file, overrides)
        check_config(Path(config), args.nodes, args.processes)
        run = Path(recipe.output.dir)
        return [begin(recipe), str(run), stamp(run)]
    sweep = args.sweep is not None or bool(args.grid)
    found = tasks(Path(recipe_file), args.sweep, args.grid, overrides) if sweep else [overrides]
    recipes = [load(recipe_file, one) for one in found]
    for recipe in recipes:
        check(recipe, Path(config), args.nodes, args.processes)
    runs = [Path(recipe.output.dir) for recipe in recipes]
    return [f"{'finished' if is_finished(run, recipe) else 'open'} {run}" for run, recipe in zip(runs, recipes, strict=True)]


if __name__ == "__main__":
    main()
