"""Are two runs the same to the last bit: what they learnt, what they say of it, and what they would go on from?"""

import hashlib
import json
from pathlib import Path

from in_process import column, lines, metrics
from safetensors.torch import load_file

from qlora_suite import checkpoint

FINAL = Path("final") / checkpoint.ADAPTER
VOLATILE = ("attempt", "tokens_per_second", "peak_memory_gib")


def curve(run: Path) -> list[dict]:
    """Everything that a step leaves in metrics.jsonl, but for its time and memory."""
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in metrics(run)]


def dev_losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["dev_loss"]) for record in lines(run / "metrics.jsonl") if "dev_loss" in record]


def state_of(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["step"]


def snapshot(folder: Path, *but: str) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(run: Path, whole: Path) -> None:
    """`run`, which was interrupted, against the uninterrupted one. Nothing may be left of the interruptions, either."""
    assert curve(run) == curve(whole)
    steps = column(metrics(run), "step")
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    attempts = column(metrics(run), "attempt")
    assert attempts == sorted(attempts)
    assert dev_losses(run) == dev_losses(whole)
    assert (run / "previews.jsonl").read_text() == (whole / "previews.jsonl").read_text()
    assert (run / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    assert (run / "final" / "chosen.json").read_text() == (whole / "final" / "chosen.json").read_text()
    newest = f"checkpoints/step-{checkpoint.steps(whole / 'checkpoints')[-1]:06d}"
    ours, its = (load_file(r / newest / checkpoint.OPTIMIZER) for r in (run, whole))
    assert ours.keys() == its.keys()
    assert all(tensor.equal(its[key]) for key, tensor in ours.items())
    assert state_of(run) == state_of(whole)
    assert leftovers(run) == []


def leftovers(run: Path) -> list[str]:
    """What a write that was cut short has left."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock")
