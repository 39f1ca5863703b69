"""Sources: the same rows come out of every kind of file, each with its place, and what cannot be read is named with it."""

import gzip
import itertools
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_suite import chats, oasst1, sources
from qlora_suite.recipe import Data, Source
from qlora_suite.sources import BadRow, Row

ASSET = Path(__file__).parents[1] / "assets" / "oasst1_en_validation.jsonl.gz"
ROWS = [{"text": "one"}, {"text": "two\u2028three"}]


def written(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return written(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def json_list(path: Path, rows: list[Any], indent: int | None = None) -> str:
    return written(path, json.dumps(rows, ensure_ascii=False, indent=indent).encode())


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def data(source: str | tuple[str, ...], **keys: Any) -> Data:
    return Data.model_validate({"source": source, "prepared": "out", **keys})


def values(rows: Iterator[Row | BadRow]) -> list[dict[str, Any]]:
    """Of rows that must all be good."""
    return [row.values for row in rows]


def read(*source: str) -> list[dict[str, Any]]:
    return values(sources.read(source))


def places(*source: str) -> list[str]:
    return [str(row.place) for row in sources.read(source)]


def loaded(source: Data) -> dict[str, list[dict[str, Any]]]:
    return {split: values(rows) for split, rows in sources.load(source).items()}


def good_and_bad(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows = list(sources.read(source))
    return [row.values for row in rows if isinstance(row, Row)], [str(row) for row in rows if isinstance(row, BadRow)]


def tree_rows(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nested, as in OASST's tree files: there, messages name no tree, and roots no parent."""
    nested = {
        m["message_id"]: {k: v for k, v in m.items() if k not in ("message_tree_id", "tree_state")} | {"replies": []} for m in messages
    }
    rows = []
    for m in messages:
        if m["parent_id"] is None:
            del nested[m["message_id"]]["parent_id"]
            rows.append({"message_tree_id": m["message_tree_id"], "tree_state": m["tree_state"], "prompt": nested[m["message_id"]]})
        elif m["parent_id"] in nested:
            nested[m["parent_id"]]["replies"].append(nested[m["message_id"]])
    return rows


# --- every kind of file


KINDS = ("a.jsonl", "b.jsonl.gz", "c.json", "d.json.gz", "e.parquet", "lines.json", "lines.json.gz")


def in_kind(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    if name.endswith("parquet"):
        return parquet(folder / name, rows)
    return json_list(folder / name, rows, indent=1) if name[0] in "cd" else jsonl(folder / name, rows)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name):
    path = in_kind(tmp_path, name, ROWS)
    assert read(path) == ROWS
    where = ("row 1", "row 2") if name.endswith("parquet") else ("line 1", "line 2")
    assert places(path) == [f"{name} {place}" for place in (("row 1 (line 2)", "row 2 (line 5)") if name[0] in "cd" else where)]


@pytest.mark.parametrize(("name", "rows"), [("list.jsonl", "row"), ("list.jsonl.gz", "row"), ("lines.json", "line")])
def test_what_is_in_a_file_decides_how_it_is_read_and_not_its_name(tmp_path, name, rows):
    path = json_list(tmp_path / name, ROWS) if rows == "row" else jsonl(tmp_path / name, ROWS)
    assert read(path) == ROWS
    assert [row.place.unit for row in sources.read(path)] == [rows] * len(ROWS)


def test_rows_of_a_list_on_one_line_have_places_of_their_own(tmp_path):
    path = written(tmp_path / "one.json", json.dumps([{"text": str(i)} for i in range(3)]).encode())
    assert places(path) == ["one.json row 1 (line 1)", "one.json row 2 (line 1)", "one.json row 3 (line 1)"]
    assert len({row.place.number for row in sources.read(path)}) == 3


def test_folders_and_several_sources_are_read_one_after_another(tmp_path):
    paths = [in_kind(tmp_path / "in", name, [{"text": name}]) for name in KINDS]
    assert read(str(tmp_path / "in")) == read(*paths) == [{"text": name} for name in KINDS]
    assert read(paths[2], str(tmp_path / "in"), paths[0])[:2] == [{"text": "c.json"}, {"text": "a.jsonl"}]


def test_files_of_one_name_are_told_apart_by_their_folders_and_moved_files_keep_their_names(tmp_path):
    for where in ("here", "there"):
        for name in ("x/rows.jsonl", "y/rows.jsonl", "alone.jsonl"):
            jsonl(tmp_path / where / name, ROWS[:1])
        assert places(str(tmp_path / where)) == ["alone.jsonl line 1", "x/rows.jsonl line 1", "y/rows.jsonl line 1"]


def test_blank_lines_and_a_byte_order_mark_are_passed_by_and_counted_as_lines(tmp_path):
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "\\ud83d\\ude00"}')
    assert (read(path), places(path)) == ([{"text": "one"}, {"text": "\U0001f600"}], ["a.jsonl line 1", "a.jsonl line 4"])
    path = written(
        tmp_path / "b.json", b'\xef\xbb\xbf \r\n[\r\n {"text": "one"}, {"text":\r\n"two"},\r\n\r\n{"text": "\\ud83d\\ude00"}\r\n]\r\n'
    )
    assert read(path) == [{"text": "one"}, {"text": "two"}, {"text": "\U0001f600"}]
    assert places(path) == ["b.json row 1 (line 3)", "b.json row 2 (line 3)", "b.json row 3 (line 6)"]


# --- long lists, which are read in pieces


def long_rows(count: int) -> list[dict[str, Any]]:
    text = 'é \u2028 \U0001f600 "quoted" \\ {[,]} '
    return [
        {"id": i, "messages": [{"role": "user", "content": text * (i % 40)}, {"n": [i, [1.5e-3, None]]}], "ø": True} for i in range(count)
    ]


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_a_list_longer_than_a_chunk_is_what_json_reads_with_the_right_lines(tmp_path, suffix):
    rows = long_rows(5000)
    path = json_list(tmp_path / f"long.{suffix}", rows, indent=2)
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    assert len(text) > 3 * sources._CHUNK
    assert read(path) == json.loads(text)
    begins = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"]
    assert [row.place.line for row in sources.read(path)] == begins
    assert [row.place.number for row in sources.read(path)] == list(range(1, len(rows) + 1))


def test_one_object_longer_than_several_chunks_comes_whole(tmp_path):
    rows = [{"text": "a" * 10}, {"text": "é\n" * sources._CHUNK}, {"list": list(range(400_000))}, {"text": "z"}]
    assert read(json_list(tmp_path / "long.json", rows)) == rows


numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(texts, anything, max_size=4), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    rows=objects,
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3, "\t"]),
    space=st.sampled_from(["", " ", "\n", " \r\n\t", "\n" * 30, " " * 70]),
    chunk=st.integers(1, 40),
)
def test_any_objects_are_read_back_from_a_list_and_from_lines(tmp_path_factory, rows, ascii_only, indent, space, chunk):
    folder = tmp_path_factory.mktemp("any")
    parts = [json.dumps(row, ensure_ascii=ascii_only, indent=indent) for row in rows]
    as_list = written(folder / "a.json", f"[{space}{f'{space},{space}'.join(parts)}{space}]{space}".encode())
    as_lines = written(folder / "b.jsonl", "".join(json.dumps(row, ensure_ascii=ascii_only) + f" {space}\n" for row in rows).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)  # so that every kind of token lies across a border
        assert read(as_list) == rows
    assert read(as_list) == read(as_lines) == rows


