"""How every script reads its arguments and reports a person's mistake: one clear sentence, no traceback, and never a token."""

import argparse
import contextlib
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from qlora_suite.leaks import redacted, refuse_tokens
from qlora_suite.recipe_file import load
from qlora_suite.watchdog import LostPeerError, explain_lost_peers


def read_arguments(parser: argparse.ArgumentParser, look: Callable[[argparse.Namespace], None] | None = None) -> argparse.Namespace:
    """The command line. A script calls this before it imports torch and the rest, so that --help and a mistake cost no seconds.

    `look` looks closer at the arguments and raises ValueError for a person's mistake. From here on, while the libraries are imported,
    Ctrl-C ends the script at once; `with_clear_errors` makes it a KeyboardInterrupt again.
    """
    args = parser.parse_intermixed_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _end_before_it_begins)
    if look is not None:
        with _in_a_sentence(args.debug):
            look(args)
    gc.disable()  # until the libraries are imported: they make a million objects, all of which stay
    return args


def read_recipe(args: argparse.Namespace) -> None:
    """`args.recipe`, a path, becomes the recipe with `args.overrides`. Raises ValueError with every complaint."""
    args.recipe = load(args.recipe, args.overrides)


def check_recipe(target: Path, overrides: list[str]) -> None:
    """Raises ValueError with every complaint, if the target is a recipe (and no run's folder)."""
    if target.is_file() or (target.suffix in (".yaml", ".yml") and not target.exists()):
        load(target, overrides)


def parser_for(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with --debug.

    A token among the arguments ends the script here, for argparse repeats what it does not know.
    """
    try:
        refuse_tokens(sys.argv[1:])
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def with_clear_errors(run: Callable[[], None], debug: bool, interrupted: str = "the same command goes on from the last checkpoint") -> None:
    """Call `run`. A person's mistake (ValueError) or the machine's refusal (OSError: disk full, not allowed) goes to stderr in a
    sentence, and the exit code is 2; with --debug the traceback is shown, as it is for every other error (exit code 1). No token is in
    either. `interrupted`: what Ctrl-C has left.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _end_before_it_begins:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _in_a_sentence(debug):
            quiet_libraries()
            if not gc.isenabled():
                gc.freeze()  # neither a later collection nor the end of the process walks through what was imported
                gc.enable()
            with explain_lost_peers():
                run()
            torch = sys.modules.get("torch")
            if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {interrupted}\n")
        sys.exit(130)


@contextlib.contextmanager
def _in_a_sentence(debug: bool) -> Iterator[None]:
    """A mistake is one; what nobody expected is a traceback, without tokens."""
    try:
        yield
    except (ValueError, OSError, LostPeerError) as error:
        if debug:
            _show_traceback()
        sys.stderr.write(f"error: {redacted(str(error))} (--debug shows where)\n")
        sys.exit(2)
    except Exception:
        _show_traceback()


def _end_before_it_begins(*_: object) -> NoReturn:
    """Not by an exception: a library that is half imported may take it for its own."""
    os.write(2, b"interrupted before it began; the same command starts again\n")
    os._exit(130)


def _show_traceback() -> NoReturn:
    """Of the error that is being handled. Not Python's own, which repeats a token that a library has put into its message."""
    sys.stderr.write(redacted(traceback.format_exc()))
    sys.exit(1)


def quiet_libraries() -> None:
    """Silence what libraries say that is no news to a person who runs these scripts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for module in ("transformers", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
