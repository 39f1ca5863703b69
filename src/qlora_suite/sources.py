"""Any input -> rows (dicts), one at a time, each with its place: files of any size pass through bounded memory.

    read("OpenAssistant/oasst1", "train")     a data set on the hub, one of its splits, streamed
    read("chats.json")                        JSON (a list of objects), JSONL, both also .gz, or Parquet
    read(("chats", "more.parquet"))           a folder of those, in the order of their names, and then a file

What cannot be read of a file that can (a line that is no JSON, a byte that is no UTF-8) comes as a `BadRow` in its place; a file that
is damaged as a whole raises ValueError. Nothing that could run code is opened: no pickle, no data set that brings a script of its own.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from qlora_suite.recipe import Source

Split = Literal["train", "validation"]
_READABLE = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
# What lies beside data without being data: licences and notes. Anything else in a folder is a mistake worth a word.
_BESIDE_DATA = ("", ".md", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BETWEEN = re.compile(r"\s*(,?)\s*")
_CHUNK = 2**20
_LONGEST = 2**26
"""Bytes of a line, or characters of an object in a list: what memory must hold at once. A file of any size may have only few line ends."""
_SHOWN = 80
"""Characters of an offending value."""


@dataclass(frozen=True, slots=True)
class Place:
    file: str
    """The file's name, or the hub's and the split's. Without its folder, so that moved data is the same data."""
    number: int
    """Of the line, or of the row, from 1."""
    unit: Literal["line", "row"] = "line"
    line: int | None = None
    """Where a row of a JSON list begins: several may stand on one line."""

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}" + (f" (line {self.line})" if self.line else "")


@dataclass(frozen=True, slots=True)
class Row:
    place: Place
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """What was left out, and why."""

    place: Place | str
    reason: str
    """Counted by this: a few words that hold nothing of the data."""
    key: str = ""
    """The key at which it was seen."""
    value: str = ""
    """The beginning of what stood there."""

    def __str__(self) -> str:
        seen = ", ".join(filter(None, (self.reason, self.key)))
        return f"{self.place}: {seen}{f': {self.value}' if self.value else ''}"


def shown(value: Any) -> str:
    """The beginning of a value as JSON, for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = repr(type(value))
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def load(source: Source, prefix: str = "") -> dict[str, Iterator[Row | BadRow]]:
    """{"train": rows, "validation": rows} with `split: published`, {"all": rows} with `by_hash` and `all`.

    The prefix stands before the file's name in each place.

    Raises ValueError for what cannot be found and for a published split that is not there; while being read, for damaged files.
    """
    names = _names(source.source)
    if source.revision is not None and not any(_is_hub_id(name) for name in names):
        raise ValueError(f"data.revision has no effect on local files ({', '.join(names)}); remove it")
    if source.split != "published":
        return {"all": read(names, revision=source.revision, prefix=prefix)}
    if source.validation_source is not None:
        train, validation = _places(names, "train"), _places(_names(source.validation_source), "validation")
        label_of = _labelled([*train, *validation], prefix)  # together, so that no two files of a data set have one name
        return {
            "train": _read(train, "train", source.revision, prefix, label_of),
            "validation": _read(validation, "validation", None, prefix, label_of),
        }
    for name in names:
        path = Path(name)
        if path.is_file() or (path.is_dir() and not any(_is_of(p, "validation") for p in _files(path))):
            raise ValueError(
                f"split: published needs a validation split, and {name} holds none (in a folder: files named validation*); "
                "set data.validation_source to it, or cut one off with data.split=by_hash"
            )
    return {split: read(names, split, source.revision, prefix) for split in ("train", "validation")}


def read(
    source: str | tuple[str, ...], split: Split | None = None, revision: str | None = None, prefix: str = ""
) -> Iterator[Row | BadRow]:
    """The rows of every source, one after another; OASST trees as flat messages, depth first.

    With a split: that split of a hub data set; of a folder, the files named train* or validation* (all of them, if none is
    named so). Without: a hub data set's train split, for its validation split is not for training; every file of a folder.

    Raises ValueError for what is missing (at once), and for what is damaged or empty (when it comes to it).
    """
    places = _places(_names(source), split)
    return _read(places, split, revision, prefix, _labelled(places, prefix))


def _places(names: tuple[str, ...], split: Split | None) -> list[tuple[str, list[Path]]]:
    """Each name with its files; a hub id has none."""
    places: list[tuple[str, list[Path]]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            places.append((name, _split_files(path, split)))
        elif path.is_file():
            places.append((name, [path]))
        elif _is_hub_id(name):
            places.append((name, []))
        else:
            raise ValueError(f"there is no file or folder {name} (working folder: {Path.cwd()}); correct data.source")
    return places


def _labelled(places: list[tuple[str, list[Path]]], prefix: str) -> dict[Path, str]:
    files = list(dict.fromkeys(file for _, found in places for file in found))
    return {file: prefix + label for file, label in zip(files, labels(files), strict=True)}


def _read(
    places: list[tuple[str, list[Path]]], split: Split | None, revision: str | None, prefix: str, label_of: dict[Path, str]
) -> Iterator[Row | BadRow]:
    for name, found in places:
        empty = True
        streams = (_read_file(file, label_of[file]) for file in found) if found else (_read_hub(name, split or "train", revision, prefix),)
        for stream in streams:
            for row in _flat(stream):
                empty = False
                yield row
        if empty:
            raise ValueError(f"{name} holds no rows; give a file with at least one")


def labels(files: list[Path]) -> list[str]:
    """A name for each file, without its folder; where two would be the same, with as much of it as tells them apart."""
    parts = {file: file.parts[-1:] for file in files}
    while twice := {name for name, count in Counter(parts.values()).items() if count > 1}:
        deeper = {file: file.parts[-len(name) - 1 :] if name in twice else name for file, name in parts.items()}
        if deeper == parts:
            break
        parts = deeper
    return ["/".join(parts[file]) for file in files]


def _flat(rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows as they are, but each OASST tree as its messages, with parent_id and message_tree_id filled in."""
    for row in rows:
        if isinstance(row, BadRow) or "message_tree_id" not in row.values or "prompt" not in row.values:
            yield row
            continue
        tree = {"message_tree_id": row.values["message_tree_id"], "tree_state": row.values.get("tree_state")}
        messages: list[Row | BadRow] = []
        stack = [(row.values["prompt"], None)]
        while stack:  # a tree may be deeper than Python's stack
            message, parent = stack.pop()
            replies = message.get("replies") if isinstance(message, dict) else None
            if not isinstance(message, dict) or not isinstance(replies, list | None):
                messages = [BadRow(row.place, "the tree holds something else than a message", "prompt", shown(message))]
                break
            messages.append(Row(row.place, {k: v for k, v in message.items() if k != "replies"} | {"parent_id": parent} | tree))
            stack += [(reply, message.get("message_id")) for reply in reversed(replies or [])]
        yield from messages


