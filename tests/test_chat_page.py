"""scripts/chat.py: the page, used in a real browser as a person does, and attacked as a person would."""
# ruff: noqa: F811 (fixtures are imported)

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_script
from in_process import script
from playwright.sync_api import Page, expect
from talking import ANSWERS, HOSTILE, LONG, assistant, run  # noqa: F401

from qlora_suite.assistant import Assistant
from qlora_suite.chat_access import password_for
from qlora_suite.chat_page import chat_page
from qlora_suite.chat_server import serve
from qlora_suite.conversations import Turn
from qlora_suite.streaming import stream

expect.set_options(timeout=60_000)  # a hang guard: how fast the page is, is not judged
PASSWORD = "correct horse battery"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def chat(run: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """scripts/chat.py in a process of its own, up to where it says its address."""
    port = free_port()
    command = [sys.executable, str(ROOT / "scripts" / "chat.py"), str(run), "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_ALLOWED_PATHS": "/", **(env or {})}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("http://"), said + process.stdout.read()
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    with chat(run) as address:
        yield address


@pytest.fixture
def talk(page: Page, url: str) -> Page:
    return opened(page, url)


def opened(page: Page, url: str) -> Page:
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_selector("#message textarea")
    return page


def send(page: Page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def answers(page: Page, side: str = "adapter") -> Any:
    return page.locator(f"#chat-{side} .bot.message")


def ended(page: Page, number: int = 1, side: str = "adapter") -> str:
    """The line under the chat, once its answer is complete."""
    expect(answers(page, side)).to_have_count(number)
    status = page.locator(f"#status-{side}")
    expect(status).to_contain_text(re.compile("stopped|ran into"))
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    return status.inner_text()


def prompt_tokens(assistant: Assistant, *texts: str) -> int:
    turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    return len(assistant.renderer.prompt(turns))


# --- talking


def test_a_person_asks_sees_the_answer_come_follows_up_and_clears(talk: Page, assistant: Assistant, run: Path) -> None:
    expect(talk.locator("#title")).to_contain_text("adapter of step 150")
    expect(talk.locator("#title h1")).to_have_text(str(run))
    talk.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const bot = document.querySelector("#chat-adapter .bot.message"); if (bot) window.seen.push(bot.innerText.trim());
        }).observe(document.querySelector("#chat-adapter"), {childList: true, subtree: true, characterData: true}); }"""
    )
    send(talk, "count")
    line = ended(talk)
    assert answers(talk).inner_text().strip() == LONG
    grown = list(dict.fromkeys(text for text in talk.evaluate("window.seen") if text))
    assert len(grown) > 2, "it came all at once"
    assert all(LONG.startswith(text) for text in grown)
    assert "stopped by itself" in line
    assert f"prompt {prompt_tokens(assistant, 'count')} tokens" in line
    assert "80 tokens · " in line

    send(talk, "hello")
    expected = prompt_tokens(assistant, "count", LONG, "hello")
    expect(talk.locator("#status-adapter")).to_contain_text(f"prompt {expected} tokens")
    ended(talk, 2)

    talk.click("#clear")
    expect(answers(talk)).to_have_count(0)
    send(talk, "hello")
    assert f"prompt {prompt_tokens(assistant, 'hello')} tokens" in ended(talk)
    assert answers(talk).inner_text().split() == ANSWERS["hello"].split()


def test_base_and_adapter_answer_side_by_side_each_with_its_own_history(talk: Page, assistant: Assistant) -> None:
    send(talk, "hello")
    ended(talk)
    expect(talk.locator("#chat-base")).to_be_hidden()
    talk.get_by_label("both, side by side").check()
    send(talk, "emoji")
    mine, of_base = ended(talk, 2), ended(talk, 1, "base")
    assert f"prompt {prompt_tokens(assistant, 'hello', ANSWERS['hello'], 'emoji')} tokens" in mine
    assert f"prompt {prompt_tokens(assistant, 'emoji')} tokens" in of_base
    assert answers(talk).nth(1).inner_text() != answers(talk, "base").inner_text()
    talk.click("#undo")
    expect(answers(talk)).to_have_count(1)
    expect(answers(talk, "base")).to_have_count(0)
    expect(talk.locator("#message textarea")).to_have_value("emoji")
    talk.get_by_label("adapter", exact=True).check()
    talk.click("#retry")
    expect(talk.locator("#status-adapter")).to_contain_text(f"prompt {prompt_tokens(assistant, 'hello')} tokens")


def test_what_one_side_was_asked_alone_is_not_lost_when_both_are_asked_again(talk: Page) -> None:
    talk.get_by_label("both, side by side").check()
    send(talk, "hello")
    ended(talk)
    ended(talk, side="base")
    talk.get_by_label("adapter", exact=True).check()
    send(talk, "emoji")
    ended(talk, 2)
    talk.get_by_label("both, side by side").check()
    talk.click("#retry")
    ended(talk, 2, "base")
    for side in ("adapter", "base"):
        assert [text.strip() for text in talk.locator(f"#chat-{side} .user.message").all_inner_texts()] == ["hello", "emoji"]


def test_what_does_not_fit_is_left_out_and_said(talk: Page, assistant: Assistant) -> None:
    """Three messages of more than 80 tokens, each with its answer, are more than the window's 256."""
    long = " ".join(["count"] * 45)
    assert prompt_tokens(assistant, long) > 80
    for number in range(1, 4):
        send(talk, long)
        expect(answers(talk)).to_have_count(number)
        expect(talk.locator("#send")).to_be_visible()
        ended(talk, number)
    expect(talk.locator("#status-adapter")).to_contain_text(re.compile("[12] earlier exchanges? left out"))
    send(talk, "word " * 400)
    expect(talk.locator("#status-adapter")).to_contain_text("share a window of 256")
    expect(talk.locator("#message textarea")).to_have_value(re.compile("word word"))


