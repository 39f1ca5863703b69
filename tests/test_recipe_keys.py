"""docs/recipe_keys.md is what recipe.py says, in a person's words."""

import re
from typing import Annotated, Any, Literal

import pytest
from conftest import ROOT
from pydantic import Field

from qlora_suite.recipe import Fraction, Grpo, Markers, Positive, Recipe, default_of, flatten
from qlora_suite.recipe_file import load
from qlora_suite.recipe_keys import page, takes

PAGE = ROOT / "docs" / "recipe_keys.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m qlora_suite.recipe_keys > docs/recipe_keys.md"


def rows() -> dict[str, list[str]]:
    """Key with its sections -> cells of its row."""
    found, place = {}, ""
    for line in page().splitlines():
        if line.startswith("##"):
            place = line.lstrip("# ").partition("the sections")[0]
        elif match := re.match(r"\| `(\w+)`", line):
            found[f"{place}.{match[1]}".lstrip(".")] = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return found


def test_every_key_has_a_row_with_its_default() -> None:
    found = rows()
    keys = set(flatten(load(ROOT / "recipes" / "quickstart_dpo.yaml"))) | {f"grpo.{key}" for key in Grpo.model_fields}
    assert {re.sub(r"\.\d+", "", key) for key in keys} <= found.keys()
    assert found["optim.learning_rate"][2] == "**needed**"
    assert found["adapter.rank"][2] == f"`{default_of('adapter.rank')}`" == "`16`"
    assert found["data.fields"][2] == "`{}`"
    assert found["stop.after_minutes"][0].endswith("°")
    assert not found["train.epochs"][0].endswith("°")
    assert "GPU" in found["speed.compile"][3]


def test_every_row_has_four_cells_and_every_link_a_heading() -> None:
    assert {len(cells) for cells in rows().values()} == {4}
    headings = {line.lstrip("# ").replace(".", "") for line in page().splitlines() if line.startswith("##")}
    links = set(re.findall(r"\(#(\w+)\)", page()))
    assert links <= headings
    assert len(links) > len(Recipe.model_fields)
    assert not re.search(r"Annotated|NoneType|Literal|tuple|Field\(|typing", page()), "Python's words for types"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Positive | None, "whole number above 0 or `null`"),
        (Fraction, "number from 0 and below 1"),
        (bool | Annotated[float, Field(ge=0, le=1)] | Literal["auto"], "`true`, `false`, number from 0 and at most 1 or `auto`"),
        (Markers, "text or list of texts"),
        (tuple[str, ...] | Literal["all-linear"], "list of texts or `all-linear`"),
        (tuple[Fraction, Fraction], "list of two: number from 0 and below 1 and number from 0 and below 1"),
        (dict[str, str | bool | int], "mapping of names to texts, `true`, `false` or whole number"),
        (tuple[Grpo, ...], "list of sections"),
    ],
)
def test_types_are_words(kind: Any, words: str) -> None:
    assert takes(kind) == words
