"""The benchmark's arms do the same work, and what is the same at every run of it stays below the peers'."""

import contextlib
import io
import site
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_suite.files import read_json, write_json
from qlora_suite.recipe_file import load

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import throughput
import throughput_arm
from throughput import Arm, Bench, arm_named
from throughput_chart import draw
from throughput_counts import Counts
from throughput_meter import Job
from throughput_workload import IGNORED, PADDED_BATCH, SHAPES, documents, make, needed_flops, steps_of

ON_CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
# several micro-batches in a step of eight conversations, where a mean of means would show
PEERS = {"ours": "ours", "loop": "loop@4", "trl-padded": "trl-padded@4", "trl-packed": "trl-packed@1", "trl-default": "trl-default"}
NEEDS_TRL = ("trl-padded", "trl-packed", "trl-default")
PRECISIONS = ("fp32", "nf4")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work of three steps."""
    folder = tmp_path_factory.mktemp("throughput") / "work"
    make(folder, TINY, 3, "cpu")
    return folder


Counted = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def counted(work: Path) -> Iterator[Counted]:
    """counted("loop", "nf4"): what an arm's three steps come to, counted once, in this process."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    threads = torch.get_num_threads()

    def count(arm: str, precision: str) -> dict[str, Any]:
        if arm in NEEDS_TRL:
            pytest.importorskip("trl", reason="pip install -r benchmarks/requirements.txt")
        if (arm, precision) not in known:
            known[arm, precision] = in_this_process(work, arm_named(PEERS[arm]), precision)
        return known[arm, precision]

    yield count
    torch.set_num_threads(threads)


def in_this_process(work: Path, arm: Arm, precision: str) -> dict[str, Any]:
    bench = Bench(work, [arm], "tiny", precision, "cpu", 1, 1)
    out = work / f"{arm.name}.{precision}.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the arm sets is undone here
        try:
            throughput_arm.run(bench.job(arm, out, counted=True))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return read_json(out)


# --- the same work


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("peer", [name for name in PEERS if name != "ours"])
def test_a_peer_learns_the_same_from_the_same(counted: Counted, peer: str, precision: str) -> None:
    ours, theirs = counted("ours", precision), counted(peer, precision)
    assert theirs["counts"]["labels_sha256"] == ours["counts"]["labels_sha256"]
    assert theirs["adapter_sha256"] == ours["adapter_sha256"]
    assert theirs["trained_in"] == ours["trained_in"] == ["float32"]
    assert len(theirs["losses"]) == 3
    assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-4)
    assert ours["losses"][2] < ours["losses"][0] - 1e-3, "nothing is learnt in three steps, so equal curves say nothing"


