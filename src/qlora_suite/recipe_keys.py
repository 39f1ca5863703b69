"""docs/recipe_keys.md: every key of a recipe with what it takes, its default and its meaning, as recipe.py has them.

python -m qlora_suite.recipe_keys > docs/recipe_keys.md
"""

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from qlora_suite.recipe import Recipe, Source, section_of

HEAD = """# All keys of a recipe

Made from `src/qlora_suite/recipe.py` by `python -m qlora_suite.recipe_keys > docs/recipe_keys.md`.

A recipe is one YAML file; on the command line of every script a key is overridden as `section.key=value`, where the value is YAML
(`optim.learning_rate=1e-4`, `data.filters.languages='[en]'`, `dpo='{}'`). An unknown key is an error, and so is one that could have no
effect. Keys with a ° may be changed between two starts of one run; all others change what is learnt, and a run refuses to go on with
another value (folders may be moved: their contents are compared).
"""
WORDS = {str: "text", int: "whole number", float: "number"}
LIMITS = {"gt": "above", "ge": "from", "lt": "below", "le": "at most"}


def page() -> str:
    """The whole file."""
    return "\n".join([HEAD, *_tables(Recipe, "")]).rstrip() + "\n"


def takes(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """What a key of such a type takes, in words."""
    *others, last = dict.fromkeys(_alternatives(annotation, metadata))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(annotation: Any, metadata: tuple[Any, ...]) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(args[0], args[1:])
    if origin in (Union, types.UnionType):
        return [words for arg in args for words in _alternatives(arg, ())]
    if origin is Literal:
        return [_code(value) for value in args]
    if annotation is type(None):
        return [_code(None)]
    if annotation is bool:
        return [_code(True), _code(False)]
    if origin is tuple and args[1] is not ...:
        return ["list of two: " + " and ".join(takes(arg) for arg in args)]
    if origin is tuple:
        alone = any(isinstance(entry, BeforeValidator) for entry in metadata)  # which makes a list of one of it
        return [*([takes(args[0])] if alone else []), f"list of {_plural(args[0])}"]
    if origin is dict:
        return [f"mapping of names to {_plural(args[1])}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["section"]
    return [WORDS[annotation] + _limits(metadata)]


def _plural(part: Any) -> str:
    words = takes(part)
    noun = next((word for word in ("section", *WORDS.values()) if words.startswith(word)), None)
    return words if noun is None else words.replace(noun, f"{noun}s", 1)


def _limits(metadata: tuple[Any, ...]) -> str:
    """` from 0 and below 1`"""
    each = [limit for entry in metadata for limit in (getattr(entry, "metadata", None) or [entry])]
    found = [f"{word} {getattr(limit, name):,}" for limit in each for name, word in LIMITS.items() if hasattr(limit, name)]
    return " " + " and ".join(found) if found else ""


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    if isinstance(field.default, BaseModel):
        return ""  # each of its keys has its own
    if field.default == () and get_origin(field.annotation) is dict:
        return "`{}`"
    return _code(field.default)


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _tables(section: type[BaseModel], path: str) -> Iterator[str]:
    """One table of a section's own keys, then those of the sections in it."""
    yield f"{'#' * (2 + path.count('.'))} {path or 'the sections, and a key'}\n"
    if section.__doc__ and path:
        yield " ".join(section.__doc__.split()) + "\n"
    yield "| key | takes | default | |\n|---|---|---|---|"
    inner = []
    for name, field in section.model_fields.items():
        words, kind, place = takes(field.annotation, tuple(field.metadata)), section_of(field.annotation), f"{path}.{name}".lstrip(".")
        if kind is not None:
            of = "data" if kind is Source else place  # whose keys stand in the table of `data`
            words = re.sub("sections?", lambda match, of=of: f"[{match[0]}](#{of.replace('.', '')})", words, count=1)
            inner += [] if kind is Source else [(kind, place)]
        free = " °" if (field.json_schema_extra or {}).get("free") else ""
        yield f"| `{name}`{free} | {words} | {_default(field)} | {_meaning(field)} |"
    yield ""
    for kind, place in inner:
        yield from _tables(kind, place)


if __name__ == "__main__":
    print(page(), end="")
