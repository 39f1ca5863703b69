"""Fault 18: texts of every size and of every kind of character go through as they are, or are left out with their place."""

import json
from pathlib import Path

import pytest
from conftest import MakeRecipe
from in_process import lines, metrics
from limited import limit_memory
from processes import run
from transformers import AutoTokenizer

from qlora_suite import chats, dataset, sources
from qlora_suite.files import read_json
from qlora_suite.recipe import Source

ODD = {
    "one letter": "a",
    "NUL": "before\0after",
    "control characters": "\x01\x02\x1b[31mred\x1b[0m\x7f\x9f",
    "emoji": "😀👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿 and 🇫🇷",
    "right to left": "שלום עולם مرحبا بالعالم",
    "bidi controls": "\u202eevil\u202c \u2066isolated\u2069 \u200f",
    "byte order mark inside": "a\ufeffb\ufeff",
    "CRLF": "one\r\ntwo\rthree\n",
    "line separators": "one\u2028two\u2029three\x85four\x0bfive\x0csix",
    "combining": "e\u0301 n\u0303 " + "a" + "\u0300\u0316" * 100,
    "not normalised": "Å Å Å ﬁ ① ｆｕｌｌ",
    "astral and private": "\U0001f9ec \ue000 \U000f0000 \U0010ffff \uffff \ufffe",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e",
    "white space at the edges": " \t\u00a0\u3000x\u3000\n ",
    "variants of one": "ﷺ ẞ ß İ ı",
}
SETTINGS = ("data.policy=null", "data.split=all", "data.dev_share=0.0", "data.packing=false", "data.max_length=512")


