#!/usr/bin/env python
"""Turn raw data into the packed rows that scripts/train.py reads, and print where every message went.

    python scripts/prepare_data.py recipes/quickstart.yaml
    python scripts/prepare_data.py recipes/quickstart.yaml data.policy=best_path --ids ids.tsv --export-jsonl chats.jsonl
    python scripts/prepare_data.py recipes/my_chat_data.yaml --inspect chats.json      what is in a file, and what to write into a recipe

Data of pairs (a chosen and a rejected answer, for `dpo`) is prepared in the same way.
Runs once, without a GPU, on all cores. Run again it says that the data is up to date, or makes it anew if the recipe or a
source file has changed. Writes the recipe's data.prepared folder: train.arrow, dev.arrow (and an index of each), validation.arrow,
bad_rows.jsonl, tokenizer/, manifest.json. Rows that cannot be used are left out, counted and named; --strict stops at the first.
"""

import os
from argparse import Namespace
from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors
from qlora_suite.recipe_file import load

EXAMPLE = Path(__file__).parents[1] / "recipes" / "my_chat_data.yaml"
"""The recipe of --inspect where none is given."""
SMALL = Path(__file__).parents[1] / "assets" / "tiny_phi"
"""Whose tokenizer counts where that recipe's base is not at hand."""


def look(args: Namespace) -> None:
    """`args.recipe`, a path, becomes the recipe; --inspect does without one. `args.base_is_chosen`: by a person."""
    args.base_is_chosen = True
    if args.num_workers < 1:
        raise ValueError(f"--num-workers is {args.num_workers}; give 1 or more")
    if args.inspect is not None and (args.recipe is None or ("=" in args.recipe and not Path(args.recipe).is_file())):
        args.overrides = [*filter(None, [args.recipe]), *args.overrides]
        args.recipe, args.base_is_chosen = EXAMPLE, any(override.startswith("model.base=") for override in args.overrides)
    if args.recipe is None:
        raise ValueError("give a recipe, or --inspect FILE")
    args.recipe = load(args.recipe, args.overrides)


if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--inspect", metavar="FILE", help="show what is in a file, folder or hub data set, and prepare nothing")
    parser.add_argument("--ids", metavar="FILE", help="write one line per example: key, tab, message ids")
    parser.add_argument("--export-jsonl", metavar="FILE", help="write readable conversations")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used, instead of leaving it out")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="processes that tokenise (all cores)"
    )
    args = read_arguments(parser, look)

import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qlora_suite import dataset
from qlora_suite.chat import Renderer
from qlora_suite.files import errors_name
from qlora_suite.funnel import LABELS, reading_rows, split_rows
from qlora_suite.inspection import LENGTHS, complaint_about, inspect, is_at_hand, lines_of, quantiles
from qlora_suite.preparation import check_replaceable, prepare
from qlora_suite.recipe import Recipe
from qlora_suite.rendered import Rendered
from qlora_suite.selection import SPLITS, Selection, selected, write_ids, write_messages
from qlora_suite.tracking import console, say
from qlora_suite.train_prompts import prompt_lengths, read_prompts
from qlora_suite.wording import counted

MUCH = 0.05
"""A share of the supervised tokens that is worth a note when it is cut."""
BAD_ROWS_SHOWN = 3
"""Of each reason."""


def run(recipe: Recipe, ids: str | None = None, export: str | None = None, strict: bool = False, num_workers: int = 1) -> None:
    for option, path in (("--ids", ids), ("--export-jsonl", export)):
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{option}: there is no folder {Path(path).parent}; make it, or name another")
    manifest = None
    try:
        manifest = dataset.load_manifest(recipe, verify=True)
    except ValueError as why:
        say(f"preparing {recipe.data.prepared} ({str(why).partition(';')[0]})")
        check_replaceable(recipe)
    if manifest is not None and not (ids or export):
        show_funnel(manifest["counts"], recipe)
        say(f"{recipe.data.prepared} is up to date")
        return
    with errors_name(Path(recipe.data.prepared)), selected(recipe, progress, strict) as selection:
        if ids:
            say(f"wrote {ids}: {counted(write_ids(Path(ids), selection.splits), 'line')}")
        if export:
            write_messages(Path(export), selection.splits)
            say(f"wrote {export}")
        if manifest is not None:
            show_funnel(manifest["counts"], recipe)
            say(f"{recipe.data.prepared} is up to date")
            return
        manifest, (renderer, example) = prepare(recipe, selection, progress, num_workers, strict)
        show_bad_rows(selection)
    show_funnel(manifest["counts"], recipe)
    show_example(renderer, [as_prompt(one) for one in example] if recipe.grpo else example, asked=recipe.grpo is not None)
    say(manifest["role_markers"]["note"])
    agreement = manifest["chat_template"]
    if agreement and not agreement["checked"]:
        say("chat template: not compared, all texts looked at have white space at their edges or hold a control token's text")
    elif agreement:
        say(f"chat template: plain transformers gives the same ids in {agreement['agreed']} of {agreement['checked']} conversations")
    say(f"wrote {recipe.data.prepared}")


