#!/usr/bin/env python
"""Score a model on the validation split: base against adapter, in bits per byte and perplexity, with an interval.

    python scripts/evaluate.py recipes/quickstart.yaml                  the base alone
    python scripts/evaluate.py runs/quickstart                          a run: its chosen checkpoint against its base
    python scripts/evaluate.py recipes/phi2_oasst1.yaml --adapter someone/phi-2-lora --format human_assistant
    python scripts/evaluate.py recipes/phi2_oasst1.yaml --model someone/phi-2-merged

The last two take an adapter or a full model that was trained elsewhere; --format says in which chat format. The validation split
is read here alone. Scores are kept beside the report by what they were made from, so that nothing is computed twice.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import track
from torch import nn

from qlora_suite import dataset
from qlora_suite.adapter import load_adapter
from qlora_suite.batches import Limit
from qlora_suite.chat import Renderer
from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.engine import start as start_engine
from qlora_suite.evaluation import AnswerScore, Cut, Excerpt, excerpts, paired_interval, score, slices
from qlora_suite.files import hash_of, read_json, sha256, write_json, write_text
from qlora_suite.metric import corpus_perplexity
from qlora_suite.model import base_fingerprint, load_base, load_config, load_tokenizer, versions
from qlora_suite.recipe import Chat, Model, Recipe, load
from qlora_suite.report import headline, markdown, result_table
from qlora_suite.role_markers import RoleMarkers, add_role_markers
from qlora_suite.run_folder import hardware, prepared_tokenizer
from qlora_suite.tracking import console, say

PLAIN_FORMATS = ("human_assistant", "instruct_output")
"""In which a base that has never seen our markers may do better."""
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Subject:
    """What is to be scored."""

    recipe: Recipe
    folder: Path
    """Where the report goes."""
    adapter: str | None = None
    model: str | None = None
    """A full model, instead of base and adapter."""
    chosen_by: str = "its maker"
    format: str | None = None
    """Of an adapter or model that was trained elsewhere."""


@dataclass(frozen=True)
class Column:
    """One model of the comparison."""

    name: str
    label: str
    model: Model
    adapter: str | None
    formats: tuple[str, ...]


def run(subject: Subject) -> None:
    accelerator, dtype = start_engine()
    recipe = subject.recipe
    manifest = dataset.load_manifest(recipe)
    everything = dataset.read_conversations(Path(recipe.data.prepared) / "validation.arrow")
    if not everything:
        raise ValueError(f"{recipe.data.prepared} has no validation split; set data.split or data.validation_source, and prepare it again")

    trained = subject.format or recipe.chat.format
    renderers = make_renderers(subject, manifest, trained)
    window = recipe.data.max_length
    if trained == "text":  # scored in pieces, so that nothing is cut
        found, cut = [Excerpt(c) for c in everything], Cut()
    else:
        found, cut = excerpts(everything, list(renderers.values()), window)
        if not found:
            raise ValueError(f"no answer fits into data.max_length = {window} tokens in every format compared; raise it")
    scores: dict[str, dict[str, list[AnswerScore]]] = {}
    columns = make_columns(subject, dtype, tuple(renderers), trained)
    for column in columns:
        for name, answers in scores_of(column, subject, renderers, found, accelerator, dtype).items():
            scores.setdefault(name, {})[column.name] = answers

    report = make_report(subject, scores, columns, trained)
    report |= {
        "cut": asdict(cut),
        "window": window,
        "data": {
            "name": describe_data(recipe),
            "conversations": len({(e.conversation.key, e.conversation.ids) for e in found}),
            "answers": len(next(iter(next(iter(scores.values())).values()))),
            "trees": len({e.conversation.group for e in found}),
            "validation_sha256": manifest["files"]["validation.arrow"]["sha256"],
        },
        "chosen_by": subject.chosen_by,
        "made_by": {**versions(), "precision": str(dtype).removeprefix("torch."), **hardware(accelerator.device)},
    }
    write_json(subject.folder / "report.json", report)
    write_text(subject.folder / "report.md", markdown(report))
    console.print(result_table(report))
    say(headline(report))
    if cut.answers:
        say(f"cut, because they do not fit: {cut.answers} answers, {cut.tokens:,} tokens, {cut.bytes:,} bytes")
    say(f"wrote {subject.folder / 'report.md'} and report.json")


def make_renderers(subject: Subject, manifest: dict[str, Any], trained: str) -> dict[str, Renderer]:
    """By format: the trained one first, then the plain-text ones. Losses are on the answers, whatever was trained on."""
    recipe = subject.recipe
    rows = load_config(recipe.model).get_text_config().vocab_size
    chat = recipe.chat.model_copy(update={"loss_on": None})
    if subject.format is None:
        markers = RoleMarkers.from_json(manifest["role_markers"])
        renderers = {trained: Renderer(prepared_tokenizer(Path(recipe.data.prepared)), chat, markers)}
    else:
        chat, tokenizer = Chat(format=trained), load_tokenizer(tokenizer_of(subject))
        renderers = {trained: Renderer(tokenizer, chat, add_role_markers(tokenizer, rows, chat))}
    for name in PLAIN_FORMATS if trained != "text" else ():
        if name not in renderers:
            plain, tokenizer = Chat(format=name), load_tokenizer(recipe.model)
            renderers[name] = Renderer(tokenizer, plain, add_role_markers(tokenizer, rows, plain))
    return renderers


def tokenizer_of(subject: Subject) -> Model:
    """Where the tokenizer of something trained elsewhere is: beside it, or else the base's."""
    for place in (subject.model, subject.adapter):
        if place and (not Path(place).is_dir() or (Path(place) / "tokenizer.json").is_file()):
            return Model(base=place)
    return subject.recipe.model


