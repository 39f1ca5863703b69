"""scripts/generate.py: answers that do not depend on what else is asked, read from anywhere, written so that nothing is lost."""
# ruff: noqa: F811 (fixtures are imported)

import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from in_process import lines, script
from talking import ANSWERS, EMOJI, assistant, run  # noqa: F401
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qlora_suite import streaming
from qlora_suite.assistant import Assistant, headline_of, load
from qlora_suite.conversations import Turn
from qlora_suite.files import read_json
from qlora_suite.generation import decode
from qlora_suite.prompts import prompts_of, rows_of
from qlora_suite.sampling import Draw, Sampling, probabilities
from qlora_suite.streaming import Limits, stream
from qlora_suite.subject import subject_of
from qlora_suite.terminal_text import printable

QUESTIONS = ["hello", "Why is the sky blue, and the sea, and everything between them?", "emoji", "No.", "count", "What?"]


@pytest.fixture
def loaded(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script loads is loaded already."""
    monkeypatch.setattr(script("generate"), "load", lambda *_: assistant)


def args(*words: str | Path) -> Namespace:
    return script("generate").arguments().parse_intermixed_args(list(map(str, words)))


def generate(*words: str | Path) -> None:
    asked = args(*words)
    script("generate").check(asked)
    script("generate").run(asked)


def prompts(assistant: Assistant, *questions: str) -> list[list[int]]:
    return [assistant.renderer.prompt([Turn("user", question)]) for question in questions]


def decoded(assistant: Assistant, ids: list[list[int]], draw: Draw | None = None, limit: int | list[int] = 24) -> list[list[int]]:
    found = decode(assistant.net, ids, assistant.renderer.stop_token_ids, limit, draw=draw)
    assert found is not None
    return found


# --- what is answered


@pytest.mark.parametrize("base", [False, True])
def test_a_greedy_answer_does_not_depend_on_its_batch(assistant: Assistant, base: bool) -> None:
    """Of six prompts of different lengths, in one batch and alone: every token. The base has not learnt to stop, the adapter has."""
    ids = prompts(assistant, *QUESTIONS)
    with assistant.answering(base):
        together = decoded(assistant, ids)
        assert together == [decoded(assistant, [one])[0] for one in ids]
    assert {row[-1] in assistant.renderer.stop_token_ids for row in together} == ({False} if base else {True, False})


def test_each_row_has_a_limit_of_its_own_and_padding_is_no_end(assistant: Assistant) -> None:
    ids = prompts(assistant, "count", "count", "hello")
    short, long, hello = decoded(assistant, ids, limit=[3, 9, 40])
    assert (len(short), len(long)) == (3, 9)
    assert long[:3] == short
    assert hello[-1] in assistant.renderer.stop_token_ids
    assert not set(short + long) & set(assistant.renderer.stop_token_ids)


def test_the_same_seed_gives_the_same_answer_whatever_the_batch_and_the_order(assistant: Assistant) -> None:
    ids, sampling = prompts(assistant, *QUESTIONS), Sampling(temperature=1.5, top_p=0.95, top_k=200, seed=3)

    def drawn(some: list[list[int]], sampling: Sampling = sampling) -> list[list[int]]:
        return decoded(assistant, some, Draw(sampling, sampling.generators(some)))

    together = drawn(ids)
    assert drawn(ids[::-1])[::-1] == together
    assert [drawn([one])[0] for one in ids] == together
    torch.manual_seed(99)
    assert drawn(ids) == together
    others = drawn(ids, Sampling(temperature=1.5, top_p=0.95, top_k=200, seed=4))
    assert all(a != b for a, b in zip(together, others, strict=True))


def test_a_prompt_that_is_asked_again_is_drawn_anew(assistant: Assistant) -> None:
    ids, sampling = prompts(assistant, "What?", "What?"), Sampling(temperature=2.0, seed=1)
    first, second = decoded(assistant, ids, Draw(sampling, sampling.generators(ids)))
    assert first != second
    earlier: Counter = Counter()
    alone = [decoded(assistant, [one], Draw(sampling, sampling.generators([one], earlier)))[0] for one in ids]
    assert alone == [first, second]


def test_what_top_k_and_top_p_leave_is_what_transformers_leaves() -> None:
    torch.manual_seed(0)
    scores = torch.randn(50, 300) * 3
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=40)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8)])
    expected = warpers(None, scores.double()).softmax(dim=-1)
    torch.testing.assert_close(probabilities(scores, sampling), expected)
    assert ((probabilities(scores, sampling) > 0).sum(dim=-1) < 40).any()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """60,000 draws from one distribution: the chi-square statistic of 6 tokens, and never the one that top-k leaves out."""
    count, sampling = 60_000, Sampling(temperature=1.0, top_k=6)
    scores = torch.tensor([[2.0, -3.0, 1.0, 0.5, 0.0, 1.5, -0.5]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = Draw(sampling, generators)(None, scores.repeat(count, 1)).argmax(dim=-1)
    seen, expected = torch.bincount(drawn, minlength=7).double(), probabilities(scores, sampling)[0] * count
    assert seen[1] == 0
    kept = expected > 0
    assert ((seen - expected)[kept] ** 2 / expected[kept]).sum() < 30  # 5 degrees of freedom: one in 70,000


def test_a_token_that_was_left_out_is_not_drawn_at_the_edge_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token has no share, and the number drawn is exactly 0."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros(1, dtype=torch.float64))
    draw = Draw(Sampling(temperature=1.0, top_k=2), [torch.Generator()])
    assert draw(None, torch.tensor([[0.0, 2.0, 1.0]])).argmax().item() == 1


def test_the_base_s_own_generation_settings_change_nothing(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5 comes with a repetition penalty: it would bend the answers that the loss was made for."""
    ids = prompts(assistant, "count")
    before = decoded(assistant, ids, limit=80)
    for net in (assistant.net, assistant.net.get_base_model()):
        settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": before[0][:5], "temperature": 0.1, "top_k": 3}
        for name, value in settings.items():
            monkeypatch.setattr(net.generation_config, name, value, raising=False)
    assert decoded(assistant, ids, limit=80) == before


def test_half_a_character_is_never_shown(assistant: Assistant) -> None:
    ids = prompts(assistant, "emoji")[0]
    pieces = list(stream(assistant, ids, Limits(60)))
    said = assistant.renderer.tokenizer.encode(EMOJI, add_special_tokens=False)
    halves = [assistant.renderer.tokenizer.decode(said[:n]) for n in range(len(said))]
    assert sum("\ufffd" in half for half in halves) >= 4, "these tokens do not split characters, so this proves nothing"
    shown = [streaming.text_so_far(assistant.renderer, said[:n]) for n in range(len(said))]
    for text in [*shown, *(piece.text for piece in pieces)]:
        assert EMOJI.startswith(text)
    assert pieces[-1].text == EMOJI
    assert [piece.ended for piece in pieces] == [None] * (len(pieces) - 1) + ["by itself"]


def test_a_stream_says_how_it_ended(assistant: Assistant) -> None:
    count = prompts(assistant, "count")[0]
    whole = list(stream(assistant, count, Limits(200)))[-1]
    assert (whole.text, whole.ended) == (ANSWERS["count"], "by itself")
    assert list(stream(assistant, count, Limits(7)))[-1].ended == "tokens"
    long = prompts(assistant, "count " * 110)[0]
    assert 0 < assistant.window - len(long) < 60
    last = list(stream(assistant, long, Limits(400), base=True))[-1]
    assert (last.num_tokens, last.ended) == (assistant.window - len(long), "window")
    assert list(stream(assistant, count, Limits(200, seconds=0.0)))[-1].ended == "seconds"


def test_whoever_stops_or_leaves_a_stream_ends_its_thread(assistant: Assistant) -> None:
    ids, stop = prompts(assistant, "What?")[0], threading.Event()
    pieces = stream(assistant, ids, Limits(200), base=True, stop=stop)
    first = next(pieces)
    stop.set()
    last = list(pieces)[-1]
    assert last.ended == "stopped"
    assert first.num_tokens <= last.num_tokens < 200
    passes = []
    handle = assistant.net.get_base_model().register_forward_pre_hook(lambda *_: passes.append(time.sleep(0.01)))
    pieces = stream(assistant, ids, Limits(200), base=True)
    next(pieces)
    pieces.close()
    handle.remove()
    assert 0 < len(passes) < 100, "it went on to the end"
    assert not assistant.lock.locked()


# --- the script


def test_in_a_process_of_its_own_it_answers_a_pipe(run: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "generate.py", run, "--max-new-tokens", "60"]
    found = subprocess.run(
        command, input="hello\n\nemoji\n", capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stderr
    assert "adapter of step 150" in found.stdout
    assert f"> hello\n{ANSWERS['hello']}\n" in found.stdout
    assert f"> emoji\n{EMOJI}\n" in found.stdout
    assert "stopped by itself" in found.stdout
    assert found.stderr == ""


@pytest.mark.usefixtures("loaded")
def test_a_streamed_answer_is_the_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(run, "emoji", "count", "--stream", "--max-new-tokens", "100")
    shown = capsys.readouterr().out
    assert f"> emoji\n{EMOJI}\n" in shown
    assert f"> count\n{ANSWERS['count']}\n" in shown


@pytest.mark.usefixtures("loaded")
def test_the_base_answers_without_the_adapter_and_the_record_says_so(run: Path, tmp_path: Path) -> None:
    generate(run, "hello", "--base", "--jsonl", tmp_path / "base.jsonl", "--max-new-tokens", "12")
    generate(run, "hello", "--jsonl", tmp_path / "adapter.jsonl", "--max-new-tokens", "60")
    (base,), (adapter,) = lines(tmp_path / "base.jsonl"), lines(tmp_path / "adapter.jsonl")
    assert (base["model"]["answers"], base["model"]["run"], base["model"]["step"]) == ("base", str(run), None)
    assert (adapter["model"]["answers"], adapter["model"]["step"]) == ("adapter", 150)
    assert adapter["answer"] == ANSWERS["hello"]
    assert not ANSWERS["hello"].startswith(base["answer"])
    assert (adapter["stopped"], adapter["prompt"], adapter["index"]) == (True, "hello", 0)
    assert adapter["model"]["base"] == read_json(run / "run.json")["recipe"]["model"]["base"]
    assert base["model"]["weights"] != adapter["model"]["weights"]


@pytest.mark.usefixtures("loaded")
def test_an_interrupted_file_is_gone_on_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Killed within a line and interrupted within a batch: the file is the one that an uninterrupted call writes, drawn answers too."""
    source = tmp_path / "prompts.jsonl"
    asked = [{"prompt": q} for q in [*QUESTIONS[::-1], "What?", "What?"]]
    asked[1] = {
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Oh."}, {"role": "user", "content": "No."}]
    }
    source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = ["--file", source, "--batch-size", "3", "--max-new-tokens", "20", "--temperature", "1.2", "--seed", "5", "--jsonl"]
    generate(run, *options, tmp_path / "whole.jsonl")

    module, calls = script("generate"), []

    def interrupted(*given: Any, **settings: Any) -> Any:
        calls.append(len(given[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*given, **settings)

    monkeypatch.setattr(module, "decode", interrupted)
    out = tmp_path / "parts.jsonl"
    with pytest.raises(SystemExit) as left:
        generate(run, *options, out)
    assert left.value.code == 130
    assert len(lines(out)) == 3
    assert f"{out} has 3 of 8 answers, and the same command goes on" in capsys.readouterr().out
    out.write_text(out.read_text().rstrip("\n").rpartition("\n")[0] + '\n{"index": 2, "requ')
    generate(run, *options, out)
    assert calls == [3, 3, 3, 3]  # of the second and third call: two were there
    strip = lambda path: [{**record, "seconds": None} for record in lines(path)]  # noqa: E731
    assert strip(out) == strip(tmp_path / "whole.jsonl")
    assert strip(out)[1]["messages"] == asked[1]["messages"]
    generate(run, *options, out)
    assert len(calls) == 4, "a finished file is not answered again"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("other", [["--max-new-tokens", "9"], ["--base"], ["--temperature", "1"], ["No."]])
def test_a_file_with_other_answers_is_left_alone(run: Path, tmp_path: Path, other: list[str]) -> None:
    out = tmp_path / "out.jsonl"
    common = [run, "--max-new-tokens", "8", "--jsonl", out]
    generate(*common, "hello")
    before = out.read_bytes()
    with pytest.raises(ValueError, match="holds other answers"):
        generate(*common, *(other if other == ["No."] else ["hello", *other]))
    assert out.read_bytes() == before


# --- mistakes


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["hello", "--top-p", "0.9"], "--top-p is of a drawn answer"),
        (["hello", "--top-k", "5"], "--top-k is of a drawn answer"),
        (["hello", "--seed", "0"], "--seed is of a drawn answer"),
        (["hello", "--temperature", "0"], "temperature has to be above 0, not 0.0"),
        (["hello", "--temperature", "nan"], "temperature has to be above 0, not nan"),
        (["hello", "--temperature", "1", "--top-p", "0"], "top-p has to be above 0"),
        (["hello", "--temperature", "1", "--top-k", "0"], "top-k has to be at least 1"),
        (["hello", "--stream", "--jsonl", "x"], "give one of the two"),
        (["hello", "--stream", "--batch-size", "2"], "--batch-size has no effect"),
        (["hello", "--max-new-tokens", "0"], "--max-new-tokens has to be at least 1"),
        (["hello", "--file", "x"], "on the command line and a --file"),
        (["hello", "--system", "Be kind."], "format oasst has no place for a system prompt"),
        (["hello", " "], "prompt 2: a prompt has to be a text that is not empty"),
        (["hello", "word " * 400], r"prompt 2: the prompt has [\d,]+ tokens, and prompt and answer share a window of 256"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_what_cannot_take_effect_or_be_asked_is_an_error(run: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        generate(run, *words)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("p.txt", "\n \n", "p.txt has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', r"p.jsonl, line 2 has to be an object with either"),
        ("p.jsonl", '{"prompt": "a", "messages": []}\n', "either"),
        ("p.jsonl", '{"prompt": \n', r"p.jsonl, line 1 is not JSON"),
        ("p.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has to be"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "end on a user turn"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_a_file_s_mistake_is_named_with_its_line(run: Path, tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        generate(run, "--file", tmp_path / name)


def test_overrides_and_prompts_are_told_apart() -> None:
    words = ["data.max_length=64", "a=b?", "chat.format=oasst", "Is data.source=x right?", "model.base=x y", "x.y=1"]
    assert script("generate").told_apart(words) == (
        ["data.max_length=64", "chat.format=oasst", "model.base=x y"],
        ["a=b?", words[3], "x.y=1"],
    )


def test_an_adapter_from_elsewhere_and_a_base_are_asked_by_their_recipe(run: Path, tmp_path: Path) -> None:
    recipe = str(run / "recipe.yaml")
    device = torch.device("cpu")
    base = load(subject_of(Path(recipe), []), device, torch.float32)
    assert (base.name, base.about(False)["run"], base.about(False)["answers"]) == ("base", None, "base")
    with pytest.raises(ValueError, match="no adapter to be taken off"):
        list(stream(base, [1], Limits(1), base=True))
    elsewhere = load(subject_of(Path(recipe), [], str(run / "final")), device, torch.float32)
    ids = prompts_of(elsewhere, rows_of([("", "hello")]), None)[0].ids
    assert list(stream(elsewhere, ids, Limits(60)))[-1].text == ANSWERS["hello"]
    assert str(run / "final") in headline_of(elsewhere.about(False))


def test_what_a_model_says_does_not_drive_the_terminal() -> None:
    assert printable("a\x1b[2J\x07b\n\tc\x9bd\u202ee👩‍🚀") == "a␛[2J␇b\n\tc�d�e👩‍🚀"
