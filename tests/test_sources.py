"""Sources: the same rows come out of every kind of file, and what cannot be read is named with its line."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_suite import oasst1, sources
from qlora_suite.conversations import Turn
from qlora_suite.recipe import Data

ASSET = Path(__file__).parents[1] / "assets" / "oasst1_en_validation.jsonl.gz"
ROWS = [{"text": "one"}, {"text": "two\u2028three"}]


def jsonl(path: Path, rows: list[Any]) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def data(source: Any, **more: Any) -> Data:
    return Data(source=source, prepared="unused", **more)


def tree_rows(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rooted trees nested as the official export nests them; its messages name no tree, and roots no parent."""
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


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    paths = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl.gz", ROWS), parquet(tmp_path / "c.parquet", ROWS)
    assert all(sources.read(path) == ROWS for path in paths)
    assert sources.read(paths) == sources.read(str(tmp_path)) == ROWS * 3


def test_blank_lines_and_a_byte_order_mark_are_passed_by(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "\\ud83d\\ude00"}')
    assert sources.read(str(tmp_path / "a.jsonl")) == [{"text": "one"}, {"text": "\U0001f600"}]


def test_nested_trees_give_the_same_conversations_as_flat_messages(tmp_path):
    flat = sources.read(str(ASSET))
    nested = sources.read(jsonl(tmp_path / "trees.jsonl.gz", tree_rows(flat)))
    assert sources.kind(nested) == "oasst"
    assert len(nested) == len(flat) - 3  # those without a parent are in no rooted tree
    for policy in ("best_path", "joined_replies", "best_replies", "all_replies", "all_paths"):
        assert oasst1.conversations(nested, policy, None)[0] == oasst1.conversations(flat, policy, None)[0]


def test_a_published_split_is_read_from_a_folder_laid_out_as_on_the_hub(tmp_path):
    flat = sources.read(str(ASSET))
    train, validation = flat[:100], flat[100:150]
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", train[60:])
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", train[:60])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", validation)
    jsonl(tmp_path / "all.messages.jsonl.gz", flat)
    for note in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / note).write_text("not data")
    splits = sources.load(data(str(tmp_path)))
    assert [[m["message_id"] for m in splits[s]] for s in ("train", "validation")] == [
        [m["message_id"] for m in p] for p in (train, validation)
    ]
    for policy in ("best_path", "all_replies"):
        assert oasst1.conversations(splits["train"], policy, None) == oasst1.conversations(train, policy, None)


def test_a_published_split_is_asked_from_the_hub_and_validation_never_comes_unasked(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name: str, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, split) if revision is None else (name, split, revision))
        return datasets.Dataset.from_list([{"text": split}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sources.load(data("OpenAssistant/oasst1")) == {"train": [{"text": "train"}], "validation": [{"text": "validation"}]}
    assert sources.load(data("OpenAssistant/oasst1", split="all")) == {"all": [{"text": "train"}]}
    assert asked == [("OpenAssistant/oasst1", s) for s in ("train", "validation", "train")]
    sources.load(data("OpenAssistant/oasst1", split="all", revision="fdf72ae"))
    assert asked[-1] == ("OpenAssistant/oasst1", "train", "fdf72ae")


def test_a_revision_of_a_local_file_is_refused(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"data\.revision has no effect on local files"):
        sources.load(data(file, split="all", revision="main"))


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(name: str, *, split: str, revision: str | None) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"no file or folder data/chats here.*ConnectionError: no network") as caught:
        sources.read("data/chats")
    assert "\n" not in str(caught.value)


def test_validation_source_is_the_validation_split(tmp_path):
    train, validation = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS[:1])
    assert sources.load(data(train, validation_source=validation)) == {"train": ROWS, "validation": ROWS[:1]}
    assert sources.load(data((train, validation), split="by_hash")) == {"all": ROWS + ROWS[:1]}