# --- memory


def large_file(folder: Path, kind: str) -> Path:
    """Some 50 MB of rows of 1 kB."""
    row = {"text": "0123456789" * 100}
    if kind.startswith("parquet"):
        path, table = folder / "large.parquet", pa.Table.from_pylist([row] * 2000)
        groups, tables = (1, 25) if kind == "parquet, one group" else (25, 1)
        with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(groups):
                writer.write_table(pa.concat_tables([table] * tables))
        return path
    path, line, between = folder / f"large.{kind}", json.dumps(row), ",\n" if kind == "json" else "\n"
    with path.open("w") as file:
        file.write("[" if kind == "json" else "")
        for number in range(50):
            file.write((between if number else "") + between.join([line] * 1000))
        file.write("]" if kind == "json" else "")
    return path


@pytest.mark.parametrize(("kind", "megabytes"), [("jsonl", 1), ("json", 8), ("parquet", 8), ("parquet, one group", 8)])
def test_a_large_file_passes_through_little_memory(tmp_path, kind, megabytes):
    path = large_file(tmp_path, kind)
    assert path.stat().st_size > 45e6
    read(parquet(tmp_path / "few" / "few.parquet", ROWS))  # what is imported only now is no matter of the file's size
    count, arrow, before = 0, 0, pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for _ in sources.read(str(path)):
            count += 1
            if count % 500 == 0:
                arrow = max(arrow, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 50_000
    assert peak < megabytes * 1e6
    assert arrow < 15e6


# --- what cannot be read of a file that can


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "line 2: not JSON, character 1"),
        (b'{"text": "\xff"}', "line 2: not UTF-8, byte 11: 0xff"),
        (b'{"text": "\\ud83d"}', "line 2: half of a surrogate pair, which is no text"),
        (b'{"text": "\\uDE00 x"}', "line 2: half of a surrogate pair, which is no text"),
        (b'{"\\ud83d": 1}', "line 2: half of a surrogate pair, which is no text"),
        (b'["text"]', 'line 2: not an object with keys: ["text"]'),
        (b"3", "line 2: not an object with keys: 3"),
        (b'{"a":' * 200_000, "line 2: nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 2: not JSON"),
    ],
    ids=["json", "bytes", "surrogate", "lower surrogate", "surrogate key", "list", "number", "deep", "long number"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json"])
def test_a_bad_line_is_a_bad_row_with_its_place_and_the_others_come(tmp_path, line, words, suffix):
    path = written(tmp_path / f"chats.{suffix}", b'{"text": "x"}\n' + line + b'\n{"text": "y"}\n')
    good, bad = good_and_bad(path)
    assert good == [{"text": "x"}, {"text": "y"}]
    assert len(bad) == 1
    assert bad[0].startswith(f"chats.{suffix} {words}")
    assert len(bad[0]) < 250


@pytest.mark.parametrize(
    ("element", "words"),
    [
        (b'{"text": "\xff"}', "not UTF-8, byte 0xff"),
        (b'{"text":\n\n"\xe9t\xe9"}', "not UTF-8, byte 0xe9"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair, which is no text"),
        (b'["text"]', 'not an object with keys: ["text"]'),
        (b"null", "not an object with keys: null"),
    ],
    ids=["bytes", "latin 1", "surrogate", "list", "null"],
)
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_a_bad_element_of_a_list_is_a_bad_row_with_its_place_and_the_others_come(tmp_path, element, words, suffix):
    path = written(tmp_path / f"chats.{suffix}", b'[{"text": "x"},\n\n' + element + b',\n{"text": "y"}\n]')
    good, bad = good_and_bad(path)
    assert good == [{"text": "x"}, {"text": "y"}]
    assert len(bad) == 1
    assert bad[0].startswith(f"chats.{suffix} row 2 (line 3): {words}")


# --- damaged files


WHOLE = b'{"text": "x"}\n' * 99


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("plain.jsonl.gz", WHOLE, "line 0"),
        ("cut.jsonl.gz", gzip.compress(WHOLE, mtime=0)[:-12], "line"),
        ("flipped.jsonl.gz", gzip.compress(WHOLE, mtime=0)[:12] + b"\xff\xff\xff" + gzip.compress(WHOLE)[15:], "line 0"),
        ("cut.parquet", b"PAR1 and no more", "row 0"),
        ("cut.json", b'[{"text": "x"},\n{"text": "y"},\n{"te', "line 3"),
        ("open.json", b'[{"text": "x"},\n{"text": "y"}\n', "line 3"),
        ("broken.json", b'[{"text": "x"},\n{"text": "y",,}, {"text": "z"}]', "line 2"),
        ("cut.json.gz", gzip.compress(b"[" + b",\n".join([b'{"text": "x"}'] * 9999) + b"]", mtime=0)[:-12], "line"),
        ("plain.json.gz", b'[{"text": "x"}]', "line 0"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_name_and_place(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read after {where}.*; repair the file, or fetch it again") as caught:
        list(sources.read(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_damaged_in_the_middle_is_named_with_the_row(tmp_path):
    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
        for _ in range(3):
            writer.write_table(pa.table({"text": [f"{i} some words" for i in range(1024)]}))
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read after row 1024"):
        list(sources.read(str(path)))


@pytest.mark.parametrize("tail", ['{"text": "b"}', '[{"text": "b"}]', "x"])
def test_what_stands_behind_a_list_is_not_lost_in_silence(tmp_path, tail):
    path = written(tmp_path / "two.json", f'[{{"text": "a"}}]\n{tail}\n'.encode())
    with pytest.raises(ValueError, match=r"two\.json cannot be read after line"):
        list(sources.read(path))


def test_a_damaged_tree_is_a_bad_row_and_the_others_come(tmp_path):
    good = {"message_tree_id": "u", "prompt": {"message_id": "u"}}
    for prompt in (None, {"message_id": "a", "replies": 3}, {"message_id": "a", "replies": ["b"]}):
        rows = list(sources.read(jsonl(tmp_path / "trees.jsonl", [{"message_tree_id": "t", "prompt": prompt}, good])))
        assert str(rows[0]).startswith("trees.jsonl line 1: the tree holds something else than a message")
        assert [row.values["message_id"] for row in rows[1:]] == ["u"]


# --- OASST trees


def test_nested_trees_give_the_same_conversations_as_flat_messages(tmp_path):
    flat = read(str(ASSET))
    nested = read(jsonl(tmp_path / "trees.jsonl.gz", tree_rows(flat)))
    assert chats.form_of(nested[0], {}) == "oasst"
    assert len(nested) == len(flat) - 3  # those without a parent are in no rooted tree
    for policy in ("best_path", "joined_replies", "best_replies", "all_replies", "all_paths"):
        assert oasst1.conversations(nested, policy, None)[0] == oasst1.conversations(flat, policy, None)[0]


# --- splits


def test_a_published_split_is_read_from_a_folder_laid_out_as_on_the_hub(tmp_path):
    flat = read(str(ASSET))
    train, validation = flat[:100], flat[100:150]
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", train[60:])
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", train[:60])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", validation)
    jsonl(tmp_path / "all.messages.jsonl.gz", flat)
    for note in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / note).write_text("not data")
    splits = loaded(data(str(tmp_path)))
    assert [[m["message_id"] for m in splits[s]] for s in ("train", "validation")] == [
        [m["message_id"] for m in p] for p in (train, validation)
    ]
    for policy in ("best_path", "all_replies"):
        assert oasst1.conversations(splits["train"], policy, None) == oasst1.conversations(train, policy, None)


def test_validation_source_is_the_validation_split(tmp_path):
    train, validation = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS[:1])
    assert loaded(data(train, validation_source=validation)) == {"train": ROWS, "validation": ROWS[:1]}
    assert loaded(data((train, validation), split="by_hash")) == {"all": ROWS + ROWS[:1]}


def test_a_published_split_without_validation_says_what_to_do(tmp_path):
    file = jsonl(tmp_path / "a" / "chats.jsonl", ROWS)
    for source in (file, str(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"holds none.*validation_source.*by_hash"):
            sources.load(data(source))
    jsonl(tmp_path / "b" / "validation.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no file named train\*"):
        sources.load(data(str(tmp_path / "b")))


def test_a_revision_of_a_local_file_is_refused(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"data\.revision has no effect on local files"):
        sources.load(data(file, split="all", revision="main"))


# --- the hub


class Pulled:
    """Many rows that count how many of them were asked for."""

    def __init__(self, split: str) -> None:
        self.split, self.count = split, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.count += 1
            yield {"text": f"{self.split} {self.count}"}


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_data_set_is_streamed_unless_offline_and_only_what_is_asked_for_is_pulled(monkeypatch, offline):
    import datasets

    asked, handed = [], []

    def load_dataset(name: str, **keys: Any) -> Pulled:
        asked.append((name, keys))
        handed.append(Pulled(keys["split"]))
        return handed[-1]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    found = sources.load(data("some/chats", revision="fdf72ae"))
    assert asked == []  # nothing is fetched that nobody reads
    for split, rows in found.items():
        first = list(itertools.islice(rows, 7))
        assert [row.values["text"] for row in first] == [f"{split} {number}" for number in range(1, 8)]
        assert [str(row.place) for row in first[:2]] == [f"some/chats/{split} row 1", f"some/chats/{split} row 2"]
    assert [one.count for one in handed] == [7, 7]
    assert asked == [("some/chats", {"split": s, "revision": "fdf72ae", "streaming": not offline}) for s in ("train", "validation")]


def test_validation_never_comes_unasked(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda _, *, split, revision, streaming: [{"text": split}])
    assert loaded(data("OpenAssistant/oasst1")) == {"train": [{"text": "train"}], "validation": [{"text": "validation"}]}
    assert loaded(data("OpenAssistant/oasst1", split="all")) == {"all": [{"text": "train"}]}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_real_data_set_of_the_hubs_library_is_read(tmp_path, monkeypatch, streaming):
    import datasets

    rows = [{"messages": [{"role": "user", "content": "hi \U0001f600"}], "n": i} for i in range(3)]
    file, load_dataset = parquet(tmp_path / "train.parquet", rows), datasets.load_dataset

    def local(name: str, *, split: str, revision: str | None, streaming: bool) -> Any:
        return load_dataset("parquet", data_files={split: file}, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", not streaming)
    assert read("some/chats") == rows


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(name: str, *, split: str, revision: str | None, streaming: bool) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"no file or folder data/chats here.*ConnectionError: no network") as caught:
        list(sources.read("data/chats"))
    assert "\n" not in str(caught.value)


# --- what is refused


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "loader.py", "rows.csv", "rows.jsonl.zip"])
def test_what_is_no_known_kind_of_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(ROWS))
    jsonl(tmp_path / "good.jsonl", ROWS)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"{name} is not read"):
            list(sources.read(str(source)))


