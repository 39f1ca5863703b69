"""scripts/train.py on pairs: the reference computed once, any micro-batch and a resumed run one curve, and TRL's losses."""

import json
import resource
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from asked_on_one_rank import asked_on
from conftest import write_recipe
from in_process import metrics, prepared, script, train
from peft import PeftModel
from processes import Started, start
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

from qlora_suite import dpo, evaluation, reference, remarks
from qlora_suite.batches import Order
from qlora_suite.checkpoint import ADAPTER
from qlora_suite.dataset import Rows
from qlora_suite.incidents import incidents
from qlora_suite.launched_runs import Killed, after_step, die, difference, free_port
from qlora_suite.recipe_file import load
from qlora_suite.reference import FILE
from qlora_suite.tracking import read_journal

STEPS = 10
PAIRS = (
    "data.policy=preference_pairs",
    "data.packing=false",
    "dpo={beta: 0.2}",
    "optim.learning_rate=1e-3",
    "evaluation.every_steps=5",
    f"train={{rows_per_step: 8, max_steps: {STEPS}, micro_batch: auto}}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.fixture(scope="module")
def first(folder: Path, tiny_base: Path, oasst_file: Path) -> Path:
    """A run of SFT."""
    recipe = prepared(write_recipe(folder, tiny_base, oasst_file, "train.max_steps=6", f"data.prepared={folder / 'first-prepared'}"))
    return train(recipe, f"output.dir={folder / 'first'}")


@pytest.fixture(scope="module")
def recipe(folder: Path, tiny_base: Path, oasst_file: Path, first: Path) -> Path:
    return prepared(write_recipe(folder, tiny_base, oasst_file, *PAIRS, f"adapter.start_from={first}"))


@pytest.fixture(scope="module")
def whole(recipe: Path, folder: Path) -> Path:
    return train(recipe, f"output.dir={folder / 'whole'}", "checkpoints.every_steps=2", "checkpoints.keep=9")


def test_it_starts_as_its_reference_and_learns_what_is_preferred(whole: Path) -> None:
    """At the first step no answer has a reward; then the chosen ones are told from the rejected."""
    records = metrics(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(records[0]["reward_chosen"]) < 1e-3
    assert abs(records[0]["reward_rejected"]) < 1e-3
    assert all(set(dpo.MEASURES) <= record.keys() for record in records)
    dev = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if "dev_loss" in line]
    assert [record["step"] for record in dev] == [5, 10]
    assert 0 <= dev[-1]["dev_accuracy"] <= 1
    assert dev[-1]["dev_loss"] != pytest.approx(0.6931, abs=1e-5)
    assert (whole / "final" / ADAPTER).is_file()


def test_pairs_that_it_sees_again_and_again_are_told_apart(recipe: Path, folder: Path) -> None:
    steps = ("train={rows_per_step: 8, epochs: 40, max_steps: 60}", "evaluation.every_steps=null", "data.max_examples=8")
    few = prepared(recipe_with(recipe, folder, *steps, f"data.prepared={folder / 'few'}"))
    records = metrics(train(few, f"output.dir={folder / 'again'}"))
    assert records[-1]["accuracy"] > 0.9
    assert records[-1]["loss"] < 0.5 < records[0]["loss"]
    assert records[-1]["margin"] > 0.5


def test_what_matters_stands_beside_the_loss_and_a_model_that_forgets_is_said_once(
    recipe: Path, folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remarks, "FAR_BELOW", -0.01)  # the random base has little to forget
    keys = (f"output.dir={folder / 'forgets'}", "optim.learning_rate=3e-2", "checkpoints.every_steps=5", "evaluation.every_steps=null")
    train(recipe, *keys, "stop.after_minutes=0.00001")
    run = train(recipe, *keys)
    shown, records = capsys.readouterr().out, metrics(run)
    last = records[-1]
    words = [f"accuracy {last['accuracy']:.2f}", f"margin {last['margin']:.2f}", f"log-ratio {last['log_ratio']:.2f}"]
    assert f"training {STEPS}/{STEPS}  loss {last['loss']:.3f}  {'  '.join(words)}  " in shown
    below = [record["step"] for record in records if record["log_ratio"] < remarks.FAR_BELOW]
    assert len(below) > 1, "of which the first alone is worth a word"
    assert shown.count("the model forgets how to speak") == 1
    assert f"step {below[0]}: chosen and rejected answers are both far less likely" in shown
    (incident,) = incidents(read_journal(run / "metrics.jsonl"))
    assert (incident["what"], incident["steps"]) == ("the model forgets how to speak", f"step {below[0]}")
    assert incident["last"].startswith("log ratio -")


def recipe_with(recipe: Path, folder: Path, *overrides: str) -> Path:
    """The recipe's file again, with other values."""
    values = load(recipe, list(overrides))
    path = folder / f"with-{abs(hash(overrides))}.json"
    path.with_suffix(".yaml").write_text(json.dumps(values.model_dump(mode="json", exclude_unset=True)))
    return path.with_suffix(".yaml")


@pytest.mark.parametrize("micro_batch", ["1", "4"])
def test_the_micro_batch_does_not_change_the_curve(recipe: Path, whole: Path, folder: Path, micro_batch: str) -> None:
    other = train(recipe, f"output.dir={folder / micro_batch}", f"train.micro_batch={micro_batch}")
    assert difference(whole, other).within(1e-5)


@pytest.mark.parametrize("lever", ["attention", "head", "lora"])
def test_nor_do_the_faster_ways(recipe: Path, whole: Path, folder: Path, lever: str) -> None:
    other = train(recipe, f"output.dir={folder / lever}", f"speed.{lever}=plain")
    taken = json.loads((whole / "run.json").read_text())["fast_paths"]
    assert not taken[lever].startswith("off")
    assert difference(whole, other).within(1e-5)


def test_a_killed_run_goes_on_to_the_same_bits_without_asking_the_reference_again(
    recipe: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"output.dir={folder / 'killed'}"
    with pytest.raises(Killed), after_step(5, die):
        train(recipe, place, "checkpoints.every_steps=2", "checkpoints.keep=9")
    monkeypatch.setattr(reference, "_log_probs", lambda *_: pytest.fail("they stand in the file"))
    again = train(recipe, place, "checkpoints.every_steps=2", "checkpoints.keep=9")
    assert difference(whole, again).within(0.0)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()[1:]]


def test_the_reference_is_computed_once_for_each_pair_that_is_used(recipe: Path, whole: Path) -> None:
    values = load(recipe, [])
    rows, dev = (Rows(Path(values.data.prepared) / f"{split}.arrow") for split in ("train", "dev"))
    order = Order(values.seed, rows.lengths, 8, 1.0, STEPS, group_by_length=True)
    wanted = {("train", row) for step in range(STEPS) for row in order.rows_for_step(step)} | {("dev", row) for row in range(len(dev))}
    found = [(line["split"], line["row"]) for line in lines(whole)]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert all(value < 0 for line in lines(whole) for value in line["log_probs"])


def stop_in_batch(monkeypatch: pytest.MonkeyPatch, run: Path, number: int) -> list[int]:
    """A request to stop comes while the reference is asked for the `number`th time; how often it was asked."""
    known, asked = reference._log_probs, []

    def log_probs(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == number:
            (run / "stop_request").touch()
        return known(*args)

    monkeypatch.setattr(reference, "_log_probs", log_probs)
    return asked


def test_a_request_to_stop_is_heard_while_the_reference_is_asked(
    recipe: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed is not computed again."""
    run = folder / "stopped"
    monkeypatch.setattr(reference, "AT_ONCE", reference.Limit(4, 1000))
    with monkeypatch.context() as during:
        asked = stop_in_batch(during, run, 2)
        during.setattr(script("train"), "engine_for", lambda *_: pytest.fail("it goes on to the engine"))
        train(recipe, f"output.dir={run}")
    assert len(asked) == 2
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 0, "on a request to stop")
    assert not (run / "stop_request").exists(), "the next start would stop at once"
    before = lines(run)
    assert 0 < len(before) < len(lines(whole))
    with (run / FILE).open("a") as file:
        file.write('{"split": "train", "row": 3, "log_p')  # and a kill in the middle of a line
    train(recipe, f"output.dir={run}")
    assert lines(run)[: len(before)] == before
    assert len(lines(run)) == len(lines(whole))
    assert difference(whole, run).within(1e-5)


def test_a_request_that_one_rank_hears_stops_all_alike_and_another_number_of_processes_goes_on(
    recipe: Path, whole: Path, folder: Path, tmp_path: Path
) -> None:
    run, port = folder / "two-ranks", str(free_port())

    def on_rank(rank: str) -> Started:
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        return start("train.py", recipe, f"output.dir={run}", log=tmp_path / rank, prelude=(asked_on, "1", 2, 4), **env)

    ranks = [on_rank(rank) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.output for rank in ranks)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 0)
    before = lines(run)
    assert len(before) == 16, "two times four pairs of two ranks"
    train(recipe, f"output.dir={run}")
    assert lines(run)[:16] == before
    assert len(lines(run)) == len(lines(whole))
    assert difference(whole, run).within(1e-5)


def test_a_request_while_a_resumed_run_asks_it_again_loses_no_step(
    recipe: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is gone, and the weights are those of a checkpoint by now."""
    run = folder / "asked-again"
    with pytest.raises(Killed), after_step(5, die):
        train(recipe, f"output.dir={run}", "checkpoints.every_steps=2")
    (run / FILE).unlink()
    monkeypatch.setattr(reference, "AT_ONCE", reference.Limit(4, 1000))
    with monkeypatch.context() as during:
        stop_in_batch(during, run, 1)
        train(recipe, f"output.dir={run}", "checkpoints.every_steps=2")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 4)
    assert 0 < len(lines(run)) < 5
    train(recipe, f"output.dir={run}", "checkpoints.every_steps=2")
    assert difference(whole, run).within(1e-5)
    known = {(line["split"], line["row"]): line["log_probs"] for line in lines(whole)}
    for line in lines(run):
        assert line["log_probs"] == pytest.approx(known[line["split"], line["row"]], abs=1e-3)
    assert len(lines(run)) < len(known), "pairs of the steps that are done are not asked again"


def test_only_development_pairs_within_the_budget_are_asked(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = prepared(recipe_with(recipe, folder, "data.dev_share=0.6", f"data.prepared={folder / 'larger'}"))
    dev = Rows(folder / "larger" / "dev.arrow")
    budget, read = int(dev.lengths[:3].sum()), []
    known = evaluation.collate

    def collate(rows: list[Any], *args: Any, **kwargs: Any) -> Any:
        read.extend(row["input_ids"].tolist() for row in rows if row is not None)
        return known(rows, *args, **kwargs)

    monkeypatch.setattr(evaluation, "collate", collate)
    steps = ("train={rows_per_step: 8, max_steps: 1}", "evaluation.every_steps=1")
    run = train(larger, f"output.dir={folder / 'budget'}", *steps, f"evaluation.budget_tokens={budget}")
    asked = [line["row"] for line in lines(run) if line["split"] == "dev"]
    assert sorted(asked) == [0, 1, 2]
    assert sorted(read) == sorted(dev[row]["input_ids"].tolist() for row in asked)
    assert len(dev) > 3


def test_a_command_for_another_run_costs_the_folder_nothing(recipe: Path, folder: Path, first: Path, tmp_path: Path) -> None:
    """Its checkpoints are refused before the reference that is kept there is touched."""
    run = folder / "kept"
    with pytest.raises(Killed), after_step(3, die):
        train(recipe, f"output.dir={run}", "checkpoints.every_steps=2")
    before = (run / FILE).read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((first / "final" / "adapter_config.json").read_bytes())
    save_file({name: 1.01 * tensor for name, tensor in load_file(first / "final" / ADAPTER).items()}, other / ADAPTER)
    with pytest.raises(ValueError, match=r"adapter.start_from \(hash of its weights\): was"):
        train(recipe, f"output.dir={run}", "checkpoints.every_steps=2", f"adapter.start_from={other}")
    assert (run / FILE).read_bytes() == before


def test_a_full_disk_keeps_no_half_line_and_what_it_did_not_take_comes_with_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, records = tmp_path / FILE, [{"split": "train", "row": row, "log_probs": [-1.5, -2.0]} for row in range(4)]
    assert reference._read(path, "it") == []
    assert reference._added(path, [], records[:1]) == []
    before, most = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 70, most[1]))
    try:
        unwritten = reference._added(path, [], records[1:3])
        unwritten = reference._added(path, unwritten, records[3:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert path.read_bytes() == before
    assert unwritten == records[1:]
    assert capsys.readouterr().out.count("CANNOT BE WRITTEN") == 1
    assert reference._added(path, unwritten, []) == []
    assert [row for _, row, _ in reference._read(path, "it")] == [0, 1, 2, 3]


def test_a_run_goes_on_where_its_reference_cannot_be_kept(recipe: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "AT_ONCE", reference.Limit(4, 1000))
    known, run = reference._added, folder / "not-kept"
    monkeypatch.setattr(reference, "_added", lambda path, *rest: known(path.parent / "nowhere" / path.name, *rest))
    assert difference(whole, train(recipe, f"output.dir={run}")).within(1e-5)
    assert lines(run) == []


def test_where_memory_is_short_the_reference_is_asked_in_halves(
    recipe: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, sizes = reference.collate, []

    def collate(rows: list[Any], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return known(rows, *args, **kwargs)

    monkeypatch.setattr(reference, "collate", collate)
    run = train(recipe, f"output.dir={folder / 'halves'}")
    assert max(sizes) > 4
    assert {(x["split"], x["row"]) for x in lines(run)} == {(x["split"], x["row"]) for x in lines(whole)}
    assert difference(whole, run).within(1e-5)


def test_a_file_whose_last_newline_was_cut_off_loses_that_line_alone(whole: Path, tmp_path: Path) -> None:
    text = (whole / FILE).read_text()
    of = json.loads(text.split("\n")[0])["of"]
    (tmp_path / FILE).write_text(text[:-1])
    assert len(reference._read(tmp_path / FILE, of)) == len(lines(whole)) - 1
    assert (tmp_path / FILE).read_text() == text[: text[:-1].rindex("\n") + 1]
    (tmp_path / FILE).write_text(text)
    assert len(reference._read(tmp_path / FILE, of)) == len(lines(whole))


def test_a_pair_without_a_finite_probability_is_named(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = reference.token_losses
    monkeypatch.setattr(reference, "token_losses", lambda *args: known(*args) * float("nan"))
    with pytest.raises(ValueError, match=r"gives the answers of row \d+ of train.arrow no finite probability"):
        train(recipe, f"output.dir={folder / 'nan'}")


def test_other_development_pairs_are_another_reference_and_so_is_another_beginning() -> None:
    manifests = [{"files": {"dev.arrow": {"sha256": value}}} for value in "ab"]
    assert reference.name_of({}, manifests[0]) != reference.name_of({}, manifests[1])
    assert reference.name_of({"adapter.init": "pissa"}, manifests[0]) != reference.name_of({"adapter.init": "default"}, manifests[0])


def test_another_reference_is_not_taken_for_this_one(
    recipe: Path, whole: Path, folder: Path, first: Path, tiny_base: Path, oasst_file: Path
) -> None:
    other = prepared(write_recipe(folder, tiny_base, oasst_file, "train.max_steps=3", f"data.prepared={folder / 'first-prepared'}"))
    second = train(other, f"output.dir={folder / 'second'}")
    run = folder / "other"
    run.mkdir()
    (run / FILE).write_bytes((whole / FILE).read_bytes())
    train(recipe, f"output.dir={run}", f"adapter.start_from={second}")
    assert (run / FILE).read_text().splitlines()[0] != (whole / FILE).read_text().splitlines()[0]
    assert lines(run)[0]["log_probs"] != next(x for x in lines(whole) if x["row"] == lines(run)[0]["row"])["log_probs"]
    assert metrics(run)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_reference_that_has_never_seen_its_role_markers_is_refused(recipe: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"its role markers are new tokens that it has never seen"):
        train(recipe, f"output.dir={folder / 'no'}", "adapter.start_from=null")


# --- TRL


def trl_losses(net: torch.nn.Module, values: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[float]:
    """Step losses of TRL's own trainer on these pairs, in this order; the reference is the base under a new adapter, or a copy of one."""
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Ours(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Heard(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    def halves(row: dict[str, Any]) -> dict[str, list[int]]:
        length, ids, flags = row["lengths"][0], row["input_ids"].tolist(), row["supervised"].tolist()
        prompt = flags.index(True)
        return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:length], "rejected_ids": ids[length + prompt :]}

    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=values.optim.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=values.optim.max_grad_norm,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=values.dpo.beta,
        disable_dropout=False,
        **options,
    )
    from transformers import AutoTokenizer

    heard = Heard()
    heard.losses = []
    tokenizer = AutoTokenizer.from_pretrained(Path(values.data.prepared) / "tokenizer")
    data = datasets.Dataset.from_list([halves(row) for row in rows])
    Ours(model=net, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[heard]).train()
    return heard.losses[:STEPS]


@pytest.mark.parametrize("start", ["new", "sft"])
@pytest.mark.parametrize(("length_normalized", "beta", "loss_type"), [(False, 0.2, "sigmoid"), (True, 20, "sigmoid_norm")])
def test_step_losses_are_those_of_trl(
    start: str, length_normalized: bool, beta: float, loss_type: str, folder: Path, tiny_base: Path, oasst_file: Path
) -> None:
    """fp32, no quantisation, no dropout; from the same adapter, over the same pairs in the same order."""
    plain = ("model.quantization=none", "chat.role_markers=text", "adapter.rank=4", "data.max_length=128")
    name = f"{start}-{length_normalized}"
    started: tuple[str, ...] = ()
    if start == "sft":
        sft = prepared(
            write_recipe(folder, tiny_base, oasst_file, *plain, "train.max_steps=5", f"data.prepared={folder / 'trl-sft-prepared'}")
        )
        started = (f"adapter.start_from={train(sft, f'output.dir={folder / name}-sft')}",)
    overrides = (*PAIRS, *plain, *started, "train.epochs=2", f"dpo={{beta: {beta}, length_normalized: {str(length_normalized).lower()}}}")
    recipe = prepared(write_recipe(folder, tiny_base, oasst_file, *overrides, f"data.prepared={folder / 'trl-prepared'}"))
    values = load(recipe, ["evaluation.every_steps=null"])
    rows = Rows(Path(values.data.prepared) / "train.arrow")
    order = Order(values.seed, rows.lengths, 8, 2.0, STEPS, group_by_length=True)
    in_order = [rows[row] for step in range(STEPS) for row in order.rows_for_step(step)]
    net, _ = first_adapter(values)
    saved = folder / f"{name}-start"
    net.save_pretrained(saved, save_embedding_layers=False)
    plain_base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain_base, saved, is_trainable=True)
    theirs = trl_losses(model, values, folder / f"{name}-trl", in_order, loss_type=[loss_type])
    ours = [record["loss"] for record in metrics(train(recipe, f"output.dir={folder / name}", "evaluation.every_steps=null"))]
    assert len(theirs) == len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(ours) < ours[0] - 0.01, "it learns, so that later steps compare gradients"


def first_adapter(values: Any) -> tuple[Any, Any]:
    from qlora_suite.dataset import load_manifest
    from qlora_suite.trainable import build_model

    return build_model(values, load_manifest(values), torch.float32, torch.device("cpu"))
