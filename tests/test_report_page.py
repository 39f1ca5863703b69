"""report.html: one file that opens from the disk, asks nobody, shows what was measured and runs nothing of what it shows."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from in_process import evaluate, prepared, train
from playwright.sync_api import Page

from qlora_suite import charts, dataset, fast_paths, sample_answers
from qlora_suite.charts import Interval, Series
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.files import read_json, write_text
from qlora_suite.generation import Answer, answer
from qlora_suite.model import load_base
from qlora_suite.report_page import differences, journals_of, report_page
from qlora_suite.sample_answers import FIXED, chosen_prompts, measures
from qlora_suite.subject import renderer_of, subject_of

HOSTILE = (
    "<script>document.title='RAN'</script><img src=\"x\" onerror=\"document.title='RAN'\"></style></pre></title>"
    "<a href='javascript:alert(1)'>a</a><base href='http://example.com/'>{{ 7*7 }}{% raw %}\u202e\u200f ]]> &lt; $x^2$"
)
SIGNS = "<script>document.title='RAN'</script><img src="
"""The part of it that a reader must find again as text."""
NAME = "run <img src=x onerror=document.title=1> {{ 7*7 }}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished run, every text of which is hostile: conversations, the data's file name, preview prompts, the run's folder."""
    folder = tmp_path_factory.mktemp("hostile")
    source = folder / "<img src=x onerror=document.title=2>.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for i in range(60):
            turns = [("user", f"Question {i}? {HOSTILE}"), ("assistant", f"Answer {i * i}. {HOSTILE}" if i % 2 else f"Yes, {i}.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    keys = ("data.policy=null", "train.max_steps=6", "data.validation_share=0.4", "data.dev_share=0.2")
    path = write_recipe(folder, tiny_base, source, *keys)
    overrides = (f"output.dir={json.dumps(str(folder / NAME))}", f"previews.prompts={json.dumps([HOSTILE])}")
    more = ("previews.every_steps=3", "previews.max_new_tokens=8", "evaluation.every_steps=3")
    train(prepared(path, *overrides, *more), *overrides, *more)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """The run's folder, evaluated."""
    folder = recipe.parent / NAME
    evaluate(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's page once more, with answers that a model could have been talked into."""
    subject, report = subject_of(run, []), read_json(run / "report.json")
    for column in report["answers"]["columns"].values():
        column["label"] = HOSTILE
        column["answers"][0]["text"] = f"An answer {HOSTILE}\x00\x1b\ud800"
    report["left_out"] = [{"column": "base_unquantised", "why": HOSTILE}]
    report["slices"][-1]["slice"] = HOSTILE
    conversations = dataset.read_conversations(Path(subject.recipe.data.prepared) / "validation.arrow")
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_text(path, report_page(report, subject, dataset.load_manifest(subject.recipe), conversations, journals_of(subject)))
    return path


@pytest.fixture
def opened(page: Page) -> Any:
    """opened(path) -> the page, and what it asked for and complained of."""
    asked: list[str] = []  # what the policy refuses fails before it leaves
    said: list[str] = []

    def open_page(path: Path) -> tuple[Page, list[str], list[str]]:
        page.on("requestfinished", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: request.failure == "csp" or asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        return page, asked, said

    return open_page


def test_one_file_that_asks_for_nothing(opened: Any, run: Path) -> None:
    shown, asked, said = opened(run / "report.html")
    assert len(asked) == 1
    assert said == []  # what the policy refuses, it says
    assert (run / "report.html").stat().st_size < 1_000_000
    headings = shown.locator("h2").all_inner_texts()
    expected = ["Answers, side by side", "Training", "Conversation by conversation", "Every model in every format", "Slices"]
    assert headings == [*expected, "Previews while it learnt", "Data", "Environment"]
    report = read_json(run / "report.json")
    assert shown.locator(".numbers .big").all_inner_texts() == [f"{report[side]['bits_per_byte']:.4f}" for side in ("base", "adapter")]
    assert f"{report['difference']['bits_per_byte']:+.4f}" in shown.locator(".sentence").inner_text()


def test_hostile_text_is_shown_and_runs_nothing(opened: Any, hostile: Path) -> None:
    shown, asked, said = opened(hostile)
    assert len(asked) == 1
    assert said == []
    assert "RAN" not in shown.title()
    assert shown.locator("script, img, base, object, iframe, form, a[href^=javascript], [onerror], [onload]").count() == 0
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for place in (".prompt > .text", ".answer .text", ".turn .text", ".previews .start", ".warn", "td", "th", "pre"):
        assert any("<img src=" in text for text in shown.locator(place).all_inner_texts()), place
    whole = shown.locator("body").inner_text()
    assert whole.count(SIGNS) > 10
    assert "{{ 7*7 }}{% raw %}" in whole
    assert shown.locator("h1").inner_text().endswith(NAME)
    assert "<img src=x onerror=document.title=2>.jsonl" in whole


def test_the_policy_alone_stops_what_would_not_be_escaped(opened: Any, hostile: Path, tmp_path: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    bad = f"{HOSTILE}<img src='http://127.0.0.1:9/x.png'><style>h1 {{ color: rgb(1, 2, 3) }}</style>"
    bad += "<p style='color: rgb(1, 2, 3)' id=bad>b</p>"
    write_text(tmp_path / "bad.html", text.replace("<main>", f"<main>{bad}"))
    shown, asked, said = opened(tmp_path / "bad.html")
    assert len(asked) == 1
    assert shown.locator("script").count() == 1
    assert "RAN" not in shown.title()
    assert all(shown.evaluate(f"getComputedStyle(document.querySelector('{where}')).color") != "rgb(1, 2, 3)" for where in ("h1", "#bad"))
    assert any("Content Security Policy" in line for line in said)


def test_light_dark_and_narrow(chromium: Any, run: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        for width in (400, 1400):
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            shown = context.new_page()
            shown.goto((run / "report.html").as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            seen[scheme] = {
                "paper": shown.locator("body").evaluate("e => getComputedStyle(e).backgroundColor"),
                "tick": shown.locator("svg text").first.evaluate("e => getComputedStyle(e).fill"),
                "line": shown.locator("svg path[stroke='var(--adapter)']").first.evaluate("e => getComputedStyle(e).stroke"),
            }
            context.close()
    assert all(seen["light"][what] != seen["dark"][what] for what in ("paper", "tick", "line"))
    assert all(value.startswith("rgb(") for of_scheme in seen.values() for value in of_scheme.values())


def test_a_base_alone_has_no_empty_boxes(opened: Any, recipe: Path, run: Path) -> None:
    report = evaluate(recipe, f"output.dir={json.dumps(str(run))}")  # beside the journals of the run, which are not the base's
    assert list(report["answers"]["columns"]) == ["base"]
    shown, _, said = opened(run / "report-base.html")
    assert said == []
    assert shown.locator("h2").all_inner_texts() == ["Answers, side by side", "Every model in every format", "Data", "Environment"]
    assert shown.locator(".numbers .big").count() == 1
    assert not [text for text in shown.locator(".card").all_inner_texts() if not text.strip()]
    assert not re.search(r"\b(None|nan|undefined|Undefined)\b", shown.locator("body").inner_text())


def test_without_answers_there_is_no_place_for_them(opened: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (run / name).read_bytes() for name in ("report.json", "report.md", "report.html")}
    report = evaluate(run, num_answers=0)
    assert report["answers"] is None
    shown, _, _ = opened(run / "report.html")
    assert shown.locator("#answers, .answer").count() == 0
    assert "## Answers" not in (run / "report.md").read_text()
    assert capsys.readouterr().out.rstrip().endswith("report.html")  # a long path may be broken into lines
    for name, content in before.items():
        (run / name).write_bytes(content)


# --- the ten at either end


def test_the_conversations_at_the_ends_are_those_that_changed_most(run: Path) -> None:
    report = read_json(run / "report.json")
    subject = subject_of(run, [])
    conversations = dataset.read_conversations(Path(subject.recipe.data.prepared) / "validation.arrow")
    found = differences(report, conversations)
    changes = {r["key"]: (r["adapter_nats"] - r["base_nats"]) / math.log(2) / r["bytes"] for r in report["conversations"]}
    best = sorted((key for key in changes if changes[key] < 0), key=changes.get)[:10]
    worst = sorted((key for key in changes if changes[key] > 0), key=lambda key: -changes[key])[:10]
    assert [row["key"] for row in found["improved"]] == best
    assert [row["key"] for row in found["worsened"]] == worst
    assert best
    texts = {c.key: c.turns for c in conversations}
    assert all(row["turns"] == texts[row["key"]] for row in found["improved"])
    assert found["num_improved"] + found["num_worsened"] <= found["count"] == len(changes)


# --- answers


def test_held_out_questions_are_drawn_by_their_text_alone(run: Path) -> None:
    subject = subject_of(run, [])
    renderer = renderer_of(subject)
    conversations = dataset.read_conversations(Path(subject.recipe.data.prepared) / "validation.arrow")
    chosen = chosen_prompts(conversations, renderer, 4, 200)
    assert [p.text for p in chosen] == [p.text for p in chosen_prompts(conversations[::-1], renderer, 4, 200)]
    assert [p.held_out for p in chosen] == [True] * 4 + [False] * len(FIXED)
    assert [p.text for p in chosen[4:]] == list(FIXED)
    assert "at most 100 words" in chosen[4].text
    questions = {c.turns[0].content: c.turns[1].content for c in conversations}
    assert all(questions[p.text] == p.reference for p in chosen[:4])
    assert chosen_prompts(conversations, renderer, 4, 200)[:2] == chosen_prompts(conversations, renderer, 2, 200)[:2]
    long = replace(conversations[0], key="long", group="long", turns=(Turn("user", "word " * 500), Turn("assistant", "yes")))
    only = chosen_prompts([long, Conversation("k", ("k",), "g", (Turn("assistant", "no question"),))], renderer, 4, 200)
    assert not any(p.held_out for p in only)


def test_the_bases_answers_are_those_of_the_base(run: Path) -> None:
    """Not of the adapter, and not of a base that the adapter has left something in."""
    subject, report = subject_of(run, []), read_json(run / "report.json")
    renderer = renderer_of(subject)
    base = load_base(subject.recipe.model, torch.float32, torch.device("cpu"))
    chats = [[Turn("user", prompt["prompt"])] for prompt in report["answers"]["prompts"]]
    expected = answer(base, renderer, chats, 12)
    columns = report["answers"]["columns"]
    assert [one["text"] for one in columns["base"]["answers"]] == [one.text for one in expected]
    assert columns["base"]["answers"] != columns["adapter"]["answers"]
    assert columns["base"]["label"] == "base, nf4"


def test_answers_are_given_in_the_faster_ways_and_are_the_plain_ones(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = []
    real = fast_paths.take_to_answer
    monkeypatch.setattr(fast_paths, "take_to_answer", lambda *args: taken.append(real(*args)))
    same = Path(shutil.copytree(run, tmp_path / "run"))
    fast = evaluate(same, answer_tokens=20)["answers"]
    shutil.rmtree(same / "evaluation")
    plain = evaluate(same, "speed={attention: plain, head: plain, lora: plain, dequantize_once: false}", answer_tokens=20)["answers"]
    assert [(p.attention, p.lora.startswith("off"), p.copies.startswith("off")) for p in taken] == [
        ("each conversation by itself", False, False),
        ("off", True, True),
    ]
    assert plain == fast
    assert {name: len(column["answers"]) for name, column in fast["columns"].items()} == {"base": 5, "adapter": 5}


def test_answers_are_kept_until_something_that_made_them_changes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_json(run / "report.json")
    loads = []
    real = sample_answers.load
    monkeypatch.setattr(sample_answers, "load", lambda *args: (loads.append(1), real(*args))[1])
    assert evaluate(run)["answers"] == before["answers"]
    assert loads == []
    assert evaluate(run, answer_tokens=5)["answers"]["max_new_tokens"] == 5
    assert loads == [1]
    assert evaluate(run)["answers"] == before["answers"]
    assert loads == [1]


def test_memory_that_is_short_means_fewer_prompts_at_once(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject, sizes = subject_of(run, []), []
    prompts = [sample_answers.Prompt((Turn("user", f"Question {i}?"),), True) for i in range(5)]
    real = sample_answers.answer

    def short(net: Any, renderer: Any, chats: Any, *args: Any) -> Any:
        sizes.append(len(chats))
        if len(chats) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(net, renderer, chats, *args)

    monkeypatch.setattr(sample_answers, "answer", short)
    file = tmp_path / "answers.json"
    for _ in sample_answers.answer_all(
        subject, None, renderer_of(subject), {"adapter": file}, prompts, 4, torch.device("cpu"), torch.float32
    ):
        assert not file.is_file()
    assert sizes == [5, 5, 2, 2, 1], "first without the copies of weights, then half as many"
    assert [one.prompt for one in sample_answers.read_answers(file)] == [prompt.text for prompt in prompts]


def test_an_answer_is_concise_only_if_it_has_ended() -> None:
    def made(words: int, stopped: bool) -> Answer:
        return Answer("?", "word " * words, words, stopped, 0.25)

    found = measures([made(100, True), made(101, True), made(5, False), made(3, True)])
    assert found == {"stopped": 0.75, "concise": 0.5, "mean_words": 52.25, "median_words": 52.5, "repetition": 0.25}


# --- charts


def test_a_gap_in_a_curve_stays_a_gap() -> None:
    whole = charts.lines([Series("loss", range(6), [1, 2, 3, 4, 5, 6])], "loss")
    gap = charts.lines([Series("loss", range(6), [1, 2, None, 4, 5, 6])], "loss")

    def strokes(svg: str) -> int:
        (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke="var\(--adapter\)"', svg)
        return path.count("M ")

    assert (strokes(whole), strokes(gap)) == (1, 2)


def test_a_long_curve_is_drawn_by_its_means() -> None:
    steps = range(100_000)
    svg = charts.lines([Series("loss", steps, [None if s < 1000 else s % 2 for s in steps])], "loss")
    assert len(svg) < 40_000


def test_a_charts_words_are_words_and_its_ids_its_own() -> None:
    one, other = (
        charts.intervals([Interval(f"<b>$x_{{{i}}}$\x00\u202e &", i, i - 1, i + 1)], '"><script>', "bits", mark=0.0) for i in (1, 2)
    )
    assert "<b>" not in one
    assert "<script>" not in one
    assert "$x_{1}$" in one
    assert "style=" not in one
    assert ' font="' not in one, "the page's own font is kept"
    assert ' font-size="' in one
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', one))
    assert used
    assert used <= ids[0]
