"""scripts/train_grpo.py: what is asked, sampled and learnt, and what a run is that was interrupted, shared out or short of memory."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, MakeRecipe, write_recipe
from families import FAMILIES, tokenizer_of
from in_process import column, lines, metrics, prepared, script, train
from safetensors.torch import load_file
from same_run import FINAL, assert_same, curve, snapshot, state_of

from qlora_suite import compatibility, generation, grpo, loss, micro_batch, reference_weights, run_facts, samples
from qlora_suite.chat import Renderer
from qlora_suite.checkpoint import State
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.dataset import Rows, load_manifest, write_row_batches
from qlora_suite.files import read_json, sha256
from qlora_suite.incidents import incidents
from qlora_suite.preemption import REQUEST
from qlora_suite.preflight_checks import output_finding
from qlora_suite.preparation import trimmed
from qlora_suite.recipe import Chat
from qlora_suite.recipe_file import load
from qlora_suite.report_page import curves
from qlora_suite.rewards import judges_of
from qlora_suite.role_markers import RoleMarkers, add_role_markers
from qlora_suite.run_folder import Run, begins_with
from qlora_suite.samples import Sampler
from qlora_suite.selection import Counts, selected
from qlora_suite.tracking import Journal
from qlora_suite.train_prompts import prompt_lengths, question_finder, read_prompts
from qlora_suite.trainable import build_model
from qlora_suite.watchdog import Watchdog

CPU = torch.device("cpu")
STEPS = 5
LETTERS = "def letters(answer):\n    return min(1.0, answer.text.count('e') / 8)\n"
"""Something that random weights can learn to say."""
SHORT_ON_THE_SECOND = """
import os, torch
from qlora_suite import samples

decode = samples.decode

def short(net, prompts, *rest):
    if len(prompts) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return decode(net, prompts, *rest)

if os.environ.get("RANK") == "1":
    samples.decode = short
"""
"""In a person's file of rewards, which every process runs: there is room for three answers on the second."""


