"""What a run is: what must not change between two starts of it, what it computes on, and in which form it can be served."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_suite import start_from
from qlora_suite.dataset import data_hash
from qlora_suite.model import base_fingerprint
from qlora_suite.prequantized import record_of
from qlora_suite.recipe import Recipe, curve_keys, names_files

DATA = "data (hash of rows and tokenizer)"
BASE = "base (commit, or hash of its files)"
START = start_from.START


def prepared_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the rows were made with, role markers and chat template included."""
    return AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)


def identity(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change between two starts of one run.

    Raises ValueError if adapter.start_from belongs to another base, or either cannot be read.
    """
    keys = {key: value for key, value in curve_keys(recipe).items() if not names_files(key)}
    everything = {**keys, DATA: data_hash(manifest), BASE: base_fingerprint(recipe.model)}
    if recipe.adapter != "none" and recipe.adapter.start_from is not None:
        noted = start_from.noted_by_finished_run(recipe)
        if noted is None:
            start_from.check_base(recipe.adapter.start_from, everything[BASE])
        everything[START] = noted or start_from.fingerprint(recipe.adapter.start_from)
    return json.loads(json.dumps(everything))  # tuples as lists, as they come back from a file


def precision_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounding(recipe: Recipe, dtype: torch.dtype) -> str:
    """What a run is computed in, and what its quantised base was rounded to before, where that is another type."""
    record = record_of(recipe.model.base)
    if record is None or record["precision"] == precision_name(dtype):
        return precision_name(dtype)
    return f"{precision_name(dtype)} on a base rounded to {record['precision']}"


def processes_text(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def servable_as(recipe: Recipe, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """(`adapter`, `merged` or `model`, why): in which form other programs can serve what this run makes."""
    if recipe.adapter == "none":
        return "model", "every weight is trained"
    if recipe.adapter.init not in ("default", "gaussian"):
        return "merged", f"adapter.init: {recipe.adapter.init} has changed the base that the adapter stands on"
    return manifest["role_markers"]["servable_as"], manifest["role_markers"]["reason"]


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computes on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "count": torch.cuda.device_count()}
    return {"device": f"CPU ({torch.get_num_threads()} threads)", "machine": platform.machine(), "cores": os.cpu_count()}


def git_state() -> dict[str, Any] | None:
    """Commit of the suite and whether files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603, S607

    return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
