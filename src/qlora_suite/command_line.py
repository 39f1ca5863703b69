"""How every script reads its arguments and reports a person's mistake: one clear sentence, no traceback, and never a token."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch.distributed

from qlora_suite.leaks import redacted, refuse_tokens
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.watchdog import LostPeerError, exit_at_once_on_errors, explain_lost_peers


def main(run: Callable[[Recipe], None], doc: str) -> None:
    """Run a script that takes a recipe and overrides."""
    parser = parser_for(doc)
    parser.add_argument("recipe", help="a recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.learning_rate=1e-4")
    args = parser.parse_intermixed_args()
    with exit_at_once_on_errors():
        with_clear_errors(lambda: run(load(args.recipe, args.overrides)), debug=args.debug)


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
    quiet_libraries()
    try:
        with explain_lost_peers():
            run()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (ValueError, OSError, LostPeerError) as error:
        if debug:
            _show_traceback()
        sys.stderr.write(f"error: {redacted(str(error))} (--debug shows where)\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {interrupted}\n")
        sys.exit(130)
    except Exception:
        _show_traceback()


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
