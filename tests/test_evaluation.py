"""What scripts/evaluate.py measures: every answer once, the same whatever the batches, and an interval that knows its trees."""

import html
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OASST1, MakeRecipe, run_script, write_recipe
from in_process import evaluate, prepared, script, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_suite import evaluation, fast_paths, oasst1, sources
from qlora_suite.adapter import adapter_folder, load_adapter
from qlora_suite.base_config import load_tokenizer
from qlora_suite.batches import Limit
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import (
    LN2,
    AnswerScore,
    Excerpt,
    by_conversation,
    check_dev_rows,
    dev_loss,
    excerpts,
    paired_interval,
    perplexity,
    score,
    score_within_memory,
    slices,
)
from qlora_suite.files import read_json, write_json
from qlora_suite.loss import collate, summed_loss
from qlora_suite.metric import corpus_perplexity
from qlora_suite.recipe import Chat, Evaluation, Model
from qlora_suite.report import headline
from qlora_suite.role_markers import add_role_markers
from qlora_suite.subject import renderers_of, subject_of, tokenizer_of

EVERYTHING = Limit(rows=10**6, tokens=10**9)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def renderer(base: Path, chat_format: str) -> Renderer:
    chat, tokenizer = Chat(format=chat_format), load_tokenizer(Model(base=str(base)))
    return Renderer(tokenizer, chat, add_role_markers(tokenizer, 1040, chat))


@pytest.fixture(scope="module")
def conversations(messages: list[dict]) -> list[Conversation]:
    found, _ = oasst1.conversations(messages[:120], "all_paths", None)
    return [kept for c in found if (kept := c.without_open_end()) and any(t.learn for t in kept.turns if t.role == "assistant")]


# --- scoring


def test_an_answers_score_is_what_a_plain_forward_pass_gives(model: PreTrainedModel, tiny_base: Path) -> None:
    ours = renderer(tiny_base, "instruct_output")
    chat = Conversation("k", ("k",), "g", (Turn("user", "How are you?"), Turn("assistant", "Fine – thank you.")), "en")
    (answer,) = score(model, ours, [Excerpt(chat)], 256, EVERYTHING)

    rendered = ours.render(chat)
    with torch.no_grad():
        logits = model(torch.tensor([rendered.ids]), use_cache=False).logits[0].double()
    nats = [-logits[i - 1].log_softmax(-1)[token].item() for i, token in enumerate(rendered.ids) if i]
    (turn,) = rendered.turns
    assert answer.nats == pytest.approx(sum(nats[turn.start - 1 : turn.end - 1]), rel=1e-5)
    assert answer.end_nats == pytest.approx(nats[turn.end - 1], rel=1e-5)
    assert answer.bytes == len("Fine – thank you.".encode())
    assert (answer.tokens, answer.end_tokens) == (turn.end - turn.start, 1)


@pytest.mark.parametrize("chat_format", ["oasst", "human_assistant", "instruct_output"])
def test_scores_do_not_depend_on_the_batches(
    model: PreTrainedModel, tiny_base: Path, conversations: list[Conversation], chat_format: str
) -> None:
    ours = renderer(tiny_base, chat_format)
    found, _ = excerpts(conversations[:25], [ours], 256)
    alone, together, some = (score(model, ours, found, 256, limit) for limit in (Limit(1, 10**9), EVERYTHING, Limit(rows=7, tokens=700)))
    for answers in (together, some):
        for a, b in zip(alone, answers, strict=True):
            assert replace(a, nats=0, end_nats=0) == replace(b, nats=0, end_nats=0)
        assert math.fsum(a.nats for a in answers) == pytest.approx(math.fsum(a.nats for a in alone), rel=1e-6)


