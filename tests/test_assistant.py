"""A finished run that is asked: what it is given of a conversation, and the chat in a terminal."""
# ruff: noqa: F811 (fixtures are imported)

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from talking import ANSWERS, EMOJI, LONG, assistant, run  # noqa: F401

from qlora_suite import history
from qlora_suite.assistant import Assistant, load
from qlora_suite.conversations import Turn
from qlora_suite.history import Exchange, asked
from qlora_suite.prompts import check_system, prompts_of, rows_of
from qlora_suite.safe_markdown import safe_markdown
from qlora_suite.streaming import Limits, stream
from qlora_suite.subject import subject_of

# --- the history


def exchanges(count: int) -> list[Exchange]:
    return [Exchange(f"question {n}", f"answer {n} " * 6) for n in range(count)]


def ids_of(assistant: Assistant, kept: list[Exchange], question: str) -> list[int]:
    turns = [Turn(role, text) for e in kept for role, text in (("user", e.question), ("assistant", e.answer))]
    return assistant.renderer.prompt([*turns, Turn("user", question)])


@pytest.mark.parametrize("max_new_tokens", [10, 60, 1000])
def test_as_many_of_the_last_exchanges_as_fit_are_kept_whole(assistant: Assistant, max_new_tokens: int) -> None:
    """One more would leave the answer less than it may have (or a quarter of the window)."""
    before = exchanges(30)
    found = asked(assistant, before, "and now?", None, None, max_new_tokens)
    kept = before[found.left_out :]
    assert 0 < len(kept) < 30
    assert found.ids == ids_of(assistant, kept, "and now?")
    room = min(max_new_tokens, 64)
    assert len(found.ids) + room <= assistant.window
    assert len(ids_of(assistant, before[found.left_out - 1 :], "and now?")) + room > assistant.window


@pytest.mark.parametrize(("most", "left_out"), [(0, 3), (1, 2), (3, 0), (9, 0), (None, 0)])
def test_no_more_exchanges_are_kept_than_asked_for(assistant: Assistant, most: int | None, left_out: int) -> None:
    """1 is the seeds' app: the last pair and the new message."""
    before = exchanges(3)
    found = asked(assistant, before, "and now?", None, most, 10)
    assert found.left_out == left_out
    assert found.ids == ids_of(assistant, before[left_out:], "and now?")


def test_a_message_that_is_longer_than_the_window_is_refused_with_the_numbers(assistant: Assistant) -> None:
    long = "word " * 300
    tokens = len(ids_of(assistant, [], long))
    with pytest.raises(ValueError, match=f"the prompt has {tokens:,} tokens, and prompt and answer share a window of 256"):
        asked(assistant, exchanges(2), long, None, None, 10)


def test_a_text_model_has_no_history_and_goes_on_from_each_text(tiny_base: Path, run: Path) -> None:
    text = load(subject_of(run / "recipe.yaml", ["chat.format=text", "chat.loss_on=null"]), torch.device("cpu"), torch.float32)
    found = asked(text, exchanges(2), "Once upon", None, None, 10)
    assert found.left_out == 2
    assert found.ids == text.renderer.prompt([Turn("user", "Once upon")])
    assert next(iter(stream(text, found.ids, Limits(3)))).num_tokens >= 1


# --- the system prompt


@pytest.mark.parametrize(("chat", "place"), [("llama2", True), ("chatml", True), ("oasst", False), ("human_assistant", False)])
def test_a_system_prompt_is_taken_where_the_format_has_a_place(tiny_base: Path, run: Path, chat: str, place: bool) -> None:
    overrides = [f"chat.format={'human_assistant' if chat == 'chatml' else chat}"]
    found = load(subject_of(run / "recipe.yaml", overrides), torch.device("cpu"), torch.float32)
    if chat == "chatml":  # the tiny base has no such tokens: a base that has learnt them is asked through its run
        from qlora_suite.chat import Renderer
        from qlora_suite.recipe import Chat
        from qlora_suite.role_markers import add_role_markers

        tokenizer = found.renderer.tokenizer
        markers = add_role_markers(tokenizer, 1040, Chat(format="chatml"))
        object.__setattr__(found, "renderer", Renderer(tokenizer, Chat(format="chatml"), markers))
    assert found.takes_system == place
    rows = rows_of([("prompt 1", "hello")])
    if not place:
        with pytest.raises(ValueError, match=f"chat format {chat} has no place for a system prompt"):
            check_system(found)
        return
    text = found.renderer.tokenizer.decode(prompts_of(found, rows, "Be kind.")[0].ids)
    assert text.index("Be kind.") < text.index("hello")
    assert asked(found, [], "hello", "Be kind.", None, 10).ids == prompts_of(found, rows, "Be kind.")[0].ids
    given = [("line 7", {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]})]
    with pytest.raises(ValueError, match="line 7: it has a system message already"):
        prompts_of(found, given, "Be kind.")


