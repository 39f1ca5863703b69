"""The job scripts in slurm/ do on a real SLURM what they promise: two nodes, requeueing, preemption, a crash, chains, sweeps."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from in_process import metrics, prepared, train
from safetensors.torch import load_file
from slurm_cluster import CannotStart, Cluster, start, wait_until, why_no_namespaces

from qlora_suite.checkpoint import ADAPTER
from qlora_suite.tracking import read_journal

DDP, CPU = "accelerate_configs/ddp.yaml", "accelerate_configs/cpu.yaml"
STEPS = 60
PLAIN = os.environ.get("SLURM_TEST_NODES") == "plain"
"""Set so, the nodes stay in this machine's network, as they do without root."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that all nodes see."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(shared: Path) -> Iterator[Cluster]:
    """One SLURM for all tests here."""
    try:
        found = start(namespaces=not PLAIN)
    except CannotStart as why:
        pytest.skip(str(why))
    found.env.update(PYTHON_ENVIRONMENT=sys.prefix, SHARED_CACHE=str(shared / "cache"), OMP_NUM_THREADS="1")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def recipe(shared: Path, tiny_base: Path, oasst_file: Path) -> Path:
    """Steps of some 50 ms, and enough of them to meet a run on its way."""
    return prepared(write_recipe(shared, tiny_base, oasst_file, "train.epochs=20", f"train.max_steps={STEPS}"))


@pytest.fixture(scope="module")
def one(recipe: Path, shared: Path) -> Path:
    """The run of one process, uninterrupted."""
    return train(recipe, f"output.dir={shared / 'one'}")


@pytest.fixture(scope="module")
def two(cluster: Cluster, recipe: Path, shared: Path) -> Path:
    """The run of two nodes, uninterrupted, and its evaluation."""
    run = shared / "two"
    before = cluster.packets_to_outside()
    training, evaluation = submit(cluster, recipe, DDP, "--nodes", "2", f"output.dir={run}")
    cluster.wait(training, "COMPLETED")
    cluster.wait(evaluation, "COMPLETED")
    (run / "packets").write_text(str(cluster.packets_to_outside() - before))
    return run


def submit(cluster: Cluster, *words: str | Path, **environment: str) -> list[str]:
    """submit.sh; returns the numbers of the jobs."""
    done = cluster.run("bash", "slurm/submit.sh", "--time", "10", *words, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^submitted (\d+)", done.stdout, re.MULTILINE)


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def adapter(run: Path) -> bytes:
    return (run / "final" / ADAPTER).read_bytes()


def wait_for_step(cluster: Cluster, job: str, run: Path, attempt: int, steps: int = 3) -> None:
    """Until this attempt of the run has done so many steps."""

    def there() -> bool:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), f"{state}: {cluster.log(cluster.job(job))}"
        return sum(record["attempt"] == attempt for record in read_journal(run / "metrics.jsonl")) >= steps

    wait_until(there, 120, f"attempt {attempt} of {run} does not come to step {steps}", lambda: cluster.log(cluster.job(job)))


# ---- two nodes -----------------------------------------------------------------------------------------------------------------


def test_two_nodes_learn_the_curve_of_one_process(one: Path, two: Path) -> None:
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert len(metrics(two)) == STEPS
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    ours, theirs = load_file(one / "final" / ADAPTER), load_file(two / "final" / ADAPTER)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in ours)


def test_the_evaluation_that_waits_for_the_run_writes_its_report(two: Path) -> None:
    assert "bits per byte" in (two / "report.md").read_text()


def test_training_and_evaluation_send_nothing_out_of_the_cluster(cluster: Cluster, two: Path) -> None:
    if not cluster.namespaces:
        pytest.skip(why_no_namespaces() or "the nodes share this machine's network")
    assert (two / "packets").read_text() == "0"
    before = cluster.packets_to_outside()
    question = "import socket; socket.create_connection(('huggingface.co', 443), timeout=2)"
    job = cluster.submit(f"--output={two}/outside.out", "--wrap", f'python -c "{question}"')
    cluster.wait(job, "FAILED")
    assert cluster.packets_to_outside() > before


