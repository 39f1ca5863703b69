"""Where a run may write: any path that its owner names, but never over, into or out of what is not a run's.

Imports only the standard library, for slurm/job.py asks before anything is queued.
"""

import fnmatch
import os
import unicodedata
from pathlib import Path

from qlora_suite.files import read_json

LONGEST_NAME, LONGEST_PATH = 200, 3500
"""In bytes. File systems take 255 and 4,096; what is written aside has a longer name, and the run's files are below."""
STATES = ("running", "stopped", "finished", "failed")
LEFT_BY_A_RUN = (
    *("status.json", "run.json", "recipe.yaml", "metrics.jsonl", "previews.jsonl", "previews.md", "checkpoints", "final", "final.corrupt*"),
    *(".lock", ".shared", ".final.tmp", ".*.tmp", "hung-rank*.txt", "stop_request", "slurm_starts.json", "black_box", "out_of_memory.json"),
    *("report*.md", "report*.json", "report*.html", "evaluation", "merged", "hub", "samples.jsonl", "samples.md", "reference.jsonl"),
)
LEFT_BESIDE_IT = ("log", "log.txt", "nohup.out", "*.log", "*.out", "*.err", ".DS_Store", "lost+found", ".nfs*", ".gitignore", ".gitkeep")
"""Logs of queues and shells, and what file systems make."""


def check_path(key: str, path: str) -> None:
    """Raises ValueError, naming the recipe's `key`, for a path that cannot be a folder's. Where it leads is its owner's choice."""
    if not path.strip():
        raise ValueError(f"{key} is empty; name a folder")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in path):
        raise ValueError(f"{key}: {path!r} has a control character or a line end in it; name a folder without")
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(f"{key}: {path[:40]!r}... has a name of {longest} bytes; choose one of at most {LONGEST_NAME}")


def check_run_folder(folder: Path) -> None:
    """Raises ValueError if output.dir is there and is no run's, or holds links that would lead a run out of it."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            what = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
            raise ValueError(f"output.dir: {folder} is {what}, not a folder; remove it, or name another")
        return
    check_links(folder)
    names = sorted(path.name for path in folder.iterdir())
    status = _status(folder / "status.json")
    if isinstance(status, dict) and status.get("state") in STATES and "reason" in status:
        return
    if _is_status_of_a_run(folder / "run.json"):  # with a status.json that is damaged or gone; trackers leave folders of any name
        return
    foreign = [name for name in names if not _is_left_by_a_run(folder / name)]
    if foreign or isinstance(status, dict):  # a damaged status.json among a run's own files is made anew
        shown = ", ".join(foreign[:3] or ["a status.json of another program"]) + (", ..." if len(foreign) > 3 else "")
        raise ValueError(f"output.dir: {folder} holds what is of no run ({shown}) and a run might overwrite it; name a folder of its own")


def check_links(folder: Path) -> None:
    """Raises ValueError if something that a run writes or deletes in its folder (or in a mirror) is a link to elsewhere."""
    inside = [path for place in (folder, folder / "checkpoints") if place.is_dir() for path in place.iterdir()]
    for path in inside:
        if path.is_symlink() and (path.parent != folder or _matches(path.name, LEFT_BY_A_RUN)):
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, and a run writes and deletes nothing outside of its folder; remove the link "
                "(the whole folder may be a link to another disk)"
            )


def check_mirror(mirror: str, output_dir: str) -> None:
    """Raises ValueError for an output.mirror that is no place for copies."""
    check_path("output.mirror", mirror)
    ours, theirs = (os.path.realpath(path) for path in (output_dir, mirror))
    if Path(theirs).is_relative_to(ours):
        raise ValueError(f"output.mirror: {mirror} lies in output.dir, so it would be lost with it; name a folder on another disk")
    if Path(mirror).is_dir():
        check_links(Path(mirror))


def _status(path: Path) -> object:
    """What status.json holds; None if it is not there, and if it cannot be read the reason, as text."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except ValueError as error:
        return str(error)
    return found if isinstance(found, dict) else "it holds no status"


def _is_left_by_a_run(path: Path) -> bool:
    if path.name == "checkpoints":
        return path.is_dir() and all(_matches(inner.name, ("step-*", ".step-*", ".DS_Store", ".nfs*")) for inner in path.iterdir())
    if path.name == "final":  # a run replaces it
        return (path / "manifest.json").is_file() and (path / "chosen.json").is_file()
    return _matches(path.name, LEFT_BY_A_RUN) or _matches(path.name, LEFT_BESIDE_IT)


def _is_status_of_a_run(path: Path) -> bool:
    found = _status(path)
    return isinstance(found, dict) and {"recipe", "servable_as", "attempt"} <= found.keys()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
