"""The room that a run's checkpoints take, asked for before its first step: a disk that is full at the last one costs the run."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_suite.recipe import Recipe

RUNTIME_FILES = 20 * 2**20
"""Bytes for metrics, previews and logs of a run, generously."""
MOMENTS = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1}
"""Bytes of the optimiser's state a trained weight: two fp32 moments, or two of 8 bits with their scales."""


@dataclass(frozen=True)
class Need:
    """In bytes."""

    one: int
    """A checkpoint: trained weights in fp32, the optimiser's state, the tokenizer's files."""
    checkpoints: int
    """How many stand there at once: those that are kept, the best one, and the one that is being written."""
    result: int

    @property
    def total(self) -> int:
        return self.checkpoints * self.one + self.result + RUNTIME_FILES

    def __str__(self) -> str:
        return f"{self.checkpoints} checkpoint{'s'[: self.checkpoints > 1]} of {size_text(self.one)}, result {size_text(self.result)}"


def need_of(recipe: Recipe, num_trained: int, num_steps: int | None = None) -> Need:
    """What a run with so many trained weights will need in output.dir; of so many steps, or of any number."""
    tokenizer = sum(path.stat().st_size for path in (Path(recipe.data.prepared) / "tokenizer").glob("*"))
    one = int((4 + MOMENTS[recipe.optim.name]) * num_trained) + tokenizer
    kept = recipe.checkpoints
    evaluates = recipe.evaluation.every_steps is not None
    periodic = kept.every_steps is not None or kept.every_minutes is not None or evaluates
    result = (2 if recipe.output.final_dtype in ("float16", "bfloat16") else 4) * num_trained + tokenizer
    most = kept.keep + evaluates + 1 if periodic else 1
    if num_steps is not None:  # `keep: 1000` keeps no more than are made
        most = min(most, num_steps if kept.every_minutes is not None or evaluates else num_steps // (kept.every_steps or num_steps) + 1)
    return Need(one, most, result)


def check_free(recipe: Recipe, num_trained: int, num_steps: int) -> None:
    """Raises ValueError if output.dir, or the mirror if it can be reached, has less room than the run will need.

    What stands there already counts: a run that goes on prunes its own. Quotas are not seen; a save that meets one is tried again.
    """
    need = need_of(recipe, num_trained, num_steps)
    places = {"output.dir": (Path(recipe.output.dir), need.total)}
    if recipe.output.mirror is not None:
        places["output.mirror"] = (Path(recipe.output.mirror), need.checkpoints * need.one)
    for key, (folder, total) in places.items():
        try:
            disk = existing(folder)
            free = shutil.disk_usage(disk).free
            standing = sum(map(size_of, [*(folder / "checkpoints").glob("step-*[0-9]"), *folder.glob("final")]))
        except OSError:
            if key == "output.mirror":  # a drive that is not there is said at every save, and does not keep the run from starting
                continue
            raise
        more = max(total - standing, need.one)
        if more > free:
            raise ValueError(
                f"{key}: this run will need {size_text(more)} more on the disk of {folder} ({need}), and {size_text(free)} are free; make "
                f"room, name a folder on another disk, or lower checkpoints.keep (now {recipe.checkpoints.keep}, at least 2)"
            )


def is_full(error: OSError) -> bool:
    """Is it the disk, or a quota, that is full? safetensors has errors of its own, of which only the text remains."""
    said = str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or any(os.strerror(n) in said for n in (errno.ENOSPC, errno.EDQUOT))


def existing(path: Path) -> Path:
    """The path, or its nearest ancestor that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def size_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
