#!/usr/bin/env python
"""Train the four published Phi-2 fine-tunes of recipes/seeds on the embedded model, as published and corrected, and score them alike.

    python benchmarks/seeds.py                  some 11 minutes on two cores; again: goes on, and scores anew
    python benchmarks/seeds.py --render         write the tables from benchmarks/seeds.json, without running anything

Every recipe is trained on assets/tiny_phi and the embedded trees for the same number of steps. Base and adapters are then scored on one
common set, the best paths of the held-out trees, on the same answers. Beside that stands what each recipe's settings do by arithmetic,
on Phi-2's shapes and on the embedded data. Writes benchmarks/seeds.json and the tables in docs/seeds.md; the runs stay in --folder.
"""

import datetime
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from qlora_suite import dataset
from qlora_suite.adapter import add_adapter, coverage, linear_names, load_adapter, size
from qlora_suite.batches import Limit, Order
from qlora_suite.chat import Renderer
from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.comparison import summary
from qlora_suite.evaluation import AnswerScore, Excerpt, excerpts, paired_interval, score
from qlora_suite.files import read_json, write_json, write_text
from qlora_suite.generation import answer
from qlora_suite.generation import summary as summary_of_answers
from qlora_suite.launched_runs import ROOT, fresh_accelerator, train_script
from qlora_suite.model import load_base, versions
from qlora_suite.preparation import prepare, trimmed
from qlora_suite.recipe import Chat, Model, Recipe
from qlora_suite.recipe_file import load
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.run_facts import hardware, prepared_tokenizer
from qlora_suite.selection import Counts, selected
from qlora_suite.tracking import read_journal, say

SEEDS, WAYS = ("000", "001", "003", "004"), ("published", "corrected")
RECIPES = ROOT / "recipes" / "seeds"
PAGE, REPORT = ROOT / "docs" / "seeds.md", ROOT / "benchmarks" / "seeds.json"
BASE, TREES = ROOT / "assets" / "tiny_phi", ROOT / "assets" / "oasst1_en_validation.jsonl.gz"
STEPS, LEARNING_RATE, WARMUP, WINDOW = 80, 1e-3, 2, 1024
CONVERSATIONS = {"000": 9846, "003": 17972, "004": 23058}
"""That their notebooks say they trained on."""
PROMPTS, NEW_TOKENS = 32, 96
"""Greedy answers to the first questions of held-out trees: do they end by themselves?"""
ON_CPU = torch.device("cpu")


# --- the recipes, on the embedded model


def recipe_file(seed: str, way: str) -> Path:
    return RECIPES / f"{seed}_{way}.yaml"


def embedded(seed: str, way: str, folder: Path, *more: str) -> Recipe:
    """The recipe on the embedded model and trees. What is changed is the same for all, and stands in docs/seeds.md."""
    known = load(recipe_file(seed, way))
    overrides = [
        f"model.base={BASE}",
        f"data.source={TREES}",
        "data.split=by_hash",
        "data.dev_share=0",
        f"data.prepared={folder / 'prepared' / f'{seed}_{way}'}",
        f"data.max_length={min(known.data.max_length, WINDOW)}",
        f"optim.learning_rate={LEARNING_RATE}",
        f"optim.warmup_steps={min(known.optim.warmup_steps, WARMUP)}",
        "train.epochs=1000",
        f"train.max_steps={STEPS}",
        "train.micro_batch=auto",
        "train.gradient_checkpointing=false",
        "evaluation={}",
        "previews={}",
        "checkpoints={}",
        f"output.dir={folder / f'{seed}_{way}'}",
    ]
    return load(recipe_file(seed, way), [*overrides, *more])


def with_equal_steps(seed: str, folder: Path) -> tuple[Recipe, Recipe]:
    """Published and corrected, both with about the same number of tokens in a step: a packed row holds several conversations."""
    published, corrected = (embedded(seed, way, folder) for way in WAYS)
    counts = prepared(published)["counts"]["train"]
    tokens = published.train.rows_per_step * counts["tokens"] / counts["rows"]
    rows = max(1, round(tokens / corrected.data.max_length))
    return published, embedded(seed, "corrected", folder, f"train.rows_per_step={rows}")


def prepared(recipe: Recipe) -> dict[str, Any]:
    """The manifest of its data, which is made if it is not there."""
    try:
        return dataset.load_manifest(recipe)
    except ValueError:
        with selected(recipe) as selection:
            prepare(recipe, selection)
        return dataset.load_manifest(recipe)