def test_every_learnt_answer_is_scored_exactly_once_or_counted_as_cut(tiny_base: Path) -> None:
    """On all trees of the validation file, in a window so small that much has to be left out."""
    found, _ = oasst1.conversations([row.values for row in sources.read(str(OASST1))], "all_paths", None)
    everything = [kept for c in found if (kept := c.without_open_end())]
    ours = [renderer(tiny_base, name) for name in ("oasst", "human_assistant")]
    kept, cut = excerpts(everything, ours, 300)
    scored = [
        (e.conversation.turns[i].content, e.conversation.key)
        for e in kept
        for i in range(len(e.conversation.turns))
        if e.conversation.turns[i].role == "assistant" and e.conversation.turns[i].learn
    ]
    assert cut.answers > 100
    assert len(scored) + cut.answers == 1241  # the learnt answers of all_paths
    assert len(set(scored)) == len(scored)
    for excerpt in kept:
        assert excerpt.conversation.turns[0].role == "user"
        assert all(len(r.render(excerpt.conversation).ids) <= 300 for r in ours)


def test_a_long_conversation_loses_its_beginning_not_its_answer(tiny_base: Path) -> None:
    ours = renderer(tiny_base, "oasst")
    words = "Tell me about the weather in the mountains, please. " * 3
    turns = tuple(Turn("assistant" if i % 2 else "user", f"{i}: {words}") for i in range(8))
    whole = Conversation("k", ("k",), "g", turns, "en")
    window = len(ours.render(replace(whole, turns=turns[:4])).ids)
    kept, cut = excerpts([whole], [ours], window)
    assert cut.answers == 0
    assert [e.answers_before for e in kept] == [0, 1, 2]
    assert [[t.content[0] for t in e.conversation.turns if t.role == "assistant" and t.learn] for e in kept] == [["1", "3"], ["5"], ["7"]]
    assert [e.conversation.turns[0].content[0] for e in kept] == ["0", "2", "4"]


def test_a_plain_text_is_scored_in_pieces_without_losing_a_byte(model: PreTrainedModel, tiny_base: Path) -> None:
    ours = renderer(tiny_base, "text")
    text = "The quick brown fox jumps over the lazy dog. " * 20
    chat = Conversation("k", ("k",), "g", (Turn("assistant", text),))
    (answer,) = score(model, ours, [Excerpt(chat)], 64, EVERYTHING)
    assert (answer.bytes, answer.end_tokens) == (len(text), 1)
    assert answer.tokens == len(ours.render(chat).ids) - 2


# --- means and intervals


def test_perplexity_by_hand() -> None:
    means = perplexity(nats=math.log(8) * 10, tokens=10, num_bytes=30)
    assert means["perplexity"] == pytest.approx(8)
    assert means["bits_per_byte"] == pytest.approx(1.0)  # 10 tokens x 3 bits / 30 bytes


def test_the_metric_module_loads_offline_and_divides_sums() -> None:
    means = corpus_perplexity([10.0, 1.0], [2, 8], [5, 5])
    assert means["nll_per_token"] == pytest.approx(11 / 10)  # not (10/2 + 1/8) / 2
    assert means == perplexity(11.0, 10, 10)


def answers(nats: Sequence[float], groups: Sequence[str]) -> list[AnswerScore]:
    return [AnswerScore(str(i), g, "en", 1, 100, n, 20, 0.0, 1) for i, (n, g) in enumerate(zip(nats, groups, strict=True))]


def test_the_interval_resamples_trees_not_answers() -> None:
    """Forty answers of two trees are two observations: the interval has to be as wide as the trees differ."""
    rng = np.random.default_rng(0)
    groups = ["a"] * 20 + ["b"] * 20
    base = answers(50 + rng.normal(0, 0.1, 40), groups)
    better = answers([b.nats - (5 if b.group == "a" else 1) for b in base], groups)
    found = paired_interval(base, better, samples=2000)
    low, high = found["interval_95"]
    assert found["bits_per_byte"] == pytest.approx(-3 / LN2 / 100)
    assert low == pytest.approx(-5 / LN2 / 100)
    assert high == pytest.approx(-1 / LN2 / 100)
    as_if_independent = paired_interval(*([replace(x, group=x.key) for x in side] for side in (base, better)), samples=2000)
    assert as_if_independent["interval_95"][1] - as_if_independent["interval_95"][0] < (high - low) / 2


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        groups = [str(g) for g in range(60) for _ in range(3)]
        base = answers(np.full(180, 50.0), groups)
        effect = np.repeat(rng.normal(-1, 2, 60), 3)
        adapter = answers(50 + effect, groups)
        low, high = paired_interval(base, adapter, samples=400)["interval_95"]
        hits += low <= -1 / LN2 / 100 <= high
    assert 178 <= hits <= 198  # 190 expected, and the percentile method is a little short at 60 trees


