"""Mutated files of every kind that the scripts read. As a program it goes on for as long as one likes, on one seed after another:

PYTHONPATH=src:tests:tests/faults python tests/faults/fuzzed.py 300 [KIND ...]
"""

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qlora_suite import chats, dataset, oasst1, sources
from qlora_suite.loss import collate
from qlora_suite.recipe import PAIR_POLICIES, Source
from qlora_suite.recipe_file import load
from qlora_suite.sources import BadRow, Row
from qlora_suite.tracking import Journal, read_journal

SECONDS = 20
"""More for one file of some kB is a hang."""
MEMORY = 3 * 2**30
"""Of address space, beyond what the process has when it begins."""
PIECES = (
    *(
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\\ud800",
    ),
    *(b"null", b"true", b"-", b"1e999", b"NaN", b"9" * 5000, b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"[" * 3000, b'{"a":' * 3000, b"&a *a"),
    *(b"!!python/object/apply:os.system ['true']", b"<|endoftext|>", b"../", b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\x7f"),
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    10**400,
    0.5,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "\0",
    "a\u2028b",
    [],
    {},
    [None],
    {"a": 1},
)


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits and bytes, parts cut out, put twice, moved or overwritten, and pieces that mean something."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        a, b = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        b = min(b, a + draw.choice((1, 4, 50, 1000)))
        what = draw.randrange(8)
        if what == 0 and data:
            data[min(a, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif what == 1 and data:
            data[min(a, len(data) - 1)] = draw.randrange(256)
        elif what == 2:
            del data[a:]
        elif what == 3:
            del data[a:b]
        elif what == 4:
            data[a:a] = data[a:b] * draw.choice((1, 2, 50))
        elif what == 5:
            part = data[a:b]
            del data[a:b]
            place = draw.randrange(len(data) + 1)
            data[place:place] = part
        elif what == 6:
            data[a : a + draw.choice((0, 1, 8))] = draw.choice(PIECES)
        else:
            data[a:b] = bytes(draw.randrange(256) for _ in range(b - a))
    return bytes(data)


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place in it replaced, removed, renamed, doubled or nested."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            places += [(inner, key) for key in keys]
            stack += [inner[key] for key in keys]
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    what = draw.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1:
        holder[key] = [holder[key]]
    elif what == 2 and isinstance(holder, dict):
        holder[draw.choice([k for h, k in places if isinstance(h, dict)])] = holder[key]
    elif what == 3 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = draw.choice(VALUES)
    return value


# --- the kinds


@dataclass(frozen=True)
class Kind:
    """A kind of file, one of which lies at `path`."""

    path: Path
    read: Callable[[Path], None]
    """All that the scripts do with it, up to the tokens."""
    structured: Callable[[bytes, random.Random], bytes] | None = None
    """Mutates values instead of bytes."""


CHAT = {"messages": [{"role": "user", "content": "Hi é 😀"}, {"role": "assistant", "content": "Hello", "train": True, "weight": 1}]}
ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3", "history": [["a", "b"]], "system": "Be brief."}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
PROMPT = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "completion": "Ho"}
PAIR = {"prompt": "Hi", "chosen": "Ho", "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm"}]}


def message(name: str, parent: str | None, **more: Any) -> dict[str, Any]:
    basic = {"message_id": name, "parent_id": parent, "message_tree_id": "P1", "role": "assistant" if name[0] == "A" else "prompter"}
    return (
        basic | {"text": f"text of {name}", "lang": "en", "rank": 0, "deleted": False, "review_result": True, "created_date": "2023"} | more
    )


FLAT = [message("P1", None), message("A1", "P1"), message("P2", "A1"), message("A2", "P2", rank=None), message("A3", "P1", rank=1)]
NESTED = {"message_tree_id": "P1", "tree_state": "ready", "prompt": FLAT[0] | {"replies": [FLAT[1] | {"replies": [FLAT[2]]}, FLAT[4]]}}


def read_rows(path: Path) -> None:
    """As selection.py does. The place of each bad row is in its words."""
    source, rows = Source(source=str(path), split="all", policy=None), list(sources.read(str(path)))
    assert all(str(row).startswith(path.name) for row in rows if isinstance(row, BadRow))
    good = [row for row in rows if isinstance(row, Row)]
    form = chats.recognise(rows[: chats.LOOK_AT], source)
    if form != "oasst":
        for row in good:
            found = chats.conversation_of(row, form, source)
            json.dumps(str(found)).encode() if isinstance(found, BadRow) else dataset.conversation_record(found)
            if not isinstance(found, BadRow):
                pa.RecordBatch.from_pylist([dataset.conversation_record(found)], schema=dataset.CONVERSATIONS)
        return
    forest = oasst1.forest(good)
    assert len(forest.messages) + len(forest.bad_rows) == len(good)
    for policy in ("best_path", "joined_replies", "best_replies", "all_replies", "all_paths", "each_message", *PAIR_POLICIES):
        for filters in (None, Source(source="x", policy=policy).filters):
            oasst1.conversations(forest.messages, policy, filters, forest.left_out)