def test_a_run_goes_on_after_a_request_a_preemption_and_a_crash(cluster: Cluster, recipe: Path, two: Path, shared: Path) -> None:
    run = shared / "interrupted"
    (job,) = submit(cluster, recipe, DDP, "--nodes", "2", "--no-evaluate", f"output.dir={run}")
    wait_for_step(cluster, job, run, attempt=1)
    cluster.ask("scancel", "--signal=USR1", "--full", job)  # the shell and all else, as some sites do it
    wait_for_step(cluster, job, run, attempt=2)
    assert cluster.job(job)["Restarts"] == "1"
    assert "asking the run to save and stop" in cluster.log(cluster.job(job))

    urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    cluster.wait(urgent, "COMPLETED")
    wait_for_step(cluster, job, run, attempt=3)
    assert cluster.job(job)["Restarts"] == "2"

    cluster.crash(cluster.nodes[1])
    assert cluster.job(job)["JobState"] != "RUNNING"
    cluster.start_node(cluster.nodes[1])
    found = cluster.wait(job, "COMPLETED")
    assert found["Restarts"] == "3"

    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert {record["attempt"] for record in records} >= {1, 2, 4}
    assert adapter(run) == adapter(two)


# ---- chains and sweeps ---------------------------------------------------------------------------------------------------------


def test_a_chain_goes_on_where_requeueing_is_forbidden_and_ends_with_the_run(
    cluster: Cluster, recipe: Path, one: Path, shared: Path
) -> None:
    run = shared / "chain"
    first, second, third = submit(cluster, recipe, CPU, "--chain", "3", "--no-evaluate", f"output.dir={run}")
    wait_for_step(cluster, first, run, attempt=1)
    cluster.ask("scancel", "--signal=USR1", "--batch", first)
    assert cluster.wait(first, "FAILED")["ExitCode"] == "75:0"
    assert "may not be requeued here; the next job of the chain" in cluster.log(cluster.job(first))
    cluster.wait(second, "COMPLETED")
    assert "nothing is left to do" in cluster.log(cluster.wait(third, "COMPLETED"))
    assert status(run)["attempt"] == 2
    assert adapter(run) == adapter(one)
    again = refused(cluster, recipe, CPU, f"output.dir={run}")
    assert "is finished already" in again


def test_a_sweep_trains_each_line_into_a_folder_of_its_own(cluster: Cluster, recipe: Path, shared: Path) -> None:
    lines = shared / "sweep.txt"
    lines.write_text("seed=1 optim.learning_rate=1e-3   # the first\n\nseed=2\n")
    (array,) = submit(cluster, recipe, CPU, "--sweep", lines, f"output.dir={shared / 'lines'}", "train.max_steps=3")
    for task in range(2):
        cluster.wait(f"{array}_{task}", "COMPLETED")
    runs = [shared / "lines-sweep" / name for name in ("seed=1,learning_rate=1e-3", "seed=2")]
    assert [len(metrics(run)) for run in runs] == [3, 3]
    assert metrics(runs[0])[0]["learning_rate"] == 1e-3
    assert metrics(runs[0])[0]["loss"] != metrics(runs[1])[0]["loss"]


# ---- how jobs start and end, with something that only plays a run: no torch, so that each takes a second -----------------------

PLAYED = """
import json, os, signal, sys, time
from pathlib import Path

run = Path(next(word for word in sys.argv if word.startswith("output.dir="))[11:])
play, node = os.environ["PLAY"], os.environ["SLURM_NODEID"]
shown = {key: os.environ.get(key) for key in ("SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")}
print(f"node {node}:", *sys.argv[1:], shown, flush=True)

def write(state):
    if node == "0":
        aside = run / "aside.json"
        aside.write_text(json.dumps({"state": state, "reason": "as played", "step": 3, "num_steps": 9}))
        aside.replace(run / "status.json")

def stop(*_):
    write("stopped")
    sys.exit(1)

if play == "nothing":
    sys.exit(0)
write("running")
if play == "die":
    sys.exit(1)
if play == "fail":
    write("failed")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
while not (run / "stop_request").exists():
    time.sleep(0.1)
stop()
"""


