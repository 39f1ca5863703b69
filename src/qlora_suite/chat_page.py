"""The chat page: streamed answers, the adapter and its base side by side, each with a history of its own.

    page = chat_page(assistant)
    serve(page, ...)                        # chat_server.py: on this machine alone, and with what that takes

Conversations are kept by the server, by session; what a browser shows is never read back. Model and messages are shown as Markdown
without HTML (safe_markdown.py).
"""

import html
import math
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from qlora_suite.assistant import Assistant, headline_of
from qlora_suite.files import read_json
from qlora_suite.history import Exchange, asked
from qlora_suite.report import headline
from qlora_suite.safe_markdown import safe_markdown
from qlora_suite.sampling import Sampling
from qlora_suite.streaming import Limits, Piece, in_words, stream

CHARACTERS_PER_TOKEN = 16
"""A message with more than that for every token of the window is refused unread."""
PAUSE = 0.05
"""Seconds between two looks at an answer: what is sent oftener nobody sees, and it slows the model down."""
BOTH = "both, side by side"

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container > main { width: 100% !important; }
.chat .placeholder-content { padding: 0 1.5rem; text-align: center; opacity: .7; }
#title h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
#title p { margin: .15rem 0 0; opacity: .8; font-size: .875rem; overflow-wrap: anywhere; }
.status { min-height: 1.4em; padding: 0 .25rem !important; }
.status p { margin: 0; font-size: .8rem; opacity: .8; font-variant-numeric: tabular-nums; }
#message textarea { font-size: 1rem; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container > main { padding: .25rem !important; }
  .chat { height: 38vh !important; }
}
"""


def look() -> dict[str, Any]:
    """For launch(): the machine's own fonts, so that nothing is fetched."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    return {"theme": gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="md", **fonts), "css": CSS}