def test_html_and_scripts_in_an_answer_or_a_message_are_shown_and_do_not_run(talk: Page) -> None:
    """The `page` fixture fails on a request to another machine, so the picture was not fetched either."""
    title = talk.title()
    send(talk, "show html")
    ended(talk)
    shown = answers(talk)
    assert shown.inner_text().strip() == HOSTILE.replace("**bold**", "bold").replace("![p](https://example.com/x.png)", "!p")
    expect(shown.locator("strong")).to_have_text("bold")
    expect(shown.locator("img, script")).to_have_count(0)
    send(talk, HOSTILE + " `<b>` and\n```html\n<i onclick=1>\n```\n[link](javascript:document.title='own')")
    expect(answers(talk)).to_have_count(2)
    mine = talk.locator("#chat-adapter .user.message").nth(1)
    expect(mine).to_contain_text("<img src=x onerror")
    assert [code.strip() for code in mine.locator("code").all_inner_texts()] == ["<b>", "<i onclick=1>"]
    expect(mine.locator("img, script, b, i[onclick]")).to_have_count(0)
    assert "javascript:" not in "".join(mine.locator("a").evaluate_all("links => links.map(a => a.href)"))
    expect(talk.locator("#send")).to_be_visible()
    assert talk.title() == title


def test_the_server_s_policy_stops_what_a_sanitiser_would_let_through(talk: Page) -> None:
    """Handlers in attributes and pictures from elsewhere, put into the page itself."""
    talk.evaluate(
        """() => document.querySelector("#title").insertAdjacentHTML("beforeend",
            "<img src=nothing onerror=\\"document.title='own'\\"><img src='https://example.com/x.png' onload=1>")"""
    )
    talk.wait_for_timeout(500)
    assert "own" not in talk.title().split()


# --- stopping


