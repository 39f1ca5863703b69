"""The prepared data: what scripts/prepare_data.py writes and scripts/train.py and scripts/evaluate.py read.

    prepared/quickstart/
      train.arrow        rows for training: input_ids, supervised, lengths (of the conversations in the row), examples;
                         of data of pairs each row is one: the chosen conversation, and behind it the rejected one
      train.index.arrow  of each of them: its tokens, its supervised tokens, and where it stands in train.arrow
      dev.arrow          the same, for choosing checkpoints
      dev.index.arrow
      validation.arrow   conversations as messages, not tokens: evaluate.py renders them for each format it compares
      bad_rows.jsonl     where rows were left out that could not be read, and why
      tokenizer/         with the role markers and the chat template
      manifest.json      counts, and the hashes that say what all this was made from

Arrow's stream format, memory-mapped: any number of rows costs no memory, and `datasets.Dataset.from_file` opens the files too. A run
starts by looking at the sizes of the files and at the index: it reads as much of 10 GB of rows as of 10 MB. Every file is read in full
when it has been prepared, and on request (`load_manifest(verify=True)`); a row is checked when it is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from qlora_suite.conversations import Conversation, Turn
from qlora_suite.files import complaint_about, hash_of, read_json, sha256
from qlora_suite.recipe import Recipe
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.run_place import check_path

FORMAT_VERSION = 5
TICK_NS = 2 * 10**9
"""The coarsest clock of a file system's times (FAT)."""
WORTH_A_BAR = 256
"""MiB that are read in more than a second."""
MANIFEST = "manifest.json"
FILES = {"train.arrow", "train.index.arrow", "dev.arrow", "dev.index.arrow", "validation.arrow"}
BASE_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)
"""Files of a local base that decide the ids: the vocabulary, the control tokens, the template, how many embedding rows are spare."""

ROWS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
        ("examples", pa.list_(pa.string())),
    ]
)
INDEX = pa.schema([(name, pa.int64()) for name in ("tokens", "supervised", "batch", "place")])
"""Of each row: how many tokens, how many of them supervised, at which byte its record batch begins, and which of its rows it is."""
CONVERSATIONS = pa.schema(
    [
        ("key", pa.string()),
        ("ids", pa.list_(pa.string())),
        ("group", pa.string()),
        ("language", pa.string()),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("learn", pa.bool_())]))),
        ("rejected", pa.string()),
        ("rejected_outranks", pa.bool_()),
    ]
)


class TableWriter:
    """Writes records in record batches of `chunk`, so that memory stays bounded. A context manager."""

    def __init__(self, path: Path, schema: pa.Schema, chunk: int = 1000) -> None:
        self.schema, self.chunk = schema, chunk
        self.buffer: list[Mapping[str, Any]] = []
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self.sink, schema)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.sink.closed:
            self._flush()
            self.writer.close()
            self.sink.close()

    def add(self, record: Mapping[str, Any]) -> None:
        self.buffer.append(record)
        if len(self.buffer) == self.chunk:
            self._flush()

    def _flush(self) -> None:
        if self.buffer:
            self.writer.write_batch(pa.RecordBatch.from_pylist(self.buffer, schema=self.schema))
            self.buffer.clear()


def write_table(path: Path, records: Iterable[Mapping[str, Any]], schema: pa.Schema, chunk: int = 1000) -> None:
    """Write records in record batches of `chunk`, so that memory stays bounded."""
    with TableWriter(path, schema, chunk) as table:
        for record in records:
            table.add(record)


def index_of(path: Path) -> Path:
    """train.arrow -> train.index.arrow"""
    return path.with_suffix(".index.arrow")