def write_grpo_recipe(folder: Path, base: Path, source: Path, *overrides: str) -> Path:
    own = folder / "own.py"
    own.write_text(LETTERS)
    ours = (
        "data.packing=false",
        "chat.role_markers=text",
        f"grpo.rewards=[{{path: '{own}:letters'}}, {{name: no_repetition, weight: 0.25}}]",
        "grpo.group_size=4",
        "grpo.max_new_tokens=12",
        "optim.learning_rate=1e-2",
        "train.rows_per_step=4",
        f"train.max_steps={STEPS}",
        "checkpoints.every_steps=2",
    )
    return prepared(write_recipe(folder, base, source, *ours, *overrides))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> Path:
    previews = "previews={prompts: [Hello], every_steps: 2, max_new_tokens: 8}"
    return write_grpo_recipe(tmp_path_factory.mktemp("grpo"), tiny_base, oasst_file, previews, "grpo.updates=2")


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The uninterrupted run, with two updates a step."""
    return train(recipe, f"output.dir={recipe.parent}/whole", by="train_grpo")


def all_samples(run: Path) -> list[dict[str, Any]]:
    return lines(run / "samples.jsonl")


# --- prompts


def lengths_of_prompts(rows: Rows) -> list[int]:
    return [length for batch in rows.batches() for length in prompt_lengths(batch["supervised"]).tolist()]


@pytest.mark.parametrize("format", ["oasst", "human_assistant", "llama2", "chatml"])
def test_a_prompt_is_what_a_model_is_given_to_answer(make_recipe: MakeRecipe, format: str) -> None:
    """Of every row: the ids before its last learnt answer are those of `Renderer.prompt` for the turns before it."""
    values = load(prepared(make_recipe("data.packing=false", f"chat.format={format}")))
    manifest, folder = load_manifest(values), Path(values.data.prepared)
    renderer = Renderer(run_facts.prepared_tokenizer(folder), values.chat, RoleMarkers.from_json(manifest["role_markers"]))
    rows, several = Rows(folder / "train.arrow"), 0
    lengths = lengths_of_prompts(rows)
    with selected(values) as selection:
        conversations = {one.key: one for one in trimmed(selection.splits["train"], Counts())}
    for number in range(len(rows)):
        conversation, row = conversations[rows.examples(number)[0]], rows[number]
        starts = {turn.index: turn.start for turn in renderer.render(conversation).turns if turn.learn}
        last = max(index for index, start in starts.items() if start < len(row["input_ids"]))
        assert row["input_ids"][: lengths[number]].tolist() == renderer.prompt(conversation.turns[:last])
        several += last > 1
    assert several > 5, "no conversation of several answers was among them"
    assert len(rows) > 50


def test_prompts_are_asked_once_each_and_long_ones_are_counted(recipe: Path) -> None:
    rows = Rows(Path(load(recipe).data.prepared) / "train.arrow")
    of_rows = [rows[number]["input_ids"][:length].tolist() for number, length in enumerate(lengths_of_prompts(rows))]
    distinct = list(dict.fromkeys(map(tuple, of_rows)))
    found = read_prompts(rows, longest=100)
    assert [tuple(prompt) for prompt in found] == [ids for ids in distinct if len(ids) <= 100]
    assert found.lengths.tolist() == [len(prompt) for prompt in found]
    assert found.num_too_long == sum(len(ids) > 100 for ids in of_rows) > 0
    assert found.num_asked_before == len(of_rows) - found.num_too_long - len(found) > 0
    assert str(found) == f"{len(found)} of {len(rows)} rows, {found.num_asked_before} the same as another, {found.num_too_long} too long"
    with pytest.raises(ValueError, match=r"every prompt of .* has more than 3 tokens"):
        read_prompts(rows, longest=3)


def test_prompts_do_not_depend_on_how_many_rows_were_written_together(recipe: Path, tmp_path: Path) -> None:
    rows = Rows(Path(load(recipe).data.prepared) / "train.arrow")
    (whole,) = rows.batches()
    write_row_batches(tmp_path / "train.arrow", [whole.slice(start, 7) for start in range(0, len(rows), 7)])
    expected, found = read_prompts(rows, 100), read_prompts(Rows(tmp_path / "train.arrow"), 100)
    assert list(found) == list(expected)
    assert found.row_numbers.tolist() == expected.row_numbers.tolist()
    assert str(found) == str(expected)


# --- samples


@pytest.fixture(scope="module")
def make_sampler(recipe: Path) -> Callable[..., Sampler]:
    values = load(recipe)
    manifest, folder = load_manifest(values), Path(values.data.prepared)
    renderer = Renderer(run_facts.prepared_tokenizer(folder), values.chat, RoleMarkers.from_json(manifest["role_markers"]))
    net, _ = build_model(values, manifest, torch.float32, CPU)
    judges = judges_of(values.grpo.rewards)
    return lambda seed=0: Sampler(net.train(), renderer, values.grpo, judges, seed, CPU, torch.float32)


PROMPTS = {0: [3, 4, 5, 6, 7, 8, 9, 10, 11], 1: [40, 41], 2: [20, 21, 22], 3: [40, 41]}


def drawn(sampler: Sampler, step: int = 7, places: tuple[int, ...] = (0, 1, 2, 3)) -> dict[int, list[list[int]]]:
    found = sampler(step, {place: PROMPTS[place] for place in places})
    assert [list(s.prompt) for s in found] == [PROMPTS[place] for place in places for _ in range(4)]
    return {place: [list(s.ids) for s in found[4 * i : 4 * i + 4]] for i, place in enumerate(places)}


def test_a_sample_depends_on_seed_step_prompt_and_number_alone(make_sampler: Callable[..., Sampler]) -> None:
    expected = drawn(make_sampler())
    everything = [ids for group in expected.values() for ids in group]
    assert len({tuple(ids) for ids in everything}) == 16, "within a group, and of a prompt that comes twice, each is another one"
    for at_once in (1, 3, 7):
        sampler = make_sampler()
        sampler.at_once = at_once
        assert drawn(sampler) == expected
    torch.manual_seed(99)
    for places in ((0, 2), (1, 3), (3, 1)):  # as two processes share them out, and in another order
        assert drawn(make_sampler(), places=places) == {place: expected[place] for place in places}
    for other in (drawn(make_sampler(), step=8), drawn(make_sampler(seed=1))):
        assert all(a != b for place in PROMPTS for a, b in zip(other[place], expected[place], strict=True))


def test_the_end_of_an_answer_is_part_of_what_is_learnt(make_sampler: Callable[..., Sampler]) -> None:
    sampler = make_sampler()
    stops, bias = sampler.renderer.stop_token_ids, sampler.net.get_output_embeddings().bias.data
    with torch.no_grad():
        bias[stops[0]] += 4
        found = sampler(0, PROMPTS)
        bias[stops[0]] -= 4
    assert {s.answer.stopped for s in found} == {True, False}
    for s in found:
        assert (s.ids[-1] in stops) == s.answer.stopped
        assert not set(s.ids[:-1]) & set(stops)
        assert len(s.ids) == s.answer.num_tokens + s.answer.stopped <= 12
        assert (s.row["input_ids"], sum(s.row["supervised"]), s.row["lengths"]) == ([*s.prompt, *s.ids], len(s.ids), [s.num_tokens])
        assert s.answer.prompt == sampler.renderer.tokenizer.decode(s.prompt)


def test_advantages_are_taken_within_the_group_of_one_prompt(make_sampler: Callable[..., Sampler]) -> None:
    found = make_sampler()(0, PROMPTS)
    for start in range(0, 16, 4):
        group = found[start : start + 4]
        rewards = np.array([s.rewards["letters"] + 0.25 * s.rewards["no_repetition"] for s in group])
        assert [s.reward for s in group] == pytest.approx(rewards.tolist())
        assert [s.advantage for s in group] == pytest.approx(((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)).tolist(), abs=1e-9)


def test_where_memory_is_short_fewer_are_sampled_at_once(make_sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, sizes = drawn(make_sampler()), []

    def short(net: Any, prompts: list, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generation.decode(net, prompts, *rest)

    monkeypatch.setattr(samples, "decode", short)
    sampler = make_sampler()
    assert drawn(sampler) == drawn(sampler) == expected
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4], "it is found out once"


def test_where_not_even_one_answer_fits_the_sentence_says_so(make_sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples, "decode", never)
    with pytest.raises(ValueError, match=r"single answer of up to 12 tokens to a prompt of 9 ran out of memory .* lower grpo.max_n"):
        make_sampler()(0, PROMPTS)


# --- what is learnt


def test_what_is_rewarded_is_said_more_often(recipe: Path) -> None:
    """Of all weights: the adapter of a base this small cannot move its output far."""
    more = ("adapter=none", "model.quantization=none", "train.max_steps=16", "train.epochs=8", "train.rows_per_step=8", "grpo.updates=1")
    run = train(recipe, f"output.dir={recipe.parent}/learns", *more, "checkpoints.every_steps=null", by="train_grpo")
    steps = metrics(run)
    rewards = column(steps, "reward_letters")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert steps[-1]["reward"] == pytest.approx(steps[-1]["reward_letters"] + 0.25 * steps[-1]["reward_no_repetition"])
    assert abs(steps[0]["kl"]) < 1e-6 < steps[-1]["kl"]
    assert set(column(steps, "clipped")) == {0}, "with one update a step the ratio is 1"
    assert all(0 < record["advantage_std"] < 1 for record in steps)
    assert {"finished", "words", "answer_tokens", "tokens_per_second", "grad_norm"} <= steps[0].keys()


def test_what_a_person_can_look_at(whole: Path) -> None:
    assert max(column(metrics(whole), "clipped")) > 0, "the second of two updates leaves the range somewhere"
    found = all_samples(whole)
    assert column(found, "step") == list(range(1, STEPS + 1))
    for record in found:
        assert len(record["answers"]) == 4
        assert sum(a["advantage"] for a in record["answers"]) == pytest.approx(0, abs=1e-9)
        assert set(record["answers"][0]["rewards"]) == {"letters", "no_repetition"}
    page = (whole / "samples.md").read_text()
    assert page.index(f"## Step {STEPS}") < page.index("## Step 1\n")
    assert "advantage +" in page
    assert "ran into the limit" in page


def test_samples_that_a_full_disk_does_not_take_are_written_when_it_does(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, append, failed = recipe.parent / "full", Journal._append, []

    def full(self: Journal, text: str) -> None:
        if self.path.name == "samples.jsonl" and len(self.records) == 2 and not failed:
            failed.append(text)
            raise OSError("no space left on device")
        append(self, text)

    monkeypatch.setattr(Journal, "_append", full)
    train(recipe, f"output.dir={run}", "train.max_steps=2", "previews.prompts=[]", by="train_grpo")
    assert failed
    assert column(all_samples(run), "step") == [1, 2]


def test_a_run_whose_first_answers_are_all_worth_the_same_goes_on(recipe: Path) -> None:
    """Its first checkpoint holds an adapter that has learnt nothing, and a gradient of 0 is not what a later one is a spike beside."""
    own = recipe.parent / "late.py"
    own.write_text(
        f"seen = []\n{LETTERS}\ndef late(answer):\n    seen.append(answer)\n    return letters(answer) if len(seen) > 32 else 1\n"
    )
    late = (f"grpo.rewards=[{{path: '{own}:late'}}]", "grpo.beta=0", "grpo.updates=1", "train.max_steps=3", "previews.prompts=[]")
    run = train(recipe, f"output.dir={recipe.parent}/late", *late, by="train_grpo")
    norms = column(metrics(run), "grad_norm")
    assert norms[:2] == [0, 0]
    assert norms[2] > 0
    weights = load_file(run / "checkpoints" / "step-000002" / FINAL.name)
    assert not any(weights[name].any() for name in weights if "lora_B" in name)
    known = [read_json(run / "checkpoints" / f"step-{step:06d}" / "state.json")["norms"] for step in (2, 3)]
    assert known == [[], norms[2:]]


def test_the_reference_is_the_adapter_that_it_starts_from(recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first update nothing has been learnt: the divergence is 0, of a new adapter and of one that has learnt already."""
    one = ("grpo.updates=1", "train.max_steps=1", "previews.prompts=[]")
    new = train(recipe, *one, f"output.dir={recipe.parent}/new", by="train_grpo")
    goes_on = train(recipe, *one, f"output.dir={recipe.parent}/on", f"adapter.start_from={whole}", by="train_grpo")
    assert abs(metrics(new)[0]["kl"]) < 1e-6 > abs(metrics(goes_on)[0]["kl"])
    assert all_samples(new)[0]["prompt"] == all_samples(goes_on)[0]["prompt"]
    assert all_samples(new)[0]["answers"] != all_samples(goes_on)[0]["answers"]
    said = capsys.readouterr().out
    assert f"runs {recipe.parent / 'own.py'}" in said
    num_prompts = len(read_prompts(Rows(Path(load(recipe).data.prepared) / "train.arrow"), 244))
    assert f"data       {num_prompts} prompts; 1 step\n" in said
    assert "step       4 prompts x 4 answers on " in said
    assert re.search(r"up to \d+ answers or [\d,]+ tokens at once", said)
    assert not re.search(r"rows on|rows or|supervised tokens", said)
    assert "too long\n" in said
    assert re.search(r"reward \d\.\d+ of 1\.25  finished", said)
    assert said.count("begins     with a new adapter; the model is held to it as it is now (grpo.beta 0.04)") == 1
    assert said.count(f"begins     with the adapter of {whole}; the model is held to it as it is now (grpo.beta 0.04)") == 1


