"""Which model of the hub a run stands on, also where its base was loaded from a folder of this machine.

    origin_of(recipe.model, fingerprint, None, None)     Origin("microsoft/phi-2", "ef38...", "the recipe's model.base")

An adapter is of use to others only if its config names the base by its hub id, and is exact only with the revision.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from qlora_suite.files import read_json
from qlora_suite.prequantized import source_of
from qlora_suite.recipe import Model

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
CACHED = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{7,40})(?:/|$)")
"""How the hub's cache names the folder of a model's (or an adapter's) commit."""
REVISION = re.compile(r"^[\w][\w./-]*$")


@dataclass(frozen=True)
class Origin:
    id: str
    revision: str | None
    """Commit, branch or tag; None where nothing tells."""
    known_by: str
    """Where this was read, for the reader."""

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.id}" + (f"/tree/{self.revision}" if self.revision else "")


def origin_of(model: Model, fingerprint: str, base_id: str | None, base_revision: str | None) -> Origin | None:
    """The base on the hub; None if nothing tells. `fingerprint` is the run's (a hub id's is `id@commit`).

    Raises ValueError for ids that cannot be, and for options that contradict the recipe.
    """
    if base_revision and not REVISION.match(base_revision):
        raise ValueError(f"--base-revision {base_revision!r} is no commit, branch or tag")
    found = _known(source_of(model.base) or model, fingerprint)
    if base_id is None:
        if found is None:
            return _without_base_id(base_revision)
        if base_revision and found.revision not in (None, base_revision):
            raise ValueError(f"--base-revision {base_revision}, but the run stands on {found.id} at {found.revision}; leave it out")
        return Origin(found.id, base_revision or found.revision, found.known_by)
    if Path(base_id).exists():
        raise ValueError(f"--base-id {base_id} is a folder of this machine; give the hub id of what is in it, e.g. microsoft/phi-2")
    check_hub_id("--base-id", base_id)
    if found is not None and found.id != base_id:
        raise ValueError(f"--base-id {base_id}, but the run stands on {found.id} ({found.known_by}); leave it out")
    return Origin(base_id, base_revision or (found.revision if found else None), "--base-id")


def _without_base_id(base_revision: str | None) -> None:
    if base_revision:
        raise ValueError("--base-revision needs --base-id beside it: nothing else tells which model of the hub it is a revision of")


def check_hub_id(what: str, value: str) -> None:
    """Raises ValueError unless it is `owner/name` as the hub allows it."""
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"{what} {value!r} is no hub id ({str(error).rstrip('.')}); it is written owner/name") from None
    if not HUB_ID.match(value):
        raise ValueError(f"{what} {value!r} is no hub id; it is written owner/name, e.g. someone/tiny-oasst")


def _known(model: Model, fingerprint: str) -> Origin | None:
    """From the recipe, from the path of the hub's cache, or from the name that older configs hold."""
    folder = Path(model.base)
    if not folder.is_dir():
        at = fingerprint.removeprefix(f"{model.base}@") if fingerprint.startswith(f"{model.base}@") else None
        return Origin(model.base, at if at != "None" else model.revision, "the recipe's model.base") if HUB_ID.match(model.base) else None
    if cached := CACHED.search(str(folder.absolute())) or CACHED.search(str(folder.resolve())):
        return Origin(f"{cached[1]}/{cached[2]}", cached[3], "its folder is one of the hub's cache")
    name = read_json(folder / "config.json").get("_name_or_path") if (folder / "config.json").is_file() else None
    if isinstance(name, str) and HUB_ID.match(name) and not Path(name).exists():
        return Origin(name, None, "the _name_or_path in its config.json")
    return None


def base_file(model: Model, origin: Origin | None, name: str) -> Path | None:
    """A file that stands beside the base's weights, in its folder or in the hub's cache; never fetched."""
    model = source_of(model.base) or model
    if Path(model.base).is_dir():
        path = Path(model.base) / name
        return path if path.is_file() else None
    found = try_to_load_from_cache(origin.id, name, revision=origin.revision) if origin else None
    return Path(found) if isinstance(found, str) else None


def licence_of(model: Model, origin: Origin | None) -> str | None:
    """The licence in the base's own card, where that is at hand."""
    card = base_file(model, origin, "README.md")
    try:
        found = (metadata_load(card) or {}).get("license") if card else None
    except Exception:  # somebody's YAML
        return None
    return found if isinstance(found, str) else None
