"""A clock for somebody else's training loop, and what it writes: one JSON file for each arm and round.

The time of a step is that from the end of the step before to its own end, so that loading, masks, optimiser and logging are in it.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput_counts import Counts, matrix_rate, wait_for
from torch import nn

from qlora_suite.files import write_json
from qlora_suite.model import versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What a process is to do; the same for every arm of a round but for the first three."""

    arm: str
    kind: str
    """ours, trl or loop."""
    overrides: list[str]
    """Of the recipe; `ours` takes them all, the peers have those of the work from it."""
    packed: bool
    micro_batch: int | None
    """Rows, or conversations if not packed, at a time; None: as the recipe says."""
    checkpointing: bool
    recipe: str
    device: str
    dtype: str
    """To compute in: fp32, bf16 or fp16."""
    warmup: int
    """Steps that are made and not measured."""
    counted: bool
    """Count instead of timing."""
    out: str
    trace: str | None = None
    """Write a profiler's trace of the last step here."""
    cap_gib: float | None = None
    """Let the CUDA allocator have no more."""


@dataclass
class Meter:
    job: Job
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Real tokens of each step, as far as the arm knows them."""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.job.device)
        self._counts: Counts | None = None
        self._counting = False
        self._places = self._real = self._micro_batches = self._steps_counted = self._tokens_counted = 0
        self._documents: list[str] = []
        self._digest = hashlib.sha256()
        if self.device.type == "cuda" and self.job.cap_gib:
            total = torch.cuda.get_device_properties(self.device).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.job.cap_gib / total))
        rate = matrix_rate(self.device, DTYPES[self.job.dtype])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.facts = {
            "threads": torch.get_num_threads(),
            "versions": {**versions(), "python": sys.version.split()[0]},
            "matrix_rate": rate,
            "rss_after_imports": _status("VmRSS"),
        }
        self._began = time.perf_counter()

    # -- what an arm tells

    def model_is_ready(self, net: nn.Module) -> None:
        """Before the first step, as it will be trained."""
        trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        digest = hashlib.sha256()
        for name, parameter in sorted(trained):
            digest.update(name.split("base_model.model.")[-1].encode() + parameter.detach().float().cpu().numpy().tobytes())
        self.facts["adapter_sha256"] = digest.hexdigest()
        self.facts["trained_parameters"] = sum(p.numel() for _, p in trained)
        self.facts["trained_in"] = sorted({str(p.dtype).removeprefix("torch.") for _, p in trained})
        if self.job.counted:
            self._counts = Counts(net, self.device)
            net.register_forward_pre_hook(self._see_forward, with_kwargs=True)
        self._began = time.perf_counter()

    def fed(self, documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """(ids, labels) of conversations that now go through the model; looked at only when counting."""
        if not self.job.counted or self._counts is None:
            return
        for ids, labels in documents:
            self._real += len(ids)
            self._tokens_counted += len(ids) if self._counting else 0
            predicted = np.array(labels, dtype=np.int64)
            predicted[0] = -100  # nothing predicts the first token, whatever stands there
            self._documents.append(hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes() + predicted.tobytes()).hexdigest())

    def on_host(self, make: Callable[..., Any], *args: Any) -> Any:
        """Call what a loader does with tensors of its own, none of which are on a device, whatever they name."""
        if not self._counting:
            return make(*args)
        with self._counts.on_host():
            return make(*args)

    def step_ended(self, loss: float | torch.Tensor, tokens: int | None = None) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self._counting:
            self._counts.end()
            self._steps_counted += 1
            self._counting = False
        self.seconds.append(now - self._began)
        self.losses.append(float(loss))
        if tokens is not None:
            self.tokens.append(tokens)
        self._digest.update("".join(sorted(self._documents)).encode())
        self._documents.clear()
        if len(self.seconds) == self.job.warmup:
            self._forget_peak()
        if self._counts is not None and len(self.seconds) >= self.job.warmup:
            self._counts.begin()
            self._counting = True
        self.write()
        self._began = time.perf_counter()

    def stop_counting(self) -> None:
        """After the last step; what comes then is no part of any."""
        if self._counting:
            self._counts.abandon()
            self._counting = False

    def write(self, **more: Any) -> None:
        values = {**asdict(self.job), **self.facts, "seconds": self.seconds, "losses": self.losses, "memory": self._memory(), **more}
        if self.tokens:
            values["step_tokens"] = self.tokens
        if self._steps_counted:
            counts, steps, tokens = self._counts, self._steps_counted, self._tokens_counted
            values["counts"] = {
                "steps": steps,
                "flops_per_token": counts.flops / tokens,
                "saved_bytes_per_token": counts.saved_bytes / tokens,
                "live_peak_bytes": counts.live_peak,
                "syncs_per_step": counts.syncs / steps,
                "sync_places": {place: n / steps for place, n in counts.sync_places.most_common()},
                "micro_batches_per_step": self._micro_batches / (steps + self.job.warmup),
                "padding_share": 1 - self._real / self._places,
                "labels_sha256": self._digest.hexdigest(),
                "uncounted_operations": sorted(counts.uncounted),
            }
        write_json(Path(self.job.out), values)

    # -- inner parts

    def _see_forward(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self._places += ids.numel()
        self._micro_batches += 1

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here: without the peak of loading
            self.facts["peak_is_of"] = "the measured steps"
        except OSError:
            self.facts["peak_is_of"] = "the whole process"

    def _memory(self) -> dict[str, int]:
        if self.device.type == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(self.device), "reserved": torch.cuda.max_memory_reserved(self.device)}
        return {"peak": _status("VmHWM"), "now": _status("VmRSS")}


def _status(key: str) -> int:
    """Of /proc/self/status, in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def set_threads() -> None:
    """All cores, or as many as OMP_NUM_THREADS says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
