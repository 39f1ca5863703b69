"""What docs/maintaining.md and docs/reliability.md name is there: tests, files, functions; and every fault has its row."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [page for page in (ROOT / "docs/maintaining.md", ROOT / "docs/reliability.md") if page.is_file()]
FAULTS = range(1, 26)
PLACES = ("", "src/qlora_suite", "tests", "tests/faults", "scripts", "slurm", "benchmarks", "docs")
MADE_BY_A_RUN = re.compile(r"(^|/)(\w+\.jsonl?|\.\w+\.json|recipe\.yaml|gpu\.json)$|\*")


def code_spans(page: Path) -> list[str]:
    """What stands between backticks, in words: `bash scripts/x.sh tests/y.py` is three."""
    return [word for span in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")) for word in span.split()]


def found(name: str) -> list[Path]:
    """A file by its path, or by its name in one of PLACES."""
    return [path for place in PLACES if (path := ROOT / place / name).is_file()]


@cache
def names_in(path: Path) -> set[str]:
    """Classes, functions, methods and constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_test_and_function_that_a_page_names_is_there(page: Path) -> None:
    missing, tests, file_before = [], 0, ""
    for span in code_spans(page):
        word = file_before + span if span.startswith("::test_") else span  # of the file that was named last
        if "::" in word:
            file_before = word.partition("::")[0]
        match = re.fullmatch(r"([\w./-]+\.(?:py|sh|sbatch|md|toml|txt|lock|yaml|json))(?:(::?)(\w+)(?:\[[^\]]*\])?)?", word)
        if not match or (match[3] is None and MADE_BY_A_RUN.search(word)):
            continue
        files = found(match[1])
        tests += match[2] == "::"
        there = any(match[3] is None or match[3] in names_in(file) for file in files)
        if not there and match[1] != "docs/reliability.md":  # which may be yet to come
            missing.append(word)
    assert not missing, f"{page.name} names what is not there: {missing}"
    assert tests > 10, "the page names no tests, or this test does not see them"


@pytest.mark.skipif(len(PAGES) < 2, reason="there is no docs/reliability.md")
def test_every_fault_has_a_row_with_a_test() -> None:
    rows = re.findall(r"^\|\s*(\d+)\s*\|(.*)$", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted({int(number) for number, _ in rows}) == list(FAULTS)
    assert [number for number, row in rows if "::test_" not in row] == []