def test_different_answers_are_not_compared() -> None:
    base = answers([1.0, 2.0], ["a", "b"])
    with pytest.raises(AssertionError, match="same answers"):
        paired_interval(base, [base[0], replace(base[1], key="other")], samples=10)


def test_slices_hold_every_answer_once_in_each_cut() -> None:
    base = [replace(a, number=i % 4 + 1, bytes=150 * (i + 1)) for i, a in enumerate(answers([9.0] * 12, ["g"] * 12))]
    found = slices(base, base)
    for cut in ("answer", "length", "language"):
        assert sum(row["answers"] for row in found if row["by"] == cut) == 12
    assert all(row["base"] == row["adapter"] for row in found)


def test_few_trees_give_no_verdict_and_one_gives_no_interval() -> None:
    groups = [str(i) for i in range(10)]
    base, better = answers([50.0] * 10, groups), answers([40.0] * 10, groups)
    for trees, verdict in ((10, "better"), (9, None), (2, None)):
        found = paired_interval(base[:trees], better[:trees], samples=50)
        assert (found["trees"], found["verdict"]) == (trees, verdict)
        assert found["interval_95"] == pytest.approx([-10 / LN2 / 100] * 2)
    alone = paired_interval(base[:1], better[:1], samples=50)
    assert alone["interval_95"] is None
    assert alone["bits_per_byte"] == pytest.approx(-10 / LN2 / 100)
    cell = {"bits_per_byte": 1.0, "perplexity": 2.0}
    said = headline({"base": {**cell, "format": "oasst"}, "adapter": cell, "difference": alone, "formats": {}})
    assert "too few trees (1) for a verdict" in said
    assert "interval" not in said


def test_conversations_sum_up_their_answers() -> None:
    base = [replace(a, key=key, number=n) for a, key, n in zip(answers([1, 2, 3, 4], "ssss"), "aabb", (1, 2, 1, 1), strict=True)]
    adapter = [replace(a, nats=a.nats / 2) for a in base]
    rows = by_conversation(base, adapter)
    assert [(r["key"], r["answers"], r["bytes"], r["base_nats"], r["adapter_nats"]) for r in rows] == [
        ("a", 2, 200, 3, 1.5),
        ("b", 1, 100, 3, 1.5),
        ("b", 1, 100, 4, 2),
    ]
    assert by_conversation(base, None)[0].keys() == {"key", "tree", "language", "answers", "bytes", "base_nats"}


# --- the development split


def test_a_recipe_that_evaluates_needs_development_rows() -> None:
    check_dev_rows(Evaluation(every_steps=None), 0)
    check_dev_rows(Evaluation(every_steps=5), 1)
    with pytest.raises(ValueError, match="dev_share left it without"):
        check_dev_rows(Evaluation(every_steps=5), 0)


class Ranks:
    """The engine as one of several ranks sees it: its wrapper must not be called, for DDP's would send buffers around."""

    def __init__(self, model: torch.nn.Module, rank: int, world: int) -> None:
        self.unwrapped = model
        self.accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))

    def sum_over_ranks(self, *values: float) -> list[float]:
        self.values = values
        return [max(values[0], 1.0), values[1]]


class FakeRows(list):
    lengths = np.array([12])