def of_lines(content: bytes, draw: random.Random) -> bytes:
    lines = [json.loads(line) for line in content.split(b"\n") if line]
    at = draw.randrange(len(lines))
    lines[at] = mutated_value(lines[at], draw)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def of_one(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(mutated_value(json.loads(content), draw)).encode()


def of_manifest(content: bytes, draw: random.Random) -> bytes:
    """With a hash that fits: whoever writes a wrong one can write that too."""
    value = mutated_value(json.loads(content), draw)
    return json.dumps(dataset.sealed(value) if isinstance(value, dict) else value).encode()


def of_yaml(content: bytes, draw: random.Random) -> bytes:
    return yaml.safe_dump(mutated_value(yaml.safe_load(content), draw)).encode()


def kinds(folder: Path, recipe: Path) -> dict[str, Kind]:
    """Valid files in `folder`; the recipe's data is prepared."""
    values = load(recipe)
    prepared = folder / "prepared"
    shutil.copytree(values.data.prepared, prepared)
    here = load(recipe, [f"data.prepared={prepared}"])

    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def lines(*values: Any) -> bytes:
        return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()

    table = pa.Table.from_pylist([CHAT, CHAT, {"messages": [{"role": "user", "content": "only"}]}] * 5)
    pq.write_table(table, folder / "rows.parquet", row_group_size=5)
    manifest = json.loads((prepared / dataset.MANIFEST).read_text()) | {"recipe": dataset.recipe_part(here)}
    (prepared / dataset.MANIFEST).write_text(json.dumps(dataset.sealed(manifest)))

    def read_manifest(_: Path) -> None:
        from qlora_suite.funnel import reading_rows, split_rows
        from qlora_suite.role_markers import RoleMarkers

        found = dataset.load_manifest(here)
        dataset.data_hash(found)
        RoleMarkers.from_json(found["role_markers"])
        reading_rows(found["counts"])
        split_rows(found["counts"], True)

    def read_arrow(path: Path) -> None:
        rows = dataset.Rows(folder / "train.arrow")
        for _ in rows.check():
            pass
        for number in range(len(rows)):
            collate([rows[number]], 0)
            rows.examples(number)

    def read_rows_alone(path: Path) -> None:
        """As a run does, which has not checked them before; what one row is refused for is no reason not to ask for the next."""
        rows, refused = dataset.Rows(folder / "train.arrow"), None
        for number in range(min(len(rows), 50)):
            try:
                collate([rows[number]], 0)
            except ValueError as error:
                refused = error
        if refused:
            raise refused

    def read_records(path: Path) -> None:
        """Whatever is damaged costs its own lines alone, and is no reason not to go on."""
        size = len(read_journal(path))
        assert len(Journal(path, 10**9).records) <= size

    steps = [{"step": n, "loss": 1.5, "applied": True, "rows": [1, 2]} for n in range(6)] + [{"event": "disk full", "step": 3}]
    answers = [{"step": n, "answers": [{"prompt": "Hi", "answer": "Ho\u2028\n 😀"}]} for n in range(3)]
    return {
        "jsonl": Kind(written("rows.jsonl", lines(*[CHAT] * 5)), read_rows, of_lines),
        "sharegpt": Kind(written("sharegpt.jsonl", lines(SHAREGPT, SHAREGPT)), read_rows, of_lines),
        "alpaca": Kind(written("alpaca.jsonl", lines(ALPACA, ALPACA)), read_rows, of_lines),
        "prompt": Kind(written("prompt.jsonl", lines(PROMPT, PROMPT)), read_rows, of_lines),
        "pairs": Kind(written("pairs.jsonl", lines(PAIR, PAIR)), read_rows, of_lines),
        "text": Kind(written("text.jsonl", lines({"text": "a b"}, {"text": "é😀"})), read_rows, of_lines),
        "gz": Kind(written("rows.jsonl.gz", gzip.compress(lines(*[CHAT] * 20))), read_rows),
        "list": Kind(written("rows.json", json.dumps([CHAT, CHAT, CHAT], indent=1).encode()), read_rows, of_one),
        "list.gz": Kind(written("list.json.gz", gzip.compress(json.dumps([CHAT] * 20).encode())), read_rows),
        "parquet": Kind(folder / "rows.parquet", read_rows),
        "messages": Kind(written("flat.jsonl", lines(*FLAT)), read_rows, of_lines),
        "trees": Kind(written("trees.jsonl", lines(NESTED, NESTED | {"message_tree_id": "P9"})), read_rows, of_lines),
        "recipe": Kind(written("recipe.yaml", recipe.read_bytes()), lambda path: load(path) and None, of_yaml),
        "manifest": Kind(prepared / dataset.MANIFEST, read_manifest, of_manifest),
        "arrow": Kind(written("train.arrow", (prepared / "train.arrow").read_bytes()), read_arrow),
        "arrow-rows": Kind(folder / "train.arrow", read_rows_alone),
        "index": Kind(written("train.index.arrow", (prepared / "train.index.arrow").read_bytes()), read_arrow),
        "index-rows": Kind(folder / "train.index.arrow", read_rows_alone),
        "conversations": Kind(
            written("validation.arrow", (prepared / "validation.arrow").read_bytes()), lambda p: dataset.read_conversations(p) and None
        ),
        "metrics": Kind(written("metrics.jsonl", lines(*steps)), read_records, of_lines),
        "previews": Kind(written("previews.jsonl", lines(*answers)), read_records, of_lines),
    }


# --- the trial


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def complaint_about_trial(kind: Kind, original: bytes, seed: str) -> tuple[str, str]:
    """(how it ended, what is wrong with that) for one mutation."""
    draw = random.Random(seed)
    mutate = kind.structured if kind.structured and draw.random() < 0.5 else mutated_bytes
    kind.path.write_bytes(mutate(original, draw))
    try:
        with no_hang(SECONDS):
            kind.read(kind.path)
    except ValueError as error:
        words = str(error)
        if kind.path.name not in words and kind.path.parent.name not in words:
            return "refused", f"{type(error).__name__} without its file: {words[:300]}"
        return ("refused", "" if "\n  File" not in words else "a traceback in the message")
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-3:]
        return "failed", f"{type(error).__name__}: {str(error)[:200]} at {[(Path(f.filename).name, f.lineno) for f in last]}"
    return "read", ""