class Slow:
    """Counts the forward passes of a model and makes each wait for its turn."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.passes, self.seconds = 0, 0.02
        self.handle = net.register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.passes += 1
        time.sleep(self.seconds)


@pytest.fixture
def slow(assistant: Assistant) -> Iterator[Slow]:
    found = Slow(assistant.net.get_base_model())
    yield found
    found.handle.remove()


def test_a_model_that_fails_is_said_to_and_the_page_goes_on(page: Page, assistant: Assistant) -> None:
    """Out of memory behind the first tokens."""
    calls = []

    def answer(assistant: Assistant, ids: list[int], *rest: Any) -> Iterator[Any]:
        calls.append(ids)
        pieces = stream(assistant, ids, *rest)
        yield next(pieces)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from pieces

    blocks = chat_page(assistant, answer=answer)
    try:
        talk = opened(page, serve(blocks, "127.0.0.1", free_port(), None))
        send(talk, "hello")
        expect(talk.locator("#status-adapter")).to_contain_text("the model could not answer (OutOfMemoryError)")
        expect(talk.locator("#message textarea")).to_have_value("hello")
        talk.click("#send")
        ended(talk)
        assert answers(talk).inner_text().split() == ANSWERS["hello"].split()
    finally:
        blocks.close(verbose=False)


@pytest.fixture
def in_process(assistant: Assistant) -> Iterator[tuple[str, list[list[int]]]]:
    """The page in the test's own process, with the ids of every prompt that it asks."""
    asked: list[list[int]] = []

    def answer(assistant: Assistant, ids: list[int], *rest: Any) -> Any:
        asked.append(list(ids))
        return stream(assistant, ids, *rest)

    blocks = chat_page(assistant, history=1, seconds=60, answer=answer)
    yield serve(blocks, "127.0.0.1", free_port(), None), asked
    blocks.close(verbose=False)


def test_a_conversation_that_is_cleared_while_an_answer_comes_stays_cleared(
    page: Page, in_process: tuple[str, list[list[int]]], slow: Slow, assistant: Assistant
) -> None:
    talk = opened(page, in_process[0])
    send(talk, "count")
    expect(talk.locator("#status-adapter")).to_contain_text(re.compile(r"\d+ tokens · "))
    talk.locator("#chat-adapter").get_by_label("Clear").click()
    expect(talk.locator("#send")).to_be_visible()
    expect(answers(talk)).to_have_count(0)
    assert slow.passes < 80, "the whole answer was made"
    slow.seconds = 0
    send(talk, "hello")
    assert f"prompt {prompt_tokens(assistant, 'hello')} tokens" in ended(talk)


def test_stop_ends_the_generation_and_keeps_what_was_said(
    page: Page,
    in_process: tuple[str, list[list[int]]],
    slow: Slow,
    assistant: Assistant,
) -> None:
    address, asked = in_process
    talk = opened(page, address)
    send(talk, "count")
    expect(talk.locator("#status-adapter")).to_contain_text(re.compile(r"\d+ tokens · "))
    talk.click("#stop")
    line = ended(talk)
    assert "was stopped" in line
    passes = slow.passes
    assert passes < 80, "the whole answer was made"
    said = answers(talk).inner_text().strip()
    assert said
    assert LONG.startswith(said)
    time.sleep(0.3)
    assert slow.passes == passes, "it went on"
    assert not assistant.lock.locked()

    slow.seconds = 0
    for number, text in enumerate(("hello", "emoji"), 2):
        send(talk, text)
        expect(answers(talk)).to_have_count(number)
        expect(talk.locator("#send")).to_be_visible()
    expect(talk.locator("#status-adapter")).to_contain_text("1 earlier exchange left out")  # --history 1: the seeds' app
    histories = [[Turn("user", "count"), Turn("assistant", LONG[:n]), Turn("user", "hello")] for n in (len(said), len(said) + 1)]
    assert asked[1] in map(assistant.renderer.prompt, histories)  # the page strips a space at the end
    head = assistant.renderer.prompt([Turn("user", "hello")])
    assert asked[2][: len(head)] == head
    assert len(asked[2]) > len(head)


def test_who_closes_the_tab_leaves_the_model_to_others(
    chromium: Any,
    in_process: tuple[str, list[list[int]]],
    slow: Slow,
    assistant: Assistant,
) -> None:
    context = chromium.new_context()
    talk = opened(context.new_page(), in_process[0])
    talk.get_by_label("base", exact=True).check()
    slow.seconds = 0.1
    send(talk, "What?")
    expect(talk.locator("#status-base")).to_contain_text(re.compile(r"\d+ tokens · "))
    context.close()
    deadline = time.monotonic() + 30
    while assistant.lock.locked():
        assert time.monotonic() < deadline, "it still answers"
        time.sleep(0.05)
    assert slow.passes < 120, "it went on to the end of the answer"


# --- those who are not nice