def test_development_loss_takes_every_rank_through_the_model_equally_often(model: PreTrainedModel) -> None:
    rows = FakeRows([{"input_ids": list(range(12)), "supervised": [False] + [True] * 11, "lengths": [12]}])
    calls = []
    hook = model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    model.train()
    first, second = Ranks(model, 0, 2), Ranks(model, 1, 2)
    assert dev_loss(first, rows, 0, EVERYTHING, None)[0] > 0
    assert calls == [False]
    assert dev_loss(second, rows, 0, EVERYTHING, None) == [0]  # an engine that gathers its weights in a forward pass waits for this one
    assert calls == [False, False]
    hook.remove()
    assert (first.values[0], second.values[0]) == (11, 0)
    assert model.training
    with torch.no_grad():
        assert first.values[1] == summed_loss(model.eval(), collate(rows, 0)).double().item()


def test_development_loss_is_cut_short_by_a_request_to_stop(model: PreTrainedModel) -> None:
    rows = FakeRows([{"input_ids": list(range(12)), "supervised": [False] + [True] * 11, "lengths": [12]}])
    model.train()
    assert dev_loss(Ranks(model, 0, 1), rows, 0, EVERYTHING, None, stop=lambda: True) is None
    assert model.training


# --- memory


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_scoring_takes_less_at_once_when_memory_is_short(
    model: PreTrainedModel, tiny_base: Path, conversations: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = renderer(tiny_base, "instruct_output")
    found, _ = excerpts(conversations[:6], [ours], 256)
    expected = score(model, ours, found, 256, Limit(1, 1))
    tried = []

    def short(*args: Any) -> list[AnswerScore]:
        tried.append(args[4])
        return out_of_memory() if args[4].rows > 1 else score(*args)

    monkeypatch.setattr(evaluation, "score", short)
    assert score_within_memory(model, ours, found, 256, Limit(4, 1024)) == expected
    assert tried == [Limit(4, 1024), Limit(2, 512), Limit(1, 256)]
    monkeypatch.setattr(evaluation, "score", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="one row"):
        score_within_memory(model, ours, found, 256, Limit(4, 1024))


def test_a_large_vocabulary_means_fewer_tokens_at_once() -> None:
    limit_for = script("evaluate").limit_for
    assert limit_for("cpu", 4096).tokens == 2048
    for device, gib in (("cpu", 2), ("cuda", 8)):
        assert 0.9 * gib * 2**30 < limit_for(device, 262_144).tokens * 262_144 * 12 <= gib * 2**30


# --- the script


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    """A recipe whose run is finished: 12 steps of QLoRA on the tiny random base."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = prepared(write_recipe(folder, tiny_base, oasst_file, "train.max_steps=12", "evaluation.every_steps=6"))
    train(recipe)
    return recipe


def test_a_run_is_compared_with_its_base_and_shown_at_once_the_second_time(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished.parent / "run"
    first = run_script("evaluate.py", run)
    assert first.returncode == 0, first.stderr
    assert f"wrote {run / 'report.md'} and {run / 'report.json'}" in first.stdout
    report = read_json(run / "report.json")
    for side in ("base", "adapter"):
        assert {"nll_per_token", "num_tokens", "perplexity", "bits_per_byte"} <= report[side].keys()
    low, high = report["difference"]["interval_95"]
    assert low <= report["difference"]["bits_per_byte"] <= high
    assert report["difference"]["bits_per_byte"] == pytest.approx(report["adapter"]["bits_per_byte"] - report["base"]["bits_per_byte"])
    # 12 steps from random weights: of course it is better, and against the base's best format
    assert high < 0
    assert report["base"]["bits_per_byte"] == min(
        c["bits_per_byte"] for f in report["formats"].values() for n, c in f.items() if n != "adapter"
    )
    assert "lowest development loss" in report["chosen_by"]
    assert report["left_out"] == []
    rows = report["conversations"]
    assert len(rows) == report["data"]["conversations"]
    assert sum(row["bytes"] for row in rows) == report["adapter"]["num_bytes"]
    for side in ("base", "adapter"):
        nats = math.fsum(row[f"{side}_nats"] for row in rows)
        assert nats / LN2 / report[side]["num_bytes"] == pytest.approx(report[side]["bits_per_byte"])
    text = (run / "report.md").read_text()
    assert "paired bootstrap over" in text
    assert f"{report['adapter']['bits_per_byte']:.4f}" in text
    monkeypatch.setattr(script("evaluate"), "load_column", None)  # every score is on disk
    again = evaluate(run, num_answers=None, answer_tokens=None)  # as many as the script takes by itself
    assert {**again, "made_by": None} == {**report, "made_by": None}


def test_a_base_that_is_scored_in_the_runs_format_alone_is_said_to_be(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.parent / "run", tmp_path / "run"))
    whole = evaluate(run)
    assert len(whole["formats"]) == 3
    assert "the base at its best" in (run / "report.md").read_text()
    report = evaluate(run, "evaluation.base_formats=trained")
    assert report["formats"].keys() == {"oasst"}
    assert {"base_unquantised", "base_quantised", "adapter"} == report["formats"]["oasst"].keys()
    assert report["base"]["bits_per_byte"] == min(
        report["formats"]["oasst"][name]["bits_per_byte"] for name in whole["labels"] if "base" in name
    )
    for file in ("report.md", "report.html"):
        text = html.unescape((run / file).read_text())
        assert "The base is scored in the trained format alone" in text
        assert "at its best" not in text


def test_scores_are_computed_in_the_faster_ways_and_are_the_plain_ones(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    real = fast_paths.take_to_score
    monkeypatch.setattr(fast_paths, "take_to_score", lambda *args: taken.append(real(*args)))
    adapter = str(finished.parent / "run" / "final")
    fast = evaluate(finished, f"output.dir={tmp_path / 'fast'}", adapter=adapter)
    assert [(p.attention, p.head, not p.lora.startswith("off"), p.copies) for p in taken] == [
        ("each conversation by itself", "tiled", False, "off"),
        ("each conversation by itself", "tiled", False, "off"),
        ("each conversation by itself", "tiled", True, "off"),
    ], "base, base in 4 bits, adapter"
    taken.clear()
    plainly = "speed={attention: plain, head: plain, lora: plain, gelu: plain}"
    plain = evaluate(finished, f"output.dir={tmp_path / 'plain'}", plainly, adapter=adapter)
    assert {(p.attention, p.head, p.lora) for p in taken} == {("off", "off", "off")}
    for row, same in zip(fast["conversations"], plain["conversations"], strict=True):
        for name in ("base_nats", "adapter_nats"):
            assert row[name] == pytest.approx(same[name], rel=1e-5), "in 4 bits and in 32"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the columns that scripts/evaluate.py loads; in place of a forward pass, each answer gets 50 nats."""
    names: list[str] = []

    def fake_score(net: str, renderer: Renderer, found: Sequence[Excerpt], *_: object) -> list[AnswerScore]:
        return [AnswerScore(e.conversation.key, e.conversation.group, "en", 1, 100, 50.0, 20, 1.0, 1) for e in found]

    monkeypatch.setattr(script("evaluate"), "load_column", lambda column, *_: names.append(column.name) or "a model")
    monkeypatch.setattr(script("evaluate"), "score_within_memory", fake_score)
    return names


def test_scores_are_kept_by_everything_that_they_were_made_from(
    finished: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter, both_bases = tmp_path / "adapter", ["base_unquantised", "base_quantised"]
    shutil.copytree(finished.parent / "run" / "final", adapter)

    def newly_loaded() -> list[str]:
        loaded.clear()
        evaluate(finished, f"output.dir={tmp_path / 'out'}", adapter=str(adapter))
        return loaded

    assert newly_loaded() == [*both_bases, "adapter"]
    assert newly_loaded() == []
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**config, "lora_alpha": 2 * config["lora_alpha"]})
    assert newly_loaded() == ["adapter"]
    tokenizer = read_json(adapter / "tokenizer.json")
    tokenizer["model"]["merges"].pop()
    write_json(adapter / "tokenizer.json", tokenizer)
    assert newly_loaded() == [*both_bases, "adapter"]  # the base too tries the trained format
    monkeypatch.setattr(script("evaluate"), "versions", lambda: {"torch": "another"})
    assert newly_loaded() == [*both_bases, "adapter"]
    assert newly_loaded() == []