# --- what is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b & c > d", "<p>a &lt; b &amp; c &gt; d</p>"),
        ("`a < b` <i>", "<p><code>a &lt; b</code> &lt;i&gt;</p>"),
        ("\\`<b>x</b>\\`", "<p>`&lt;b&gt;x&lt;/b&gt;`</p>"),  # escaped backticks are none
        ("``x < y``", "<p><code>x &lt; y</code></p>"),
        ("    x < y", "<pre><code>x &lt; y&#10;</code></pre>"),
        ("- a\n  ```\n\n<b>x</b>", "<ul>\n<li>a<pre><code>&#10;</code></pre>\n</li>\n</ul>\n<p>&lt;b&gt;x&lt;/b&gt;</p>"),
        ("```\r\nx\r\n```\r\n<img src=x>", "<pre><code>x&#10;</code></pre>\n<p>&lt;img src=x&gt;</p>"),
        ("```\na\n\n<b> never closed", "<pre><code>a&#10;&#10;&lt;b&gt; never closed</code></pre>"),
        ("![p](http://x/y.png)", '<p>!<a href="http://x/y.png">p</a></p>'),
        ("[l](javascript:x) <http://x>", '<p>[l](javascript:x) <a href="http://x">http://x</a></p>'),
        ("**b**\n- 1\n# h", "<p><strong>b</strong></p>\n<ul>\n<li>1</li>\n</ul>\n<h1>h</h1>"),
        ("a\nb\n\nc", "<p>a<br />\nb</p>\n<p>c</p>"),
    ],
)
def test_markdown_stays_and_html_and_pictures_are_shown_as_text(text: str, shown: str) -> None:
    assert safe_markdown(text) == f"<div>{shown}</div>"


@given(
    st.lists(
        st.sampled_from(
            ["<b>", "</div>", "`", "```", "~~~", "\n", "\n\n", "    ", "- ", "> ", "\r\n", "\\", "&lt;", "![", "](x)", "|", "x"]
        )
    )
)
def test_no_text_brings_html_of_its_own_or_a_blank_line(parts: list[str]) -> None:
    made = safe_markdown("".join(parts))
    assert not re.search(r"<(b|img)\b", made)
    assert made.count("</div>") == made.count("<div>") <= 1
    assert "\n\n" not in made


# --- the terminal


class Terminal:
    """scripts/chat.py --terminal on a terminal of its own."""

    def __init__(self, run: Path, *options: str) -> None:
        script = str(ROOT / "scripts" / "chat.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
        self.pid, self.fd = pty.fork()  # a terminal of its own, so that Ctrl-C typed there reaches it alone
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, script, str(run), "--terminal", *options], environment)
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.fd, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to there; a hang guard."""
        deadline, data = time.monotonic() + seconds, b""
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, f"waited for {pattern!r}, saw {self.seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                data += os.read(self.fd, 65536)
                self.seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", data.decode(errors="replace"))
        return self.seen


@pytest.fixture(scope="module")
def terminal(run: Path) -> Iterator[Terminal]:
    found = Terminal(run, "--max-new-tokens", "120")
    try:
        found.until(r"you> ")
        yield found
    finally:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(found.pid, os.WNOHANG) == (0, 0):
                os.kill(found.pid, signal.SIGKILL)
                os.waitpid(found.pid, 0)
        os.close(found.fd)


def test_a_person_talks_in_a_terminal(terminal: Terminal, assistant: Assistant) -> None:
    """Answers, history, the base with a history of its own, a paste of several lines, Ctrl-C, commands, the end."""

    def said(text: str) -> str:
        terminal.type(text + "\r")
        return terminal.until(r"prompt [\d,]+ tokens.*\)\n\n(you|base)> ")

    found = said("emoji")
    assert f"{EMOJI}\n  (" in found
    assert "stopped by itself, prompt 6 tokens" in found or f"prompt {len(ids_of(assistant, [], 'emoji'))} tokens" in found
    followed = len(ids_of(assistant, [Exchange("emoji", EMOJI)], "hello"))
    assert f"prompt {followed} tokens" in said("hello")

    terminal.type("/base\r")
    terminal.until("the base answers from now on\nbase> ")
    assert f"prompt {len(ids_of(assistant, [], 'hello'))} tokens" in said("hello")
    terminal.type("/adapter\r")
    terminal.until("the adapter answers from now on\nyou> ")

    terminal.type("/clear\r")
    terminal.until("forgotten\nyou> ")
    pasted = "one\ntwo\nthree"
    terminal.type(f"\x1b[200~{pasted}\x1b[201~\r")
    found = terminal.until(r"prompt [\d,]+ tokens.*\)\n\nyou> ")
    assert f"prompt {len(ids_of(assistant, [], pasted))} tokens" in found

    for text, complaint in (
        ("/foo", "/foo is no command"),
        ("/system Be kind.", "no place for a system prompt"),
        ("/model", "no model here"),
    ):
        terminal.type(text + "\r")
        terminal.until(f"error: .*{complaint}.*\nyou> ")
    for seconds in (10, 10, 60):  # the prompt is shown a moment before the terminal listens: a person presses again
        terminal.type("\x03")
        with contextlib.suppress(AssertionError if seconds == 10 else ()):
            terminal.until(r"\(/quit or Ctrl-D leaves\)\nyou> ", seconds)
            break
    terminal.type("/quit\r")
    assert os.waitpid(terminal.pid, 0)[1] == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interrupt comes while the third piece is shown; what was said until then is remembered."""
    from qlora_suite import chat_terminal

    messages = iter(["count", "hello", "/quit"])
    monkeypatch.setattr(chat_terminal, "read", lambda _: next(messages))
    shown = []

    def out(text: str, **_: object) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_terminal.console, "out", out)
    given = []
    monkeypatch.setattr(chat_terminal, "asked", lambda *a: given.append(list(a[1])) or history.asked(*a))
    chat_terminal.talk(assistant, None, 120, 60)
    assert "was stopped" in capsys.readouterr().out
    assert not assistant.lock.locked()
    (stopped,) = given[1]
    assert stopped.question == "count"
    assert stopped.answer
    assert LONG.startswith(stopped.answer)
    assert len(stopped.answer) < len(LONG)
    assert "".join(shown[3:]) != ANSWERS["count"]