def chat_page(
    assistant: Assistant,
    history: int | None = None,
    max_new_tokens: int = 1024,
    seconds: float = 120,
    examples: Sequence[str] | None = None,
    answer: Callable[..., Iterator[Piece]] = stream,
) -> gr.Blocks:
    """`history`: exchanges that a message is asked behind (None: all that fit). `max_new_tokens` and `seconds` bound an answer.

    `examples`: None for the recipe's preview prompts. `answer`: takes what `stream` takes.
    """
    longest = max(1, min(max_new_tokens, assistant.window // 2))
    sides = [assistant.name, *(["base"] if assistant.has_adapter else [])]
    examples = assistant.recipe.previews.prompts if examples is None else examples
    system_prompt = assistant.renderer.chat.system_prompt or ""
    stops: dict[str, threading.Event] = {}
    wiped: set[str] = set()  # sessions whose conversation was cleared while an answer was coming
    """By session, while it is answered."""

    def shown_sides(choice: str) -> list[str]:
        return sides if choice == BOTH else [choice if choice in sides else sides[0]]

    def settings(system: str | None, temperature: float, top_p: float, tokens: float) -> tuple[str | None, Sampling | None, int]:
        """Raises ValueError: what a browser sends need not come from the page's sliders."""
        numbers = (temperature, top_p, tokens)
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) or not (
            1 <= tokens <= longest and 0 <= temperature <= 2
        ):
            raise ValueError(f"the settings are out of their bounds: at most {longest} new tokens and a temperature of 2")
        check_length(system or "")
        sampling = Sampling(temperature, top_p, seed=secrets.randbits(32)) if temperature > 0 else None
        return system if assistant.takes_system and (system or system_prompt) else None, sampling, int(tokens)

    def check_length(text: str) -> None:
        if len(text) > assistant.window * CHARACTERS_PER_TOKEN:
            raise ValueError(f"{len(text):,} characters do not fit into a window of {assistant.window:,} tokens; shorten it")

    def send(
        message: str, talk: dict, choice: str, system: str | None, temperature: float, top_p: float, tokens: float, request: gr.Request
    ) -> Iterator[dict]:
        """Asks the chosen sides, one behind the other, and shows the answers while they are made."""
        message = message.strip() if isinstance(message, str) else ""
        asking = [side for side in shown_sides(choice) if side in sides]
        lines = {side: talk["status"].get(side, "") for side in sides}
        if not message:
            yield shown(talk, lines)
            return
        stop = stops[request.session_hash] = threading.Event()
        complaint = ""
        try:
            check_length(message)
            system, sampling, tokens = settings(system, temperature, top_p, tokens)
            prompts = {side: asked(assistant, talk[side], message, system, history, tokens) for side in asking}
            waiting = dict.fromkeys(asking, "waiting")
            yield {**shown(talk, {**lines, **waiting}, dict.fromkeys(asking, (message, ""))), **running(True), box: ""}
            live: dict[str, tuple[str, str]] = dict.fromkeys(asking, (message, ""))
            for side in asking:
                base = side == "base" and assistant.has_adapter
                last = 0.0
                for piece in answer(assistant, prompts[side].ids, Limits(tokens, seconds), sampling, base, stop):
                    live[side] = (message, piece.text)
                    waiting[side] = status(piece, len(prompts[side].ids), prompts[side].left_out)
                    if piece.ended or time.monotonic() - last >= PAUSE:
                        yield shown(talk, {**lines, **waiting}, live)
                        last = time.monotonic()
                talk = {**talk, side: [*talk[side], Exchange(message, piece.text)], "status": {**talk["status"], side: waiting[side]}}
                del live[side]
        except ValueError as error:
            complaint = str(error)
        except RuntimeError as error:  # the card's memory, for example: the page must not wait for ever
            complaint = f"the model could not answer ({type(error).__name__}); its console says why"
            traceback.print_exc()
        finally:
            stops.pop(request.session_hash, None)
        if request.session_hash in wiped:
            wiped.discard(request.session_hash)
            yield {**shown(empty, {}), **running(False), state: empty}
        elif complaint:
            lines = {side: f"⚠ {plain(complaint)}" if side in asking else text for side, text in lines.items()}
            yield {**shown(talk, lines), **running(False), box: message}
        else:
            yield {**shown(talk, talk["status"]), **running(False), state: talk}

    def stop_answer(request: gr.Request) -> None:
        if stop := stops.get(request.session_hash):
            stop.set()

    def wipe(request: gr.Request) -> dict:
        """Also while an answer comes, which then is the last thing that is wiped."""
        if request.session_hash in stops:
            wiped.add(request.session_hash)
            stop_answer(request)
        return {**shown(empty, {}), state: empty}

    def without_last(talk: dict, choice: str) -> tuple[dict, str]:
        """And the message that it answered. A side that was asked something else last keeps it: the longest one says what was last."""
        asked_last = {side: talk[side][-1].question for side in shown_sides(choice) if talk[side]}
        last = asked_last[max(asked_last, key=lambda side: len(talk[side]))] if asked_last else ""
        for side in (side for side, question in asked_last.items() if question == last):
            talk = {**talk, side: talk[side][:-1], "status": {**talk["status"], side: ""}}
        return talk, last

    def undo(talk: dict, choice: str) -> dict:
        talk, last = without_last(talk, choice)
        return {**shown(talk, talk["status"]), state: talk, box: last}

    def shown(talk: dict, lines: dict[str, str], live: dict[str, tuple[str, str]] | None = None) -> dict:
        """`live`: a question and as much of its answer as there is, by side."""
        found: dict[Any, Any] = {}
        for side in sides:
            pairs = [(e.question, e.answer) for e in talk[side]] + ([live[side]] if live and side in live else [])
            found[chats[side]] = [
                {"role": role, "content": safe_markdown(text) or "&nbsp;"}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            found[statuses[side]] = lines.get(side, "")
        return found

    def running(on: bool) -> dict:
        others = dict.fromkeys((retry, back, clear), gr.update(interactive=not on))
        return {ask: gr.update(visible=not on), halt: gr.update(visible=on), **others}

    empty = {**{side: [] for side in sides}, "status": {}}
    with gr.Blocks(title=f"{assistant.subject.folder.name} · qlora-suite", analytics_enabled=False) as page:
        gr.HTML(title(assistant), elem_id="title")
        state = gr.State(empty, time_to_live=6 * 3600)
        if len(sides) > 1:
            choice = gr.Radio([*sides, BOTH], value=sides[0], label="Who answers", show_label=False, container=False, elem_id="choice")
        else:
            choice = gr.State(sides[0])
        chats, statuses, columns = {}, {}, {}
        with gr.Row(equal_height=True):
            for side in sides:
                with gr.Column(visible=side == sides[0], min_width=300) as columns[side]:
                    chats[side] = gr.Chatbot(
                        label=side,
                        elem_id=f"chat-{side}",
                        elem_classes="chat",
                        height="46vh",
                        placeholder=placeholder(assistant, side),
                        buttons=[],  # its copy button would copy what safe_markdown made
                        feedback_options=None,
                        sanitize_html=True,
                        allow_tags=False,
                        allow_file_downloads=False,
                        latex_delimiters=[],
                    )
                    statuses[side] = gr.Markdown("", elem_id=f"status-{side}", elem_classes="status", sanitize_html=True)
        with gr.Row(equal_height=True):
            box = gr.Textbox(
                placeholder="The beginning of a text" if assistant.renderer.is_plain_text else "Your message",
                show_label=False,
                label="message",
                lines=1,
                max_lines=8,
                max_length=assistant.window * CHARACTERS_PER_TOKEN,
                autofocus=True,
                scale=8,
                elem_id="message",
            )
            ask = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
            halt = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
        with gr.Row():
            retry = gr.Button("Retry", size="sm", min_width=70, elem_id="retry")
            back = gr.Button("Undo", size="sm", min_width=70, elem_id="undo")
            clear = gr.Button("Clear", size="sm", min_width=70, elem_id="clear")
        if examples:
            samples = gr.Dataset(components=[box], samples=[[text] for text in examples], label="Examples", elem_id="examples")
            samples.click(lambda sample: sample[0], samples, box, queue=False, api_visibility="private")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            system = gr.Textbox(system_prompt, label="System prompt", lines=2, visible=assistant.takes_system, elem_id="system")
            with gr.Row():
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: greedy", elem_id="temperature")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="with a temperature", interactive=False)
                tokens = gr.Slider(1, longest, min(256, longest), step=1, label="New tokens", info="the longest answer", elem_id="tokens")

        inputs = [box, state, choice, system, temperature, top_p, tokens]
        outputs = [box, state, *chats.values(), *statuses.values(), ask, halt, retry, back, clear]
        model = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([box.submit, ask.click], send, inputs, outputs, trigger_mode="once", **model)
        halt.click(stop_answer, None, None, **quick)
        page.unload(stop_answer)
        drawn = [box, state, *chats.values(), *statuses.values()]
        back.click(undo, [state, choice], drawn, **quick)
        retry.click(undo, [state, choice], drawn, **quick).then(send, inputs, outputs, **model)
        gr.on([clear.click, *(chat.clear for chat in chats.values())], wipe, None, drawn, **quick)
        temperature.change(lambda t: gr.update(interactive=t > 0), temperature, top_p, **quick)
        if len(sides) > 1:
            shows = lambda chosen: [gr.update(visible=side in shown_sides(chosen)) for side in sides]  # noqa: E731
            choice.change(shows, choice, list(columns.values()), **quick)
    return page


def placeholder(assistant: Assistant, side: str) -> str:
    """In a chat where nothing was asked."""
    if side == "base" and assistant.has_adapter:
        return f"The same weights without the adapter, asked in the chat format that it learnt ({assistant.subject.format})."
    return f"Ask the {side} something."


def status(piece: Piece, prompt_tokens: int, left_out: int) -> str:
    """Under an answer: 22 tokens · 31.4 tokens/s · stopped by itself · prompt 45 tokens · 2 earlier exchanges left out"""
    parts = [f"{piece.num_tokens:,} tokens", f"{piece.tokens_per_second:.1f} tokens/s"]
    parts += [in_words(piece.ended)] if piece.ended else []
    parts += [f"prompt {prompt_tokens:,} tokens"]
    parts += [f"{left_out} earlier exchange{'s'[: left_out > 1]} left out"] if left_out else []
    return " · ".join(parts)


def title(assistant: Assistant) -> str:
    """Who answers and, for a run that was evaluated, how well."""
    about = assistant.about(base=False)
    name = about["adapter"] or about["model"] or about["run"] or about["base"]
    what = [headline_of(about).removeprefix(f"{name}, "), f"window {assistant.window:,} tokens"]
    report = assistant.subject.folder / f"{assistant.subject.report}.json"
    lines = [", ".join(what), *([headline(read_json(report))] if report.is_file() else [])]
    return f"<h1>{html.escape(name)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def plain(text: str) -> str:
    """A sentence in a line of Markdown, every mark of which is shown."""
    return "".join(f"&#{ord(c)};" if c in r"\`*_{}[]()<>#+-!|~&" else c for c in text)