def trials(folder: str, recipe: str, names: list[str], per_kind: int, seconds: float, seed: int, journal: str) -> None:
    """In a process of its own, for a reader may take the process with it: the journal's last line then tells which trial it was."""
    everything = kinds(Path(folder), Path(recipe))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    ends, until, number = Counter(), time.monotonic() + seconds, 0
    original = {name: kind.path.read_bytes() for name, kind in everything.items()}
    with open(journal, "a", encoding="utf-8") as out:
        while number < per_kind and time.monotonic() < until:
            for name in names or everything:
                of_trial = f"{seed}/{name}/{number}"
                out.write(f"trying {of_trial}\n")
                out.flush()
                ended, complaint = complaint_about_trial(everything[name], original[name], of_trial)
                everything[name].path.write_bytes(original[name])  # rows and their index are read together
                ends[name, ended] += 1
                if complaint:
                    out.write(f"WRONG {of_trial}: {complaint}\n")
            number += 1
        for name in names or everything:
            out.write(f"ended {name}: {', '.join(f'{how} {ends[name, how]}' for how in ('read', 'refused', 'failed'))}\n")


if __name__ == "__main__":
    import tempfile

    from conftest import ROOT, write_recipe
    from in_process import prepared

    with tempfile.TemporaryDirectory() as name:
        folder, journal, seed = Path(name), Path(name) / "journal", random.randrange(2**32)
        (folder / "chats.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(20)))
        small = ("data.policy=null", "data.split=all", "data.dev_share=0.3", "data.max_length=64")
        recipe = prepared(write_recipe(folder, ROOT / "assets" / "tiny_phi", folder / "chats.jsonl", *small))
        began = time.monotonic()
        (folder / "fuzzed").mkdir()
        trials(str(folder / "fuzzed"), str(recipe), sys.argv[2:], 10**9, float(sys.argv[1]), seed, str(journal))
        said = journal.read_text().splitlines()
        print("\n".join(line for line in said if not line.startswith("trying")))
        print(f"{sum(line.startswith('trying') for line in said):,} trials in {time.monotonic() - began:.0f} s, seed {seed}")