def show_bad_rows(selection: Selection) -> None:
    """The first of each reason, with place and value."""
    for reason in dict.fromkeys(row.reason for row in selection.bad_rows):
        of_reason = [row for row in selection.bad_rows if row.reason == reason]
        for row in of_reason[:BAD_ROWS_SHOWN]:
            say(f"left out: {row}")
        if len(of_reason) > BAD_ROWS_SHOWN:
            say("left out: ... and more for this reason, see bad_rows.jsonl")


def show_funnel(counts: dict[str, Any], recipe: Recipe) -> None:
    """Where every message and every conversation went."""
    reading, splits = reading_rows(counts), split_rows(counts, recipe.data.packing, prompts=recipe.grpo is not None)
    width = max(map(len, [*LABELS.values(), *(label for label, _ in reading)]))
    unit = "pair" if recipe.dpo is not None else "conversation"
    if len(counts["sets"]) > 1:
        for one in counts["sets"]:
            left = one["read"] - sum(one["dropped"].values())
            of_it = f"{left:,} of {one['read']:,} {one['unit']} kept, of form {one['form']}"
            say(f"{one['name']}: {of_it}; {counted(one['taken'], unit)} for training")
    for label, count in reading:
        say(f"{label:<{width}} {count:>9,}")
    say("")
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=width)
    for split in SPLITS:
        table.add_column(split, justify="right")
    for label, values in splits:
        table.add_row(label, *values)
    console.print(table)
    if any(one.split == "by_hash" for one in recipe.data.each):
        say("the validation split is cut by a hash of the tree, or of the first question")
    train, dev = counts["train"], counts["dev"]
    if counts["validation"]["kept"] and (train["dropped_too_long"] or train["cut_conversations"]):
        say("the validation split is kept whole; scripts/evaluate.py says what of it does not fit")
    if recipe.grpo is not None:
        show_prompts(recipe)
    else:
        show_losses(train, recipe, unit)
    if recipe.evaluation.every_steps is not None and not dev["kept"]:
        say("note: the dev split is empty, so scripts/train.py cannot evaluate; raise data.dev_share, or set evaluation.every_steps: null")


def show_losses(train: dict[str, Any], recipe: Recipe, unit: str) -> None:
    """What data.max_length costs, where it is much."""
    dropped, cut = train.get("dropped_tokens", 0), train["cut_tokens"]  # data of an earlier version counts them together
    whole, at = max(1, train["supervised"] + cut + dropped), f"data.max_length: {recipe.data.max_length:,}"
    larger = "where base and memory allow"
    if dropped / whole > MUCH:
        which = f"{counted(train['dropped_too_long'], unit)} left out as longer than {at}"
        say(f"note: {which}, {dropped / whole:.0%} of what there is to learn; a larger one keeps it, {larger}")
    if cut / whole > MUCH:
        remedy = f"a larger one keeps it, {larger}"
        if recipe.dpo is not None and recipe.data.too_long == "truncate":
            remedy += "; data.too_long: drop compares whole answers alone"
        say(f"note: {cut / whole:.0%} of what there is to learn is cut off at {at}; {remedy}")


def show_prompts(recipe: Recipe) -> None:
    """What scripts/train_grpo.py will ask."""
    room = recipe.data.max_length - recipe.grpo.max_new_tokens
    shared = f"data.max_length: {recipe.data.max_length:,}, of which an answer may take grpo.max_new_tokens: {recipe.grpo.max_new_tokens:,}"
    try:
        prompts = read_prompts(dataset.Rows(Path(recipe.data.prepared) / "train.arrow"), room)
    except ValueError as why:
        say(f"note: {why}")
        return
    say(f"prompts to answer: {prompts} (more than {room:,} tokens)" if prompts.num_too_long else f"prompts to answer: {prompts}")
    if (share := prompts.num_too_long / len(prompts.rows)) > MUCH:
        say(f"note: {share:.0%} of the prompts leave no room in {shared}; lower the one or raise the other")


def as_prompt(example: Rendered) -> Rendered:
    """A conversation up to the answer that people gave, which GRPO does not read."""
    (length,) = prompt_lengths(pa.array([example.supervised])).tolist()
    return replace(example, ids=example.ids[:length], supervised=[True] * length)