def train(recipe: Recipe) -> None:
    """Run the loop of scripts/train.py; a run that is finished is left as it is. Raises ValueError if it was stopped."""
    with fresh_accelerator():
        train_script().train(recipe)
    state = read_json(Path(recipe.output.dir) / "status.json")
    if state["state"] != "finished":
        raise ValueError(f"{recipe.output.dir} is {state['state']} at step {state['step']}; the same command goes on")


# --- what the settings do, by arithmetic


def phi2() -> PhiForCausalLM:
    """Phi-2's shapes, without its weights."""
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
    )
    with torch.device("meta"):
        return PhiForCausalLM(config)


def shapes(recipe: Recipe) -> dict[str, Any]:
    """What the adapter is on Phi-2: its parameters, and the target names that match nothing."""
    base = phi2()
    matched = coverage(linear_names(base), recipe.adapter.targets).matched
    with torch.device("meta"):
        parameters = size(add_adapter(base, recipe.adapter, (), False)).trainable
    return {"parameters": parameters, "unmatched": [target for target, modules in matched.items() if not modules]}


def steps_of(recipe: Recipe, num_rows: int) -> int:
    """Optimiser steps of the recipe on so many rows."""
    train = recipe.train
    return Order(recipe.seed, [1] * num_rows, train.rows_per_step, train.epochs, train.max_steps).num_steps


def on_the_data(recipe: Recipe) -> dict[str, Any]:
    """What becomes of the embedded train trees at the recipe's own length, with the embedded tokenizer."""
    counts = prepared(recipe)["counts"]["train"]
    with selected(recipe) as selection:
        conversations = list(trimmed(selection.splits["train"], Counts()))
    return {
        "conversations": len(conversations),
        "rows": counts["rows"],
        "tokens": counts["tokens"],
        "learnt": counts["supervised"],
        "cut": counts["cut_conversations"],
        "padding": 1 - counts["tokens"] / (counts["rows"] * recipe.data.max_length),
        "replies": sum(len(c.ids) for c in conversations) / len(conversations) if recipe.data.policy == "joined_replies" else None,
        "newlines": sum(any("\n" in t.content.strip() for t in c.turns) for c in conversations),
    }


def arithmetic(seed: str, way: str, folder: Path) -> dict[str, Any]:
    """Everything that needs no training."""
    recipe = load(recipe_file(seed, way))
    conversations = CONVERSATIONS.get(seed) if way == "published" else None
    own_length = f"data.max_length={recipe.data.max_length}", f"data.prepared={folder / 'own_length' / f'{seed}_{way}'}"
    return {
        **shapes(recipe),
        "rank": recipe.adapter.rank,
        "published_conversations": conversations,
        "published_steps": steps_of(recipe, conversations) if conversations else None,
        "data": on_the_data(embedded(seed, way, folder, *own_length)),
    }


# --- one common set


def common_set(recipes: dict[str, Recipe], renderers: Sequence[Renderer]) -> tuple[list[Excerpt], dict[str, int]]:
    """The best paths of the held-out trees, as much of them as fits into the window in every format."""
    everything = dataset.read_conversations(Path(recipes["000_published"].data.prepared) / "validation.arrow")
    found, cut = excerpts(everything, renderers, WINDOW)
    answers = sum(t.role == "assistant" and t.learn for e in found for t in e.conversation.turns)
    return found, {"trees": len({e.conversation.group for e in found}), "answers": answers, "answers_left_out": cut.answers}


def renderer_of(recipe: Recipe, manifest: dict[str, Any]) -> Renderer:
    """Its trained format; answers are scored, and written, as they are, whatever was trained on."""
    chat = recipe.chat.model_copy(update={"loss_on": None, "escape_markers": False})
    return Renderer(prepared_tokenizer(Path(recipe.data.prepared)), chat, RoleMarkers.from_json(manifest["role_markers"]))


def later_answers(found: Sequence[Excerpt]) -> tuple[list[Excerpt], list[Excerpt]]:
    """Each answer that has an earlier exchange: behind its history, and behind its own question alone."""
    with_history, without = [], []
    for excerpt in found:
        turns = excerpt.conversation.turns
        for i, turn in enumerate(turns):
            before = [j for j in range(i) if turns[j].role == "assistant"]
            if turn.role != "assistant" or not turn.learn or not before:
                continue
            alone = [replace(t, learn=j == i) for j, t in enumerate(turns[: i + 1])]
            number = excerpt.answers_before + len(before)
            with_history.append(Excerpt(replace(excerpt.conversation, turns=tuple(alone)), excerpt.answers_before))
            without.append(Excerpt(replace(excerpt.conversation, turns=tuple(alone[before[-1] + 1 :])), number))
    return with_history, without