@pytest.fixture(scope="module")
def stage(shared: Path) -> Path:
    """An environment whose Python plays the run when it is asked to launch one."""
    bin_folder = shared / "stage" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "played.py").write_text(PLAYED)
    python = bin_folder / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then exec {sys.executable} {bin_folder}/played.py "$@"; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return bin_folder.parent


Play = Callable[..., tuple[str, Path]]


@pytest.fixture
def play(cluster: Cluster, recipe: Path, stage: Path, tmp_path: Path) -> Play:
    """play("fail", "--nodes=2") submits a job whose run does that; returns its number and folder."""

    def submit_played(what: str, *options: str, **environment: str) -> tuple[str, Path]:
        run = tmp_path / "run"
        run.mkdir()
        words = [f"--output={run}/log", "--time=10", *options, "slurm/train.sbatch", recipe, DDP, f"output.dir={run}"]
        return cluster.submit(*words, **{"PLAY": what, "PYTHON_ENVIRONMENT": str(stage), **environment}), run

    return submit_played


def test_counts_come_from_slurm_and_the_rank_from_the_node(cluster: Cluster, play: Play) -> None:
    job, _ = play("nothing", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=6")
    log = cluster.log(cluster.wait(job, "FAILED"))
    for node in (0, 1):
        (line,) = re.findall(f"^node {node}: .*", log, re.MULTILINE)
        assert f"--machine_rank {node} " in line
        assert "--num_machines 2 --num_processes 4 " in line
        assert "'SLURM_CPUS_PER_TASK': '6'" in line
        assert "'CUDA_VISIBLE_DEVICES': '0,1'" in line
        assert "'ACCELERATE_USE_CPU': None" in line
    addresses = set(re.findall(r"--main_process_ip (\S+)", log))
    assert len(addresses) == 1
    assert not cluster.namespaces or addresses == {f"{cluster.network}.1"}
    assert "the run ended before it opened its folder" in log  # the launcher's exit code was 0


@pytest.mark.parametrize(
    ("what", "reason"), [("die", "the run died at step 3 of 9 without a word"), ("fail", "failed at step 3 of 9 (as played)")]
)
def test_a_run_that_fails_fails_the_job(cluster: Cluster, play: Play, what: str, reason: str) -> None:
    job, _ = play(what)
    found = cluster.wait(job, "FAILED")
    assert found["ExitCode"] == "1:0"
    assert reason in cluster.log(found)


def test_a_cancelled_job_saves_and_is_not_brought_back(cluster: Cluster, play: Play) -> None:
    job, run = play("go on")
    wait_until((run / "status.json").exists, 120, "the run does not start", lambda: cluster.log(cluster.job(job)))
    cluster.ask("scancel", job)
    wait_until(lambda: "SLURM ended the job" in (run / "log").read_text(), 120, "no last word", (run / "log").read_text)
    found = cluster.wait(job, "CANCELLED")
    assert found["Restarts"] == "0"
    assert status(run)["state"] == "stopped"


@pytest.mark.parametrize(("address", "reason"), [("no-such-host.invalid", "has no address here"), ("localhost", "itself alone")])
def test_a_head_node_that_others_cannot_reach_is_said(
    cluster: Cluster, play: Play, stage: Path, tmp_path: Path, address: str, reason: str
) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(stage, folder)
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\n[ "$3" = node ] && echo "NodeName=x NodeAddr={address} State=IDLE" && exit\nexec {cluster.which("scontrol")} "$@"\n'
    )
    scontrol.chmod(0o755)
    job, _ = play("nothing", "--nodes=2", PYTHON_ENVIRONMENT=str(folder))
    log = cluster.log(cluster.wait(job, "FAILED"))
    assert reason in log
    assert "set HEAD_ADDRESS in slurm/env.sh" in log