def test_a_published_split_without_validation_says_what_to_do(tmp_path):
    file = jsonl(tmp_path / "a" / "chats.jsonl", ROWS)
    for source in (file, str(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"holds none.*validation_source.*by_hash"):
            sources.load(data(source))
    jsonl(tmp_path / "b" / "validation.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no file named train\*"):
        sources.load(data(str(tmp_path / "b")))


def test_the_kind_is_seen_from_the_keys():
    assert sources.kind([{"message_id": "a", "parent_id": None, "text": "x"}]) == "oasst"
    assert sources.kind([{"messages": None}, {"id": 3}]) == "messages"
    assert sources.kind(ROWS) == "text"
    with pytest.raises(ValueError, match="1 of kind text and 1 of kind messages"):
        sources.kind([{"text": "x"}, {"messages": []}])
    with pytest.raises(ValueError, match="the keys: instruction, output"):
        sources.kind([{"instruction": "x", "output": "y"}])


def test_chats_become_conversations_and_bad_rows_are_counted_by_reason():
    good = [{"role": "system", "content": ""}, {"role": "prompter", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "x"}]
    user = {"role": "user", "content": "hi"}
    bad = [None, "hi", [], [user, None], [{"role": "user", "content": None}], [{"role": "bot", "content": "x"}], [user | {"content": " "}]]
    rows = [{"messages": m} for m in bad] + [{"messages": good}, {"messages": [user, user]}]
    kept, skipped = sources.messages_conversations(rows)
    assert skipped == {"no messages": 2, "empty": 2, "content is not text": 2, "unknown role": 1}
    assert [c.turns for c in kept] == [(Turn("user", "hi"), Turn("assistant", "yes")), (Turn("user", "hi"), Turn("user", "hi"))]
    assert [c.key for c in kept] == ["8", "9"]
    assert kept[0].group == kept[1].group  # the same first prompt stays on one side of a split


def test_texts_become_conversations_grouped_by_what_they_say():
    kept, skipped = sources.text_conversations([{"text": "a"}, {"text": None}, {"text": 3}, {"text": "\n"}, {"text": "a"}, {"text": "b"}])
    assert skipped == {"no text": 2, "empty": 1}
    assert [(c.key, c.turns) for c in kept] == [(k, (Turn("assistant", t),)) for k, t in (("1", "a"), ("5", "a"), ("6", "b"))]
    assert kept[0].group == kept[1].group == "ca978112ca1bbdca"
    assert kept[2].group != kept[0].group


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "line 2 is not JSON"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 11 is 0xff\)"),
        (b'{"text": "\\ud83d"}', "line 2 holds half of a surrogate pair"),
        (b'["text"]', "line 2 holds a list"),
        (b"[" * 200_000, "line 2 is nested too deep"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, words, suffix):
    content = b'{"text": "x"}\n' + line + b"\n"
    path = tmp_path / f"chats.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == "jsonl.gz" else content)
    with pytest.raises(ValueError, match=rf"chats\.{suffix} {words}"):
        sources.read(str(path))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    whole = gzip.compress(b'{"text": "x"}\n' * 99)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "flipped.jsonl.gz").write_bytes(whole[:12] + b"\xff\xff\xff" + whole[15:])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    for name in ("plain.jsonl.gz", "cut.jsonl.gz", "flipped.jsonl.gz", "cut.parquet"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            sources.read(str(tmp_path / name))


def test_a_damaged_tree_is_named():
    for prompt in (None, {"message_id": "a", "replies": 3}, {"message_id": "a", "replies": ["b"]}):
        with pytest.raises(ValueError, match="OASST tree t holds"):
            list(sources._flat([{"message_tree_id": "t", "prompt": prompt}]))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "loader.py", "rows.json", "rows.csv"])
def test_what_is_neither_jsonl_nor_parquet_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(ROWS))
    jsonl(tmp_path / "good.jsonl", ROWS)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"{name} is not read"):
            sources.read(str(source))


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*none\.jsonl \(working folder"):
        sources.read(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"no file or folder chats/none\.jsonl"):
        sources.read("chats/none.jsonl")
    with pytest.raises(ValueError, match="holds no file named"):
        sources.read(str(tmp_path))
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        sources.read(jsonl(tmp_path / "empty.jsonl", []))