def write_row_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    """Write record batches of rows, and the index beside them. Returns the number of rows."""
    parts: list[tuple[np.ndarray, ...]] = []
    begins = ROWS.serialize().size
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, ROWS) as writer:
        for batch in batches:
            tokens, supervised = _list_lengths(batch["input_ids"]), _sum_per_list(batch["supervised"])
            parts.append((tokens, supervised, np.full(len(batch), begins), np.arange(len(batch))))
            writer.write_batch(batch)
            begins = sink.tell()
    nothing = np.zeros(0, dtype=np.int64)
    columns = [np.concatenate(found) for found in zip((nothing,) * len(INDEX), *parts, strict=True)]
    with pa.OSFile(str(index_of(path)), "wb") as sink, pa.ipc.new_stream(sink, INDEX) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=INDEX))
    return len(columns[0])


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The whole table, memory-mapped: its record batches stay on the disk until they are looked at.

    Raises ValueError if the file is none of these; with a schema, also if it has another one, or if a place in it points outside.
    """
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        if schema is not None:
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if schema is not None:
        _check_schema(path, table.schema, schema)
    return table


def _check_schema(path: Path, found: pa.Schema, wanted: pa.Schema) -> None:
    if not found.equals(wanted):
        try:
            names = ", ".join(found.names) or "no column"
        except UnicodeDecodeError:
            names = "columns whose names are no text"
        raise _damaged(path, f"it holds {names}, and wanted is {', '.join(wanted.names)}")


def _damaged(path: Path, why: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged: {' '.join(str(why).split())}; prepare the data again")


class Rows(Sequence[dict[str, Any]]):
    """Prepared rows, each read from the disk, and checked, when it is asked for. To open them takes as long for any number of rows.

    Raises ValueError for files that are none of rows, and, for a row that cannot be trained on, when it is read: one that is not whole, or
    of whose tokens the index says something else, for a step divides its loss by what the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_table(index_of(path), INDEX)
        if any(column.null_count for column in index.columns):
            raise self._unlike("the index has nulls")
        self.lengths, self.num_supervised, self._batches, self._places = (column.to_numpy() for column in index.columns)
        """Tokens of each row, and supervised tokens of each, at least 1; views of the file. [rows] int64 each"""
        try:
            self._file = pa.memory_map(str(path)).read_buffer()
            schema = pa.ipc.open_stream(self._file).schema
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from None
        _check_schema(path, schema, ROWS)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        record = self._record(row)
        arrays = {name: record[name].flatten().to_numpy(zero_copy_only=False) for name in ("input_ids", "supervised", "lengths")}
        return {
            "input_ids": arrays["input_ids"].astype(np.int64),
            "supervised": arrays["supervised"],
            "lengths": arrays["lengths"].tolist(),
        }

    def examples(self, row: int) -> list[str]:
        """Keys of the conversations in a row."""
        return self._record(row)["examples"][0].as_py()

    def check(self) -> Iterator[int]:
        """Read every row; yields how many bytes were checked. Raises ValueError as `batches` does."""
        for batch in self.batches():
            yield batch.nbytes

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in their order, as many at a time as were written together.

        Raises ValueError if one cannot be trained on, or the index names another number of rows than there are.
        """
        starts = np.flatnonzero(np.diff(self._batches, prepend=-1))
        if (np.diff(self._batches[starts]) < 1).any():
            raise self._unlike("the index does not name each row once")
        for start, end in pairwise([*starts.tolist(), len(self)]):
            batch = self._batch(int(self._batches[start]))
            if not np.array_equal(self._places[start:end], np.arange(len(batch))):
                raise self._unlike("the index does not name each row once")
            self._check(batch, self.lengths[start:end], self.num_supervised[start:end])
            yield batch
        if (found := read_table(self.path).num_rows) != len(self):
            raise self._unlike(f"it holds {found:,} rows, and the index names {len(self):,}")

    def _record(self, row: int) -> pa.RecordBatch:
        """One row."""
        record = self._batch(int(self._batches[row])).slice(max(0, int(self._places[row])), 1)
        if len(record) != 1:
            raise self._unlike(f"row {row} is not where the index says")
        self._check(record, self.lengths[row], self.num_supervised[row])
        return record

    def _batch(self, begins: int) -> pa.RecordBatch:
        """The record batch at a byte of the file."""
        if not 0 <= begins < self._file.size:
            raise self._unlike("the index names a place outside of it")
        try:
            return pa.ipc.read_record_batch(pa.ipc.read_message(self._file.slice(begins)), ROWS)
        except (pa.ArrowException, OSError, ValueError, EOFError) as error:
            raise _damaged(self.path, error) from None

    def _check(self, batch: pa.RecordBatch, lengths: Any, num_supervised: Any) -> None:
        """Are these rows whole, and as the index has them?"""
        try:
            batch.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise _damaged(self.path, error) from None
        complaint = _complaint_about_rows(batch)
        if not complaint and (_list_lengths(batch["input_ids"]) != lengths).any():
            complaint = "the index tells another number of tokens than a row has"
        if not complaint and (_sum_per_list(batch["supervised"]) != num_supervised).any():
            complaint = "the index tells another number of supervised tokens than a row has"
        if complaint:
            raise self._unlike(complaint)

    def _unlike(self, complaint: str) -> ValueError:
        return ValueError(f"{self.path} is not what scripts/prepare_data.py writes: {complaint}; remove the folder and run it again")


def _sum_per_list(chunk: pa.ListArray) -> np.ndarray:
    """The sum of each list's numbers, or how many of its flags are true. [lists] int64"""
    ends = np.cumsum(_list_lengths(chunk))
    cumulative = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)])
    return np.diff(cumulative[np.concatenate([[0], ends])])


