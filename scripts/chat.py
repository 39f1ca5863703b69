#!/usr/bin/env python
"""Talk to a run: a page in the browser, or the terminal.

    python scripts/chat.py runs/quickstart                      http://127.0.0.1:7860, reached from this machine alone
    python scripts/chat.py runs/quickstart --terminal
    python scripts/chat.py runs/quickstart --history 1          each message behind the last exchange alone
    python scripts/chat.py recipes/phi2_oasst1.yaml --adapter someone/phi-2-lora --format human_assistant
    QLORA_CHAT_PASSWORD=... python scripts/chat.py runs/quickstart --listen 0.0.0.0

The page shows answers while they are made, and the adapter beside its base. Other machines are let in by --listen ADDRESS alone, and
with a password from the environment; the connection is not encrypted, so over an open network prefer
`ssh -L 7860:127.0.0.1:7860 HOST`. The terminal knows /base, /adapter, /system, /clear, /again and /quit; Ctrl-C stops an answer.
"""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from qlora_suite.command_line import check_recipe, parser_for, read_arguments, with_clear_errors
from qlora_suite.recipe import Chat


def check(args: Namespace) -> None:
    """Raises ValueError for options that cannot take effect, or make no sense."""
    for name in ("listen", "port"):
        if args.terminal and getattr(args, name) is not None:
            raise ValueError(f"--{name} is of the page, and --terminal has none; leave one of them out")
    if args.max_new_tokens < 1 or not args.seconds > 0:
        raise ValueError("--max-new-tokens has to be at least 1, and --seconds above 0")
    check_recipe(args.target, args.overrides)


def history(text: str) -> int | None:
    """A number of exchanges, or all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise ArgumentTypeError(f"{text!r} is neither a number of exchanges nor all")
    return int(text)


def arguments() -> ArgumentParser:
    parser = parser_for(__doc__)
    parser.add_argument("target", type=Path, help="a run's folder or a recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--adapter", metavar="PATH", help="a PEFT adapter (folder or hub id[@revision]) to put on the recipe's base")
    parser.add_argument("--model", metavar="PATH", help="a full model (folder or hub id) instead of the recipe's base")
    parser.add_argument("--format", choices=Chat.model_fields["format"].annotation.__args__, help="chat format of --adapter or --model")
    parser.add_argument("--terminal", action="store_true", help="talk here instead of in a browser")
    parser.add_argument("--history", type=history, metavar="TURNS|all", help="exchanges a message is asked behind (default: all that fit)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="most that an answer may have (default: 1024)")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="most that an answer may take (default: 120)")
    parser.add_argument("--listen", metavar="ADDRESS", help="let other machines in at this address of this one; needs a password")
    parser.add_argument("--port", type=int, metavar="PORT", help="default: the first free one from 7860")
    return parser


if __name__ == "__main__":  # before the imports that take seconds
    args = read_arguments(arguments(), check)

import os

from qlora_suite.assistant import load
from qlora_suite.chat_access import check_place, password_for
from qlora_suite.engine import start as start_engine
from qlora_suite.subject import subject_of
from qlora_suite.tracking import say


def run(args: Namespace) -> None:
    address = args.listen or "127.0.0.1"
    password = None
    if not args.terminal:
        password = password_for(address)
        check_place(address, args.port)
    accelerator, dtype = start_engine()
    if accelerator.num_processes > 1:
        raise ValueError("one process answers here; run it without accelerate launch")
    subject = subject_of(args.target, args.overrides, args.adapter, args.model, args.format)
    assistant = load(subject, accelerator.device, dtype)
    if args.history is not None and assistant.renderer.is_plain_text:
        raise ValueError("chat format text has no turns, so there is no history to choose; leave --history out")
    if args.terminal:
        from qlora_suite.chat_terminal import talk

        talk(assistant, args.history, args.max_new_tokens, args.seconds)
        return
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from qlora_suite.chat_page import chat_page  # Gradio takes seconds to import
    from qlora_suite.chat_server import serve

    page = chat_page(assistant, args.history, args.max_new_tokens, args.seconds)
    url = serve(page, address, args.port, password)
    say(f"{url} shows {args.target}; Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    with_clear_errors(lambda: run(args), debug=args.debug)
