#!/usr/bin/env python
"""Score a model on the validation split: base against adapter, in bits per byte and perplexity, with an interval.

    python scripts/evaluate.py recipes/quickstart.yaml                  the base alone
    python scripts/evaluate.py runs/quickstart                          a run: its chosen checkpoint against its base
    python scripts/evaluate.py recipes/phi2_oasst1.yaml --adapter someone/phi-2-lora --format human_assistant
    python scripts/evaluate.py recipes/phi2_oasst1.yaml --model someone/phi-2-merged
    python scripts/evaluate.py runs/quickstart --lm-eval arc_easy       with benchmarks of the lm-evaluation-harness
    python scripts/evaluate.py --compare runs/a runs/b runs/c           evaluated runs side by side

The third and fourth take an adapter or a full model that was trained elsewhere; --format says in which chat format (else: the recipe's).
A run that began with another adapter (adapter.start_from) is compared with that one first: perplexity and answers before and after. Of
data of pairs, the report says how often the chosen answer is found likelier, and the reward accuracy against the start, with an interval;
of a run of GRPO, what the answers of base, start and run to held-out prompts are worth to its rewards (a file of one's own is run).
Under `accelerate launch`, with any config, the processes share out the answers, each with a whole model; the report is the same.
Reports go to the run's folder or the recipe's output.dir: report.html, report.md and report.json for a run, report-base for the base
alone, report-NAME for an adapter or a model. report.html is one page for the browser that needs no network: curves, conversations,
and answers of base and adapter side by side (--answers, --answer-tokens). --compare reads finished reports and writes compare.html
and compare.md: settings that differ, and runs that differ in their seed alone as mean and standard deviation.

The validation split is read here alone. Scores and answers are kept beside the report by what they were made
from, so that nothing is computed twice.
"""

import argparse
from pathlib import Path

from qlora_suite.command_line import check_recipe, parser_for, read_arguments, with_clear_errors
from qlora_suite.recipe import Chat, Model, Recipe