def make_columns(subject: Subject, dtype: torch.dtype, formats: tuple[str, ...], trained: str) -> list[Column]:
    """The models to compare, in the order in which they are shown."""
    recipe, columns = subject.recipe, []
    unquantised = Model(base=recipe.model.base, revision=recipe.model.revision, quantization="none")
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if not recipe.model.random_init:
        columns.append(Column("base_unquantised", f"base, {short}", unquantised, None, formats))
        if recipe.model.quantization != "none":
            columns.append(Column("base_quantised", f"base, {recipe.model.quantization}", recipe.model, None, formats))
    if subject.adapter:
        columns.append(Column("adapter", "adapter", recipe.model, subject.adapter, (trained,)))
    if subject.model:
        columns.append(Column("adapter", "model", Model(base=subject.model, quantization="none"), None, (trained,)))
    if not columns:
        raise ValueError("the recipe makes its model from nothing, so there is no base to score; give its run's folder instead")
    return columns


def scores_of(
    column: Column,
    subject: Subject,
    renderers: dict[str, Renderer],
    chosen: list[Excerpt],
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> dict[str, list[AnswerScore]]:
    """Scores by format, from the files of an earlier call where there are any."""
    made_from = {
        "model": base_fingerprint(column.model),
        "quantization": [column.model.quantization, column.model.double_quantization],
        "adapter": fingerprint_of(column.adapter),
        "precision": str(dtype),
        "window": subject.recipe.data.max_length,
        "conversations": hash_of([[e.answers_before, dataset.conversation_record(e.conversation)] for e in chosen]),
    }
    found, net = {}, None
    for name in column.formats:
        renderer = renderers[name]
        key = hash_of({**made_from, "chat": renderer.chat.model_dump(), "template": renderer.tokenizer.chat_template})[:16]
        kept = subject.folder / "evaluation" / f"{column.name}-{name}-{key}.json"
        if kept.is_file():
            found[name] = [AnswerScore(**values) for values in read_json(kept)]
            continue
        if net is None:
            net = load_column(column, accelerator.device, dtype)
        longest = subject.recipe.data.max_length
        limit = Limit(rows=256, tokens=max(longest, TOKENS_AT_ONCE.get(accelerator.device.type, 2048)))
        with accelerator.autocast():
            found[name] = score(net, renderer, chosen, longest, limit, progress=lambda b, n=name: bar(b, f"{column.label}, {n}"))
        write_json(kept, [asdict(s) for s in found[name]])
    return found


def load_column(column: Column, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The base, or the base under its adapter."""
    base = load_base(column.model, dtype, device)
    if column.adapter is None:
        return base
    return load_adapter(base, column.adapter)


def fingerprint_of(adapter: str | None) -> str | None:
    """Hash of an adapter's weights; the name of one on the hub."""
    file = Path(adapter) / "adapter_model.safetensors" if adapter else None
    return sha256(file) if file and file.is_file() else adapter


def bar(batches: Sequence[Any], label: str) -> Any:
    return track(batches, description=f"scoring {label}", console=console, transient=True, disable=not console.is_terminal)


def make_report(subject: Subject, scores: dict[str, dict[str, list[AnswerScore]]], columns: list[Column], trained: str) -> dict[str, Any]:
    """Sums to means, the base's best score, the paired difference, slices and every conversation."""
    formats = {name: {column: summary(found) for column, found in cells.items()} for name, cells in scores.items()}
    ours = scores[trained].get("adapter")
    candidates = [
        (s["bits_per_byte"], name, column) for name, cells in formats.items() for column, s in cells.items() if column != "adapter"
    ]
    base = difference = theirs = None
    if candidates:
        _, name, column = min(candidates)
        base, theirs = {"format": name, "column": column, **formats[name][column]}, scores[name][column]
        if ours:
            difference = paired_interval(theirs, ours, subject.recipe.evaluation.bootstrap_samples)
    return {
        "base": base,
        "adapter": {"format": trained, **formats[trained]["adapter"]} if ours else None,
        "difference": difference,
        "formats": formats,
        "labels": {column.name: column.label for column in columns},
        "slices": slices(theirs, ours) if ours else [],
        "answers": paired_answers(theirs, ours),
    }


def summary(found: list[AnswerScore]) -> dict[str, float]:
    """The metric of the content, and the end tokens apart."""
    means = corpus_perplexity([a.nats for a in found], [a.tokens for a in found], [a.bytes for a in found])
    end_nats, end_tokens = math.fsum(a.end_nats for a in found), sum(a.end_tokens for a in found)
    end_nll = end_nats / end_tokens if end_tokens else 0.0
    with_end = means["bits_per_byte"] + end_nats / math.log(2) / means["num_bytes"]
    ends = {"end_tokens": end_tokens, "end_nll": end_nll, "end_probability": math.exp(-end_nll), "bits_per_byte_with_end": with_end}
    return {**means, **ends}


def paired_answers(theirs: list[AnswerScore] | None, ours: list[AnswerScore] | None) -> list[dict[str, Any]]:
    """Every answer with the nats of both: what the interval was made from."""
    rows = []
    for i, answer in enumerate(ours or theirs or []):
        row = {"key": answer.key, "tree": answer.group, "language": answer.language, "number": answer.number, "bytes": answer.bytes}
        row |= {"adapter_nats": answer.nats} if ours else {}
        rows.append(row | ({"base_nats": theirs[i].nats} if theirs else {}))
    return rows


def describe_data(recipe: Recipe) -> str:
    source = recipe.data.validation_source or recipe.data.source
    name = source if isinstance(source, str) else ", ".join(source)
    kind = {"published": "validation split", "by_tree": "held-out trees of a demonstration split, not the published one", "all": "all"}
    return f"{name}, {kind[recipe.data.split]}, policy {recipe.data.policy}"


def subject_of(target: Path, overrides: list[str], adapter: str | None, model: str | None, chat_format: str | None) -> Subject:
    """What the command line names. Raises ValueError if it cannot be scored."""
    if adapter and model:
        raise ValueError("--adapter and --model name two different things to score; give one")
    if chat_format and not (adapter or model):
        raise ValueError("--format says how an --adapter or --model was trained; a run and a base are scored in the recipe's format")
    if not target.is_dir():
        recipe = load(target, overrides)
        return Subject(recipe, Path(recipe.output.dir), adapter, model, format=chat_format)
    if adapter or model:
        raise ValueError(f"{target} is a run's folder and has a result of its own; give a recipe with --adapter or --model")
    if not (target / "recipe.yaml").is_file():
        raise ValueError(f"{target} is not a run's folder: it has no recipe.yaml (for an adapter, give a recipe and --adapter {target})")
    recipe, final = load(target / "recipe.yaml", overrides), target / "final"
    if not final.is_dir():
        state = read_json(target / "status.json")
        raise ValueError(
            f"{target} is not finished ({state['state']} at step {state['step']} of {state['num_steps']}); train on, then evaluate"
        )
    chosen_by = read_json(final / "chosen.json")["chosen_by"]
    if recipe.adapter == "none":
        return Subject(recipe, target, model=str(final), chosen_by=chosen_by)
    return Subject(recipe, target, adapter=str(final), chosen_by=chosen_by)


if __name__ == "__main__":
    parser = parser_for(__doc__)
    parser.add_argument("target", type=Path, help="a recipe's YAML file or a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--adapter", metavar="PATH", help="a PEFT adapter (folder or hub id) to put on the recipe's base")
    parser.add_argument("--model", metavar="PATH", help="a full model (folder or hub id) to compare with the recipe's base")
    parser.add_argument("--format", choices=Chat.model_fields["format"].annotation.__args__, help="chat format of --adapter or --model")
    args = parser.parse_intermixed_args()
    with_clear_errors(lambda: run(subject_of(args.target, args.overrides, args.adapter, args.model, args.format)), debug=args.debug)
