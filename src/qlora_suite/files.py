"""Files that are either wholly there or not there: write aside, flush, rename; and their hashes."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def flush(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """A full disk does not say which one it is: an OSError of the block that names no file names `path`.

    Libraries in Rust (tokenizers, safetensors) raise errors of their own, with the number in their text: those become OSErrors.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path; what was written there takes `path`'s place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path):
            yield aside
            flush(aside)
            aside.replace(path)
            flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def folder_aside(folder: Path, ending: str) -> Path:
    """A new hidden folder beside `folder`, of this process alone. Those of this machine's processes that were killed are removed."""
    of_here = f".{folder.name}.{platform.node()}-"
    for left in folder.parent.glob(f"{glob.escape(of_here)}*.{ending}"):
        pid = left.name.removeprefix(of_here).removesuffix(f".{ending}")  # of x.selected.tmp, which is another's, it is no number
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{of_here}{os.getpid()}.{ending}")
    aside.mkdir(parents=True)
    return aside


def remove_folder(folder: Path) -> None:
    """All of it, even if a request to stop (an exception of a signal's handler) comes in the middle, which is then raised."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_alive(pid: int) -> bool:
    """Is there such a process on this machine? (watchdog.py asks the same, and is run as a file, without this package.)"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@contextlib.contextmanager
def folder_made_aside(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes `folder`'s name if the block ends well. Raises ValueError if something is in its place."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it or give another folder")
    aside = folder_aside(folder, "tmp")
    try:
        yield aside
        for path in aside.iterdir():
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read; a model is there to be shared
            flush(path)
        aside.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a symbolic link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_json(path: Path) -> Any:
    """Raises ValueError if the file is not JSON, or JSON that nobody writes: numbers of 5,000 digits, or a thousand brackets deep."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deep to be read") from None


def check_version(path: Path, values: Mapping[str, Any], known: int) -> None:
    """Raises ValueError for a file of a newer format than this version of the suite reads. One that names none has the first."""
    if (found := values.get("format_version", 1)) > known:
        raise ValueError(f"{path} was written by a newer version (format {found}, this one reads {known}); update qlora-suite")


def file_table(folder: Path, but: str) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below a folder except `but`, by its relative name: the part of a manifest that protects it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != but)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def complaint_about(folder: Path, table: dict[str, dict[str, Any]], hashes: bool = True) -> str | None:
    """What is wrong with the files that a manifest's table promises, or None. The table may come from anybody.

    Without `hashes` the files are not read: they are there, and as long as they were.
    """
    if not isinstance(table, dict) or not all(
        isinstance(expected, dict) and expected.keys() >= {"bytes", "sha256"} for expected in table.values()
    ):
        return "the table of its files is damaged"
    for name, expected in table.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{name} is not in the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if hashes and sha256(path) != expected["sha256"]:
            return f"{name} does not have the hash it was written with"
    return None