def test_other_labels_have_another_hash(work: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import plain_loop

    known = plain_loop.split

    def one_label_less(*args: Any) -> Iterator[tuple[Any, Any]]:
        for ids, labels in known(*args):
            at = np.flatnonzero(labels != IGNORED)[-1]
            yield ids, np.where(np.arange(len(labels)) == at, IGNORED, labels)

    monkeypatch.setattr(plain_loop, "split", one_label_less)
    changed = in_this_process(work, replace(arm_named("loop@4"), name="changed"), "fp32")
    assert changed["counts"]["labels_sha256"] != counted("loop", "fp32")["counts"]["labels_sha256"]


def test_every_step_holds_so_many_rows_and_conversations_and_none_twice(work: Path) -> None:
    steps = list(steps_of(load(work / "recipe.yaml")))
    assert len(steps) == 3
    assert {len(step) for step in steps} == {TINY.rows_per_step}
    assert len({sum(len(row["lengths"]) for row in step) for step in steps}) == 1
    assert sum(len(row["lengths"]) for row in steps[0]) % PADDED_BATCH == 0
    ids = [bytes(document.tobytes()) for step in steps for row in step for document, _ in documents(row)]
    assert len(ids) > 20
    assert len(set(ids)) >= len(ids) - 1  # an answer of a few words may come twice


def test_the_unpacked_rows_are_the_same_conversations(work: Path) -> None:
    packed = load(work / "recipe.yaml")
    per_step = sum(len(row["lengths"]) for row in next(steps_of(packed)))
    alone = load(work / "recipe.yaml", throughput.unpacked(work, per_step))

    def all_of(recipe: Any) -> list[tuple[bytes, bytes]]:
        return sorted((ids.tobytes(), labels.tobytes()) for step in steps_of(recipe) for row in step for ids, labels in documents(row))

    assert all_of(packed) == all_of(alone)


# --- what is the same at every run


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ours_pads_less_and_computes_less_for_a_token_than_the_padded_loop(counted: Counted, precision: str) -> None:
    ours, loop = (counted(name, precision)["counts"] for name in ("ours", "loop"))
    assert ours["padding_share"] < 0.02
    assert loop["padding_share"] > 0.1
    assert ours["flops_per_token"] < 0.75 * loop["flops_per_token"]
    assert ours["saved_bytes_per_token"] < 0.75 * loop["saved_bytes_per_token"]
    assert ours["live_peak_bytes"] < loop["live_peak_bytes"]


def test_ours_computes_no_more_than_a_packed_row_takes(work: Path, counted: Counted) -> None:
    """What cannot be left out, below; and above, all of that with attention and the head over whole rows."""
    steps = list(steps_of(load(work / "recipe.yaml")))
    needed = needed_flops(TINY, 16, steps)
    whole = 4 * 3.5 * TINY.row * TINY.hidden * TINY.layers + 6 * TINY.vocabulary * TINY.hidden
    assert needed < counted("ours", "fp32")["counts"]["flops_per_token"] < 1.05 * (needed + whole)


def test_ours_waits_for_the_device_once_a_step(counted: Counted) -> None:
    counts = counted("ours", "fp32")["counts"]
    assert counts["syncs_per_step"] == 1, counts["sync_places"]


def test_trl_waits_more_often(counted: Counted) -> None:
    packed, ours = (counted(name, "fp32")["counts"] for name in ("trl-packed", "ours"))
    assert packed["syncs_per_step"] / packed["micro_batches_per_step"] > ours["syncs_per_step"] / ours["micro_batches_per_step"]


# --- the counter


def lora(work: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    return get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
    )


def test_the_flops_of_a_dense_step_are_those_of_the_formula(work: Path) -> None:
    """One conversation in one row, every token supervised: the formula counts causal attention, the operation all of the square."""
    net, length = lora(work), 128
    counts = Counts(net, ON_CPU)
    ids = torch.arange(length)[None]
    counts.begin()
    net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts.end()
    row = {"lengths": [length], "supervised": np.ones(length, dtype=bool), "input_ids": np.arange(length)}
    half_attention = 4 * TINY.hidden * TINY.layers * 3.5 * length * (length - 1) / 2
    assert counts.flops == pytest.approx(needed_flops(TINY, 16, [[row]]) * length + half_attention, rel=0.01)


def test_waits_are_those_of_tensors_on_the_device() -> None:
    layer = torch.nn.Linear(4, 4)
    counts = Counts(layer, ON_CPU)
    counts.begin()
    host = torch.ones(3, 4)
    assert host.sum().item() == 12  # a loader's own
    assert counts.syncs == 0
    sent = host.to(ON_CPU)
    out = layer(sent).sum()
    assert counts.syncs == 0
    assert bool(out.isfinite())  # 1
    out.detach().tolist()  # 2
    mask = sent > 0
    mask.nonzero()  # 3
    sent[mask]  # 4
    sent[torch.arange(2)]  # numbers instead of a mask: their number is known
    torch.zeros(2, device=ON_CPU).tolist()  # 5
    counts.end()
    assert counts.syncs == 5
    assert sum(counts.sync_places.values()) == 5
    assert set(counts.sync_places) == {"test_throughput.py:test_waits_are_those_of_tensors_on_the_device"}


def test_kept_bytes_are_those_of_distinct_storages_that_are_no_weights() -> None:
    layer = torch.nn.Linear(256, 64, bias=False)
    counts = Counts(layer, ON_CPU)
    x = torch.ones(32, 256, requires_grad=True)
    counts.begin()
    (layer(x).exp() + layer(x)).sum().backward()
    counts.end()
    assert counts.saved_bytes == 4 * (32 * 256 + 32 * 64)  # x once, the exponential once, no weight


# --- the program


def forked(job: Job, timeout: float | None = None) -> dict[str, Any]:
    """`in_a_process` without the seconds that importing the stack takes."""
    out = Path(job.out)
    write_json(out.with_suffix(".job.json"), asdict(job))
    arm = ROOT / "benchmarks" / "throughput_arm.py"
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    log, on_path = out.with_suffix(".output"), (site.addsitedir, str(arm.parent))
    ended = processes.run(str(arm), out.with_suffix(".job.json"), log=log, prelude=on_path, seconds=300, **environment)
    assert out.exists(), ended.output
    return read_json(out)


def test_two_tables_a_report_and_a_chart_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program, on ours alone."""
    report, chart = tmp_path / "report.json", tmp_path / "chart.svg"
    asked = ["--shape", "tiny", "--steps", "1", "--warmup", "1", "--rounds", "1", "--device", "cpu", "--arms", "ours"]
    places = ["--folder", str(tmp_path / "work"), "--json", str(report), "--plot", str(chart)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *asked, *places])
    monkeypatch.setattr(throughput, "in_a_process", forked)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        throughput.main()
    found = read_json(report)
    for arm in found["arms"].values():
        assert arm["tokens_per_second"]["median"] > 0
        assert arm["threads"] == 1
        assert arm["peak_bytes"]["median"] > arm["peak_bytes_above_imports"]["median"] > 0
        assert len(arm["losses"]) == 2
        assert len(arm["seconds"]) == 1
        assert arm["versions"]["torch"] == torch.__version__
    assert found["same_work"]["labels_are_the_same"]
    assert found["same_work"]["first_adapters_are_the_same"]
    assert found["work"]["share_of_head"] > 0
    assert "ids and labels that went in" in shown.getvalue()
    assert "it is not the same work" not in shown.getvalue()
    assert "tokens a second" in chart.read_text()


def fake(rates: list[float], losses: tuple[float, ...] = (3.0, 2.0)) -> list[dict[str, Any]]:
    """Rounds of one warm-up and one measured step of 1,000 tokens."""
    common = {"memory": {"peak": 2}, "rss_after_imports": 1, "matrix_rate": 1e9, "threads": 1, "versions": {}}
    return [{"seconds": [9.0, 1000 / rate], "losses": list(losses), "step_tokens": [1000, 1000], **common} for rate in rates]


def test_a_ratio_is_that_of_the_same_round(work: Path, tmp_path: Path) -> None:
    """A machine that slows down slows both: the medians' ratio would be another."""
    bench = Bench(work, [arm_named("ours"), arm_named("loop@8")], "tiny", "fp32", "cpu", 1, 1)
    bench.rounds = {"ours": fake([100, 50, 400]), "loop@8": fake([50, 25, 100], losses=(3.0, 2.5))}
    results = bench.results()
    assert results["arms"]["loop@8"]["ours_to_this"] == {"median": 2.0, "smallest": 2.0, "largest": 4.0}
    assert results["arms"]["ours"]["tokens_per_second"] == {"median": 100, "smallest": 50, "largest": 400}
    assert results["arms"]["loop@8"]["largest_loss_difference"] == 0.5
    draw(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_an_arm_that_fails_is_reported_and_the_others_go_on(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [arm_named("ours"), arm_named("loop@8")]
    bench = Bench(work, arms, "tiny", "fp32", "cpu", 1, 1)

    def in_a_process(job: Any, timeout: float | None = None) -> dict[str, Any]:
        return {"error": "RuntimeError: no"} if job.kind == "loop" else fake([100])[0]

    monkeypatch.setattr(throughput, "in_a_process", in_a_process)
    bench.run(2)
    assert len(bench.rounds["ours"]) == 2
    assert bench.errors == {"loop@8": "RuntimeError: no"}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        throughput.show(bench.results())
    assert "loop@8 failed: RuntimeError: no" in shown.getvalue()


def test_a_process_that_dies_or_hangs_is_an_error(work: Path) -> None:
    bench = Bench(work, [arm_named("ours")], "tiny", "fp32", "cpu", 1, 1)
    job = bench.job(bench.arms[0], work / "hangs.json", counted=False)
    assert throughput.in_a_process(job, timeout=0.1)["error"] == "it took longer than 0 s"


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ("trl-paded@8", "trl-paded@8 is none; known: ours"),
        ("ours@4", "ours@4 is none"),
        ("trl-packed@0", "trl-packed@0 is none"),
    ],
)
def test_an_arm_that_is_not_known_is_refused(arms: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        arm_named(arms)


def test_a_micro_batch_that_does_not_divide_a_step_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match="a step has 4 packed rows; N must divide them"):
        Bench(work, [arm_named("trl-packed@3")], "tiny", "fp32", "cpu", 1, 1)


def test_every_rung_of_the_ladder_is_a_recipe(work: Path) -> None:
    recipe = work / "recipe.yaml"
    rungs = throughput.ladder(work, sum(len(row["lengths"]) for row in next(steps_of(load(recipe)))))
    assert len({rung.name for rung in rungs}) == len(rungs) == 12
    for rung in rungs[1:]:
        assert load(recipe, rung.overrides) != load(recipe), rung.name


# --- the GPU's program, on the CPU


def test_the_gpu_program_runs_without_one(tmp_path: Path) -> None:
    """Ceilings, and whether the reference recipe's sizes fit: the parts that are no part of throughput.py."""
    gpu.measure("cpu", "tiny", ["ceilings", "fits"], tmp_path / "work", tmp_path / "gpu.json", 300)
    parts = read_json(tmp_path / "gpu.json")["parts"]
    assert parts["ceilings"]["copy_bytes_per_second"] > 0
    assert parts["ceilings"]["matrix_rate"]["fp32"] > 0
    assert parts["fits"]["fits"], parts["fits"]
    assert len(parts["fits"]["losses"]) == 4


def test_a_part_without_time_is_noted_and_a_card_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    gpu.measure("cpu", "tiny", ["ceilings"], tmp_path / "work", tmp_path / "gpu.json", 1)
    assert read_json(tmp_path / "gpu.json")["parts"] == {"ceilings": {"error": "not run: the time was up"}}
    with pytest.raises(ValueError, match="torch sees no GPU here; --device cpu --shape tiny"):
        gpu.measure("cuda", "phi2", ["ceilings"], tmp_path / "work", tmp_path / "gpu.json", 100)