# --- interrupted


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_ends_as_the_whole_one(recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Checkpoints at steps 2 and 4: what stands after them is done again, to the same bits."""
    run, signs = recipe.parent / f"killed{step}", Run.signs

    def killed(self: Run, state: State, *args: Any) -> Any:
        if state.step == step:  # the step is learnt and written down, and not saved
            raise KeyboardInterrupt
        return signs(self, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "signs", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, f"output.dir={run}", by="train_grpo")
    assert column(all_samples(run), "step")[-1] == step
    train(recipe, f"output.dir={run}", by="train_grpo")
    assert_same(run, whole)
    assert all_samples(run) == all_samples(whole)
    assert (run / "samples.md").read_text() == (whole / "samples.md").read_text()


@pytest.mark.parametrize("tokens", [2, 30, 53])
def test_a_request_to_stop_ends_the_sampling_and_the_step_is_done_later(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Asked at a token of a preview, of step 2, and of step 4: the run ends before the step, and goes on as if nothing had been."""
    run, asked, seen = recipe.parent / f"asked{tokens}", generation._Asked.__call__, []

    def ask(self: generation._Asked, *args: object, **kwargs: object) -> object:
        seen.append(1)
        if len(seen) == tokens:
            (run / REQUEST).touch()
        return asked(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(generation._Asked, "__call__", ask)
        train(recipe, f"output.dir={run}", by="train_grpo")
    assert len(seen) == tokens, "it generated on"
    status = read_json(run / "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("stopped", {2: 0, 30: 1, 53: 3}[tokens], "on a request to stop")
    assert len(metrics(run) if status["step"] else []) == status["step"]
    assert not (run / REQUEST).exists()
    train(recipe, f"output.dir={run}", by="train_grpo")
    assert_same(run, whole)
    assert all_samples(run) == all_samples(whole)


def test_a_reward_that_takes_its_time_beats_the_watchdog_and_can_be_stopped_between_two_answers(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request comes while the fourth answer of step 2 is judged."""
    run, judged, beat, events = recipe.parent / "judging", samples.judged, Watchdog.beat, []

    def judge(*args: Any) -> Any:
        events.append("judged")
        if events.count("judged") == 20:
            (run / REQUEST).touch()
        return judged(*args)

    def beats(self: Watchdog, words: str) -> None:
        events.append("beat")
        beat(self, words)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "judged", judge)
        patch.setattr(Watchdog, "beat", beats)
        train(recipe, f"output.dir={run}", by="train_grpo")
    assert events.count("judged") == 20, "it judged on"
    assert all(before == "beat" for before, event in pairwise(events) if event == "judged")
    assert state_of(run) == ("stopped", 1)
    train(recipe, f"output.dir={run}", by="train_grpo")
    assert_same(run, whole)
    assert all_samples(run) == all_samples(whole)


def test_a_resumed_run_samples_and_learns_in_the_batches_that_it_had_come_to(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, where another batch gives other answers. Memory is short once, in step 2; the resumed run has room again, and would
    cut its micro-batches otherwise.
    """
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    sizes: dict[str, list[int]] = {}

    def trained(name: str, short: bool, until: int = STEPS) -> Path:
        run, signs, loss, drawn = recipe.parent / name, Run.signs, script("train_grpo").grpo.summed_loss, sizes.setdefault(name, [])

        def decode(net: Any, prompts: list, *rest: Any) -> Any:
            drawn.append(len(prompts))
            if short and len(drawn) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return generation.decode(net, prompts, *rest)

        def summed_loss(now: torch.Tensor, *rest: Any) -> Any:
            learnt.append(len(rest[3]))
            return loss(now, *rest)

        def killed(self: Run, state: State, *args: Any) -> Any:
            if state.step > until:
                raise KeyboardInterrupt
            return signs(self, state, *args)

        learnt: list[int] = sizes.setdefault(f"{name}, learnt", [])
        with monkeypatch.context() as patch:
            patch.setattr(samples, "decode", decode)
            patch.setattr(script("train_grpo").grpo, "summed_loss", summed_loss)
            patch.setattr(Run, "signs", killed)
            with contextlib.suppress(KeyboardInterrupt):
                train(recipe, f"output.dir={run}", "previews.prompts=[]", by="train_grpo")
        return run

    whole = trained("16 bits", short=True)
    run = trained("16 bits, killed", short=True, until=2)
    assert state_of(run)[0] == "failed"
    assert read_json(run / "checkpoints" / "step-000002" / "state.json")["answers_at_once"] == 8
    for name in ("16 bits, killed", "16 bits, killed, learnt"):
        sizes[name].clear()
    monkeypatch.setattr(micro_batch, "CPU_TOKENS", 64)
    assert trained("16 bits, killed", short=False) == run
    assert sizes["16 bits"] == [16, 16, 8, 8, 8, 8, 8, 8, 8, 8]
    assert sizes["16 bits, killed"] == [8] * 6
    assert sizes["16 bits, killed, learnt"] == sizes["16 bits, learnt"][-len(sizes["16 bits, killed, learnt"]) :]
    assert all_samples(run) == all_samples(whole)
    assert_same(run, whole)


def test_checkpointing_that_is_asked_for_later_is_heard(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes no number, and is what a person turns on where memory is short."""
    run = f"output.dir={recipe.parent}/more"
    train(recipe, run, "stop.after_minutes=1e-9", by="train_grpo")
    train(recipe, run, "train.gradient_checkpointing=true", by="train_grpo")
    assert read_json(recipe.parent / "more" / "run.json")["gradient_checkpointing"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint(recipe: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = recipe.parent / number.name
    process = processes.start("train_grpo.py", recipe, f"output.dir={run}", log=tmp_path / "log")
    process.wait_for(lambda: processes.has_step(run, 1))
    process.send(number)
    assert process.wait() == 0, process.output
    state, step = state_of(run)
    assert state == "stopped"
    assert 1 <= step < STEPS
    assert "Traceback" not in process.output
    train(recipe, f"output.dir={run}", by="train_grpo")
    assert_same(run, whole)
    assert all_samples(run) == all_samples(whole)


def test_a_finished_run_says_so_and_another_reward_is_another_run(recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(whole, ".lock")
    train(recipe, f"output.dir={whole}", by="train_grpo")
    assert "is finished: 5 steps" in capsys.readouterr().out
    own = recipe.parent / "own.py"
    try:
        own.write_text(LETTERS.replace("'e'", "'a'"))
        train(recipe, f"output.dir={whole}", by="train_grpo")
        assert "the file of the reward letters, or one that it imports, has changed since this run was made" in capsys.readouterr().out
    finally:
        own.write_text(LETTERS)
    with pytest.raises(ValueError, match=r"grpo.rewards.0.name: was None, is now 'no_repetition'"):
        train(recipe, f"output.dir={whole}", "grpo.rewards=[{name: no_repetition}]", by="train_grpo")
    with pytest.raises(ValueError, match=r"grpo.beta: was 0.04, is now 0.1"):
        train(recipe, f"output.dir={whole}", "grpo.beta=0.1", by="train_grpo")
    assert snapshot(whole, ".lock") == before


# --- cut otherwise


def test_the_curve_does_not_depend_on_the_micro_batch(recipe: Path, whole: Path) -> None:
    run = train(recipe, f"output.dir={recipe.parent}/cut", "train.micro_batch=3", by="train_grpo")
    assert_near(run, whole)


@pytest.mark.parametrize(("size", "pieces"), [(16, [16]), (5, [5, 5, 5, 1]), (1, [1] * 16)])
def test_a_micro_batch_is_of_answers(recipe: Path, monkeypatch: pytest.MonkeyPatch, size: int, pieces: list[int]) -> None:
    known, found = script("train_grpo").grpo.summed_loss, []

    def summed_loss(now: torch.Tensor, *rest: Any) -> Any:
        found.append(len(rest[3]))
        return known(now, *rest)

    monkeypatch.setattr(script("train_grpo").grpo, "summed_loss", summed_loss)
    one = ("train.max_steps=1", "previews.prompts=[]", "grpo.updates=1", f"output.dir={recipe.parent}/of{size}")
    train(recipe, f"train.micro_batch={size}", *one, by="train_grpo")
    assert found == pieces


def test_a_micro_batch_of_more_answers_than_a_step_has_is_a_mistake(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"micro_batch is 17, of answers .* has 16 of them in a step \(4 prompts x 4 answers\); use 16 or"):
        train(recipe, "train.micro_batch=17", f"output.dir={recipe.parent}/too_many", by="train_grpo")
    values = load(recipe, ["train.micro_batch=9"])
    assert grpo.answers_of_a_process(values, 1) == 16
    with pytest.raises(ValueError, match=r"has 8 of them in a step \(4 prompts / 2 processes x 4 answers\)"):
        grpo.answers_of_a_process(values, 2)
    with pytest.raises(ValueError, match="rows_per_step = 4 cannot be shared out: 3 processes"):
        grpo.answers_of_a_process(load(recipe), 3)


def test_a_micro_batch_is_tried_with_the_longest_answers_to_the_longest_prompts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a CPU does not do by itself."""
    ours, asked, tried, learnt = script("train_grpo"), [], [], []
    log_probabilities = grpo.log_probabilities

    def choose(train: Any, answers: int, longest: int, device: Any, trial: Any, *rest: Any) -> Any:
        asked.append((answers, longest))
        for checkpointing in (0.0, 1.0):
            trial(3, checkpointing)
        assert not any(p.grad is not None for p in seen[0].parameters())
        return micro_batch.choose(train, answers, longest, device, trial, *rest)

    seen: list[Any] = []

    def asks(net: Any, batch: Any, temperature: float) -> Any:
        seen.append(net)
        (learnt if len(tried) == 2 else tried).append((tuple(batch.input_ids.shape), len(batch.targets)))
        return log_probabilities(net, batch, temperature)

    monkeypatch.setattr(ours, "choose", choose)
    monkeypatch.setattr(grpo, "log_probabilities", asks)
    train(recipe, "train.max_steps=1", "previews.prompts=[]", f"output.dir={recipe.parent}/tried", by="train_grpo")
    values = load(recipe)
    prompts = read_prompts(Rows(Path(values.data.prepared) / "train.arrow"), values.data.max_length - 12)
    longest = max(map(len, prompts)) + 12
    assert asked == [(16, longest)]
    assert tried == [((3, longest), 3 * (longest - 1))] * 2
    assert learnt
    assert max(shape[1] for shape, _ in learnt) <= longest


def test_nothing_has_been_learnt_before_the_first_update_however_often_it_is_begun(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second micro-batch runs out of memory: the first one is done again in halves, and every ratio is 1 to the last bit, although
    another batch gives other numbers, as it does in 16 bits.
    """
    known, log_probabilities, apart = grpo.summed_loss, grpo.log_probabilities, []
    monkeypatch.setattr(grpo, "log_probabilities", lambda net, batch, _: log_probabilities(net, batch, _) + 1e-3 * len(batch.input_ids))

    def short(now: torch.Tensor, old: torch.Tensor, *rest: Any) -> Any:
        apart.append((now - old).abs().max().item())
        if len(apart) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(now, old, *rest)

    monkeypatch.setattr(script("train_grpo").grpo, "summed_loss", short)
    one = ("train.max_steps=1", "previews.prompts=[]", "grpo.updates=1", f"output.dir={recipe.parent}/again")
    train(recipe, "train.micro_batch=8", *one, by="train_grpo")
    assert apart == [0.0] * 6, "8, 8 (short), and four times 4"


def test_without_a_beta_there_is_no_reference(recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a copy of the weights, not a forward pass, and no number for what is not measured. The first answers are the same."""
    counts: dict[str, list[bool]] = {}
    forward, kept, copies = loss.forward, reference_weights.kept, []
    for beta in ("0.04", "0"):
        found = counts.setdefault(beta, [])

        def counted(*args: Any, found: list[bool] = found) -> Any:
            found.append(torch.is_grad_enabled())
            return forward(*args)

        monkeypatch.setattr(loss, "forward", counted)
        monkeypatch.setattr(reference_weights, "kept", lambda net: copies.append(net) or kept(net))
        one = ("previews.prompts=[]", "train.micro_batch=16", f"output.dir={recipe.parent}/beta{beta}")
        train(recipe, f"grpo.beta={beta}", *one, by="train_grpo")
    with_gradient, without = ([found.count(flag) for found in counts.values()] for flag in (True, False))
    assert with_gradient[0] == with_gradient[1] >= 2 * STEPS, "the updates, and the trial of the faster ways"
    assert without[0] - without[1] == STEPS, "once a step, whatever the updates"
    assert len(copies) == 1
    run = recipe.parent / "beta0"
    assert all_samples(run)[0] == all_samples(whole)[0]
    steps = metrics(run)
    assert len(steps) == STEPS
    assert all("kl" not in record and math.isfinite(record["clipped"]) for record in steps)
    titles = [chart["title"] for chart in curves(steps, [])]
    assert titles[0] == "Loss, mean over answers"
    assert "Reward of an answer" in titles
    assert not any("KL" in title for title in titles)


def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_ones(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, known, sizes = recipe.parent / "short", script("train_grpo").grpo.summed_loss, []

    def short(now: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(rest[3]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(script("train_grpo").grpo, "summed_loss", short)
        train(recipe, f"output.dir={run}", by="train_grpo")
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 4
    assert [r["rows"] for r in lines(run / "metrics.jsonl") if r.get("event") == "out of memory"] == [8, 4]
    assert "with at most 4 answers or " in capsys.readouterr().out
    assert_near(run, whole)


def assert_near(run: Path, other: Path) -> None:
    """The same samples, and the same curve but for rounding."""
    assert [[a["text"] for a in r["answers"]] for r in all_samples(run)] == [[a["text"] for a in r["answers"]] for r in all_samples(other)]
    for a, b in zip(curve(run), curve(other), strict=True):
        assert a.keys() == b.keys()
        assert [a[key] for key in a] == pytest.approx([b[key] for key in a], rel=1e-3, abs=1e-5)
    ours, theirs = (load_file(one / FINAL) for one in (run, other))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-3


def test_two_processes_sample_and_learn_what_one_does(recipe: Path, whole: Path) -> None:
    """The last step has prompts for one of them alone: 4 + 4 + 4 + 4 + 1 of 17. On the second one memory is short: both take less."""
    run, count = recipe.parent / "two", len(read_prompts(Rows(Path(load(recipe).data.prepared) / "train.arrow"), 244))
    epochs = f"train.epochs={17 / count}"
    one = train(recipe, f"output.dir={recipe.parent}/one", epochs, by="train_grpo")
    own = recipe.parent / "short.py"
    own.write_text(LETTERS + SHORT_ON_THE_SECOND)
    rewards = f"grpo.rewards=[{{path: '{own}:letters'}}, {{name: no_repetition, weight: 0.25}}]"
    done = on_two_processes(recipe, f"output.dir={run}", epochs, rewards)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    assert state_of(run) == state_of(one) == ("finished", 5)
    assert column(metrics(one), "advantage_std")[-1] > 0
    assert read_json(run / "checkpoints" / "step-000005" / "state.json")["answers_at_once"] == 2
    assert_near(run, one)
    assert len(metrics(whole)) == STEPS


# --- refused


@pytest.mark.parametrize("engine", [compatibility.ZERO2, compatibility.ZERO3, compatibility.FSDP2])
def test_engines_that_share_weights_out_are_refused(recipe: Path, engine: str) -> None:
    found = compatibility.refusals(load(recipe), engine)
    assert any(f"grpo does not work under {engine}" in line and "accelerate_configs/ddp.yaml" in line for line in found)
    assert compatibility.refusals(load(recipe), compatibility.DDP) == []


def test_a_recipe_without_rewards_is_for_the_other_script(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=r"no section grpo.*use scripts/train.py"):
        train(make_recipe(), by="train_grpo")


def test_a_reward_that_fails_ends_the_run_with_its_name(recipe: Path) -> None:
    own = recipe.parent / "bad.py"
    own.write_text("def bad(answer):\n    return 2\n")
    run = recipe.parent / "bad"
    with pytest.raises(
        ValueError, match=r"reward bad gave 2, not a number from 0 to 1; .*; nothing has been learnt yet: mend the function"
    ):
        train(recipe, f"output.dir={run}", f"grpo.rewards=[{{path: '{own}:bad'}}]", by="train_grpo")
    assert read_json(run / "status.json")["state"] == "failed"
    assert not (run / "checkpoints").exists()


# --- a reward that is mended


FAILS = """
seen = []

def letters(answer):
    seen.append(answer)
    if len(seen) > {after}:
        raise KeyError("rare")
    return min(1.0, answer.text.count('e') / 8)
"""


def test_a_reward_that_fails_loses_no_step_and_mended_it_goes_on(recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails in step 4, between the checkpoints of steps 2 and 4; the file that is mended says what the whole run's says."""
    own, run, mirror = (recipe.parent / name for name in ("fails.py", "fails", "mirror of fails"))
    ours = (f"output.dir={run}", f"output.mirror={mirror}")
    ours += (f"grpo.rewards=[{{path: '{own}:letters'}}, {{name: no_repetition, weight: 0.25}}]",)
    own.write_text(FAILS.format(after=3 * 16 + 5))
    with pytest.raises(
        ValueError, match=r"reward letters failed with KeyError: 'rare'; .*; step 3 is saved: mend the function, and the same"
    ):
        train(recipe, *ours, by="train_grpo")
    assert state_of(run)[0] == "failed"
    assert column(metrics(run), "step") == [1, 2, 3]
    capsys.readouterr()

    own.write_text(LETTERS)
    train(recipe, *ours, by="train_grpo")
    said = capsys.readouterr().out
    assert f"goes on from {run / 'checkpoints' / 'step-000003'}" in said
    assert said.count("not exact: the file of the reward letters, or one that it imports, has changed since the checkpoint") == 1
    events = [record for record in lines(run / "metrics.jsonl") if "event" in record]
    assert [(r["event"], r["step"], r["reward"]) for r in events] == [("the file of a reward has changed", 3, "letters")]
    assert incidents(lines(run / "metrics.jsonl"))[0]["last"] == "reward letters"
    assert metrics(run)[3:] != []
    assert all_samples(run) == all_samples(whole)
    assert_near(run, whole)
    known = "grpo.rewards.0.path (function, and hash of its file)"
    for place in (run / "checkpoints" / "step-000005" / "state.json", run / "status.json"):
        assert read_json(place)["identity"][known] == f"letters {sha256(own)}", "the next start compares with the mended one"


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ("[{path: '%s:letters'}]", r"grpo.rewards.1.name: was 'no_repetition', is now None"),
        ("[{path: '%s:letters', weight: 2}, {name: no_repetition, weight: 0.25}]", r"grpo.rewards.0.weight: was 1.0, is now 2"),
        (
            "[{path: '%s:others'}, {name: no_repetition, weight: 0.25}]",
            r"grpo.rewards.0.path \(function, and hash .*: was 'letters .* 'others ",
        ),
    ],
)
def test_another_list_of_rewards_is_another_run(recipe: Path, whole: Path, rewards: str, words: str) -> None:
    own = recipe.parent / "another.py"
    own.write_text(LETTERS + LETTERS.replace("letters", "others"))
    with pytest.raises(ValueError, match=words):
        train(recipe, f"output.dir={whole}", "grpo.rewards=" + rewards % own, by="train_grpo")


def on_two_processes(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts/train_grpo.py"), str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_reward_that_fails_on_the_second_process_loses_no_step(recipe: Path) -> None:
    """8 answers a step are judged there: it fails in step 4."""
    own, run = recipe.parent / "fails_there.py", recipe.parent / "fails there"
    own.write_text("import os\n" + FAILS.format(after="(3 * 8 + 2 if os.environ.get('RANK') == '1' else 10**6)"))
    done = on_two_processes(recipe, f"output.dir={run}", f"grpo.rewards=[{{path: '{own}:letters'}}]", "previews.prompts=[]")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("error: reward letters failed with KeyError: 'rare'") == 1
    assert "step 3 is saved: mend the function, and the same command goes on" in said
    assert "Error: reward" not in said, "no traceback"
    assert (run / "checkpoints" / "step-000003" / "manifest.json").is_file()
    assert state_of(run) == ("failed", 3)


def test_preflight_knows_the_run_of_a_recipe_with_own_rewards(recipe: Path, whole: Path) -> None:
    values = load(recipe, [f"output.dir={whole}"])
    assert "is finished" in output_finding(values, load_manifest(values)).text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grpo=null"], ""),
        (["grpo=null", "adapter.start_from=runs/a"], "with the adapter of runs/a"),
        (["adapter.start_from=runs/a"], "with the adapter of runs/a; the model is held to it as it is now (grpo.beta 0.04)"),
        (["adapter.start_from=runs/a", "grpo.beta=0"], "with the adapter of runs/a; nothing holds the model to it (grpo.beta 0)"),
        (
            ["grpo=null", "dpo={}", "data.policy=preference_pairs"],
            "with a new adapter; the model is held to it as it is now (dpo.beta",
        ),
        (
            ["adapter=none", "model.quantization=none"],
            "with the weights of the base; the model is held to them as they are now (grpo.beta 0.04)",
        ),
    ],
)
def test_where_a_run_begins_is_said(recipe: Path, overrides: list[str], words: str) -> None:
    found = begins_with(load(recipe, overrides))
    assert found.startswith(words)
    assert bool(found) == bool(words)


# --- steps in which no answer is better than another


SOMETIMES = (
    LETTERS
    + """
seen = []

def sometimes(answer):
    seen.append(answer)
    return 0.5 if 32 < len(seen) <= 64 else letters(answer)
"""
)


def test_a_step_in_which_all_earn_the_same_changes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 3 and 4, after two that have moved the model: there is a gradient, of the KL divergence alone."""
    own = recipe.parent / "sometimes.py"
    own.write_text(SOMETIMES)
    ours = (f"grpo.rewards=[{{path: '{own}:sometimes'}}]", "checkpoints.every_steps=1", "checkpoints.keep=5", "previews.prompts=[]")
    run = train(recipe, f"output.dir={recipe.parent}/sometimes", *ours, by="train_grpo")
    steps, weights = metrics(run), [load_file(run / "checkpoints" / f"step-{n:06d}" / FINAL.name) for n in range(1, STEPS + 1)]
    states = [load_file(run / "checkpoints" / f"step-{n:06d}" / "optimizer.safetensors") for n in range(1, STEPS + 1)]

    def changed(before: int, after: int, tensors: list[dict[str, torch.Tensor]]) -> int:
        return sum(not torch.equal(tensors[before - 1][name], tensors[after - 1][name]) for name in tensors[0])

    for tensors in (weights, states):
        assert [changed(n, n + 1, tensors) > 0 for n in range(1, STEPS)] == [True, False, False, True]
    assert column(steps, "groups_alike")[2:4] == [1, 1]
    assert max(column(steps, "groups_alike")[i] for i in (0, 1, 4)) < 1
    assert min(column(steps, "grad_norm")[2:4]) > 0, "nothing was there to be left out"
    assert column(steps, "kl")[2] > 0
    assert column(steps, "skipped_steps") == [0] * STEPS
    assert incidents(lines(run / "metrics.jsonl")) == []
    said = capsys.readouterr().out
    assert said.count("all answers earned the same, so nothing is learnt from it") == 1
    assert "step 3: within each of its groups" in said
    assert len(read_json(run / "checkpoints" / "step-000005" / "state.json")["norms"]) == 3 * 2, "two updates in each step that teaches"


def test_a_run_without_a_better_answer_ends_in_a_sentence(recipe: Path) -> None:
    own, run = recipe.parent / "constant.py", recipe.parent / "constant"
    own.write_text("def constant(answer):\n    return 0.5\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"in none of the 2 steps did two answers .* look at .*samples.md, change grpo.rewards"):
            train(recipe, f"output.dir={run}", f"grpo.rewards=[{{path: '{own}:constant'}}]", "train.max_steps=2", by="train_grpo")
        assert state_of(run) == ("failed", 2)
    assert not (run / "final").exists()
    assert column(metrics(run), "groups_alike") == [1, 1]


def test_a_run_of_which_no_step_was_applied_ends_in_another_sentence(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script("train_grpo"), "is_applied", lambda *_: False)  # as fp16 that is in search of its loss scale
    run = recipe.parent / "never applied"
    with pytest.raises(ValueError, match=r"none of the 4 updates from which something could be learnt was applied"):
        train(recipe, f"output.dir={run}", "train.max_steps=2", "train.max_skipped_steps=9", by="train_grpo")
    assert state_of(run) == ("failed", 2)


def test_whether_a_step_teaches_is_one_answer_on_two_processes(recipe: Path) -> None:
    """Some prompts' answers are all worth the same: all of a step's, those of one process, or none."""
    own = recipe.parent / "partly.py"
    own.write_text(LETTERS + "def partly(answer):\n    return letters(answer) if sum(answer.prompt.encode()) % 5 == 0 else 0.5\n")
    ours = (
        f"grpo.rewards=[{{path: '{own}:partly'}}]",
        "train.max_steps=8",
        "train.epochs=4",
        "train.rows_per_step=2",
        "previews.prompts=[]",
    )
    one = train(recipe, f"output.dir={recipe.parent}/partly", *ours, by="train_grpo")
    two = recipe.parent / "partly on two"
    done = on_two_processes(recipe, f"output.dir={two}", *ours)
    assert done.returncode == 0, done.stdout + done.stderr
    shares = column(metrics(one), "groups_alike")
    assert {0.5, 1.0} <= set(shares)
    assert shares == column(metrics(two), "groups_alike")
    assert_near(two, one)


# --- what a reward gets, and prompts without answers


SEES = r"""
import json
from pathlib import Path

def sees(answer):
    with (Path(__file__).parent / "seen.jsonl").open("a") as file:
        file.write(json.dumps([answer.question, answer.expected, answer.prompt]) + "\n")
    return min(1.0, answer.text.count('e') / 8)
"""
QUESTIONS = [f"What is {n} and {n}?" for n in range(12)]


def write_chats(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("format", ["oasst", "human_assistant"])
def test_a_reward_gets_the_question_and_the_answer_that_the_data_has(tmp_path: Path, tiny_base: Path, format: str) -> None:
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = [{"prompt": q, "completion": f"It is {q}\n"} for q in QUESTIONS[:6]]
    asked += [{"prompt": [*before, {"role": "user", "content": q}]} for q in QUESTIONS[6:]]
    own = tmp_path / "sees.py"
    own.write_text(SEES)
    ours = ("data.policy=null", f"chat.format={format}", "data.validation_share=0.0", "data.dev_share=0.0", "train.epochs=1.0")
    ours += () if format == "oasst" else ("chat.role_markers=auto",)
    made = write_grpo_recipe(tmp_path, tiny_base, write_chats(tmp_path, asked), *ours)
    run = train(made, f"grpo.rewards=[{{path: '{own}:sees'}}]", by="train_grpo")
    seen = {question: (expected, prompt) for question, expected, prompt in lines(tmp_path / "seen.jsonl")}
    assert seen.keys() == set(QUESTIONS)
    assert [seen[q][0] for q in QUESTIONS] == [*(f"It is {q}\n" for q in QUESTIONS[:6]), *[None] * 6]
    assert all(q in seen[q][1] and q != seen[q][1] for q in QUESTIONS)
    assert {record.get("expected") for record in all_samples(run)} <= {None, *(f"It is {q}\n" for q in QUESTIONS[:6])}
    assert state_of(run) == ("finished", 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["model", "chatml", "oasst", "llama2", "human_assistant"])
def test_a_prompt_without_an_answer_is_what_the_model_is_asked(name: str, format: str) -> None:
    """As its row holds it, of every family's tokenizer and template; and its question is found again."""
    tokenizer = tokenizer_of(name)
    chat = Chat(format=format, system_prompt="Be nice." if format == "llama2" else None)
    renderer = Renderer(tokenizer, chat, add_role_markers(tokenizer, len(tokenizer) + 20, chat))
    question_of = question_finder(renderer)
    first, later = [Turn("user", "Hello you")], [Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "say\n\nhi")]
    for turns in (first, later):
        row = renderer.render(Conversation("key", ("key",), "group", (*turns, Turn("assistant", ""))))
        length = prompt_lengths(pa.array([row.supervised]))[0]
        assert row.ids[:length] == renderer.prompt(turns)
        assert renderer.answer_text([i for i, learn in zip(row.ids, row.supervised, strict=True) if learn][-2:]).strip() in ("", "hello")
        assert question_of(tokenizer.decode(row.ids[:length], skip_special_tokens=False)) == turns[-1].content


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["model", "chatml", "llama2", "oasst", "human_assistant", "instruct_output"])
def test_a_question_is_found_behind_a_system_message_where_a_marker_tells_them_apart(name: str, format: str) -> None:
    tokenizer = tokenizer_of(name)
    chat = Chat(format=format)
    renderer = Renderer(tokenizer, chat, add_role_markers(tokenizer, len(tokenizer) + 20, chat))
    question_of = question_finder(renderer)
    system, before = Turn("system", "Be nice,\n\nalways."), [Turn("user", "hi"), Turn("assistant", "hello")]

    def found(*turns: Turn) -> str:
        return question_of(tokenizer.decode(renderer.prompt(turns), skip_special_tokens=False))

    asked = Turn("user", "say\n\nhi")
    no_marker = format in ("oasst", "human_assistant", "instruct_output") or (
        format == "model" and name in ("mistral_v1", "mistral_v3", "gemma2")
    )
    assert found(system, asked) == (f"{system.content}\n\n" if no_marker else "") + asked.content
    assert found(system, *before, asked) == found(*before, asked) == found(asked) == asked.content
