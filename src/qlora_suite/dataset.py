"""The prepared data: what scripts/prepare_data.py writes and scripts/train.py and scripts/evaluate.py read.

    prepared/quickstart/
      train.arrow        rows for training: input_ids, supervised, lengths (of the conversations in the row), examples
      dev.arrow          the same, for choosing checkpoints
      validation.arrow   conversations as messages, not tokens: evaluate.py renders them for each format it compares
      bad_rows.jsonl     where rows were left out that could not be read, and why
      tokenizer/         with the role markers and the chat template
      manifest.json      counts, and the hashes that say what all this was made from

Arrow's stream format, memory-mapped: any number of rows costs no memory, and `datasets.Dataset.from_file` opens the files too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
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

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
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
_PIECES = pa.schema([("key", pa.string()), ("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.bool_()))])
CONVERSATIONS = pa.schema(
    [
        ("key", pa.string()),
        ("ids", pa.list_(pa.string())),
        ("group", pa.string()),
        ("language", pa.string()),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("learn", pa.bool_())]))),
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


class Pieces:
    """Tokenised pieces of conversations, on their way into rows: written one after another, then read in any order. A context
    manager, at whose end the file is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._writer = path, TableWriter(path, _PIECES, chunk=4096)
        self._table: pa.Table | None = None
        self.lengths: list[int] = []
        """Tokens of each."""

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._path.unlink()

    def add(self, key: str, input_ids: Sequence[int], supervised: Sequence[bool]) -> None:
        self._writer.add({"key": key, "input_ids": input_ids, "supervised": supervised})
        self.lengths.append(len(input_ids))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """key, input_ids, supervised. After the last `add`."""
        if self._table is None:
            self._writer.close()
            self._table = read_table(self._path)
        return {name: self._table[name][number].as_py() for name in _PIECES.names}


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The whole table, memory-mapped: its record batches stay on the disk until they are looked at.

    Raises ValueError if the file is none of these; with a schema, also if it has another one, or if a place in it points outside.
    """
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        if schema is not None:
            if not table.schema.equals(schema):
                raise ValueError(f"it holds {', '.join(table.schema.names) or 'no column'}, and wanted is {', '.join(schema.names)}")
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged: {what}; prepare the data again") from None
    return table


class Rows(Sequence[dict[str, Any]]):
    """Prepared rows, read from the disk as they are asked for. Raises ValueError for rows that cannot be trained on."""

    def __init__(self, path: Path) -> None:
        self._table = read_table(path, ROWS)
        self.lengths = _list_lengths(self._table["input_ids"])
        """Tokens of each row. [rows] int64"""
        counts = []
        for batch in self._table.to_batches():
            if complaint := _complaint_about_rows(batch):
                raise ValueError(f"{path} is not what scripts/prepare_data.py writes: {complaint}; remove the folder and run it again")
            counts.append(_sum_per_list(batch["supervised"]))
        self.num_supervised = np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
        """Supervised tokens of each row, at least 1. [rows] int64"""

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        record = self._table.slice(row, 1)
        arrays = {name: _flat(record[name]).to_numpy(zero_copy_only=False) for name in ("input_ids", "supervised", "lengths")}
        return {
            "input_ids": arrays["input_ids"].astype(np.int64),
            "supervised": arrays["supervised"],
            "lengths": arrays["lengths"].tolist(),
        }

    def examples(self, row: int) -> list[str]:
        """Keys of the conversations in a row."""
        return self._table["examples"][row].as_py()


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """The values of a list column, end to end."""
    chunks = [chunk.flatten() for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], column.type.value_type)


def _sum_per_list(chunk: pa.ListArray) -> np.ndarray:
    """The sum of each list's numbers, or how many of its flags are true. [lists] int64"""
    ends = np.cumsum(pa.compute.list_value_length(chunk).to_numpy().astype(np.int64))
    cumulative = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)])
    return np.diff(cumulative[np.concatenate([[0], ends])])