def test_a_chain_that_makes_no_checkpoint_is_stopped(cluster: Cluster, recipe: Path, stage: Path, shared: Path) -> None:
    run = shared / "stuck"
    *chain, evaluation = submit(cluster, recipe, CPU, "--chain", "5", f"output.dir={run}", PLAY="die", PYTHON_ENVIRONMENT=str(stage))
    logs = [cluster.log(cluster.wait(job, "FAILED")) for job in chain]
    assert ["node 0: " in log for log in logs] == [True, True, True, False, False]
    assert "was started 3 times from no checkpoint" in logs[3]
    cluster.wait(evaluation, "CANCELLED")


# ---- mistakes are said before anything is queued -------------------------------------------------------------------------------


def refused(cluster: Cluster, *words: str | Path, **environment: str) -> str:
    """What submit.sh says, in one line, when it submits nothing."""
    before = cluster.ask("squeue", "-h", "--states=all")
    done = cluster.run("bash", "slurm/submit.sh", *words, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert cluster.ask("squeue", "-h", "--states=all").count("\n") == before.count("\n")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_mistakes_are_said_before_anything_is_queued(cluster: Cluster, recipe: Path, shared: Path) -> None:
    new = f"output.dir={shared / 'new'}"
    assert "this site wants an account" in refused(cluster, recipe, CPU, new, ACCOUNT_REQUIRED="yes")
    assert "there is no recipe at missing.yaml" in refused(cluster, "missing.yaml", CPU)
    assert "there is no accelerate config at missing.yaml" in refused(cluster, recipe, "missing.yaml", new)
    assert "runs one process (distributed_type: NO)" in refused(cluster, recipe, CPU, "--nodes", "2", new)
    assert "cannot be shared out" in refused(cluster, recipe, DDP, "--nodes", "2", new, PROCESSES_PER_NODE="3")
    assert "run: python scripts/prepare_data.py" in refused(cluster, recipe, CPU, "data.prepared=nowhere", new)
    assert "is stale: data.max_length" in refused(cluster, recipe, CPU, "data.max_length=99", new)
    assert "bash slurm/prefetch.sh" in refused(cluster, recipe, CPU, "model.base=microsoft/phi-2", new)
    assert "Node count specification invalid" in refused(cluster, recipe, DDP, "--nodes", "4", new)
    assert "node configuration is not available" in refused(cluster, recipe, DDP, "--gpus-per-node", "4", new)
    assert "Invalid partition" in refused(cluster, recipe, CPU, new, SBATCH_PARTITION="gold")
    assert "unknown option --node" in refused(cluster, recipe, CPU, "--node", "2", new)
    typo = cluster.run("bash", "slurm/submit.sh", recipe, CPU, "optim.learning_rat=1", new)
    assert (typo.returncode, "did you mean optim.learning_rate?" in typo.stderr) == (1, True)


def test_a_dry_run_shows_the_commands_and_the_nodes(cluster: Cluster, recipe: Path, shared: Path) -> None:
    run = shared / "dry"
    words = [recipe, DDP, "--nodes", "2", "--gpus-per-node", "2", "--time", "1:00:00", "--chain", "2", "--dry-run", f"output.dir={run}"]
    done = cluster.run("bash", "slurm/submit.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "using 16 processors on nodes" in done.stdout
    first, second, evaluation = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert "--nodes=2 --time=1:00:00 --gpus-per-node=2 --cpus-per-task=8" in first
    assert "--dependency=afterany:JOB1" in second
    assert "--dependency=afterok:JOB2 --kill-on-invalid-dep=yes" in evaluation
    assert not run.exists()
