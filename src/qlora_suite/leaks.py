"""What must not leave this machine: paths that name its disks and users, and tokens.

roots = machine_roots(run)                 folders whose names are nobody's business
without_paths(text, roots)                 /home/me/suite/data/x.jsonl -> data/x.jsonl
complaint_about_leaks(folder, roots)       what still leaks, or None
refuse_tokens(sys.argv[1:])                ValueError if a token is among them
redacted(text)                             the text of an error, without this machine's tokens
"""

import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_suite.files import read_json

TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|wandb_v1_[A-Za-z0-9_]{20,}"
    r"|sk-(?:proj-|svcacct-|admin-|ant-[a-z0-9]+-)[A-Za-z0-9_-]{20,}|sk-(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,})"
)
"""Of the hub, of OpenAI (and those who write theirs alike), of Weights & Biases. Its older keys, 40 hex digits, look like a commit."""
SECRET_VARIABLE = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
"""Names of environment variables that hold a secret (HF_TOKEN, WANDB_API_KEY; not HF_TOKEN_PATH)."""
SHORTEST_SECRET = 8
"""A shorter value is a word or a number, which any text may hold."""
COMMON = {Path(p) for p in ("/", "/usr", "/usr/local", "/opt", "/tmp", "/var/tmp", "/home", "/mnt", "/media", "/data")}  # noqa: S108
"""Names that every machine has, and that anybody's text may speak of."""


def refuse_tokens(arguments: Iterable[str]) -> None:
    """Raises ValueError, without repeating it, for a token on the command line: others see it in `ps` and in the shell's history."""
    known = secrets()
    if any(holds_token(argument, known) or re.match(r"--(hf[-_])?token(=|$)", argument) for argument in arguments):
        raise ValueError("a token does not belong on the command line, where others can read it; set HF_TOKEN or use `hf auth login`")


def secrets_of_environment() -> list[str]:
    """Values of environment variables that are named like a secret, longest first."""
    found = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def secrets() -> list[str]:
    """And the hub's token, which `hf auth login` keeps in a file."""
    from huggingface_hub import get_token

    return [*filter(None, [get_token()]), *secrets_of_environment()]


def holds_token(text: str, known: Iterable[str] = ()) -> bool:
    """Is there a token in the text, by its look or because its value is known?"""
    return TOKEN.search(text) is not None or any(value in text for value in known)


def redacted(text: str) -> str:
    """The text with [token] in the place of each token."""
    for value in secrets():
        text = text.replace(value, "[token]")
    return TOKEN.sub("[token]", text)


_END = r"(?![\w.+@%-])"


def machine_roots(run: Path, recipes: Iterable[str] = ()) -> list[str]:
    """Absolute folders of this machine that a run's files may name, longest first. `recipes`: the texts of those of earlier runs, which
    lay and read elsewhere.
    """
    from huggingface_hub import constants

    suite = Path(__file__).resolve().parents[2]
    found = {Path.cwd(), Path.home(), suite, run.absolute(), run.resolve(), Path(sys.prefix), Path(constants.HF_HOME)}
    values = [yaml.safe_load(recipe) for recipe in recipes]
    for name, read in (("recipe.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8"))), ("run.json", read_json)):
        if (run / name).is_file():
            values.append(read(run / name))
    found |= {Path(text).parent for text in _texts(values) if re.match(r"^/[^/\s]+/\S", text)}
    return sorted({str(root) for root in found if root not in COMMON}, key=len, reverse=True)


def without_paths(text: str, roots: Iterable[str]) -> str:
    """Paths below a root become relative to it."""
    for root in roots:
        text = re.sub(re.escape(root) + r"/", "", text)
        text = re.sub(re.escape(root) + _END, ".", text)
    return text


def cleaned(value: Any, roots: Sequence[str]) -> Any:
    """A JSON value with `without_paths` in every string and key."""
    if isinstance(value, str):
        return without_paths(value, roots)
    if isinstance(value, dict):
        return {cleaned(key, roots): cleaned(inner, roots) for key, inner in value.items()}
    return [cleaned(inner, roots) for inner in value] if isinstance(value, list) else value


def complaint_about_leaks(folder: Path, roots: Iterable[str]) -> str | None:
    """The first file that names a place of this machine or holds a token, or None. The token itself is not repeated.

    Of weights the header is read; the rest is numbers.
    """
    paths = [(root, re.compile((re.escape(root) + _END).encode())) for root in roots]
    tokens = [token.encode() for token in secrets()]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = _header(path) if path.suffix == ".safetensors" else path.read_bytes()
        if re.search(TOKEN.pattern.encode(), content) or any(token in content for token in tokens):
            return f"{path.relative_to(folder)} holds what looks like a token; remove it where it came from"
        for root, pattern in paths:
            if pattern.search(content):
                return f"{path.relative_to(folder)} names {root}, a folder of this machine"
    return None


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(min(length, 2**26))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