def _complaint_about_rows(batch: pa.RecordBatch) -> str | None:
    """What would end a run in its middle: a row from which nothing is learnt (a step of it alone is 0/0), or that is not whole."""
    if any(column.null_count or column.flatten().null_count for column in batch.columns):
        return "a row has nulls"
    sizes = {name: pa.compute.list_value_length(batch[name]).to_numpy() for name in ROWS.names}
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


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pa.compute.list_value_length(column).to_numpy().astype(np.int64)


def conversation_record(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": t.role, "content": t.content, "learn": t.learn} for t in conversation.turns]
    return {
        "key": conversation.key,
        "ids": list(conversation.ids),
        "group": conversation.group,
        "language": conversation.language,
        "turns": turns,
    }


def conversation_from(record: Mapping[str, Any]) -> Conversation:
    """The reverse of `conversation_record`."""
    turns = tuple(Turn(**turn) for turn in record["turns"])
    return Conversation(record["key"], tuple(record["ids"]), record["group"], turns, record["language"])


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


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of every local file that the recipe's rows are made from: the data, and the tokenizer and config of the base.

    A hub id has none: its revision stands in the manifest.
    """
    files = [f for name in source_names(recipe) for f in ([Path(name)] if Path(name).is_file() else sorted(Path(name).rglob("*")))]
    files += [f for f in sorted(Path(recipe.model.base).glob("*")) if f.name in BASE_FILES]
    return {str(f): sha256(f) for f in files if f.is_file()}


def source_names(recipe: Recipe) -> list[str]:
    """Every file, folder and hub id that the recipe names as data."""
    sources = [names for one in recipe.data.each for names in (one.source, one.validation_source)]
    return [name for s in sources if s is not None for name in ([s] if isinstance(s, str) else s)]


def load_manifest(recipe: Recipe, verify: bool = False) -> dict[str, Any]:
    """The manifest of the recipe's prepared data, after checking that it is whole and that it is this recipe's.

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
    stale = staleness(manifest, recipe)
    if stale:
        raise ValueError(f"the prepared data in {folder} is stale: {stale}; {remedy}")
    complaint = complaint_about(folder, manifest["files"])
    if complaint:
        raise ValueError(f"the prepared data in {folder} is damaged: {complaint}; {remedy}")
    return manifest


def _is_manifest(values: dict[str, Any]) -> bool:
    """Has it every part that is read later, each of its kind? A damaged one must not end a run in its middle."""
    parts = [values.get(name) for name in ("recipe", "sources", "files", "counts", "role_markers")]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(values.get("tokenizer"), str):
        return False
    recipe, _, files, counts, markers = parts
    splits, sets, ids = [counts.get(split) for split in ("train", "dev", "validation")], counts.get("sets"), markers.get("token_ids")
    return (
        all(isinstance(section, dict) for section in recipe.values())
        and {"train.arrow", "dev.arrow", "validation.arrow"} <= files.keys()
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


def staleness(manifest: Mapping[str, Any], recipe: Recipe) -> str | None:
    """Why the recipe would now give other data than the manifest's, or None."""
    then, now = manifest["recipe"], recipe_part(recipe)
    for section in now:
        for key in now[section]:
            if key not in then.get(section, {}):
                return f"it was written before {section}.{key} existed"
            if then[section][key] != now[section][key]:
                return "{} was {!r} and is now {!r}".format(*_difference(f"{section}.{key}", then[section][key], now[section][key]))
    current = source_hashes(recipe)
    for name, digest in current.items():
        if manifest["sources"].get(name) != digest:
            return f"{name} has changed"
    for name in manifest["sources"]:
        # Raw data may be gone as a whole (a compute node needs the rows alone), but not a part of it.
        if name not in current and any(Path(folder).is_dir() and Path(name).is_relative_to(folder) for folder in source_names(recipe)):
            return f"{name} is gone"
    return None


def data_hash(manifest: Mapping[str, Any]) -> str:
    """Names the rows and their tokenizer: what a run must find again when it resumes."""
    return hash_of([manifest["files"]["train.arrow"]["sha256"], manifest["tokenizer"]])