def show_example(renderer: Renderer, example: Sequence[Rendered], asked: bool = False) -> None:
    """One conversation, or the two of a pair, as the model sees it; what the loss counts is green, or in ⟦ ⟧ where there are no colours."""
    plain = not console.is_terminal or console.no_color
    titles = ("one prompt; what is asked" if asked else "one example; what is learnt",)
    if len(example) == 2:
        titles = ("one pair, the chosen answer; what is compared", "the rejected answer; what is compared")
    for title, one in zip(titles, example, strict=True):
        console.rule(f"{title} is {'in ⟦ ⟧' if plain else 'green'}")
        console.print(_marked(renderer, one, plain))
    console.rule()


def _marked(renderer: Renderer, example: Rendered, plain: bool) -> Text:
    text, ids, flags = Text(), example.ids, example.supervised
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or flags[i] != flags[start]:
            part = renderer.tokenizer.decode(ids[start:i])
            text.append(f"⟦{part}⟧" if plain and flags[start] else part, style="bold green" if flags[start] else "dim")
            start = i
    return text


def show_inspection(recipe: Recipe, file: str, base_is_chosen: bool = True) -> None:
    """What is in a file: form, what would be left out, lengths, an example, and the lines for a recipe."""
    if not base_is_chosen and not is_at_hand(recipe.model):
        say(f"{recipe.model.base}, the base of {EXAMPLE.name}, is not at hand; tokens are those of assets/{SMALL.name}, shorter ones,")
        say("so that each length is more than yours will be; give your recipe, or model.base=FOLDER, to count with yours\n")
        model = recipe.model.model_copy(update={"base": str(SMALL), "revision": None})
        recipe = recipe.model_copy(update={"model": model})
    found = inspect(recipe, file, progress)
    rows = f"{'the first ' if found.more else ''}{counted(found.read, 'row')}"
    say(f"{file}: {rows}, of form {found.form}; tokens are those of {recipe.model.base}, chat format {found.chat.format}\n")
    keys = ", ".join(key if count == found.read else f"{key} ({count:,})" for key, count in found.keys.most_common(12))
    say(f"keys            {keys}")
    roles = ", ".join(f"{role} {count:,}" for role, count in found.roles.most_common())
    say(f"{'pairs' if found.of_pairs else 'conversations':<15} {len(found.turns):,}; turns: {roles or 'none'}")
    if found.open_ends or found.unanswered:
        say(f"                {found.open_ends:,} end on an unanswered question, which is left off; {found.unanswered:,} have no answer")
    for reason, count in found.dropped.most_common():
        say(f"left out        {count:,}: {reason}")
        for row in (row for row in found.bad_rows if row.reason == reason):
            say(f"                  {row}")
    if found.refused:
        say(f"                  {found.refused}")
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=15)
    parts = {"turns": found.turns, "words of a reply": found.reply_words, "tokens": found.tokens}
    if found.of_pairs:
        parts = {
            "turns": found.turns,
            "words, chosen": found.reply_words,
            "words, rejected": found.rejected_words,
            "tokens of each": found.tokens,
        }
    for name in quantiles(found.turns or [0]):
        table.add_column(name, justify="right")
    for name, values in parts.items():
        table.add_row(name, *(f"{value:,.0f}" for value in quantiles(values).values()))
    console.print(table)
    if found.tokens:
        shares = "   ".join(f"{length:,}: {found.share_cut(length):.1%}" for length in LENGTHS)
        say(f"\nlonger than max_length   {shares}")
        say(f"learnt                   {found.supervised / sum(found.tokens):.0%} of {sum(found.tokens):,} tokens")
    if found.example:
        show_example(found.renderer, found.example)
    sections = found.sections(recipe)
    *names, last = sections
    say(f"to stand in place of the sections {', '.join(names)} and {last} of a recipe:\n")
    console.print(Text(lines_of(sections), style="cyan"))
    if complaint := complaint_about(sections, recipe):
        say(f"\n# {complaint}".replace("\n  ", "\n#   "))


def end_at_once(*_: object) -> None:
    """As SIGTERM does by itself, but clearing away what was being written."""
    raise SystemExit(128 + signal.SIGTERM)


def progress(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=description)


if __name__ == "__main__":

    def main() -> None:
        if args.inspect is not None:
            show_inspection(args.recipe, args.inspect, args.base_is_chosen)
        else:
            run(args.recipe, args.ids, args.export_jsonl, args.strict, args.num_workers)

    signal.signal(signal.SIGTERM, end_at_once)
    with_clear_errors(main, debug=args.debug, interrupted="what was prepared before is untouched, the same command starts anew")