def row(answer: str, question: str = "say it") -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("kind", ["jsonl, escaped", "jsonl", "jsonl with a BOM and CRLF", "json list"])
def test_every_odd_text_comes_to_the_disk_as_it_is_and_is_trained_on(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    rows = [row(text) for text in ODD.values()]
    path = tmp_path / ("odd.json" if kind == "json list" else "odd.jsonl")
    if kind == "json list":
        path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())
    else:
        end, begin = ("\r\n", "\ufeff") if "BOM" in kind else ("\n", "")
        path.write_bytes((begin + "".join(json.dumps(r, ensure_ascii="escaped" in kind) + end for r in rows)).encode())
    recipe = make_recipe(f"data.source={path}", *SETTINGS, "train.max_steps=1", "train.rows_per_step=15")
    ended = run("prepare_data.py", recipe, log=tmp_path / "log")
    assert ended.process.exitcode == 0, ended.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    made = dataset.Rows(tmp_path / "prepared" / "train.arrow")
    learnt = {}
    for number in range(len(made)):
        ids, flags = made[number]["input_ids"], made[number]["supervised"]
        place = int(made.examples(number)[0].rpartition(":")[2]) - 1
        learnt[list(ODD)[place]] = tokenizer.decode(ids[flags][:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert learnt == ODD
    if kind == "jsonl":
        trained = run("train.py", recipe, log=tmp_path / "train")
        assert trained.process.exitcode == 0, trained.output
        assert metrics(tmp_path / "run")[0]["applied"]


def test_half_characters_and_bytes_that_are_no_text_are_named_with_their_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    good = [json.dumps(row(f"answer {n}")).encode() for n in range(6)]
    bad = [
        b'{"messages": [{"role": "user", "content": "\\ud83d alone"}]}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        json.dumps(row("\xe9t\xe9"), ensure_ascii=False).encode("latin-1"),
        b'{"messages": "\xed\xa0\xbd"}',
        json.dumps(row("x")).encode("utf-16"),
    ]
    content = b"\n".join([good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3], bad[3], good[4], bad[4], good[5]])
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    ended = run("prepare_data.py", make_recipe(f"data.source={path}", *SETTINGS), log=tmp_path / "log")
    assert ended.process.exitcode == 0, ended.output
    named = [(r["place"], r["reason"]) for r in lines(tmp_path / "prepared" / "bad_rows.jsonl")]
    assert named[0] == ("odd.jsonl line 2", "half of a surrogate pair, which is no text")
    assert named[1:] == [(f"odd.jsonl line {n}", "not UTF-8") for n in (4, 6, 8, 10)]
    counts = read_json(tmp_path / "prepared" / "manifest.json")["counts"]
    assert (counts["read"], counts["train"]["kept"], sum(counts["dropped"].values())) == (11, 6, 5)


def test_one_row_of_200_000_tokens_is_cut_or_left_out_by_the_rule_and_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    novel = "".join(f"word {n} of a novel, " for n in range(40_000))
    path.write_text("".join(json.dumps(r) + "\n" for r in [row("short"), row(novel), row("a")]))
    found = {}
    for too_long in ("truncate", "drop"):
        recipe = make_recipe(f"data.source={path}", *SETTINGS, f"data.too_long={too_long}", "train.max_steps=1", "train.rows_per_step=2")
        ended = run("prepare_data.py", recipe, log=tmp_path / "log", prelude=(limit_memory, 2500))
        assert ended.process.exitcode == 0, ended.output
        found[too_long] = read_json(tmp_path / "prepared" / "manifest.json")["counts"]["train"]
        lengths = dataset.Rows(tmp_path / "prepared" / "train.arrow").lengths.tolist()
        assert max(lengths) <= 512
        assert len(lengths) == (3 if too_long == "truncate" else 2)
    assert found["truncate"]["cut_conversations"] == 1
    assert found["truncate"]["cut_tokens"] > 200_000
    truncated, dropped = (sum(one[key] for key in ("supervised", "cut_tokens", "dropped_tokens")) for one in found.values())
    assert truncated == dropped
    assert found["drop"]["dropped_too_long"] == 1
    trained = run("train.py", recipe, log=tmp_path / "log")
    assert trained.process.exitcode == 0, trained.output


def test_lines_of_50_and_100_megabytes_are_left_out_in_bounded_memory(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Tokenising the first would take 10 GB, and the second is not even read whole."""
    path = tmp_path / "huge.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(row("before")) + "\n")
        for megabytes in (50, 100):
            file.write(json.dumps(row("0123456789" * (megabytes * 100_000))) + "\n")
        file.write(json.dumps(row("after")) + "\n")
    recipe = make_recipe(f"data.source={path}", *SETTINGS)
    ended = run("prepare_data.py", recipe, log=tmp_path / "log", prelude=(limit_memory, 1500))
    path.unlink()
    assert ended.process.exitcode == 0, ended.output[-2000:]
    named = [(r["place"], r["reason"]) for r in lines(tmp_path / "prepared" / "bad_rows.jsonl")]
    assert sorted(named) == [
        ("huge.jsonl line 2", "more than 4,000,000 characters; cut it into rows"),
        ("huge.jsonl line 3", "a line of more than 67,108,864 bytes"),
    ]
    assert read_json(tmp_path / "prepared" / "manifest.json")["counts"]["train"]["kept"] == 2
    assert len(ended.output) < 5000


def test_an_endless_object_of_a_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LONGEST", 2**21)
    path = tmp_path / "long.json"
    path.write_text('[{"text": "a"}, {"text": "' + "b" * 2**23 + '"}]')
    with pytest.raises(ValueError, match=r"long\.json cannot be read after line 1: an object goes on for more than 2,097,152 characters"):
        list(sources.read(str(path)))


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_line_of_exactly_the_longest_is_read_and_one_more_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(sources, "_LONGEST", 1000)
    line = json.dumps({"text": "x" * (1000 + size - len('{"text": ""}') - 1)}) + "\n"
    assert len(line) == 1000 + size
    path = tmp_path / "lines.jsonl"
    path.write_text(line + '{"text": "next"}\n')
    first, second = sources.read(str(path))
    assert isinstance(first, sources.BadRow) == (size > 0)
    assert (second.values, second.place.number) == ({"text": "next"}, 2)


def test_a_conversation_of_exactly_the_longest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "LONGEST", 10)
    place = sources.Place("x", 1)
    for answer, taken in (("12345678", True), ("123456789", False)):
        found = chats.conversation_of(sources.Row(place, row(answer, "ab")), "messages", Source(source="x", policy=None))
        assert isinstance(found, sources.BadRow) != taken
