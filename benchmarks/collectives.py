"""Which collectives a training step really issues, and of how many bytes: counted under torch's dispatcher, in real processes over gloo.

    count("fsdp", "recipes/quickstart.yaml", ["train.micro_batch=2"], folder)      # {"all_gather float32": [8, 1180672], ...}

DDP's gradients, too, which C++ sends: every collective of a process group is an operator `c10d::...` of the dispatcher, where a
TorchDispatchMode sees it. The bytes are those of the whole tensor: what all-reduce reduces, what all-gather puts together and what
reduce-scatter takes apart. benchmarks/scaling.py turns them into what crosses a link.
"""

import contextlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_suite import engine
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import CONFIGS, ROOT, free_port, rank, train_script
from qlora_suite.recipe_file import load
from qlora_suite.run_folder import Run

NAMES = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_base_": "all_to_all",
}
Counted = dict[str, list[int]]
"""{"all_reduce float32": [collectives, bytes of the whole tensors]}"""


class Collectives(TorchDispatchMode):
    """Counts the collectives of this process while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # a sharded tensor's own operators come by again, with plain tensors
        if func.namespace == "c10d" and func._schema.name != "c10d::barrier":
            whole = max(args, key=size_of)
            key = f"{NAMES[func._schema.name.removeprefix('c10d::')]} {str(tensors_of(whole)[0].dtype).removeprefix('torch.')}"
            self.calls[key] += 1
            self.bytes[key] += size_of(whole)
        return func(*args, **(kwargs or {}))

    def counted(self) -> Counted:
        return {key: [self.calls[key], self.bytes[key]] for key in sorted(self.calls)}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Of an argument that is a tensor or a list of them, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in value for tensor in tensors_of(inner)] if isinstance(value, list | tuple) else []


def size_of(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(value))


def count(name: str, recipe: str | Path, overrides: list[str], folder: Path, processes: int = 2, live: int | None = None) -> Counted:
    """What the first process of `processes` issues in the third step of a run (in the first ones optimisers make their states).

    The data must be prepared. `live`: elements that ZeRO-3 may keep gathered, for a small model to be sharded as a large one is.
    Raises RuntimeError if the launch fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    write_json(job, {"recipe": str(recipe), "overrides": [*overrides, f"output.dir={folder / 'run'}"], "live": live})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{CONFIGS[name]}.yaml"), "--num_processes", str(processes)]
    command += ["--main_process_port", str(free_port()), __file__, str(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    if done.returncode != 0:
        raise RuntimeError(f"counting {name} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    return read_json(folder / "counted.json")


def work(job: Path) -> None:
    """In each process: three steps, the last of which is counted."""
    values, known = read_json(job), Run.add_metrics
    collectives, before = Collectives(), []

    def add_metrics(self: Run, **metrics: Any) -> None:
        known(self, **metrics)
        before.append(collectives.counted())

    Run.add_metrics = add_metrics
    if values["live"] is not None:
        configure = engine._configure_deepspeed

        def configure_with_less(accelerator: Accelerator) -> None:
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero.update(stage3_max_live_parameters=values["live"], stage3_max_reuse_distance=values["live"])
            configure(accelerator)

        engine._configure_deepspeed = configure_with_less
    engine.stand_in_for_gpus()
    with job.with_name(f"log{rank()}").open("w") as log, contextlib.redirect_stdout(log), collectives:
        train_script().train(load(values["recipe"], values["overrides"]))
    if rank() == 0:
        start, end = before[1:3]
        write_json(job.with_name("counted.json"), {k: [n - s for n, s in zip(end[k], start.get(k, [0, 0]), strict=True)] for k in end})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