def test_missing_and_empty_sources_are_named(tmp_path):
    for missing in (str(tmp_path / "none.jsonl"), "chats/none.jsonl"):
        with pytest.raises(ValueError, match=r"no file or folder .*none\.jsonl \(working folder"):
            sources.read(missing)  # at once, not only when it is iterated
    with pytest.raises(ValueError, match="holds no file named"):
        sources.read(str(tmp_path))
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b" \n\n"), ("empty.json", b"[\n]"), ("nothing.json", b"")):
        with pytest.raises(ValueError, match=rf"{name} holds no rows"):
            list(sources.read(written(tmp_path / name, content)))


def test_files_of_one_name_in_both_splits_are_told_apart(tmp_path):
    train, held_out = (jsonl(tmp_path / place / "chats.jsonl", ROWS[:1]) for place in ("a", "b"))
    found = sources.load(Source(source=train, validation_source=held_out))
    assert [str(row.place) for split in found.values() for row in split] == ["a/chats.jsonl line 1", "b/chats.jsonl line 1"]


def test_one_object_over_several_lines_is_said_to_be_no_list(tmp_path):
    path = written(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1).encode())
    with pytest.raises(ValueError, match=r"a\.json is one JSON object over several lines; wanted is a list of rows, or a row a line"):
        read(path)


@pytest.mark.parametrize(("kind", "value"), [(pa.timestamp("us"), 2**62), (pa.date32(), 2**30)])
def test_a_date_beyond_all_dates_is_one_sentence(tmp_path, kind, value):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "when": pa.array([value], pa.int64() if value > 2**40 else pa.int32()).cast(kind)}), path)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read after row 0.*; repair the file"):
        read(str(path))