def measured(net: nn.Module, renderer: Renderer, found: Sequence[Excerpt]) -> tuple[list[AnswerScore], dict[str, float]]:
    """The answers' scores, and their means with those of the previews."""
    scores = score(net, renderer, found, WINDOW, Limit(rows=64, tokens=2048))
    chats = [e.conversation.turns[:1] for e in found if not e.answers_before and len(renderer.prompt(e.conversation.turns[:1])) < 256]
    previews = answer(net, renderer, chats[:PROMPTS], NEW_TOKENS)
    return scores, {**summary(scores), **{f"preview_{name}": value for name, value in summary_of_answers(previews).items()}}


def score_everything(recipes: dict[str, Recipe], manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Base in every format, each adapter in its own, and as the apps of two seeds used theirs."""
    renderers = {recipe.chat.format: renderer_of(recipe, manifests[name]) for name, recipe in recipes.items()}
    found, counts = common_set(recipes, list(renderers.values()))
    say(
        f"scoring {counts['answers']} answers of {counts['trees']} held-out trees; {counts['answers_left_out']} are too long for the window"
    )
    net = load_base(Model(base=str(BASE)), torch.float32, ON_CPU)
    base = {name: measured(net, renderer, found) for name, renderer in renderers.items()}
    runs: dict[str, Any] = {}
    scores: dict[str, list[AnswerScore]] = {}
    served: dict[str, Any] = {}
    for name, recipe in recipes.items():
        say(f"scoring {name}")
        net = load_adapter(load_base(recipe.model, torch.float32, ON_CPU), str(Path(recipe.output.dir) / "final"))
        scores[name], means = measured(net, renderers[recipe.chat.format], found)
        runs[name] = {
            **means,
            "format": recipe.chat.format,
            "against_base": paired_interval(base[recipe.chat.format][0], scores[name], 2000),
        }
        if name == "003_published":
            other = Renderer(renderers["llama2"].tokenizer, Chat(format="llama2"), RoleMarkers("text"))
            fitting, _ = excerpts([e.conversation for e in found], [other], WINDOW)
            assert len(fitting) == len(found), "the format of the app needs more room than the trained ones"
            of_app, means = measured(net, other, found)
            served[name] = {**means, "against_trained": paired_interval(scores[name], of_app, 2000)}
        if name == "000_corrected":
            pair = [score(net, renderers[recipe.chat.format], part, WINDOW, Limit(64, 2048)) for part in later_answers(found)]
            served["history"] = {"answers": len(pair[0]), "with": summary(pair[0]), "without": summary(pair[1])}
            served["history"]["difference"] = paired_interval(pair[0], pair[1], 2000)
    for seed in SEEDS:
        runs[f"{seed}_corrected"]["against_published"] = paired_interval(scores[f"{seed}_published"], scores[f"{seed}_corrected"], 2000)
    return {"common_set": counts, "base": {name: means for name, (_, means) in base.items()}, "runs": runs, "served": served}


# --- the tables


def tables(report: dict[str, Any]) -> dict[str, str]:
    """The generated parts of docs/seeds.md, by the name of their place."""
    return {"settings": _settings(report), "scores": _scores(report), "made": _made(report)}


def _settings(report: dict[str, Any]) -> str:
    head = "| recipe | parameters on Phi-2 | targets that match nothing | steps on the published data | rows here | padding if filled up | "
    lines = [head + "conversations cut | tokens learnt |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    for name, of_run in report["arithmetic"].items():
        data, count = of_run["data"], of_run["published_conversations"]
        steps = f"{of_run['published_steps']:,} ({count:,} conversations)" if count else "not known"
        unmatched = ", ".join(f"`{target}`" for target in of_run["unmatched"]) or "none"
        lines.append(
            f"| `{name}` | {of_run['parameters']:,} | {unmatched} | {steps} | {data['rows']:,} | {data['padding']:.0%} | "
            f"{data['cut']:,} of {data['conversations']:,} | {data['learnt']:,} of {data['tokens']:,} |"
        )
    return "\n".join(lines)


def _scores(report: dict[str, Any]) -> str:
    head = "| recipe | format | tokens trained | bits per byte | against the base in its format | against published | end token | "
    lines = [head + "stop (tokens) |", "|---|---|---:|---:|---|---|---:|---:|"]
    for name, means in report["base"].items():
        lines.append(f"| base, NF4 | `{name}` | | {means['bits_per_byte']:.4f} | | | {_ends(means)} |")
    for name, of_run in report["runs"].items():
        other = f" {_interval(of_run['against_published'])} |" if "against_published" in of_run else " |"
        lines.append(
            f"| `{name}` | `{of_run['format']}` | {of_run['tokens_trained']:,} | {of_run['bits_per_byte']:.4f} | "
            f"{_interval(of_run['against_base'])} |{other} {_ends(of_run)} |"
        )
    app, history = report["served"]["003_published"], report["served"]["history"]
    lines += [
        f"| `003_published`, asked as its app asks | `llama2` | | {app['bits_per_byte']:.4f} | | {_interval(app['against_trained'])} | "
        f"{_ends(app)} |",
        "",
        f"History: the {history['answers']} answers that follow an earlier exchange cost `000_corrected` "
        f"{history['with']['bits_per_byte']:.4f} bits per byte behind their history and {history['without']['bits_per_byte']:.4f} behind "
        f"their own question alone, as the app of 000 asks: {_interval(history['difference'])}.",
    ]
    return "\n".join(lines)


def _made(report: dict[str, Any]) -> str:
    made, common = report["made_by"], report["common_set"]
    used = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"`python benchmarks/seeds.py`, {report['date']}, {made['device']} of {made['cores']} cores ({made['machine']}), fp32, {used}. "
        f"{STEPS} steps each; scored on {common['answers']} answers of {common['trees']} held-out trees, "
        f"{common['answers_left_out']} more are too long for the window of {WINDOW:,} tokens."
    )


def _interval(found: dict[str, Any]) -> str:
    low, high = found["interval_95"]
    return f"{found['bits_per_byte']:+.4f} ({low:+.4f} to {high:+.4f})"


def _ends(means: dict[str, float]) -> str:
    return f"{means['end_probability']:.3f} | {means['preview_stopped']:.0%} ({means['preview_tokens']:.0f})"


def with_tables(page: str, report: dict[str, Any]) -> str:
    """The page with its generated parts written anew. Raises ValueError if one has no place in it."""
    for name, text in tables(report).items():
        begin, end = f"<!-- {name}: made by benchmarks/seeds.py -->\n", f"\n<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"docs/seeds.md has no place for the part {name}: wanted are the lines {begin.strip()} and {end.strip()}")
        before, _, rest = page.partition(begin)
        page = before + begin + text + end + rest.partition(end)[2]
    return page


def write_page(report: dict[str, Any]) -> None:
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), report))
    say(f"wrote the tables of {PAGE.relative_to(ROOT)}")


# --- all of it


def run(folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the table is of a CPU, on a machine with a GPU too
    began = time.monotonic()
    names = [f"{seed}_{way}" for seed in SEEDS for way in WAYS]
    recipes = dict(zip(names, (recipe for seed in SEEDS for recipe in with_equal_steps(seed, folder)), strict=True))
    manifests: dict[str, dict[str, Any]] = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        spent = time.monotonic() - began
        left = f", some {spent / number * (len(names) - number) / 60 + 2:.0f} minutes left" if number else ""
        say(f"run {number + 1} of {len(names)}: {name}{left}")
        manifests[name] = prepared(recipe)
        train(recipe)
    report = {"date": datetime.date.today().isoformat(), **score_everything(recipes, manifests)}
    for name in names:
        metrics = read_journal(Path(recipes[name].output.dir) / "metrics.jsonl")
        report["runs"][name]["tokens_trained"] = max(record.get("tokens", 0) for record in metrics)
    say("the arithmetic of the settings")
    report["arithmetic"] = {name: arithmetic(*name.split("_"), folder) for name in names}
    report["made_by"] = {**hardware(ON_CPU), "versions": versions()}
    write_json(REPORT, report)
    write_page(report)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds", help="where the runs go")
    parser.add_argument("--render", action="store_true", help="write the tables from the report that is there")
    args = parser.parse_args()
    if args.render:
        write_page(read_json(REPORT))
    else:
        run(args.folder.resolve())


if __name__ == "__main__":
    with_clear_errors(main, debug="--debug" in sys.argv)
