"""One arm of benchmarks/throughput.py in a process of its own: `python throughput_arm.py JOB.json`."""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from throughput_meter import Job, Meter, set_threads
from throughput_workload import documents

from qlora_suite.command_line import quiet_libraries
from qlora_suite.files import read_json, write_json
from qlora_suite.launched_runs import fresh_accelerator, train_script
from qlora_suite.recipe_file import load
from qlora_suite.run_folder import Run


def run(job: Job) -> None:
    """Make the job's steps and write what was measured to job.out, after each."""
    quiet_libraries()
    set_threads()
    os.environ["ACCELERATE_MIXED_PRECISION"] = job.dtype if job.kind == "ours" or job.dtype != "fp32" else "no"
    if job.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    meter = Meter(job)
    with traced(job, meter), fresh_accelerator():
        if job.kind == "ours":
            ours(job, meter)
        elif job.kind == "trl":
            from peers.trl_trainer import train

            train(job, meter)
        else:
            from peers.plain_loop import train

            train(job, meter)
    meter.write(finished=True)


def ours(job: Job, meter: Meter) -> None:
    """The loop of scripts/train.py itself, on the job's recipe: a clock behind its metrics, and a look at its batches."""
    train = train_script()
    recipe = load(job.recipe, [*job.overrides, f"output.dir={Path(job.out).with_suffix('.run')}"])
    known = (train.engine_for, train.collate, Run.add_metrics)
    tokens_so_far = 0

    def engine_for(accelerator: Any, net: torch.nn.Module, *more: Any) -> Any:
        meter.model_is_ready(net)
        return known[0](accelerator, net, *more)

    def collate(rows: list[dict[str, Any] | None], pad_id: int, **more: Any) -> Any:
        meter.fed(one for row in rows if row for one in documents(row))
        return meter.on_host(functools.partial(known[1], **more), rows, pad_id)

    def add_metrics(run: Run, **values: Any) -> None:
        nonlocal tokens_so_far
        known[2](run, **values)
        meter.step_ended(values["loss"], values["tokens"] - tokens_so_far)
        tokens_so_far = values["tokens"]
        if recipe.train.max_steps == values["step"] or len(meter.losses) == run.num_steps:
            meter.stop_counting()

    train.engine_for, train.collate, Run.add_metrics = engine_for, collate, add_metrics
    try:
        with Path(job.out).with_suffix(".log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            train.train(recipe)
    finally:
        train.engine_for, train.collate, Run.add_metrics = known


@contextlib.contextmanager
def traced(job: Job, meter: Meter) -> Iterator[None]:
    """A profiler around the last of the warm-up steps and the next one, and its table, where the job asks for it."""
    if not job.trace:
        yield
        return
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (job.device == "cuda")
    profiler, known = torch.profiler.profile(activities=kinds), meter.step_ended

    def step_ended(*values: Any) -> None:
        done = len(meter.seconds) + 1
        if done == job.warmup + 1:
            profiler.stop()
            by = "self_device_time_total" if job.device == "cuda" else "self_cpu_time_total"
            meter.facts["top_operations"] = profiler.key_averages().table(sort_by=by, row_limit=25).splitlines()
            profiler.export_chrome_trace(job.trace)
        known(*values)
        if done == job.warmup:
            profiler.start()

    meter.step_ended = step_ended
    yield


if __name__ == "__main__":
    of_job = Job(**read_json(Path(sys.argv[1])))
    try:
        run(of_job)
    except BaseException as error:  # written down for the process that asked, which goes on with the other arms
        traceback.print_exc()
        path = Path(of_job.out)
        words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        write_json(path, {**(read_json(path) if path.exists() else {}), "arm": of_job.arm, "error": words})
        sys.exit(1)