def _complaint_about_rows(batch: pa.RecordBatch) -> str | None:
    """What would end a run in its middle: a row from which nothing is learnt (a step of it alone is 0/0), or that is not whole."""
    if any(column.null_count or column.flatten().null_count for column in batch.columns):
        return "a row has nulls"
    sizes = {name: _list_lengths(batch[name]) for name in ROWS.names}
    lengths = batch["lengths"].flatten().to_numpy().astype(np.int64)
    tokens = sizes["input_ids"]
    fits = (tokens == sizes["supervised"]) & (tokens == _sum_per_list(batch["lengths"])) & (sizes["lengths"] == sizes["examples"])
    if not fits.all() or (lengths < 1).any():
        return "tokens, flags and lengths of a row do not fit together"
    if batch["supervised"].flatten().to_numpy(zero_copy_only=False)[np.cumsum(lengths) - lengths].any():
        return "the first token of a conversation is supervised, which nothing predicts"
    num_supervised = _sum_per_list(batch["supervised"])
    if not num_supervised.all():
        key = batch["examples"][int((num_supervised == 0).argmax())][0].as_py()
        return f"the row of {key} has no supervised token"
    return None


def _list_lengths(lists: pa.ListArray) -> np.ndarray:
    return pa.compute.list_value_length(lists).to_numpy().astype(np.int64)


