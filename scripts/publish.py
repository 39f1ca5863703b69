#!/usr/bin/env python
"""Make a run's result into a folder for the hub, look at it, and push it.

    python scripts/publish.py runs/quickstart --repo someone/tiny-oasst --dry-run      build and show it, send nothing
    python scripts/publish.py runs/quickstart --repo someone/tiny-oasst                the adapter, private
    python scripts/publish.py runs/quickstart --repo someone/tiny-oasst --merged --public
    python scripts/publish.py runs/quickstart --repo someone/tiny-oasst --space --space-hardware zerogpu

The folder (runs/NAME/hub, or --output) holds the weights, the tokenizer with its chat template, a model card, the recipe and the
evaluation, and nothing else of the run or of this machine: paths are cut, and a token in any file stops it. --merged publishes what
scripts/merge.py made. --space adds a chat page as a Gradio Space of the same name (runs/NAME/space).

An adapter names its base by the hub's id and revision. Where the base was loaded from a folder, they are read from the hub's cache or
the folder's own files if they can be; otherwise give --base-id (and --base-revision).

The token comes from HF_TOKEN or from `hf auth login`, never from the command line. Repositories are private unless --public says
otherwise. Everything goes in one commit: after a broken connection the same command starts over.
"""

from argparse import ArgumentParser
from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors

HARDWARE = ("cpu", "gpu", "zerogpu")


def arguments() -> ArgumentParser:
    parser = parser_for(__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where on the hub")
    parser.add_argument("--merged", action="store_true", help="the merged model (runs/NAME/merged) instead of the adapter")
    parser.add_argument("--public", action="store_true", help="everybody may read it (otherwise it is private)")
    parser.add_argument("--dry-run", action="store_true", help="build and show everything, send nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the folder is built (otherwise runs/NAME/hub)")
    parser.add_argument("--base-id", metavar="OWNER/NAME", help="the base on the hub, if it was loaded from a folder that does not tell")
    parser.add_argument("--base-revision", metavar="COMMIT", help="its revision")
    parser.add_argument("--license", metavar="ID", help="as the hub spells it, e.g. mit (otherwise the base's, if its card is at hand)")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="OWNER/NAME", help="hub id of data that came from files; repeatable"
    )
    parser.add_argument("--no-reports", action="store_true", help="leave the report's files out: they quote the validation split")
    parser.add_argument("--space", action="store_true", help="also a chat page, as a Gradio Space")
    parser.add_argument("--space-hardware", choices=HARDWARE, help="what the Space runs on (cpu)")
    return parser


if __name__ == "__main__":  # before the imports that take seconds
    args = read_arguments(arguments())

from rich.table import Table

from qlora_suite.base_origin import check_hub_id, licence_of, origin_of
from qlora_suite.files import read_json
from qlora_suite.hub_folder import CARD, Result, build, form_of, listing, report_of, roots_of
from qlora_suite.hub_space import build_space
from qlora_suite.hub_upload import push
from qlora_suite.leaks import cleaned
from qlora_suite.model_card import hub_datasets, languages_of, model_card, serving_lines
from qlora_suite.subject import subject_of
from qlora_suite.tracking import console, say


def run(args) -> None:
    check_hub_id("--repo", args.repo)
    result = result_of(args)
    folder = args.output or args.run / "hub"
    build(result, folder, model_card(result, serving_lines(result)), with_reports=not args.no_reports)
    show(folder, f"https://huggingface.co/{args.repo}", args.public, card=args.dry_run)
    space = None
    if args.space:
        space = folder.with_name("space" if folder.name == "hub" else f"{folder.name}-space")
        build_space(result, folder, space, args.space_hardware)
        show(space, f"https://huggingface.co/spaces/{args.repo}", args.public, card=args.dry_run)
    if args.dry_run:
        say("nothing was sent: this was --dry-run")
        return
    say(f"pushing {folder}")
    say(f"published {push(folder, args.repo, 'model', args.public, f'{result.form} of {result.subject.folder.name}')}")
    if space:
        say(f"published {push(space, args.repo, 'space', args.public, f'chat with {result.name}')}")
        if not args.public:
            say("the model is private: the Space needs a secret HF_TOKEN with read access to it (its Settings, Secrets)")


def result_of(args) -> Result:
    """The run's result, with all that can be known of it. Raises ValueError if it cannot be published as asked."""
    if args.run.suffix in (".yaml", ".yml"):
        raise ValueError(f"{args.run} is a recipe; what is published is a run: give its folder, e.g. runs/quickstart")
    if args.space_hardware and not args.space:
        raise ValueError("--space-hardware is of a Space; add --space")
    subject = subject_of(args.run, [])
    form, record = form_of(subject, args.merged), read_json(args.run / "run.json")
    model = subject.recipe.model
    origin = None if model.random_init else origin_of(model, record["base"], args.base_id, args.base_revision)
    if origin is None and form == "adapter":
        raise ValueError(
            f"nothing tells which model of the hub {model.base} is, and an adapter is of no use without its base; "
            "give it with --base-id OWNER/NAME (and --base-revision COMMIT)"
        )
    if origin is None and args.base_id:
        raise ValueError("--base-id has no effect: the run was trained from nothing and has no base; leave it out")
    report, why_not = report_of(subject)
    roots = roots_of(subject)
    record, report = cleaned(record, roots), cleaned(report, roots)
    licence = args.license or licence_of(model, origin)
    datasets = hub_datasets(subject.recipe, record["data_manifest"], args.dataset)
    known_by = (
        f"base: {origin.id} at {origin.revision or 'an unknown revision'} (from {origin.known_by})" if origin else "base: not on the hub"
    )
    notes = (known_by, why_not, "" if licence else "no licence is known, so the card states none; give it with --license")
    for note in filter(None, notes):
        say(note)
    return Result(args.repo, subject, form, origin, record, report, licence, datasets, languages_of(subject.recipe, report))


def show(folder: Path, address: str, public: bool, card: bool) -> None:
    """Every file, and the card as it will stand on the hub."""
    table = Table(title=f"{folder} -> {address} ({'public' if public else 'private'})", title_justify="left", box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("what it is")
    files = list(listing(folder))
    for name, size, what in files:
        table.add_row(name, f"{size:,}", what)
    table.add_row("together", f"{sum(size for _, size, _ in files):,}", "")
    console.print(table)
    if card:
        say(f"\n{CARD}:\n")
        say((folder / CARD).read_text(encoding="utf-8"))


if __name__ == "__main__":
    with_clear_errors(lambda: run(args), debug=args.debug)