NUM_ANSWERS = 6
"""Held-out questions that are answered for reading."""
NUM_ANSWERS_OF_GRPO = 24
"""Of a run that was rewarded for its answers: what they are worth is its result."""
ANSWER_TOKENS = 160
"""Room for 100 words of English."""


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a mistake in the recipe and for options that cannot take effect."""
    if args.compare:
        given = {name: value for name, value in vars(args).items() if value not in (None, [])}
        if others := [name for name in given if name not in ("compare", "output", "debug")]:
            named = ", ".join("--" + name.replace("_", "-") if name != "target" else str(args.target) for name in others)
            raise ValueError(f"--compare reads reports that are there, so {named} has no effect with it")
        return
    if args.target is None:
        raise ValueError("give a recipe's YAML file or a run's folder, or --compare RUN RUN ...")
    if args.output:
        raise ValueError("--output says where --compare writes; a report goes to the run's folder or the recipe's output.dir")
    if (args.answers or 0) < 0 or (args.answer_tokens is not None and args.answer_tokens < 1):
        raise ValueError("--answers takes 0 or more, --answer-tokens 1 or more")
    if args.answers == 0 and args.answer_tokens:
        raise ValueError("--answers 0 makes no answers, so --answer-tokens has no effect")
    if not args.lm_eval and (args.lm_eval_tasks_folder or args.lm_eval_limit is not None):
        raise ValueError("--lm-eval-tasks-folder and --lm-eval-limit have no effect without --lm-eval TASK,TASK")
    if args.lm_eval_limit is not None and args.lm_eval_limit < 1:
        raise ValueError("--lm-eval-limit takes 1 or more")
    check_recipe(args.target, args.overrides)


def parser() -> argparse.ArgumentParser:
    made = parser_for(__doc__)
    made.add_argument("target", type=Path, nargs="?", help="a recipe's YAML file or a run's folder")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--adapter", metavar="PATH", help="a PEFT adapter (folder or hub id[@revision]) to put on the recipe's base")
    made.add_argument("--model", metavar="PATH", help="a full model (folder or hub id) to compare with the recipe's base")
    made.add_argument("--format", choices=Chat.model_fields["format"].annotation.__args__, help="chat format of --adapter or --model")
    made.add_argument(
        "--answers",
        type=int,
        metavar="N",
        help=f"held-out questions to answer for reading, 0 for none ({NUM_ANSWERS}; {NUM_ANSWERS_OF_GRPO} of a run of GRPO)",
    )
    made.add_argument(
        "--answer-tokens", type=int, metavar="N", help=f"longest of these answers, in tokens ({ANSWER_TOKENS}; of GRPO as in training)"
    )
    made.add_argument("--lm-eval", metavar="TASK,TASK", help="benchmarks of the lm-evaluation-harness, for base and adapter")
    made.add_argument("--lm-eval-tasks-folder", type=Path, metavar="FOLDER", help="YAML files of tasks of your own")
    made.add_argument("--lm-eval-limit", type=int, metavar="N", help="examples of each task (all)")
    made.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="folders of evaluated runs to put side by side")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="where --compare writes (the folder that the runs have in common)")
    return made


if __name__ == "__main__":  # before the imports that take seconds
    args = read_arguments(parser(), check)

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from torch import nn

from qlora_suite import dataset, fast_paths
from qlora_suite.adapter import adapter_commit, adapter_folder, load_adapter
from qlora_suite.answer_rewards import judge_answers, judges_at_hand, summary
from qlora_suite.assistant import load as load_assistant
from qlora_suite.base_config import load_config
from qlora_suite.batches import Limit
from qlora_suite.chat import Renderer
from qlora_suite.compare_page import compare_page
from qlora_suite.compared_runs import comparison_of, notes
from qlora_suite.compared_runs import markdown as markdown_of_runs
from qlora_suite.compared_runs import tables as tables_of_runs
from qlora_suite.comparison import Scores, compare, describe_data
from qlora_suite.conversations import Conversation
from qlora_suite.engine import autocast
from qlora_suite.engine import start as start_engine
from qlora_suite.evaluation import AnswerScore, Cut, Excerpt, excerpts, release_memory, scorable, score_within_memory
from qlora_suite.files import hash_of, read_json, sha256, write_json, write_text
from qlora_suite.harness import Benchmarks, harness_scores
from qlora_suite.incidents import incidents
from qlora_suite.model import base_fingerprint, hub_commit, load_base, versions
from qlora_suite.preferences import HeldOutPairs, compare_pairs, of_pairs, pairs_that_fit
from qlora_suite.preparation import tokenizer_hash
from qlora_suite.prequantized import record_of
from qlora_suite.ranks import gathered, taking_turns, together
from qlora_suite.report import benchmark_lines, cut_line, findings, left_out_lines, markdown, result_table
from qlora_suite.report_page import journals_of, report_page
from qlora_suite.rewards import in_words, named
from qlora_suite.run_facts import hardware
from qlora_suite.sample_answers import BATCH, Prompt, answer_all, as_column, chosen_prompts, concise_words, read_answers
from qlora_suite.stages import method_of
from qlora_suite.subject import START_LABEL, Column, Subject, columns_of, renderers_of, subject_of
from qlora_suite.tracking import console, say
from qlora_suite.watchdog import exit_at_once_on_errors

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
LOGIT_BYTES = {"cpu": 2 * 2**30, "cuda": 8 * 2**30}
"""For the logits of all places in fp32, three times: as they are, as log-probabilities, and something in between."""


def run(
    target: Path,
    overrides: list[str],
    adapter: str | None = None,
    model: str | None = None,
    chat: str | None = None,
    *,
    num_answers: int | None = None,
    answer_tokens: int | None = None,
    benchmarks: Benchmarks | None = None,
) -> None:
    accelerator, dtype = start_engine()
    console.quiet = not accelerator.is_main_process
    with together(accelerator):
        if benchmarks and accelerator.num_processes > 1:
            raise ValueError(
                "--lm-eval runs on one process; start it without `accelerate launch` (scores that are kept are not made again)"
            )
        if benchmarks:
            benchmarks.check()
        subject = subject_of(target, overrides, adapter, model, chat)
        recipe = subject.recipe
        manifest = dataset.load_manifest(recipe)
        everything = dataset.read_conversations(Path(recipe.data.prepared) / "validation.arrow")
        if not everything:
            raise ValueError(
                f"{recipe.data.prepared} has no validation split; set data.split or data.validation_source, and prepare it again"
            )
        ours, of_base = renderers_of(subject, manifest)
        if any(turn.role == "tool" for c in everything for turn in c.turns):  # only the base's own template has a place for tools
            of_base = {subject.format: of_base[subject.format]}
        answered = [one for one in map(scorable, everything) if one]
        found, cut, held_out = what_fits(answered, [ours, *of_base.values()], recipe.data.max_length)
        columns = columns_of(subject, dtype, ours, of_base)
        start = next((column.adapter for column in columns if column.name == "start" and not column.missing), None)
    if num_answers is None:
        num_answers = NUM_ANSWERS_OF_GRPO if recipe.grpo else NUM_ANSWERS
    if answer_tokens is None:  # the rewards are of answers of so many tokens
        answer_tokens = recipe.grpo.max_new_tokens if recipe.grpo else ANSWER_TOKENS

    scores: Scores = {}
    left_out = []
    for column in columns if found else ():
        answers, why = scores_or_reason(column, subject, found, accelerator, dtype)
        for name, of_format in answers.items():
            scores.setdefault(name, {})[column.name] = of_format
        if why:
            left_out.append({"column": column.name, "why": why})

    if not found:
        left_out = [{"column": c.name, "why": f"{c.label}: {c.missing}"} for c in columns if c.missing]
    with together(accelerator):
        if found and not scores:
            raise ValueError(f"there is nothing to report: {'; '.join(left['why'] for left in left_out)}")
    asked = side_by_side(subject, start, ours, everything, accelerator, dtype, num_answers, answer_tokens) if num_answers else None
    with together(accelerator):
        if accelerator.is_main_process and not (found or asked):
            raise ValueError("no held-out conversation has an answer to be scored, and no prompt is answered: there is nothing to report")
        if accelerator.is_main_process:
            journals, labels, samples = journals_of(subject), {c.name: c.label for c in columns}, recipe.evaluation.bootstrap_samples
            preferences = None
            began = next((c.name for c in columns if c.name == "start"), None) or reference_without_start(subject)
            if held_out:
                preferences = compare_pairs(held_out, scores, labels, subject.format, began, recipe.dpo, samples)
                found = found[: held_out.num_chosen]
                scores = {name: {c: of_all[: held_out.num_chosen] for c, of_all in cells.items()} for name, cells in scores.items()}
            answers, texts = asked or (None, [])
            report = {
                **compare(scores, labels, subject.format, samples),
                "tuning": tuning_of(subject),
                "preferences": preferences,
                "rewards": rewarded(subject, answers, texts, began, samples) if recipe.grpo and answers else None,
                "left_out": left_out,
                **describe_data(recipe, manifest, found, cut),
                "chosen_by": subject.chosen_by,
                "made_by": {**versions(), "precision": str(dtype).removeprefix("torch."), **hardware(accelerator.device)},
                "weights": weight_hashes(subject.adapter),
                "incidents": incidents(journals.get("metrics", [])),
                "commits": {
                    "base": hub_commit(recipe.model),
                    "adapter": adapter_commit(subject.adapter) if subject.adapter else None,
                    "model": hub_commit(Model(base=subject.model)) if subject.model else None,
                },
                "answers": answers,
                "lm_eval": benchmarked(subject, benchmarks, accelerator.device, dtype) if benchmarks else None,
            }
            write_and_show(report, report_page(report, subject, manifest, everything, journals), subject)


def write_and_show(report: dict[str, Any], page: str, subject: Subject) -> None:
    """report.md, report.json, report.html and what stands on the console."""
    paths = [subject.folder / f"{subject.report}.{ending}" for ending in ("md", "json", "html")]
    write_text(paths[0], markdown(report))
    write_json(paths[1], report)
    write_text(paths[2], page)
    console.print(result_table(report))
    for line in (
        *findings(report),
        *benchmark_lines(report),
        *left_out_lines(report),
        *([cut_line(report)] if report["cut"]["answers"] else []),
    ):
        say(line)
    say(f"wrote {paths[0]} and {paths[1]}")
    say(f"with curves, conversations and answers, as a page for the browser: {paths[2]}")


def compare_runs(folders: list[Path], output: Path | None) -> None:
    """compare.html and compare.md, in the folder that all runs have in common unless another is named."""
    sets = comparison_of(folders)
    output = output or Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    write_text(output / "compare.md", markdown_of_runs(sets))
    write_text(output / "compare.html", compare_page(sets))
    for compared in sets:
        say(f"scored on {compared.data}")
        for table in tables_of_runs(compared):
            console.print(table)
        for note in notes(compared):
            say(note)
        say("")
    say(f"wrote {output / 'compare.md'} and, as a page for the browser, {output / 'compare.html'}")


def what_fits(
    everything: Sequence[Conversation], renderers: Sequence[Renderer], window: int
) -> tuple[list[Excerpt], Cut, HeldOutPairs | None]:
    """What all formats can score, of pairs the chosen answers and the rejected ones. Raises ValueError if nothing of it fits."""
    held_out = None
    if not everything:  # prompts alone
        return [], Cut(), None
    if of_pairs(everything):
        held_out = pairs_that_fit(everything, list(dict.fromkeys(renderers)), window)
        found, cut = held_out.found, held_out.cut
    elif any(renderer.is_plain_text for renderer in renderers):  # plain text is scored in pieces, so that nothing is cut
        found, cut = [Excerpt(conversation) for conversation in everything], Cut()
    else:
        found, cut = excerpts(everything, list(dict.fromkeys(renderers)), window)
    if not found:
        raise ValueError(f"no answer fits into data.max_length = {window} tokens in every format compared; raise it")
    return found, cut, held_out


def reference_without_start(subject: Subject) -> str | None:
    """The column that DPO of a new adapter began as: the base as it was trained on. None for what was not trained here."""
    if subject.elsewhere or not subject.adapter:
        return None
    return "base_quantised" if subject.recipe.model.quantization != "none" else "base_unquantised"


def tuning_of(subject: Subject) -> str | None:
    """How the run learnt: `dpo`, `grpo` or `sft`; None for what was not trained here."""
    if subject.report != "report":
        return None
    return method_of(subject.recipe)


def scores_or_reason(
    column: Column, subject: Subject, found: Sequence[Excerpt], accelerator: Accelerator, dtype: torch.dtype
) -> tuple[dict[str, list[AnswerScore]], str]:
    """Scores by format, or why a base has none: it is too large for the GPU, or not at hand. The same on all ranks.

    Raises ValueError if it is the adapter that is too large.
    """
    why = f"{column.label}: {column.missing}"
    try:
        if not any(gathered(accelerator, bool(column.missing))):
            return scores_of(column, subject, found, accelerator, dtype), ""
    except torch.OutOfMemoryError:
        why = f"{column.label}: {column.model.base} does not fit into the memory of the {accelerator.device.type} device"
    finally:
        release_memory()
    if column.name == "adapter":
        with together(accelerator):
            raise ValueError(f"{why}, even one row at a time; use a larger GPU, model.quantization: nf4 or a smaller data.max_length")
    return {}, why


def scores_of(
    column: Column, subject: Subject, found: Sequence[Excerpt], accelerator: Accelerator, dtype: torch.dtype
) -> dict[str, list[AnswerScore]]:
    """Scores by format, the same on all ranks, from the files of an earlier call where there are any."""
    files, scores = {}, {}
    with together(accelerator):
        if accelerator.is_main_process:  # it alone looks: all must know the same of them
            files = score_files(column, subject, found, dtype)
            scores = {name: [AnswerScore(**values) for values in read_json(path)] for name, path in files.items() if path.is_file()}
    scores = gathered(accelerator, scores)[0]
    missing = [name for name in column.renderers if name not in scores]
    if missing:
        with taking_turns(accelerator):
            net = load_column(column, accelerator.device, dtype, subject.recipe)
            limit = limit_for(accelerator.device.type, load_config(column.model).get_text_config().vocab_size)
    for name in missing:
        progress = partial(bar, label=f"{column.label}, {name}")
        with autocast(accelerator.device, dtype):
            scores[name] = score_within_memory(
                net, column.renderers[name], found, subject.recipe.data.max_length, limit, progress, accelerator
            )
        with together(accelerator):
            if accelerator.is_main_process:
                write_json(files[name], [asdict(s) for s in scores[name]])
    return {name: scores[name] for name in column.renderers}


def side_by_side(
    subject: Subject,
    start: str | None,
    renderer: Renderer,
    everything: Sequence[Conversation],
    accelerator: Accelerator,
    dtype: torch.dtype,
    count: int,
    max_new_tokens: int,
) -> tuple[dict[str, Any], list[str]] | None:
    """Answers of base, adapter and what it was at the start, as they stand in report.json: made, or read from files of an earlier call.
    And of each prompt all the text that stands before its answers. None if there is no prompt, and on other ranks.

    The main process makes them, and the ranks meet between two batches, so that none waits longer than one takes.
    """
    work: Iterator[Any] = iter(())
    files: dict[str, Path] = {}
    with together(accelerator):
        if accelerator.is_main_process:
            prompts = chosen_prompts(everything, renderer, count, subject.recipe.data.max_length - max_new_tokens)
            if prompts:
                asked = {"prompts": [prompt.record() for prompt in prompts], "max_new_tokens": max_new_tokens}
                asked_in = {"chat": renderer.chat.model_dump(), "tokenizer": tokenizer_hash(renderer.tokenizer)}
                files = kept_files(subject, start, "answers", dtype, **asked, **asked_in)
            work = with_bar(subject, start, renderer, files, prompts, max_new_tokens, accelerator.device, dtype)
    going = True
    while going:
        with together(accelerator):
            going = next(work, work) is not work
        going = gathered(accelerator, going)[0]
    release_memory()
    if not files:
        return None
    limit = concise_words(subject.recipe)
    columns = {name: {"label": label_of(name, subject), **as_column(read_answers(file), limit)} for name, file in files.items()}
    texts = [renderer.tokenizer.decode(renderer.prompt(p.turns), clean_up_tokenization_spaces=False) for p in prompts]
    return {**asked, "concise_words": limit, "columns": columns}, texts


def with_bar(
    subject: Subject,
    start: str | None,
    renderer: Renderer,
    files: dict[str, Path],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[None]:
    """`answer_all`, token by token."""
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing and not console.is_terminal:
        say(f"answering {len(prompts)} prompts for reading: {', '.join(missing)}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (missing and console.is_terminal)) as bars:
        batches = sum(1 for _ in range(0, len(prompts), BATCH))
        task = bars.add_task("answering, to be read side by side", total=len(missing) * batches * max_new_tokens)
        yield from answer_all(subject, start, renderer, files, prompts, max_new_tokens, device, dtype, lambda: bars.advance(task))


def kept_files(subject: Subject, start: str | None, kind: str, dtype: torch.dtype, **made_from: Any) -> dict[str, Path]:
    """Of base, start and adapter, whichever there are: where what was made with them is kept, named by what it was made from."""
    model = Model(base=subject.model, quantization="none") if subject.model else subject.recipe.model
    adapters: dict[str, str | None] = {} if subject.model else {"base": None}
    if start:
        adapters["start"] = start
    if subject.model or subject.adapter:
        adapters["adapter"] = subject.adapter
    files = {}
    for name, adapter in adapters.items():
        everything = {
            "model": base_fingerprint(model),
            "quantization": [model.quantization, model.double_quantization, quantized_from(model, dtype)],
            "adapter": fingerprint_of(adapter),
            "precision": str(dtype),
            "versions": versions(),
            **made_from,
        }
        files[name] = subject.folder / "evaluation" / f"{kind}-{name}-{hash_of(everything)[:16]}.json"
    return files


def rewarded(subject: Subject, asked: dict[str, Any], texts: Sequence[str], began: str | None, samples: int) -> dict[str, Any]:
    """What the answers are worth, by the recipe's rewards; writes it beside each of them, too."""
    rewards = subject.recipe.grpo.rewards
    say(f"rewards    {in_words(rewards, published=True)}")
    identity = {} if subject.report != "report" else read_json(subject.folder / "status.json").get("identity") or {}
    judges, left_out = judges_at_hand(rewards, identity)
    judge_answers(asked, texts, judges, left_out)
    began = began if began in (None, "start") else "base"  # it answers as it was trained on
    kept = [reward for name, reward in named(rewards).items() if name in judges]
    return {"in_words": in_words(kept, published=True), **summary(asked, judges, left_out, began, samples)}