def _names(source: str | tuple[str, ...] | None) -> tuple[str, ...]:
    assert source is not None, "the recipe refuses a data set without a source"
    return (source,) if isinstance(source, str) else source


# --- files


def _files(folder: Path) -> list[Path]:
    """The readable files in a folder and its folders, in the order of their paths; hidden ones and notes are passed by."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = [p for p in paths if p.name.endswith(_READABLE)]
    others = [p for p in paths if not p.name.endswith(_READABLE) and p.suffix not in _BESIDE_DATA]
    if others:
        _refuse(others[0])
    if not files:
        raise ValueError(f"the folder {folder} holds no file named *{', *'.join(_READABLE)}; put the data there or correct the path")
    return files


def _split_files(folder: Path, split: Split | None) -> list[Path]:
    files = _files(folder)
    if split is None or not any(_is_of(p, "train") or _is_of(p, "validation") for p in files):
        return files
    files = [p for p in files if _is_of(p, split)]
    if not files:
        raise ValueError(f"the folder {folder} holds no file named {split}*, though its files are named by split; add it or name the files")
    return files


def _is_of(path: Path, split: Split) -> bool:
    return path.name.startswith(split)


def _refuse(path: Path) -> None:
    remedy = {
        ".csv": "write it as JSONL, one object a line (csv.DictReader and json.dumps do it in three lines)",
        ".txt": 'write {"text": ...}, one object a line, into a file .jsonl and set chat.format: text',
    }.get(path.suffix, "convert the file, or move it away if it is no data")
    raise ValueError(f"{path} is not read: data must be {', '.join(_READABLE)}; {remedy}")


def _read_file(path: Path, label: str) -> Iterator[Row | BadRow]:
    if not path.name.endswith(_READABLE):
        _refuse(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, label)
    # Many files named .json hold one object a line, and the other way round; what begins with a bracket is one list.
    return _read_list(path, label) if _first_byte(path) == b"[" else _read_lines(path, label)


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _first_byte(path: Path) -> bytes:
    try:
        with _opened(path) as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except (OSError, EOFError, zlib.error) as error:
        raise _cannot_read(path, 0, "line", error) from None


def _cannot_read(path: Path, number: int, unit: str, error: Exception) -> ValueError:
    what = " ".join(str(error).split())
    return ValueError(f"{path} cannot be read after {unit} {number}: {what}; repair the file, or fetch it again")


def _read_lines(path: Path, label: str) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with _opened(path) as lines:
            while line := lines.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    yield BadRow(Place(label, number), f"a line of more than {_LONGEST:,} bytes")
                    while not line.endswith(b"\n") and (line := lines.readline(_CHUNK)):
                        pass
                    continue
                row = _parse(line, Place(label, number))
                if number == 1 and isinstance(row, BadRow) and line.strip() == b"{":
                    raise ValueError(
                        f"{path} is one JSON object over several lines; wanted is a list of rows, or a row a line: "
                        "write the list that it holds into a file of its own"
                    )
                if row is not None:
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        raise _cannot_read(path, number, "line", error) from None


def _parse(line: bytes, place: Place) -> Row | BadRow | None:
    """The object on one line; None for a blank one."""
    try:
        text = line.decode("utf-8-sig")  # Windows editors put a byte order mark in front
        if not text.strip():
            return None
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(place, "not UTF-8", f"byte {error.start + 1}", f"{line[error.start]:#04x}")
    except RecursionError:
        return BadRow(place, "nested too deep to be read")
    except ValueError as error:  # no JSON, or a number of thousands of digits
        where = f"character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow(place, "not JSON", where, text.strip()[:_SHOWN])
    return _checked(row, place, "\\ud" in text.lower())


def _checked(row: Any, place: Place, may_hold_surrogates: bool, bytes_came_through: bool = False) -> Row | BadRow:
    if not isinstance(row, dict):
        return BadRow(place, "not an object with keys", "", shown(row))
    if may_hold_surrogates:
        # "\ud83d" without its other half is JSON but no text: no tokenizer and no file could take it.
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            around, lone = str(error.object)[max(error.start - 20, 0) : error.start + 20], ord(error.object[error.start])
            if bytes_came_through and 0xDC80 <= lone <= 0xDCFF:
                return BadRow(place, "not UTF-8", f"byte {lone - 0xDC00:#04x} in", shown(around))
            return BadRow(place, "half of a surrogate pair, which is no text", "", shown(around))
    return Row(place, row)


def _read_list(path: Path, label: str) -> Iterator[Row | BadRow]:
    """One JSON list of objects, a few of them in memory at a time, each at the line where it begins."""
    decoder, number, line, at = json.JSONDecoder(), 0, 1, 0
    try:
        # Bytes that are no UTF-8 come through as surrogates, so that one of them costs its own object alone.
        with io.TextIOWrapper(_opened(path), "utf-8-sig", "surrogateescape", newline="") as file:
            text = file.read(_CHUNK)
            at = text.index("[") + 1
            line += text.count("\n", 0, at)
            comma = ""  # none before the first object
            while True:
                between = _BETWEEN.match(text, at)
                if between.end() == len(text) and (more := file.read(_CHUNK)):
                    text, at = text[at:] + more, 0
                    continue
                line += text.count("\n", at, between.end())
                at = between.end()
                if text[at : at + 1] == "]" and not between[1]:
                    _check_nothing_follows(text[at + 1 :], file)
                    return
                if between[1] != comma:
                    raise ValueError(f"wanted is {'a comma' if comma else 'an object'}, {shown(text[at : at + 40])}")
                try:
                    value, end = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    # It may only be that the object goes on behind what was read; then the error is at the end of it.
                    cut_off = error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")
                    if len(text) - at > _LONGEST:
                        raise ValueError(f"an object goes on for more than {_LONGEST:,} characters") from None
                    more = file.read(max(_CHUNK, len(text) - at)) if cut_off else ""
                    if not more:
                        raise ValueError(f"{error.msg}, {shown(text[error.pos : error.pos + 40])}") from None
                    text, at, comma = text[at:] + more, 0, ""  # the comma is behind us
                    continue
                number += 1
                yield _checked(value, Place(label, number, "row", line), may_hold_surrogates=True, bytes_came_through=True)
                line += text.count("\n", at, end)
                at, comma = end, ","
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise _cannot_read(path, line, "line", error) from None


def _check_nothing_follows(rest: str, file: IO[str]) -> None:
    """Two lists in one file are no JSON."""
    while not rest.strip() and (more := file.read(_CHUNK)):
        rest = more
    if rest.strip():
        raise ValueError(f"something stands behind the end of the list, {shown(rest.strip()[:40])}")


def _read_parquet(path: Path, label: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:  # else it reads the whole file at once
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(Place(label, number, "row"), row)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # e.g. no text where text should be, a date beyond all dates
        raise _cannot_read(path, number, "row", error) from None


# --- the hub


def hub_commits(source: Source) -> dict[str, str]:
    """{hub id: the commit that its name and revision stand for now}; `unknown` if the hub does not say (a copy from the cache)."""
    import huggingface_hub  # local files do not need it

    commits = {}
    for name in _names(source.source):
        if _is_hub_id(name):
            try:
                commits[name] = huggingface_hub.HfApi().dataset_info(name, revision=source.revision).sha or "unknown"
            except (OSError, ValueError):
                commits[name] = "unknown"
    return commits


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_READABLE) and not Path(name).exists()


def _read_hub(name: str, split: Split, revision: str | None, prefix: str = "") -> Iterator[Row]:
    import datasets  # takes seconds, and local files do not need it

    # Offline there is only what was fetched before, whole, and is then read from the cache; both come row by row.
    try:
        rows = datasets.load_dataset(name, split=split, revision=revision, streaming=not datasets.config.HF_HUB_OFFLINE)
        for number, row in enumerate(rows, 1):
            yield Row(Place(f"{prefix}{name}/{split}", number, "row"), row)
    except Exception as error:  # the clients below have many of their own, timeouts among them
        raise ValueError(
            f"there is no file or folder {name} here, and the hub gave no split {split} of a data set of that name "
            f"({type(error).__name__}: {' '.join(str(error).split())}); correct data.source, or give local files"
        ) from None
