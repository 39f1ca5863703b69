"""Any input -> rows (dicts), and plain rows -> conversations.

    read("OpenAssistant/oasst1", "train")     a data set on the hub, one of its splits
    read("chats.jsonl.gz")                    JSONL, JSONL.gz or Parquet
    read(("chats", "more.parquet"))           a folder of those, in the order of their names, and then a file

What a row is, is seen from its keys, never from the name of its file:

    {"message_id", "parent_id", "message_tree_id", "text", "role", ...}    an OASST message          -> oasst1.py
    {"message_tree_id", "prompt": {..., "replies": [{...}]}}               an OASST tree, flattened  -> oasst1.py
    {"messages": [{"role", "content"}, ...]}                               a chat                    -> messages_conversations
    {"text"}                                                               plain text                -> text_conversations

Nothing that could run code is opened: no pickle, and no data set that brings a script of its own.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_suite.conversations import Conversation, Turn
from qlora_suite.recipe import Data

Row = dict[str, Any]
Kind = Literal["oasst", "messages", "text"]
Split = Literal["train", "validation"]
ROLES = {"system": "system", "user": "user", "prompter": "user", "assistant": "assistant"}
_READABLE = (".jsonl", ".jsonl.gz", ".parquet")
# What lies beside data without being data: licences and notes. Anything else in a folder is a mistake worth a word.
_BESIDE_DATA = ("", ".md", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(data: Data) -> dict[str, list[Row]]:
    """{"train": rows, "validation": rows} with `split: published`, {"all": rows} with `by_hash` and `all`.

    Raises ValueError for what cannot be read and for a published split that is not there.
    """
    if data.revision is not None and not any(_is_hub_id(name) for name in _names(data.source)):
        raise ValueError(f"data.revision has no effect on local files ({data.source}); remove it")
    if data.split != "published":
        return {"all": read(data.source, revision=data.revision)}
    if data.validation_source is not None:
        return {"train": read(data.source, "train", data.revision), "validation": read(data.validation_source, "validation")}
    for name in _names(data.source):
        path = Path(name)
        if path.is_file() or (path.is_dir() and not any(_is_of(p, "validation") for p in _files(path))):
            raise ValueError(
                f"split: published needs a validation split, and {name} holds none (in a folder: files named validation*); "
                "set data.validation_source to it, or cut one off with data.split=by_hash"
            )
    return {split: read(data.source, split, data.revision) for split in ("train", "validation")}


def read(source: str | tuple[str, ...], split: Split | None = None, revision: str | None = None) -> list[Row]:
    """The rows of every source, one after another; OASST trees as flat messages, depth first.

    With a split: that split of a hub data set; of a folder, the files named train* or validation* (all of them, if none is
    named so). Without: a hub data set's train split, for its validation split is not for training; every file of a folder.

    Raises ValueError, with the file and line, for what is missing, not readable or empty.
    """
    rows: list[Row] = []
    for name in _names(source):
        before = len(rows)
        path = Path(name)
        if path.is_file() or path.is_dir():
            for file in _split_files(path, split) if path.is_dir() else [path]:
                rows += _flat(_read_file(file))
        elif _is_hub_id(name):
            rows += _flat(_read_hub(name, split or "train", revision))
        else:
            raise ValueError(f"there is no file or folder {name} (working folder: {Path.cwd()}); correct the path")
        if len(rows) == before:
            raise ValueError(f"{name} holds no rows; give a file with at least one")
    return rows


def kind(rows: list[Row]) -> Kind:
    """What the rows are. Raises ValueError if they are none of the three kinds, or several."""
    found = Counter(_row_kind(row) for row in rows)
    known: list[Kind] = [k for k in found if k is not None]
    if not known:
        seen = ", ".join(list(rows[0])[:8]) if rows else "no row at all"
        raise ValueError(
            f"the rows have the keys: {seen}; wanted are OASST messages (message_id, parent_id, ...), OASST trees "
            "(message_tree_id, prompt), chats (messages) or plain text (text); rename the keys"
        )
    if len(known) > 1:
        counts = " and ".join(f"{found[k]:,} of kind {k}" for k in known)
        raise ValueError(f"the rows are of several kinds, {counts}; prepare each kind by a recipe of its own")
    return known[0]


def messages_conversations(rows: list[Row]) -> tuple[list[Conversation], Counter[str]]:
    """One conversation a row, and the number of rows skipped by each reason: kept = len(rows) - skipped.total().

    The key is the row's number, from 1 and counting skipped ones, so that it leads back to the line. The group is a hash of
    the first user turn, so that several answers to one prompt, or one chat written out turn by turn, stay on one side of a
    split. A system message without text says nothing and is left out of its conversation.
    """
    kept, skipped = [], Counter[str]()
    for number, row in enumerate(rows, 1):
        turns = _turns(row.get("messages"))
        if isinstance(turns, str):
            skipped[turns] += 1
        else:
            first = next((t.content for t in turns if t.role == "user"), turns[0].content)
            kept.append(Conversation(key=str(number), ids=(str(number),), group=_group(first), turns=turns))
    assert len(rows) == len(kept) + skipped.total()
    return kept, skipped


def text_conversations(rows: list[Row]) -> tuple[list[Conversation], Counter[str]]:
    """One assistant turn a row, and the number of rows skipped by each reason: kept = len(rows) - skipped.total().

    The key is the row's number, from 1 and counting skipped ones; the group is a hash of the text, so that a text that
    stands twice is never on both sides of a split.
    """
    kept, skipped = [], Counter[str]()
    for number, row in enumerate(rows, 1):
        text = row.get("text")
        if not isinstance(text, str):
            skipped["no text"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            kept.append(Conversation(key=str(number), ids=(str(number),), group=_group(text), turns=(Turn("assistant", text),)))
    assert len(rows) == len(kept) + skipped.total()
    return kept, skipped


def _turns(messages: Any) -> tuple[Turn, ...] | str:
    """The turns of a chat, or the reason why it is none."""
    if not isinstance(messages, list):
        return "no messages"
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "content is not text"
        # Some exports have keys for tools or names beside these two; a role we know is read, whatever stands beside it.
        if message.get("role") not in tuple(ROLES):
            return "unknown role"
        turn = Turn(ROLES[message["role"]], message["content"])
        if turn.content.strip():
            turns.append(turn)
        elif turn.role != "system":
            return "empty"
    return tuple(turns) or "empty"


def _group(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_kind(row: Row) -> Kind | None:
    # OASST messages have a `text` too, so they are asked for first.
    if "message_id" in row and "parent_id" in row:
        return "oasst"
    if "messages" in row:
        return "messages"
    return "text" if "text" in row else None


def _flat(rows: Iterator[Row] | list[Row]) -> Iterator[Row]:
    """The rows as they are, but each OASST tree as its messages, with parent_id and message_tree_id filled in."""
    for row in rows:
        if "message_tree_id" not in row or "prompt" not in row:
            yield row
            continue
        tree = {"message_tree_id": row["message_tree_id"], "tree_state": row.get("tree_state")}
        stack = [(row["prompt"], None)]
        while stack:  # a tree may be deeper than Python's stack
            message, parent = stack.pop()
            replies = message.get("replies") if isinstance(message, dict) else None
            if not isinstance(message, dict) or not isinstance(replies, list | None):
                raise ValueError(f"OASST tree {row['message_tree_id']} holds {str(message)[:60]!r} for a message; repair or remove it")
            yield {k: v for k, v in message.items() if k != "replies"} | {"parent_id": parent} | tree
            stack += [(reply, message.get("message_id")) for reply in reversed(replies or [])]


def _names(source: str | tuple[str, ...]) -> tuple[str, ...]:
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
    raise ValueError(f"{path} is not read: data must be {', '.join(_READABLE)}; convert the file, or move it away if it is no data")


def _read_file(path: Path) -> Iterator[Row]:
    if not path.name.endswith(_READABLE):
        _refuse(path)
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                row = _parse(line, f"{path} line {number}")
                if row is not None:
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number}: {error}; fetch or compress the file again") from None


def _parse(line: bytes, place: str) -> Row | None:
    """The object on one line; None for a blank one."""
    try:
        text = line.decode("utf-8-sig")  # Windows editors put a byte order mark in front
        if not text.strip():
            return None
        row = json.loads(text)
        # "\ud83d" without its other half is JSON but no text: no tokenizer and no file could take it.
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 (byte {error.start + 1} is {line[error.start]:#04x}); save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; remove it") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deep to be read; give the flat messages instead of trees") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg} at character {error.pos + 1}); write one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds a {type(row).__name__}, not an object with keys; write one object a line")
    return row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}; fetch or write the file again") from None


# --- the hub


def hub_commits(data: Data) -> dict[str, str]:
    """{hub id: the commit that its name and revision stand for now}; `unknown` if the hub does not say (a copy from the cache)."""
    import huggingface_hub  # local files do not need it

    commits = {}
    for name in _names(data.source):
        if _is_hub_id(name):
            try:
                commits[name] = huggingface_hub.HfApi().dataset_info(name, revision=data.revision).sha or "unknown"
            except (OSError, ValueError):
                commits[name] = "unknown"
    return commits


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_READABLE) and not Path(name).exists()


def _read_hub(name: str, split: Split, revision: str | None) -> list[Row]:
    import datasets  # takes seconds, and local files do not need it

    try:
        return datasets.load_dataset(name, split=split, revision=revision).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"there is no file or folder {name} here, and the hub gave no split {split} of a data set of that name "
            f"({type(error).__name__}: {' '.join(str(error).split())}); correct data.source, or give local files"
        ) from None
