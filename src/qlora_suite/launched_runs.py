"""Runs of the training loop under any engine, several in one launch: starting the stack costs more than a few steps of a small model.

    launch("zero3", [Case("at once"), Case("resumed", killed_after=7)], folder, recipe, overrides, processes=2, gpu=False)

What scripts/verify.py, scripts/compatibility.py, benchmarks/seeds.py and the tests are made of. Each case has a folder below `folder`
and a log beside it.
"""

import contextlib
import importlib.util
import math
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from qlora_suite.accelerate_config import CONFIGS
from qlora_suite.batches import Order
from qlora_suite.checkpoint import ADAPTER
from qlora_suite.command_line import quiet_libraries
from qlora_suite.engine import stand_in_for_gpus
from qlora_suite.files import read_json, write_json
from qlora_suite.preemption import REQUEST
from qlora_suite.ranks import EndedByAnotherRank
from qlora_suite.recipe_file import load
from qlora_suite.run_folder import Run
from qlora_suite.tracking import read_journal

ROOT = Path(__file__).resolve().parents[2]
FAILED = "failed:"
TIMEOUT = timedelta(minutes=2)
"""Of a collective: one rank's failure must not keep the others waiting for long."""


@dataclass(frozen=True)
class Case:
    """One run, in a folder of its own."""

    name: str
    overrides: tuple[str, ...] = ()
    precision: str = "fp32"
    killed_after: int | None = None
    """Dies without a word after this step, and is started again."""
    stopped_after: int | None = None
    """Is asked to stop after this step: somebody else goes on."""
    poisoned_at: int | None = None
    """In this step the last rank's losses are multiplied by `poison`."""
    poison: float = math.nan
    tried: bool = False
    """Micro-batches are tried out before, as on a GPU."""
    folder: str | None = None
    """The run's folder; its name, unless it goes on with somebody else's."""

    def path(self, folder: Path) -> Path:
        return folder / (self.folder or self.name.replace(",", "").replace(" ", "-"))


# ---- in the process that asks ---------------------------------------------------------------------------------------------------


