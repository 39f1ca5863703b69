"""The chat in a terminal: answers as they come, the adapter or its base, one history for each."""

import contextlib
import secrets
import select
import sys
from dataclasses import dataclass, field

from qlora_suite.assistant import Assistant, headline_of
from qlora_suite.history import Exchange, asked
from qlora_suite.prompts import check_system
from qlora_suite.sampling import Sampling
from qlora_suite.streaming import Limits, in_words, stream
from qlora_suite.terminal_text import printable
from qlora_suite.tracking import console, say

HELP = """\
/base  /adapter     who answers from now on; each has its own history
/system TEXT        a system prompt (without TEXT: none)
/temperature T      0 is greedy
/again              the last message once more
/clear              forget the conversation
/quit               or Ctrl-D; Ctrl-C stops an answer"""


@dataclass
class Talk:
    """What the commands change."""

    base: bool = False
    system: str | None = None
    temperature: float = 0.0
    exchanges: dict[bool, list[Exchange]] = field(default_factory=lambda: {False: [], True: []})
    """By who answered: the base or not."""


def talk(assistant: Assistant, history: int | None, max_new_tokens: int, seconds: float) -> None:
    """Until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history, keys to edit with, and takes a paste of several lines as one)
    say(f"{headline_of(assistant.about(base=False))}; /help names the commands")
    state = Talk()
    limits = Limits(max(1, min(max_new_tokens, assistant.window // 2)), seconds)
    while True:
        try:
            message = read("base> " if state.base else "you> ").rstrip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D leaves)")
            continue
        if message == "/quit":
            return
        try:
            if message.startswith("/"):
                message = command(assistant, state, message)
            if message.strip():
                reply(assistant, state, message.strip(), history, limits)
        except ValueError as error:
            say(f"error: {error}")


def read(prompt: str) -> str:
    """A message: a line, or the lines that were pasted at once."""
    lines = [input(prompt if sys.stdin.isatty() else "")]
    while sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
        lines.append(input(""))
    return "\n".join(lines)


def command(assistant: Assistant, state: Talk, message: str) -> str:
    """Does what it says. Returns a message to be answered, or "". Raises ValueError for what is not possible."""
    name, _, rest = message.partition(" ")
    mine = state.exchanges[state.base]
    if name == "/help":
        say(HELP)
    elif name == "/base":
        assistant.check_base()
        state.base = True
        say("the base answers from now on")
    elif name in ("/adapter", "/model"):
        if assistant.name != name[1:]:
            raise ValueError(f"there is no {name[1:]} here; {assistant.name} answers")
        state.base = False
        say(f"the {assistant.name} answers from now on")
    elif name == "/system":
        check_system(assistant)
        state.system = rest or None
        say("the system prompt is set" if rest else "there is no system prompt")
    elif name == "/temperature":
        if not rest.replace(".", "", 1).isdigit() or float(rest) > 2:
            raise ValueError("/temperature takes a number from 0 (greedy) to 2")
        state.temperature = float(rest)
    elif name == "/clear":
        state.exchanges = {False: [], True: []}
        say("forgotten")
    elif name == "/again":
        if not mine:
            raise ValueError("there is no message to answer again")
        return mine.pop().question
    else:
        raise ValueError(f"{name} is no command; /help names them (a message that begins with / goes behind a space)")
    return ""


def reply(assistant: Assistant, state: Talk, message: str, history: int | None, limits: Limits) -> None:
    """Shows the answer while it is made, and remembers it. Ctrl-C stops it."""
    mine = state.exchanges[state.base]
    found = asked(assistant, mine, message, state.system, history, limits.max_new_tokens)
    sampling = Sampling(state.temperature, seed=secrets.randbits(32)) if state.temperature else None
    text, last = "", None
    pieces = stream(assistant, found.ids, limits, sampling, state.base)
    try:
        for last in pieces:
            console.out(printable(last.text[len(text) :]), end="", highlight=False)
            text = last.text
    except KeyboardInterrupt:
        pieces.close()
    ended = in_words(last.ended or "stopped") if last else in_words("stopped")
    notes = [f"{last.num_tokens} tokens", f"{last.tokens_per_second:.1f} tokens/s"] if last else []
    notes += [ended, f"prompt {len(found.ids)} tokens"]
    notes += [f"{found.left_out} earlier exchange{'s'[: found.left_out > 1]} left out"] if found.left_out else []
    console.print(f"{'' if text else '(nothing)'}\n  ({', '.join(notes)})\n", style="dim", markup=False)
    mine.append(Exchange(message, text))