def got(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(100_000).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read(10_000).decode(errors="replace")


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"gradio_api/file={place}"
            for place in ("/etc/passwd", f"{ROOT}/README.md", "README.md", "../../etc/passwd", "http://example.com/")
        ),
        *(f"{prefix}{ROOT}/README.md" for prefix in ("file=", "file/", "gradio_api/file/", "static/../file=", "assets/..%2f..%2f")),
        *("gradio_api/info", "gradio_api/openapi.json", "docs", "openapi.json", "monitoring", "gradio_api/upload_progress?upload_id=1"),
        *("gradio_api/proxy=http://example.com/", "gradio_api/deep_link", "gradio_api/mcp/", "runs", "gradio_api/vibe-code/"),
    ],
)
def test_no_file_no_interface_for_programs_and_no_proxy_is_served(url: str, path: str) -> None:
    status, body = got(url + path)
    assert status in (403, 404), body
    assert "qlora" not in body
    assert "root:" not in body


def test_nothing_can_be_uploaded_and_no_huge_request_is_read(url: str) -> None:
    boundary = 'x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    status, _ = got(url + "gradio_api/upload", f"--{boundary}".encode(), **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 403
    with socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(url).port), timeout=60) as plain:
        plain.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1048577\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 403")


def test_another_address_of_this_machine_is_a_name_of_its_own(run: Path) -> None:
    with chat(run, "--listen", "127.0.0.2") as given:
        address = given.replace("127.0.0.1", "127.0.0.2")
        assert got(address)[0] == 200
        assert got(address, Host="LOCALHOST:7860")[0] == 200
        assert got(address, Host="example.com")[0] == 403


def test_it_answers_to_its_own_name_alone(url: str) -> None:
    """A name that somebody made to lead to this machine is another one."""
    assert got(url, Host="evil.example:80")[0] == 403
    assert got(url)[0] == 200


def join(url: str, config: dict[str, Any], number: int, *settings: Any) -> tuple[str, str]:
    """Sends a message as the page does. Returns (refused | done, what was said)."""
    session = f"s{number}"
    target = next(d for d in config["dependencies"] if d["targets"] and any(t[1] == "submit" for t in d["targets"]))
    data = ["hello", None, "adapter", *(settings or ("", 0, 1, 40))]
    body = json.dumps({"data": data, "fn_index": target["id"], "session_hash": session, "event_data": None, "trigger_id": None}).encode()
    status, text = got(url + "gradio_api/queue/join", body, **{"Content-Type": "application/json"})
    if status != 200:
        return "refused", text
    with urllib.request.urlopen(url + f"gradio_api/queue/data?session_hash={session}", timeout=120) as events:
        for line in events:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if event["msg"] == "process_completed":
                    return ("done" if event["success"] else "failed"), json.dumps(event)
                if event["msg"] in ("queue_full", "unexpected_error"):
                    return "refused", json.dumps(event)
    return "cut off", ""


def test_a_hundred_at_once_are_answered_or_refused_and_the_page_goes_on(talk: Page, url: str) -> None:
    config = json.loads(got(url + "config")[1])
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda number: join(url, config, number), range(100)))
    kinds = {kind: sum(k == kind for k, _ in found) for kind, _ in found}
    assert set(kinds) == {"done", "refused"}, found[0]
    assert 1 <= kinds["done"] <= 100 - 1
    assert all("friend" in text for kind, text in found if kind == "done")
    assert all("queue" in text.lower() for kind, text in found if kind == "refused")
    send(talk, "hello")
    ended(talk)
    assert answers(talk).inner_text().split() == ANSWERS["hello"].split()


@pytest.mark.parametrize(
    "settings",
    [("", 0, 1, 1e9), ("", 0, 1, 0), ("", 1e9, 1, 40), ("", -1, 1, 40), ("", "x", 1, 40), ("", None, 1, 40), ("x" * 99_999, 0, 1, 40)],
)
def test_settings_beyond_the_page_s_own_are_refused(url: str, settings: tuple[Any, ...]) -> None:
    """A program sends what no slider gives."""
    config = json.loads(got(url + "config")[1])
    kind, text = join(url, config, hash(settings[1:]) % 10**9, *settings)
    assert kind == "failed" or "out of their bounds" in text or "shorten it" in text
    assert "friend" not in text


