#!/usr/bin/env python
"""Ask a run, a base or another adapter: prompts in the format it was trained in, and the answers up to where they stop.

    python scripts/generate.py runs/quickstart "Who are you?" "How do I make pancakes?"
    python scripts/generate.py runs/quickstart --base "Who are you?"                 the same weights without the adapter
    python scripts/generate.py runs/quickstart --file prompts.txt --jsonl answers.jsonl
    python scripts/generate.py runs/quickstart --stream --temperature 0.7 --top-p 0.9 --seed 1 "Tell me a story."
    python scripts/generate.py recipes/phi2_oasst1.yaml --adapter someone/phi-2-lora --format human_assistant "Who are you?"
    echo "Who are you?" | python scripts/generate.py runs/quickstart

A file has a prompt a line; one that ends in .jsonl has {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]} a
line. A pipe is read by lines. Answers are greedy, or drawn with --temperature: the same seed then gives a prompt the same answer,
whatever is asked beside it. --jsonl writes a record for each answer; the same command again goes on where it was stopped.
"""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from qlora_suite.command_line import check_recipe, parser_for, read_arguments, with_clear_errors
from qlora_suite.recipe import Chat, Recipe

BATCH = 8


def told_apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Overrides of the recipe, which begin as one of its keys does, and prompts."""
    sections = "|".join(Recipe.model_fields)
    overrides = [word for word in words if re.match(rf"({sections})\.[a-z_.]+=", word)]
    return overrides, [word for word in words if word not in overrides]


def check(args: Namespace) -> None:
    if args.stream and args.jsonl:
        raise ValueError("--stream shows answers as they come, --jsonl writes them; give one of the two")
    if args.stream and args.batch_size is not None:
        raise ValueError("--stream makes one answer after the other, so --batch-size has no effect; leave one of them out")
    for name in ("batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} has to be at least 1, not {value}")
    check_recipe(args.target, told_apart(args.words)[0])


def arguments() -> ArgumentParser:
    parser = parser_for(__doc__)
    parser.add_argument("target", type=Path, help="a run's folder or a recipe's YAML file")
    parser.add_argument("words", nargs="*", metavar="prompt", help="what to ask; words like data.max_length=512 override the recipe")
    parser.add_argument("--file", type=Path, metavar="PROMPTS", help="a prompt a line, or .jsonl")
    parser.add_argument("--base", action="store_true", help="take the run's adapter off and ask its base")
    parser.add_argument("--adapter", metavar="PATH", help="a PEFT adapter (folder or hub id[@revision]) to put on the recipe's base")
    parser.add_argument("--model", metavar="PATH", help="a full model (folder or hub id) instead of the recipe's base")
    parser.add_argument("--format", choices=Chat.model_fields["format"].annotation.__args__, help="chat format of --adapter or --model")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, where the format has a place for one")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw the answers instead of taking the likeliest token each time")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold this share (default: all)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, metavar="S", help="of what is drawn (default: 0)")
    parser.add_argument("--stream", action="store_true", help="show each answer while it is made, one prompt at a time")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"prompts answered together (default: {BATCH})")
    parser.add_argument("--jsonl", type=Path, metavar="OUT", help="write a record an answer; an unfinished file is gone on with")
    return parser


if __name__ == "__main__":  # before the imports that take seconds
    args = read_arguments(arguments(), check)

import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict

import torch

from qlora_suite.answer_file import AnswerFile
from qlora_suite.assistant import Assistant, headline_of, load
from qlora_suite.engine import autocast
from qlora_suite.engine import start as start_engine
from qlora_suite.generation import Answer, answer_of, decode
from qlora_suite.prompts import Prompt, Row, prompts_of, room_for, rows_in, rows_of
from qlora_suite.sampling import Draw, Sampling
from qlora_suite.streaming import Limits, in_words, stream
from qlora_suite.subject import subject_of
from qlora_suite.terminal_text import printable
from qlora_suite.tracking import StepBar, console, say


def run(args: Namespace) -> None:
    sampling = sampling_of(args)
    overrides, words = told_apart(args.words)
    rows = asked(args, words)
    accelerator, dtype = start_engine()
    if accelerator.num_processes > 1:
        raise ValueError("one process answers here; run it without accelerate launch")
    assistant = load(subject_of(args.target, overrides, args.adapter, args.model, args.format), accelerator.device, dtype)
    if args.base:
        assistant.check_base()
    about = assistant.about(args.base)
    prompts = prompts_of(assistant, rows, args.system)
    settings = {"max_new_tokens": args.max_new_tokens, "sampling": asdict(sampling) if sampling else None}
    file = AnswerFile(args.jsonl, prompts, about, settings) if args.jsonl else None
    how = f"drawn at temperature {sampling.temperature:g}, seed {sampling.seed}" if sampling else "greedy"
    say(f"{headline_of(about)}; {how}, at most {args.max_new_tokens:,} new tokens")
    if file:
        write_answers(assistant, prompts, args, sampling, file)
        return
    with suppress(KeyboardInterrupt):  # there is nothing to go on with
        show_answers(assistant, prompts, args, sampling)


def show_answers(assistant: Assistant, prompts: list[Prompt], args: Namespace, sampling: Sampling | None) -> None:
    """On the console, as they come with --stream, else batch by batch."""
    if args.stream:
        for prompt in prompts:
            show_stream(assistant, prompt, args, sampling)
        return
    earlier: Counter = Counter()
    for begin in range(0, len(prompts), args.batch_size or BATCH):
        batch, began = prompts[begin : begin + (args.batch_size or BATCH)], time.monotonic()
        answers = answer_batch(assistant, batch, args, sampling, earlier)
        seconds = time.monotonic() - began
        for prompt, found in zip(batch, answers, strict=True):
            say(f"\n> {printable(prompt.question)}\n{printable(found.text) or '(nothing)'}")
            room = room_for(assistant, prompt.ids, args.max_new_tokens)
            ended = "by itself" if found.stopped else "tokens" if room == args.max_new_tokens else "window"
            say(f"  ({found.num_tokens} tokens, {in_words(ended)})")
        tokens = sum(found.num_tokens for found in answers)
    say(f"\n{len(prompts)} answer{'s'[: len(prompts) > 1]}; the last batch: {tokens / seconds:.1f} tokens/s")


def show_stream(assistant: Assistant, prompt: Prompt, args: Namespace, sampling: Sampling | None) -> None:
    say(f"\n> {printable(prompt.question)}")
    shown = 0
    for piece in stream(assistant, prompt.ids, Limits(args.max_new_tokens), sampling, args.base):
        console.out(printable(piece.text[shown:]), end="", highlight=False)
        shown = len(piece.text)
        last = piece
    say(f"{'' if shown else '(nothing)'}\n  ({last.num_tokens} tokens, {in_words(last.ended)}, {last.tokens_per_second:.1f} tokens/s)")


def write_answers(assistant: Assistant, prompts: list[Prompt], args: Namespace, sampling: Sampling | None, file: AnswerFile) -> None:
    """To the file, under a bar; what is there already is not asked again."""
    done = len(file.records)
    if done:
        say(f"{file.path} has {done} of {len(prompts)} answers already")
    earlier: Counter = Counter()
    if sampling:
        sampling.generators([prompt.ids for prompt in prompts[:done]], earlier)  # so that a prompt asked again is drawn anew
    with StepBar("answering", len(prompts), done) as bar:
        try:
            for begin in range(done, len(prompts), args.batch_size or BATCH):
                batch, began = prompts[begin : begin + (args.batch_size or BATCH)], time.monotonic()
                answers = answer_batch(assistant, batch, args, sampling, earlier)
                seconds = time.monotonic() - began
                file.add(answers, seconds)
                bar.advance(len(file.records), f"{sum(found.num_tokens for found in answers) / seconds:.0f} tokens/s")
        except KeyboardInterrupt:
            say(f"stopped; {file.path} has {len(file.records)} of {len(prompts)} answers, and the same command goes on")
            raise SystemExit(128 + signal.SIGINT) from None
    ended = sum(record["stopped"] for record in file.records)
    say(f"wrote {file.path}: {len(prompts)} answers, {ended} of which ended by themselves")


def answer_batch(assistant: Assistant, batch: list[Prompt], args: Namespace, sampling: Sampling | None, earlier: Counter) -> list[Answer]:
    ids = [prompt.ids for prompt in batch]
    rooms = [room_for(assistant, prompt, args.max_new_tokens) for prompt in ids]
    draw = Draw(sampling, sampling.generators(ids, earlier)) if sampling else None
    try:
        with assistant.answering(args.base), autocast(assistant.device, assistant.dtype):
            found = decode(assistant.net, ids, assistant.renderer.stop_token_ids, rooms, draw=draw)
    except torch.OutOfMemoryError:
        raise ValueError(f"{len(batch)} prompts at once need more memory than there is; use a smaller --batch-size") from None
    return [answer_of(prompt.question, generated, assistant.renderer) for prompt, generated in zip(batch, found, strict=True)]


def asked(args: Namespace, words: list[str]) -> list[Row]:
    """What the command line, a file or a pipe asks."""
    if words and args.file:
        raise ValueError("there are prompts on the command line and a --file; give one of them")
    if words:
        return rows_of([(f"prompt {number}", text) for number, text in enumerate(words, 1)])
    if args.file:
        return rows_in(args.file)
    if sys.stdin.isatty():
        raise ValueError('there is nothing to ask; give prompts ("Who are you?"), a --file or a pipe')
    rows = rows_of([(f"line {number}", line) for number, line in enumerate(sys.stdin.read().split("\n"), 1) if line.strip()])
    if not rows:
        raise ValueError("the pipe has no prompts")
    return rows


def sampling_of(args: Namespace) -> Sampling | None:
    """None: greedy. Raises ValueError for options that cannot take effect."""
    if args.temperature is None:
        if given := [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "seed") if getattr(args, name) is not None]:
            raise ValueError(f"{given[0]} is of a drawn answer, and without --temperature the answers are greedy; add it, e.g. 0.7")
        return None
    return Sampling(args.temperature, 1.0 if args.top_p is None else args.top_p, args.top_k, args.seed or 0)


if __name__ == "__main__":
    with_clear_errors(lambda: run(args), debug=args.debug)