@pytest.mark.usefixtures("loaded")
def test_only_a_run_writes_the_runs_report(finished: Path, tmp_path: Path) -> None:
    def written() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("report*"))

    out = f"output.dir={tmp_path}"
    base = evaluate(finished, out)
    assert (base["adapter"], base["difference"]) == (None, None)
    assert written() == ["report-base.html", "report-base.json", "report-base.md"]
    assert "adapter_nats" not in base["conversations"][0]
    evaluate(finished, out, adapter=str(finished.parent / "run" / "final"))
    assert written() == [f"report-{name}.{ending}" for name in ("base", "run") for ending in ("html", "json", "md")]
    names = [subject_of(finished, [out], adapter=place).report for place in ("some one/phi 2: lora", ".", "/")]
    here = re.sub(r"[^A-Za-z0-9._-]+", "-", Path.cwd().name)
    assert names == ["report-phi-2-lora", f"report-{here}", "report-other"]


@pytest.mark.usefixtures("loaded")
def test_a_model_too_large_for_the_gpu_is_left_out_unless_it_is_the_adapter(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["base_quantised", "adapter"]
    monkeypatch.setattr(script("evaluate"), "load_column", lambda column, *_: "a model" if column.name in small else out_of_memory())
    adapter, out = str(finished.parent / "run" / "final"), f"output.dir={tmp_path}"
    report = evaluate(finished, out, adapter=adapter)
    assert [left["column"] for left in report["left_out"]] == ["base_unquantised"]
    assert report["base"]["column"] == "base_quantised"
    assert report["difference"] is not None
    why = report["left_out"][0]["why"]
    assert "does not fit into the memory" in why
    assert why in capsys.readouterr().out
    assert why in (tmp_path / "report-run.md").read_text()

    small[:] = ["base_quantised"]
    shutil.rmtree(tmp_path / "evaluation")
    with pytest.raises(ValueError, match=r"adapter: .* does not fit .* even one row at a time"):
        evaluate(finished, out, adapter=adapter)
    small[:] = []
    shutil.rmtree(tmp_path / "evaluation")
    with pytest.raises(ValueError, match="nothing to report"):
        evaluate(finished, out)


def test_a_damaged_result_is_not_evaluated(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.parent / "run", run)
    subject_of(run, [])
    tokenizer = run / "final" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("a", "b", 1))
    with pytest.raises(ValueError, match=r"final is damaged \(tokenizer.json"):
        subject_of(run, [])