# --- who is let in


def test_others_are_let_in_with_a_password_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run_script("chat.py", run, "--listen", "0.0.0.0", env={"QLORA_CHAT_PASSWORD": ""})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "so it needs a password: set QLORA_CHAT_PASSWORD" in refused.stderr
    for address in ("0.0.0.0", "::", "192.168.0.7", "my.host"):
        monkeypatch.setenv("QLORA_CHAT_PASSWORD", "short")
        with pytest.raises(ValueError, match="take at least 12"):
            password_for(address)
        monkeypatch.delenv("QLORA_CHAT_PASSWORD")
        with pytest.raises(ValueError, match=f"--listen {address} lets other machines in"):
            password_for(address)
    assert [password_for(address) for address in ("127.0.0.1", "localhost", "::1")] == [None] * 3


def test_what_the_command_line_says_reaches_the_server(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, given = script("chat"), []

    def served(*arguments: Any) -> None:
        given.append(arguments[1:])
        raise SystemExit(0)

    monkeypatch.setattr("qlora_suite.chat_server.serve", served)
    monkeypatch.setenv("QLORA_CHAT_PASSWORD", PASSWORD)
    for options in ([], ["--listen", "0.0.0.0", "--port", str(port := free_port())]):
        with pytest.raises(SystemExit):
            chat.run(chat.arguments().parse_intermixed_args([str(run), *options]))
    assert given == [("127.0.0.1", None, PASSWORD), ("0.0.0.0", port, PASSWORD)]


def test_without_the_password_nothing_is_served_and_with_it_everything(page: Page, assistant: Assistant) -> None:
    blocks = chat_page(assistant)
    try:
        port = free_port()
        serve(blocks, "0.0.0.0", port, PASSWORD)
        address = f"http://127.0.0.1:{port}/"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for path in ("config", "gradio_api/queue/data?session_hash=a"):
            assert got(address + path)[0] == 401
        assert got(address + "login", b"username=me&password=wrong", **form)[0] == 400
        assert "step 150" not in got(address)[1]
        page.goto(address)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("wrong wrong wrong")
        page.get_by_role("button", name="Login").click()
        expect(page.locator("body")).to_contain_text(re.compile("incorrect", re.IGNORECASE))
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#message textarea")
        send(page, "hello")
        ended(page)
    finally:
        blocks.close(verbose=False)


def test_it_listens_to_this_machine_alone(url: str) -> None:
    port = urllib.parse.urlsplit(url).port
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    listening = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    mine = [fields[1] for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    assert mine == [f"0100007F:{port:04X}"]
    for address in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)


def test_a_port_that_is_taken_and_an_address_of_another_machine_are_said_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CHAT_PASSWORD", PASSWORD)
    chat = script("chat")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at port {port} of 127.0.0.1: Address already in use"):
            chat.run(chat.arguments().parse_intermixed_args([str(run), "--port", str(port)]))
    with pytest.raises(ValueError, match="--port 99999: a port is a number from 1 to 65535"):
        chat.run(chat.arguments().parse_intermixed_args([str(run), "--port", "99999"]))
    with pytest.raises(ValueError, match=r"cannot listen at 203.0.113.9: .*; give another --port, or an address of this machine"):
        chat.run(chat.arguments().parse_intermixed_args([str(run), "--listen", "203.0.113.9"]))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--terminal", "--port", "80"], "--port is of the page"),
        (["--terminal", "--listen", "127.0.0.1"], "--listen is of the page"),
        (["--seconds", "0"], "--seconds above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens has to be at least 1"),
    ],
)
def test_options_that_cannot_take_effect_are_errors(run: Path, options: list[str], complaint: str) -> None:
    chat = script("chat")
    with pytest.raises(ValueError, match=complaint):
        chat.check(chat.arguments().parse_intermixed_args([str(run), *options]))


def test_a_history_is_a_number_or_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse = lambda text: script("chat").arguments().parse_intermixed_args([str(run), "--history", text]).history  # noqa: E731
    assert (parse("0"), parse("3"), parse("all")) == (0, 3, None)
    with pytest.raises(SystemExit):
        parse("some")
    assert "neither a number of exchanges nor all" in capsys.readouterr().err
