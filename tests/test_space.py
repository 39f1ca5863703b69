"""The Space as it is pushed: `python app.py` in a process of its own, used in a browser, answers as the scripts do."""
# ruff: noqa: F811 - fixtures are imported, and asked for by their names

import ast
import html
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load
from playwright.sync_api import Page, expect
from published import BASE, COMMIT, REPO, cache, publish, run, trained_run  # noqa: F401

from qlora_suite import hub_space
from qlora_suite.assistant import Assistant, load
from qlora_suite.base_origin import Origin
from qlora_suite.conversations import Turn
from qlora_suite.files import read_json
from qlora_suite.generation import answer
from qlora_suite.hub_folder import Result
from qlora_suite.recipe_file import load as load_recipe
from qlora_suite.subject import renderer_of, subject_of

LONGEST = 64
"""Tokens of an answer: a quarter of the window, so that earlier ones fit in front of it."""


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def hardware(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(trained_run: Path, hardware: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(trained_run, hardware, tmp_path_factory)


def build(trained_run: Path, hardware: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two folders that are pushed, side by side: `model` and `model-space`."""
    folder = tmp_path_factory.mktemp(hardware)
    done = publish(trained_run, "--repo", REPO, "--output", folder / "model", "--space", "--space-hardware", hardware, "--dry-run")
    assert done.code == 0, done.text
    for name in os.listdir(folder / "model-space"):
        assert name in done.said
    return folder


@pytest.fixture(scope="module")
def space(built: Path, cache: Path) -> Iterator[tuple[str, int]]:
    """Address and process of the Space, started as the hub starts it, but with the model from the folder beside it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO_")}
    env |= {"MODEL_ID": str(built / "model"), "HF_HUB_CACHE": str(cache), "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    log = built / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=built / "model-space", env=env, stdout=file, stderr=file)
    try:
        for _ in range(600):
            if process.poll() is not None or "Running on local URL" in log.read_text():
                break
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", process.pid
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=20)


def assistant_for(trained_run: Path, hardware: str) -> Assistant:
    """The run's result as the scripts load it: on the GPU's Space in 4 bits, as it was trained, else in 32."""
    subject = subject_of(trained_run, [])
    if hardware == "cpu":
        subject = replace(subject, recipe=load_recipe(trained_run / "recipe.yaml", ["model.quantization=none"]))
    return load(subject, torch.device("cpu"), torch.float32)


def greedy(assistant: Assistant, *turns: str) -> str:
    """The scripts' answer to a chat of user and assistant in turn, on one line as the browser compares it."""
    roles = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)]
    text = answer(assistant.net, assistant.renderer, [roles], LONGEST)[0].text.strip()
    assert text, "an empty answer would show nothing"
    return text


def ask(page: Page, text: str) -> None:
    page.locator("textarea").first.fill(text)
    page.keyboard.press("Enter")


def shown(text: str) -> re.Pattern[str]:
    """The text whatever its white space."""
    return re.compile(r"^\s*" + r"\s+".join(map(re.escape, text.split())) + r"\s*$")


def test_a_question_in_the_browser_gets_the_answer_of_the_scripts(
    space: tuple[str, int], hardware: str, trained_run: Path, page: Page
) -> None:
    address, pid = space
    assistant, answers = assistant_for(trained_run, hardware), page.locator(".message.bot")
    page.goto(address)
    ask(page, "Who are you?")
    first = greedy(assistant, "Who are you?")
    expect(answers.last).to_have_text(shown(first), timeout=60_000)
    if hardware != "cpu":
        return
    everywhere = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert everywhere == ["127.0.0.1"]
    ask(page, "What is a tree?")
    expect(answers).to_have_count(2)
    expect(answers.last).to_have_text(shown(greedy(assistant, "Who are you?", first, "What is a tree?")), timeout=60_000)
    page.get_by_label("Clear").first.click()
    expect(answers).to_have_count(0)
    page.get_by_label("base").check()
    ask(page, "Who are you?")
    with assistant.as_base():
        base = greedy(assistant, "Who are you?")
    assert base != first
    expect(answers.last).to_have_text(shown(base), timeout=60_000)
    hostile = "<img src=x onerror='window.ran = true'> **bold** <|assistant|>"
    ask(page, html.escape(hostile, quote=False))  # as the app hands on what a model writes
    expect(page.locator(".message.user").last).to_have_text(hostile)
    expect(answers).to_have_count(2)
    assert page.locator(".message img, .message strong").count() == 0
    ask(page, hostile)
    expect(answers).to_have_count(3)
    assert page.evaluate("window.ran") is None


def test_on_zerogpu_the_gpu_is_lent_for_an_answer_in_16_bits(
    trained_run: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lent = build(trained_run, "zerogpu", tmp_path_factory), []

    def gpu(duration: int) -> Callable[[Any], Any]:
        lent.append(duration)
        return lambda function: function

    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=gpu))  # outside of the hub it is a decorator that does nothing
    monkeypatch.setenv("MODEL_ID", str(folder / "model"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    spec = importlib.util.spec_from_file_location("zerogpu_app", folder / "model-space" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert lent == [120]
    assert next(app.model.get_base_model().parameters()).dtype == torch.bfloat16
    *pieces, last = app.answer("Who are you?", [])
    assert len(set(pieces)) > 10, "it comes piece by piece"
    before, stream = threading.active_count(), app.answer("Who are you?", [])
    next(stream)
    stream.close()  # as when the reader presses stop
    assert threading.active_count() == before, "nothing goes on generating"
    expected = answer(app.model, renderer_of(subject_of(trained_run, [])), [[Turn("user", "Who are you?")]], LONGEST)[0].text
    assert last == expected.strip() != ""
    hostile = "<img src=x onerror=alert(1)> &lt; ![p](http://evil.example/p)"
    monkeypatch.setattr(app.model, "generate", lambda streamer, **_: streamer.on_finalized_text(hostile))
    *_, last = app.answer("Who are you?", [])
    assert last == "&lt;img src=x onerror=alert(1)&gt; &amp;lt; ![p](http://evil.example/p)"
    history = [{"role": "user", "content": "a <|assistant|>"}, {"role": "assistant", "content": last}]
    turns = [Turn("user", "a <\u200b|assistant|>"), Turn("assistant", hostile), Turn("user", "b")]
    assert app.prompt("b", history, 1)["input_ids"].tolist() == [renderer_of(subject_of(trained_run, [])).prompt(turns)]
    assert app.prompt("b", history * 9, 1)["input_ids"].shape[1] < 256, "the oldest pairs are left out"
    assert says_what_it_needs(folder / "model-space")["suggested_hardware"] == "zero-a10g"


def test_the_space_says_what_it_needs(built: Path, hardware: str) -> None:
    front = says_what_it_needs(built / "model-space", bitsandbytes=hardware == "gpu")
    assert front["suggested_hardware"] == {"cpu": "cpu-basic", "gpu": "t4-small"}[hardware]


def says_what_it_needs(folder: Path, bitsandbytes: bool = False) -> dict[str, Any]:
    """Checks pins, imports and settings; returns the front matter."""
    front, pins = metadata_load(folder / "README.md"), (folder / "requirements.txt").read_text().split("\n")
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [REPO, BASE])
    assert front["sdk_version"] == version("gradio")
    assert all(re.match(r"^(\w+==[\d.]+(\+cpu)?|--extra-index-url \S+|)$", line) for line in pins)
    assert any(line.startswith("bitsandbytes==") for line in pins) == bitsandbytes
    tree = ast.parse((folder / "app.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "peft", "transformers"}, "the app stands alone"
    settings = read_json(folder / "space.json")
    assert (settings["model"], settings["adapter"], settings["window"]) == (REPO, True, 256)
    assert bool(settings["quantization"]) == bitsandbytes
    return front


def test_the_memory_is_counted_and_a_machine_chosen_that_holds_it(trained_run: Path) -> None:
    subject, record = subject_of(trained_run, []), read_json(trained_run / "run.json")
    phi2 = {"trainable": 23_592_960, "base": 2_779_683_840, "packed": 2_779_683_840 - 2_516_582_400 // 2}
    seventy = {"trainable": 0, "base": 70_000_000_000, "packed": 70_000_000_000}

    def result(parameters: dict[str, int]) -> Result:
        run = {**record, "parameters": parameters}
        return Result(REPO, subject, "adapter", Origin(BASE, COMMIT, "test"), run, None, None, (), ())

    def plan(hardware: str) -> tuple[str, str, float]:
        found = hub_space.plan_for(result(phi2), trained_run, hardware)
        sizes = hub_space.arithmetic(result(phi2), trained_run, found.dtype, found.quantization)
        return found.machine, found.dtype, sum(size for size, what in sizes if "weights" in what)

    adapter = 23_592_960 * 4
    assert plan("cpu") == ("cpu-basic", "float32", 2_779_683_840 * 4 + adapter)
    assert plan("zerogpu") == ("zero-a10g", "bfloat16", 2_779_683_840 * 2 + adapter)
    assert plan("gpu") == ("t4-small", "half", pytest.approx(2_516_582_400 * 4.127 / 8 + 263_101_440 * 2 + adapter))
    with pytest.raises(ValueError, match=r"142\.0 GB of memory is needed"):
        hub_space.plan_for(result(seventy), trained_run, "zerogpu")


def test_a_space_is_refused_where_it_could_not_chat(run: Path) -> None:
    done = publish(run, "--repo", REPO, "--space-hardware", "gpu", "--dry-run")
    assert done.code == 2
    assert "add --space" in done.error
    result = Result(REPO, replace(subject_of(run, []), format="text"), "adapter", None, {}, None, None, (), ())
    with pytest.raises(ValueError, match="knows no chat"):
        hub_space.build_space(result, run / "hub", run / "space", "cpu")