# --- trained elsewhere


def damaged(finished: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(finished.parent / "run" / "final", folder)
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}, r"lacks .*layers\.1\..* in all"),
        (lambda t: {}, "lack"),
        (lambda t: {k.replace(".layers.", ".blocks."): v for k, v in t.items()}, r"lacks .*; it has what .* no place for .*blocks"),
        (lambda t: {**t, "base_model.model.other.weight": torch.zeros(2)}, r"no place for base_model\.model\.other\.weight"),
        (lambda t: {k: v[:, :3].contiguous() if "lora_A" in k else v for k, v in t.items()}, "cannot put the adapter"),
    ],
    ids=["a layer missing", "nothing", "of another model", "more", "another width"],
)
def test_an_adapter_that_is_not_whole_or_not_for_this_base_is_refused(
    finished: Path, tiny_base: Path, tmp_path: Path, change: Callable, complaint: str
) -> None:
    folder = damaged(finished, tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=complaint):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))


def test_an_adapter_with_whole_embeddings_beside_it_is_read(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = load_adapter(base, str(finished.parent / "run" / "final"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(plain.unload(), config).save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), str(tmp_path))


def test_a_pickled_adapter_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    folder = damaged(finished, tmp_path / "adapter", lambda tensors: tensors)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        adapter_folder(str(folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Publish a folder, in what the hub's client has fetched already."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def publish(folder: Path) -> str:
        cached = tmp_path / "hub" / f"models--someone--{folder.name}"
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        return f"someone/{folder.name}"

    return publish


def test_an_adapter_on_the_hub_without_a_tokenizer_gets_the_bases(finished: Path, tmp_path: Path, hub: Callable) -> None:
    folder = damaged(finished, tmp_path / "lora", lambda tensors: tensors)
    for path in folder.glob("*token*"):
        path.unlink()
    name = hub(folder)
    report = evaluate(finished, f"output.dir={tmp_path / 'out'}", adapter=f"{name}@main", chat="instruct_output")
    assert report["adapter"]["format"] == "instruct_output"
    assert report["commits"] == {"base": None, "adapter": "0" * 40, "model": None}
    assert (tmp_path / "out" / "report-lora-main.md").is_file()
    with pytest.raises(ValueError, match=rf"cannot find the adapter {name}@v2"):
        evaluate(finished, f"output.dir={tmp_path / 'out'}", adapter=f"{name}@v2")
    broken = hub(damaged(finished, tmp_path / "broken", lambda tensors: dict(list(tensors.items())[2:])))
    with pytest.raises(ValueError, match=f"cannot put the adapter {broken} on .* lack"):
        evaluate(finished, f"output.dir={tmp_path / 'out'}", adapter=broken)


def test_a_model_without_a_tokenizer_gets_the_bases_and_a_damaged_tokenizer_is_an_error(
    finished: Path, tiny_base: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model, ignore=shutil.ignore_patterns("*token*"))
    report = evaluate(finished, f"output.dir={tmp_path / 'out'}", model=str(model))
    assert report["adapter"]["bits_per_byte"] == report["formats"]["oasst"]["base_unquantised"]["bits_per_byte"]
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load"):
        tokenizer_of(subject_of(finished, [], model=str(model)))


def test_markers_of_something_trained_elsewhere_are_never_rows_that_nobody_trained(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    with_tokenizer = finished.parent / "run" / "final"
    bare = damaged(finished, tmp_path / "bare", lambda tensors: tensors)
    for path in bare.glob("*token*"):
        path.unlink()
    manifest = read_json(finished.parent / "prepared" / "manifest.json")
    for adapter, control in ((with_tokenizer, True), (bare, False)):
        ours, of_base = renderers_of(subject_of(finished, [], adapter=str(adapter), chat="oasst"), manifest)
        assert ours.layout.control is control
        assert of_base["oasst"] is ours
        assert ("<|prompter|>" in ours.tokenizer.get_vocab()) is control


def test_llama2_keeps_the_recipes_system_prompt(finished: Path) -> None:
    values = ["chat.format=llama2", "chat.system_prompt=Be brief."]
    subject = subject_of(finished, values, adapter=str(finished.parent / "run" / "final"), chat="llama2")
    ours, _ = renderers_of(subject, {})
    assert "Be brief." in ours.tokenizer.decode(ours.prompt([Turn("user", "Hello")]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapter": "a", "model": "b"}, "give one"),
        ({"chat": "oasst"}, "--adapter or --model"),
        ({"adapter": "no/such-adapter"}, "cannot find the adapter no/such-adapter"),
        ({"model": "no/such-model"}, "cannot load"),
    ],
)
def test_mistakes_get_a_sentence(finished: Path, tmp_path: Path, arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluate(finished, f"output.dir={tmp_path / 'out'}", **arguments)


def test_an_unfinished_run_is_not_evaluated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(make_recipe().read_text())
    (folder / "status.json").write_text('{"state": "stopped", "step": 3, "num_steps": 9}')
    done = run_script("evaluate.py", folder)
    assert done.returncode == 2
    assert "not finished (stopped at step 3 of 9)" in done.stderr
    assert "Traceback" not in done.stderr