def conversation_record(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": t.role, "content": t.content, "learn": t.learn} for t in conversation.turns]
    return {
        "key": conversation.key,
        "ids": list(conversation.ids),
        "group": conversation.group,
        "language": conversation.language,
        "turns": turns,
        "rejected": conversation.rejected,
        "rejected_outranks": conversation.rejected_outranks,
    }


def conversation_from(record: Mapping[str, Any]) -> Conversation:
    """The reverse of `conversation_record`."""
    turns = tuple(Turn(**turn) for turn in record["turns"])
    values = {name: record[name] for name in ("key", "group", "language", "rejected", "rejected_outranks")}
    return Conversation(ids=tuple(record["ids"]), turns=turns, **values)


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of validation.arrow."""
    return [conversation_from(record) for record in read_table(path, CONVERSATIONS).to_pylist()]


def recipe_part(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what is prepared."""
    data = recipe.data.model_dump(mode="json", exclude={"prepared"})
    return {
        "model": {"base": recipe.model.base, "revision": recipe.model.revision},
        "data": data,
        "chat": recipe.chat.model_dump(mode="json"),
    }


def _difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """The first part of a value that differs: its name, and what it was and is. data.sets are long, and one key of them is news."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        parts = [(str(i), *pair) for i, pair in enumerate(zip(then, now, strict=True))]
    elif isinstance(then, dict) and isinstance(now, dict):
        parts = [(key, then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys())]
    else:
        return name, then, now
    differing = [part for part in parts if part[1] != part[2]]
    if not differing:  # a null that is a missing key in the other
        return name, then, now
    key, before, after = differing[0]
    return _difference(f"{name}.{key}", before, after)


def source_files(recipe: Recipe) -> list[Path]:
    """Every local file that the recipe's rows are made from: the data, and the tokenizer and config of the base."""
    files = [f for name in source_names(recipe) for f in ([Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*")))]
    files += [f for f in sorted(Path(recipe.model.base).glob("*")) if f.name in BASE_FILES]
    return [f for f in files if f.is_file()]


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of every local source. A hub id has none: its revision stands in the manifest."""
    return {str(f): sha256(f) for f in source_files(recipe)}


def source_stats(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Size and time of the last change of every local source: if both are as they were, a later start does not read the file again."""
    stats = {str(f): f.stat() for f in source_files(recipe)}
    return {name: {"bytes": of.st_size, "mtime_ns": of.st_mtime_ns} for name, of in stats.items()}


def source_names(recipe: Recipe) -> list[str]:
    """Every file, folder and hub id that the recipe names as data."""
    sources = [names for one in recipe.data.each for names in (one.source, one.validation_source)]
    return [name for s in sources if s is not None for name in ([s] if isinstance(s, str) else s)]


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """With a hash of itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**rest, "sha256": hash_of(rest)}


def load_manifest(recipe: Recipe, verify: bool = False) -> dict[str, Any]:
    """The manifest of the recipe's prepared data, after checking that it is whole and that it is this recipe's.

    By the manifest's own hash, the sizes of the prepared files, and the sizes and times of the sources: some milliseconds, however much
    there is. With `verify` by reading all of it: the hash of every prepared file and of every source, and every row (with a bar).
    Raises ValueError, with the command to run, if the data is missing, damaged or stale.
    """
    check_path("data.prepared", recipe.data.prepared)
    folder = Path(recipe.data.prepared)
    remedy = f"run: python scripts/prepare_data.py {recipe.command_line}"
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"there is no prepared data in {folder}; {remedy}")
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format {version}, this version reads {FORMAT_VERSION}; {remedy}")
    if version is None or not _is_manifest(manifest):
        raise ValueError(f"{folder / MANIFEST} is not a manifest of prepared data; {remedy}")
    if sealed(manifest) != manifest:
        raise ValueError(f"{folder / MANIFEST} is damaged: it does not have the hash it was written with; {remedy}")
    stale = staleness(manifest, recipe, verify)
    if stale:
        raise ValueError(f"the prepared data in {folder} is stale: {stale}; {remedy}")
    complaint = complaint_about(folder, manifest["files"], hashes=False)
    if complaint is None and verify:
        complaint = _complaint_after_reading(folder, manifest["files"])
    if complaint:
        raise ValueError(f"the prepared data in {folder} is damaged: {complaint}; {remedy}")
    return manifest


def check_rows(folder: Path) -> Iterator[int]:
    """Read all prepared rows; yields how many bytes were checked. Raises ValueError if one cannot be trained on."""
    for split in ("train", "dev"):
        yield from Rows(folder / f"{split}.arrow").check()


def _complaint_after_reading(folder: Path, table: dict[str, dict[str, Any]]) -> str | None:
    from qlora_suite.tracking import StepBar  # it brings the console, which a start that shows nothing can do without

    of_rows = sum(table[f"{split}.arrow"]["bytes"] for split in ("train", "dev"))
    done, total = 0, (sum(file["bytes"] for file in table.values()) + of_rows) // 2**20
    with StepBar(f"checking {folder}", total, visible=total >= WORTH_A_BAR) as bar:
        for name, expected in table.items():
            if sha256(folder / name) != expected["sha256"]:
                return f"{name} does not have the hash it was written with"
            done += expected["bytes"]
            bar.advance(done // 2**20, "MiB")
        for num_bytes in check_rows(folder):
            done += num_bytes
            bar.advance(min(total, done // 2**20), "MiB")
    return None


def _is_manifest(values: dict[str, Any]) -> bool:
    """Has it every part that is read later, each of its kind? A damaged one must not end a run in its middle."""
    parts = [values.get(name) for name in ("recipe", "sources", "source_stats", "files", "counts", "role_markers")]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(values.get("tokenizer"), str):
        return False
    if not isinstance(values.get("pairs"), bool):
        return False
    recipe, _, _, files, counts, markers = parts
    splits, sets, ids = [counts.get(split) for split in ("train", "dev", "validation")], counts.get("sets"), markers.get("token_ids")
    return (
        all(isinstance(section, dict) for section in recipe.values())
        and files.keys() >= FILES
        and all(isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files.values())
        and all(isinstance(split, dict) and all(isinstance(n, int | float) for n in split.values()) for split in splits)
        and isinstance(counts.get("unit"), str)
        and isinstance(sets, list)
        and all(isinstance(one, dict) and {"name", "form", "unit", "read", "dropped", "taken"} <= one.keys() for one in sets)
        and all(isinstance(one.get("read"), int) and _are_counts(one.get("dropped")) for one in (counts, *sets))
        and markers.keys() == {field.name for field in fields(RoleMarkers)}
        and isinstance(ids, list)
        and all(isinstance(i, int) for i in ids)
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(count, int) for count in values.values())


def staleness(manifest: Mapping[str, Any], recipe: Recipe, verify: bool = False) -> str | None:
    """Why the recipe would now give other data than the manifest's, or None. With `verify` every source is read, whatever its time."""
    before, after = manifest["recipe"], recipe_part(recipe)
    for section in after:
        for key in after[section]:
            if key not in before.get(section, {}):
                return f"it was written before {section}.{key} existed"
            if before[section][key] != after[section][key]:
                return "{} was {!r} and is now {!r}".format(*_difference(f"{section}.{key}", before[section][key], after[section][key]))
    if manifest["pairs"] != (recipe.dpo is not None):
        return "it holds pairs, and the recipe has no dpo" if manifest["pairs"] else "the recipe has dpo, and it holds no pairs"
    # Of chats, GRPO keeps the prompts that nobody answered; trees and texts are the same with it and without.
    of_chats = any(one["form"] not in ("oasst", "text") for one in manifest["counts"]["sets"])
    if of_chats and manifest.get("grpo", False) != (recipe.grpo is not None):
        then, now = ("with", "has none") if manifest.get("grpo") else ("without", "has it")
        return f"it was prepared for a recipe {then} grpo, and this {now}"
    current = source_stats(recipe)
    # A file that changed just before the manifest was written may have changed again since, within one tick of a coarse clock.
    settled = (Path(recipe.data.prepared) / MANIFEST).stat().st_mtime_ns - TICK_NS
    for name, now in current.items():
        untouched = manifest["source_stats"].get(name) == now and now["mtime_ns"] < settled
        if (verify or not untouched) and manifest["sources"].get(name) != sha256(Path(name)):
            return f"{name} has changed"
    for name in manifest["sources"]:
        # Raw data may be gone as a whole (a compute node needs the rows alone), but not a part of it.
        if name not in current and any(Path(folder).is_dir() and Path(name).is_relative_to(folder) for folder in source_names(recipe)):
            return f"{name} is gone"
    return None


def data_hash(manifest: Mapping[str, Any]) -> str:
    """Names the rows and their tokenizer: what a run must find again when it resumes."""
    return hash_of([manifest["files"]["train.arrow"]["sha256"], manifest["tokenizer"]])