def launch(
    engine: str,
    cases: Sequence[Case],
    folder: Path,
    recipe: str,
    overrides: Sequence[str],
    processes: int,
    gpu: bool,
    config: Path | None = None,
) -> dict[str, str]:
    """Run cases under an engine's accelerate config (or another `config`), in one launch. Returns what `run_case` said of each.

    Raises RuntimeError, with the end of what was printed, if the launch itself failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    outcomes = job.with_name("outcomes.json")
    outcomes.unlink(missing_ok=True)
    values = {"recipe": recipe, "overrides": list(overrides), "folder": str(folder), "gpu": gpu, "cases": [asdict(c) for c in cases]}
    write_json(job, values)
    name = "single_gpu" if gpu and engine == "one" else CONFIGS[engine]
    config = config or ROOT / "accelerate_configs" / f"{name}.yaml"
    number = 1 if engine == "one" else processes
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // number))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["--num_processes", str(number), "--main_process_port", str(free_port()), "-m", "qlora_suite.launched_runs", str(job)]
    done = subprocess.run(  # noqa: S603 - our own module
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the launch of {engine} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    return read_json(outcomes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class Difference:
    """Between two runs: the largest of all steps. Losses and norms relative, weights absolute; infinite where something is missing."""

    loss: float
    grad_norm: float
    dev_loss: float
    adapter: float

    def within(self, tolerance: float) -> bool:
        return all(value <= tolerance for value in asdict(self).values())  # NaN is not


EQUAL = Difference(0.0, 0.0, 0.0, 0.0)


def difference(one: Path, other: Path) -> Difference:
    """How far two runs' curves and adapters are apart."""
    a, b = (read_journal(run / "metrics.jsonl") for run in (one, other))
    ours, theirs = (load_file(file) if (file := run / "final" / ADAPTER).is_file() else {} for run in (one, other))
    adapter = math.inf
    if ours and ours.keys() == theirs.keys():
        adapter = largest((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return Difference(apart(a, b, "loss"), apart(a, b, "grad_norm"), apart(a, b, "dev_loss"), adapter)


def apart(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest relative difference of a metric between the same steps; 0 if neither has it, infinite if they have other steps."""
    x, y = ({r["step"]: r[key] for r in records if r.get(key) is not None} for records in (a, b))
    if x.keys() != y.keys():
        return math.inf
    if not x:
        return 0.0 if a and b else math.inf
    return largest(abs(x[step] - y[step]) / abs(x[step]) for step in x)


def largest(values: Iterable[float]) -> float:
    """Not `max`, which passes NaN over."""
    known = list(values)
    return math.inf if any(map(math.isnan, known)) else max(known)


# ---- in the launched processes ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that dies: nothing in the loop catches it."""


def work(job: Path) -> None:
    """Walk a job's cases within one process group, and write what came out of each."""
    quiet_libraries()
    values = read_json(job)
    if not values["gpu"]:
        stand_in_for_gpus(TIMEOUT)
    outcomes = {}
    for of_case in values["cases"]:
        case = Case(**{**of_case, "overrides": tuple(of_case["overrides"])})
        outcomes[case.name] = run_case(case, values["recipe"], values["overrides"], Path(values["folder"]))
        if PartialState().is_main_process:
            write_json(job.with_name("outcomes.json"), outcomes)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_case(case: Case, recipe: str, overrides: Sequence[str], folder: Path) -> str:
    """Nothing if it ran, else the words of a refusal (ValueError), or FAILED and an error. What it prints goes to a log."""
    train, place = train_script(), case.path(folder)
    os.environ["ACCELERATE_MIXED_PRECISION"] = case.precision
    log = place.with_name(place.name + (f".rank{rank()}.log" if rank() else ".log"))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.ExitStack() as during:
        try:
            values = load(recipe, [*overrides, *case.overrides, f"output.dir={place}"])
            if case.killed_after is not None:
                with contextlib.suppress(Killed), after_step(case.killed_after, die), fresh_accelerator():
                    train.train(values)
            if case.stopped_after is not None:
                during.enter_context(in_step(case.stopped_after, (place / REQUEST).touch))
            if case.poisoned_at is not None:
                during.enter_context(poisoned(train, case.poisoned_at, case.poison))
            if case.tried:
                during.enter_context(trying(train))
            with fresh_accelerator():
                train.train(values)
        except (ValueError, EndedByAnotherRank) as error:
            return str(error)
        except Exception as error:  # the others go on: it failed on all ranks, or a collective's time limit ends them
            traceback.print_exc(file=file)
            return f"{FAILED} {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def train_script() -> ModuleType:
    """scripts/train.py as a module."""
    if "train_script" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
        sys.modules["train_script"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["train_script"])
    return sys.modules["train_script"]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def die() -> None:
    raise Killed


@contextlib.contextmanager
def in_step(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` on every rank when this step begins: before the ranks tell each other in it what there is to look after."""
    rows_for_step = Order.rows_for_step

    def act_and_go_on(self: Order, number: int) -> list[int]:
        if number == step - 1:  # counted from 0
            act()
        return rows_for_step(self, number)

    Order.rows_for_step = act_and_go_on
    try:
        yield
    finally:
        Order.rows_for_step = rows_for_step


@contextlib.contextmanager
def after_step(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` on every rank once `step` is done."""
    add_metrics = Run.add_metrics

    def add_metrics_and_act(self: Run, **values: Any) -> None:
        add_metrics(self, **values)
        if values["step"] == step:
            act()

    Run.add_metrics = add_metrics_and_act
    try:
        yield
    finally:
        Run.add_metrics = add_metrics


@contextlib.contextmanager
def poisoned(train: ModuleType, step: int, factor: float) -> Iterator[None]:
    """Multiply the last rank's losses of one step, and so their gradients: its seed is set just before."""
    known_loss, known_seed, now = train.summed_loss, train.seed_for, [-1]

    def seed_for(seed: int, *position: int) -> None:
        now[0] = position[0] + 1
        known_seed(seed, *position)

    def summed_loss(*args: Any) -> torch.Tensor:
        last = rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1
        return known_loss(*args) * (factor if last and now[0] == step else 1)

    train.summed_loss, train.seed_for = summed_loss, seed_for
    try:
        yield
    finally:
        train.summed_loss, train.seed_for = known_loss, known_seed


@contextlib.contextmanager
def trying(train: ModuleType) -> Iterator[None]:
    """Run the trials of a micro-batch, each rank another number, although a CPU has no need of them."""
    known = train.choose

    def choose(*args: Any) -> Any:
        trial = args[4]
        for num_rows in range(1, 3 + rank()):
            trial(num_rows, num_rows == 1)
        return known(*args)

    train.choose = choose
    try:
        yield
    finally:
        train.choose = known


@contextlib.contextmanager
def fresh_accelerator() -> Iterator[None]:
    """Forget the accelerator afterwards, but keep the process group."""
    kind = PartialState._shared_state.get("distributed_type")
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if kind is not None:
            PartialState._shared_state["distributed_type"] = kind  # an accelerator writes FSDP there, which the next would not understand


if __name__ == "__main__":
    work(Path(sys.argv[1]))