def label_of(name: str, subject: Subject) -> str:
    """Of `base`, `start` and `adapter`, as they answer and take benchmarks: all on the base as it was trained on."""
    if name == "start":
        return START_LABEL
    if name == "base":
        return f"base, {subject.recipe.model.quantization}" if subject.recipe.model.quantization != "none" else "base"
    return "model" if subject.model else "adapter"


def benchmarked(subject: Subject, wanted: Benchmarks, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Scores of base and adapter on the harness's tasks, as they stand in report.json."""
    files = kept_files(subject, None, "lm-eval", dtype, wanted=wanted.record())
    if missing := {name: file for name, file in files.items() if not file.is_file()}:
        assistant = load_assistant(subject, device, dtype)
        for name, file in missing.items():
            say(f"lm-eval {', '.join(wanted.tasks)}: {label_of(name, subject)}")
            side = assistant.as_base() if name == "base" and assistant.has_adapter else contextlib.nullcontext()
            with side, autocast(device, dtype):
                write_json(file, harness_scores(assistant.net, assistant.renderer.tokenizer, wanted))
    columns = {name: {"label": label_of(name, subject), "results": read_json(file)} for name, file in files.items()}
    return {"version": version("lm_eval"), "limit": wanted.limit, "columns": columns}


def weight_hashes(adapter: str | None) -> dict[str, str]:
    """For the environment part of the page."""
    return dict(zip(("adapter_model.safetensors", "adapter_config.json"), fingerprint_of(adapter) or (), strict=False))


def score_files(column: Column, subject: Subject, found: Sequence[Excerpt], dtype: torch.dtype) -> dict[str, Path]:
    """By format: where the scores of this column are kept, under a name that holds everything that they were made from."""
    made_from = {
        "model": base_fingerprint(column.model),
        "quantization": [column.model.quantization, column.model.double_quantization, quantized_from(column.model, dtype)],
        "adapter": fingerprint_of(column.adapter),
        "precision": str(dtype),
        "window": subject.recipe.data.max_length,
        "conversations": hash_of([[e.answers_before, dataset.conversation_record(e.conversation)] for e in found]),
        "versions": versions(),
    }
    files = {}
    for name, renderer in column.renderers.items():
        key = hash_of({**made_from, "chat": renderer.chat.model_dump(), "tokenizer": tokenizer_hash(renderer.tokenizer)})[:16]
        files[name] = subject.folder / "evaluation" / f"{column.name}-{name}-{key}.json"
    return files


def quantized_from(model: Model, dtype: torch.dtype) -> str | None:
    """The type that the weights had when they were quantised: this run's, if it quantises them itself."""
    if model.quantization == "none":
        return None
    record = record_of(model.base)
    return record["precision"] if record else str(dtype).removeprefix("torch.")


def load_column(column: Column, device: torch.device, dtype: torch.dtype, recipe: Recipe) -> nn.Module:
    """The base, or the base under its adapter, to be scored in the faster ways that the recipe allows."""
    base = load_base(column.model, dtype, device)
    net = base if column.adapter is None else load_adapter(base, column.adapter)
    fast_paths.take_to_score(net, recipe.speed, dtype, recipe.data.max_length)
    return net


def limit_for(device_type: str, vocab_size: int) -> Limit:
    """How much to score at once. A large vocabulary needs more memory for its logits than the model for everything else."""
    of_logits = LOGIT_BYTES.get(device_type, LOGIT_BYTES["cpu"]) // (vocab_size * 4 * 3)
    return Limit(rows=256, tokens=min(TOKENS_AT_ONCE.get(device_type, TOKENS_AT_ONCE["cpu"]), of_logits))


def fingerprint_of(adapter: str | None) -> list[str] | None:
    """Hashes of an adapter's weights and of its config, which holds its scale."""
    if adapter is None:
        return None
    return [sha256(adapter_folder(adapter) / name) for name in ("adapter_model.safetensors", "adapter_config.json")]


def bar(batches: Sequence[Any], label: str) -> Any:
    if not console.is_terminal:
        say(f"scoring {label}: {len(batches)} batches")
    return track(batches, description=f"scoring {label}", console=console, transient=True, disable=not console.is_terminal)


def end_at_once(*_: object) -> None:
    """As SIGTERM does by itself, but clearing away the file that was being written."""
    say("stopped; the same command goes on, and keeps the scores of the models and formats that are done")
    raise SystemExit(128 + signal.SIGTERM)


def main(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    if args.compare:
        compare_runs(args.compare, args.output)
        return
    tasks = tuple(filter(None, (args.lm_eval or "").split(",")))
    wanted = Benchmarks(tasks, args.lm_eval_tasks_folder, args.lm_eval_limit) if tasks else None
    asked = {"num_answers": args.answers, "answer_tokens": args.answer_tokens}
    run(args.target, args.overrides, args.adapter, args.model, args.format, **asked, benchmarks=wanted)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_at_once)
    with exit_at_once_on_errors():
        with_clear_errors(lambda: main(args), debug=args.debug)
