"""What can be known of a run before it is started: each check says what it found, and what to do where that will not do.

Checks read the recipe, the accelerate config, the prepared rows and the output folder, and change none of them.
"""

import fcntl
import importlib.util
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from qlora_suite import accelerate_config, adapter, checkpoint, compatibility, grpo, prequantized, rewards, run_facts, start_from
from qlora_suite.base_config import load_tokenizer
from qlora_suite.base_files import weight_files
from qlora_suite.batches import Order, check_division
from qlora_suite.cards import Card
from qlora_suite.chat import Renderer
from qlora_suite.compiled import check_compiler
from qlora_suite.dataset import Rows
from qlora_suite.disk_space import existing, need_of, size_text
from qlora_suite.engine import TRACKER_PACKAGES
from qlora_suite.evaluation import check_dev_rows
from qlora_suite.files import read_json
from qlora_suite.memory_estimate import Estimate, Sampled, fits
from qlora_suite.micro_batch import HEADROOM, in_words
from qlora_suite.model import BF16_CAPABILITY, PRECISIONS, check_reachable
from qlora_suite.module_table import Skeleton
from qlora_suite.recipe import Recipe
from qlora_suite.remarks import remarks
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.run_place import check_path, check_run_folder
from qlora_suite.tracking import read_journal
from qlora_suite.train_prompts import Prompts
from qlora_suite.wording import counted

Level = Literal["ok", "look", "fail"]
ROWS_LOOKED_AT = 500
LITTLE_SUPERVISED, MANY_CUT, FEW_ENDS, MUCH_PADDING = 0.1, 0.1, 0.5, 0.1
TABLED_SIZES = (1e9, 15e9)
"""Weights in matrix products of the models to which the table's rates apply: small ones keep no card busy."""
SHORTEST_JOB = 10 * 60.0
"""slurm/*.sbatch ask a run to save and stop minutes before the job's end, and loading a base takes some at its beginning."""
WARM_UP_STEPS = 3
"""First steps of a run, whose rate is no rate."""


@dataclass(frozen=True)
class Finding:
    level: Level
    what: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Place:
    """Where it would run."""

    values: Mapping[str, Any]
    """The accelerate config."""
    engine: str
    processes: int
    cpu: bool


@dataclass(frozen=True)
class Rate:
    """Tokens a second of one process."""

    tokens: float
    source: str
    device: str = ""
    """Of the run that it was measured in; empty for a tabled one."""
    answer_tokens: float | None = None
    """Of an answer in that run, if it sampled them (GRPO): then the rate is one of sampling and learning together."""

    def is_of(self, where: Place, card: Card | None) -> bool:
        """Was it measured on such hardware?"""
        if where.cpu:
            return self.device.startswith("CPU")
        return card is not None and bool(self.device) and set(_words(self.device)) >= set(_words(card.name)[:2])


def refused(what: str, error: Exception) -> Finding:
    """An error's sentence, cut where it begins to say what to do."""
    text, _, remedy = str(error).partition("; ")
    return Finding("fail", what, " ".join(text.split()), " ".join(remedy.split()))


def caught(what: str, check: Callable[[], Finding | None]) -> Finding | None:
    """The finding; a ValueError or OSError is one too."""
    try:
        return check()
    except (ValueError, OSError) as error:
        return refused(what, error)


# ---- where it runs ----------------------------------------------------------------------------------------------------------------


def place(config: Path, processes: int | None) -> Place:
    """What the config asks for. Raises ValueError if it cannot be read or starts other processes than are asked for."""
    values = accelerate_config.check_config(config, 1, processes)
    cpu = bool(values.get("use_cpu")) or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    count = 1 if values["distributed_type"] == "NO" else processes or int(values.get("num_processes") or 1)
    engine = accelerate_config.engine_of(dict(values))
    return Place(values, compatibility.ONE if engine == compatibility.DDP and count == 1 else engine, count, cpu)


def config_finding(recipe: Recipe, where: Place) -> Finding:
    """Does the engine take this config and this recipe?"""
    found = [*accelerate_config.objections(dict(where.values)), *compatibility.refusals(recipe, where.engine)]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        text, _, remedy = found[0].replace(": remove", "; remove").replace(": use", "; use").replace(": set", "; set").partition("; ")
        return Finding("fail", "engine", text + more, remedy)
    on = "the CPU" if where.cpu else "1 GPU" if where.processes == 1 else f"{where.processes} GPUs"
    return Finding("ok", "engine", f"{where.engine} on {on}; nothing in recipe or config stands against it")


def gpus_finding(where: Place, card: Card | None, named: bool) -> Finding:
    """Are there as many GPUs as processes? Only told on the machine that will train."""
    here = torch.cuda.device_count()
    if where.cpu:
        return Finding("ok", "hardware", f"{os.cpu_count()} CPU cores, {size_text(memory_of_machine())} of memory free")
    if card is None:
        return Finding("look", "hardware", "no GPU here and no --card named: nothing is compared with a card", "add e.g. --card t4")
    if not named and here and where.processes > here:
        return Finding(
            "fail",
            "hardware",
            f"{where.processes} processes want a GPU each, and here are {here}",
            f"accelerate launch --num_processes {here} (several machines: --card NAME says what they have)",
        )
    major, minor = card.capability
    many = f"{where.processes} x " if where.processes > 1 else ""
    return Finding("ok", "hardware", f"{many}{card.name}, {size_text(card.memory)} as CUDA reports, compute capability {major}.{minor}")


def precision(where: Place, card: Card | None) -> tuple[torch.dtype, Finding]:
    """What the run computes in, as engine.start will decide it on this card."""
    asked = str(where.values.get("mixed_precision") or "no").lower()
    if asked not in PRECISIONS:
        return torch.float16, Finding("fail", "precision", f"mixed_precision: {asked} is not supported", "use bf16, fp16 or no")
    if where.cpu:
        dtype = PRECISIONS[asked] or torch.float32
        return dtype, Finding("ok", "precision", f"{_name(dtype)} on the CPU")
    dtype = PRECISIONS[asked] or (card.dtype if card else torch.bfloat16)
    if card and asked == "bf16" and card.capability < BF16_CAPABILITY:
        return torch.float16, Finding(
            "fail", "precision", f"bf16 is asked for, and {card.name} has no bf16 units", "use accelerate_configs/single_t4.yaml (fp16)"
        )
    why = "as the config asks" if asked != "no" else "which follows the card" if card else "from Ampere on; float16 before"
    if card and dtype == torch.float16 and card.capability >= BF16_CAPABILITY:
        return dtype, Finding(
            "look",
            "precision",
            f"float16, {why}; {card.name} has bf16 units, which never overflow",
            "use accelerate_configs/single_gpu.yaml",
        )
    return dtype, Finding("ok", "precision", f"{_name(dtype)}, {why}; trained weights and optimiser in float32")


def step_finding(recipe: Recipe, where: Place) -> Finding:
    """Do the rows of a step, or its prompts, divide among the processes?"""
    rows = recipe.train.rows_per_step
    if recipe.grpo is not None:
        answers = grpo.answers_of_a_process(recipe, where.processes)
        each = f", {answers} of them on each of {where.processes}" if where.processes > 1 else ""
        return Finding(
            "ok", "step", f"{counted(rows, 'prompt')} x {recipe.grpo.group_size} answers = {rows * recipe.grpo.group_size}{each}"
        )
    check_division(rows, where.processes, recipe.train.micro_batch)
    each = f" = {rows // where.processes} on each of {where.processes}" if where.processes > 1 else ""
    return Finding("ok", "step", f"{counted(rows, 'row')}{each}")


def compiler_finding(where: Place) -> Finding | None:
    """What DeepSpeed needs: itself, and on a CPU a compiler. For GPUs nothing is compiled, for the optimisers are torch's."""
    if where.engine not in (compatibility.ZERO2, compatibility.ZERO3):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return Finding("fail", "deepspeed", "the package is not installed", "pip install deepspeed, or use ddp.yaml or fsdp.yaml")
    if not where.cpu:
        return Finding("ok", "deepspeed", "installed; for GPUs it compiles nothing that is used here")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return Finding(
            "fail",
            "deepspeed",
            f"between CPU processes it compiles its exchange of gradients, and there is no {' and no '.join(missing)}",
            "install them (apt-get install g++ ninja-build, module load gcc), or use ddp.yaml",
        )
    return Finding("ok", "deepspeed", "installed, with the compiler that it wants on CPUs")


def compile_finding(recipe: Recipe, where: Place) -> Finding | None:
    """What speed.compile needs of this machine, if it is asked for. Raises ValueError if that is missing."""
    if not recipe.speed.compile:
        return None
    check_compiler(torch.device("cpu" if where.cpu else "cuda"))
    return Finding("ok", "compile", "a compiler is here; the first steps take a minute or more longer, each kind of layer once")


def trackers_finding(recipe: Recipe) -> Finding | None:
    """Are the trackers' packages there?"""
    asked = recipe.tracking.trackers
    missing = [t for t in asked if not any(importlib.util.find_spec(p) for p in TRACKER_PACKAGES.get(t, (t,)))]
    if missing:
        packages = " ".join(TRACKER_PACKAGES.get(t, (t,))[0] for t in missing)
        return Finding("fail", "trackers", f"tracking.trackers: {', '.join(missing)} not installed", f"pip install {packages}")
    return Finding("ok", "trackers", f"{', '.join(asked)} beside metrics.jsonl") if asked else None


# ---- the base ---------------------------------------------------------------------------------------------------------------------


def base_finding(recipe: Recipe, config: PreTrainedConfig) -> Finding:
    """Are its files here, for nodes without a network, and are they in the form that the recipe wants? Run with HF_HUB_OFFLINE=1, or
    it would fetch what is missing.
    """
    folder = Path(recipe.model.base)
    prequantized.check_quantization(recipe.model, config, None)
    load_tokenizer(recipe.model)
    if not recipe.model.random_init:
        try:
            check_reachable(recipe.model)
            _check_weights_are_whole(recipe)
        except ValueError as error:
            remedy = "copy them again" if folder.is_dir() else f"on the login node: bash slurm/prefetch.sh {recipe.command_line}"
            why = f": {error}" if str(error).startswith("model") else " (model.safetensors, or its index and every part)"
            return Finding("fail", "base", f"the weights of {recipe.model.base} are not all here{why}", remedy)
    what = "config and tokenizer" if recipe.model.random_init else "config, tokenizer and weights"
    where = "in a folder here" if folder.is_dir() else "whole in the hub's cache"
    return Finding("ok", "base", f"{recipe.model.base}: {what} {where}; jobs need no network")


def _check_weights_are_whole(recipe: Recipe) -> None:
    """Raises ValueError if a file of the weights is shorter than its header says: a download or a copy that was cut short."""
    for file in weight_files(recipe.model):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} is damaged ({str(error).strip()})") from None


def start_finding(recipe: Recipe, manifest: Mapping[str, Any]) -> Finding | None:
    """Can the run begin with the adapter that is named, as far as can be said without loading it?"""
    remark = start_from.check_recipe(recipe, manifest)
    if recipe.adapter == "none" or recipe.adapter.start_from is None:
        return None
    if remark:
        return Finding("look", "start", remark, "take the data and the split of that run, if what is held out is to be judged on")
    return Finding("ok", "start", f"begins with the adapter of {recipe.adapter.start_from}")


def rewards_finding(recipe: Recipe) -> Finding | None:
    """Can the functions that judge be run?"""
    if recipe.grpo is None:
        return None
    rewards.judges_of(recipe.grpo.rewards)
    return Finding("ok", "rewards", rewards.in_words(recipe.grpo.rewards))


def coverage_finding(recipe: Recipe, skeleton: Skeleton) -> Finding:
    """Which modules are adapted; that the targets cover the model was checked when the adapter was put on."""
    if recipe.adapter == "none":
        return Finding("ok", "adapter", f"none: all {skeleton.num_trained:,} weights are trained")
    names = [re.sub(r"\.base_layer$", "", n.removeprefix("base_model.model.")) for n in adapter.linear_names(skeleton.net)]
    own = adapter.coverage([n for n in names if ".lora_" not in n], recipe.adapter.targets)
    nothing = [target for target, modules in own.matched.items() if not modules]
    adapted = sum(len(own.modules[m]) for m in {m for modules in own.matched.values() for m in modules})
    whole = sum(map(len, own.modules.values()))
    base = sum(one.parameters for one in skeleton.weights)
    share = f"{skeleton.num_trained:,} trained ({100 * skeleton.num_trained / (base + skeleton.num_trained):.2f} %)"
    text = f"{adapted} of {whole} linear modules in {own.num_layers} layers, rank {recipe.adapter.rank}: {share}"
    if nothing:
        return Finding("look", "adapter", f"{text}; {', '.join(nothing)} match nothing", "correct adapter.targets, or use all-linear")
    if adapted < whole:
        left = ", ".join(sorted(m for m in own.modules if not any(m in modules for modules in own.matched.values())))
        return Finding("look", "adapter", f"{text}; {left} stay as they are", "all-linear adapts these too, if that is wanted")
    return Finding("ok", "adapter", text)


# ---- the data -----------------------------------------------------------------------------------------------------------------------


def data_findings(recipe: Recipe, manifest: Mapping[str, Any], rows: Rows, dev: Rows, config: PreTrainedConfig) -> list[Finding]:
    """Of prepared data that is whole and this recipe's: the template, what is learnt, lengths."""
    counts = manifest["counts"]["train"]
    found = [_template(recipe, manifest), _lengths(recipe, rows, config, counts)]
    if recipe.grpo is None:  # which learns from no answer that stands there
        found += [_ends(recipe, manifest, rows), _supervised(rows), _cut(recipe, counts)]
    found.append(caught("development", lambda: _dev(recipe, dev)))
    servable, because = run_facts.servable_as(recipe, manifest)
    found.append(Finding("ok", "servable", f"as {'an adapter' if servable == 'adapter' else servable}: {because}"))
    return found


def _supervised(rows: Rows) -> Finding:
    share = rows.num_supervised.sum() / max(1, rows.lengths.sum())
    level: Level = "fail" if share == 0 else "look" if share < LITTLE_SUPERVISED else "ok"
    remedy = "" if level == "ok" else "look at the example that prepare_data.py prints; chat.loss_on and data.learn_after decide it"
    return Finding(level, "supervised", f"{share:.1%} of {int(rows.lengths.sum()):,} tokens are learnt", remedy)


def _template(recipe: Recipe, manifest: Mapping[str, Any]) -> Finding:
    agreement = manifest.get("chat_template")
    if recipe.chat.format == "text" or not agreement:
        return Finding("ok", "template", "plain text has none")
    checked, agreed = agreement["checked"], agreement["agreed"]
    text = f"{recipe.chat.format}: apply_chat_template gives our ids in {agreed:,} of {checked:,} conversations compared"
    if checked and agreed < checked:
        level: Level = "fail" if agreed == 0 else "look"
        return Finding(
            level, "template", text, "other programs would ask in another format: prepare again, and report the base if it stays"
        )
    return Finding("ok", "template", text)


def _ends(recipe: Recipe, manifest: Mapping[str, Any], rows: Rows) -> Finding:
    """A model learns to stop from the end token behind each answer that is learnt."""
    tokenizer = run_facts.prepared_tokenizer(Path(recipe.data.prepared))
    if recipe.chat.format == "text":
        ends: tuple[int, ...] = (tokenizer.eos_token_id,)
    else:
        ends = Renderer(tokenizer, recipe.chat, RoleMarkers.from_json(manifest["role_markers"])).stop_token_ids
    seen = ended = 0
    for number in np.linspace(0, len(rows) - 1, min(len(rows), ROWS_LOOKED_AT), dtype=int):
        row, start = rows[int(number)], 0
        for length in row["lengths"]:
            ids, learnt = row["input_ids"][start : start + length], row["supervised"][start : start + length]
            start += length
            if learnt.any():
                seen += 1
                ended += bool(np.isin(ids[learnt], ends).any())
    share = ended / max(1, seen)
    text = f"the end token is learnt in {ended:,} of {seen:,} conversations looked at"
    if ended == 0:
        return Finding("fail", "end token", f"{text}: the model would never stop", "give the tokenizer an eos_token, and prepare again")
    if share < FEW_ENDS:
        return Finding("look", "end token", text, "most are cut inside an answer: raise data.max_length, or data.too_long: drop")
    return Finding("ok", "end token", text)


def _lengths(recipe: Recipe, rows: Rows, config: PreTrainedConfig, counts: Mapping[str, Any]) -> Finding:
    longest = ", ".join(f"{n:,}" for n in np.sort(rows.lengths)[::-1][:3])
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    padding = counts["padding_share"]
    one = "one pair" if recipe.dpo else "one conversation"
    how = f"packed, {padding:.1%} padding" if recipe.data.packing else f"{one} a row, neighbours of like length"
    text = f"{counted(len(rows), 'row')} ({how}); the longest have {longest} tokens"
    # of a pair's row, the two conversations have positions of their own
    if window and min(int(rows.lengths.max()), recipe.data.max_length) > window:
        return Finding("look", "rows", f"{text}, and the base was made for {window:,}", f"data.max_length={window}, and prepare again")
    if recipe.data.packing and padding > MUCH_PADDING:
        return Finding("look", "rows", text, "much of each row is empty: a longer or much shorter data.max_length packs better")
    return Finding("ok", "rows", text)


def _cut(recipe: Recipe, counts: Mapping[str, Any]) -> Finding:
    cut, dropped, unit = counts["cut_conversations"], counts["dropped_too_long"], "pairs" if recipe.dpo else "conversations"
    whole = counts["kept"] + dropped
    fates = {"cut, and lose what is behind": cut, "dropped": dropped}
    lost = ", ".join(f"{count:,} ({count / whole:.1%}) are {fate}" for fate, count in fates.items() if count)
    text = f"of {whole:,} {unit} at {recipe.data.max_length:,} tokens: {lost or 'all are whole'}"
    if cut + dropped > MANY_CUT * whole:
        return Finding("look", "cut", text, "raise data.max_length, if base and card allow it")
    return Finding("ok", "cut", text)


def _dev(recipe: Recipe, dev: Rows) -> Finding:
    check_dev_rows(recipe.evaluation, len(dev))
    every = recipe.evaluation.every_steps
    if every is None:
        return Finding("ok", "development", "not evaluated while training: the last step is the result")
    often = "every step" if every == 1 else f"every {every:,} steps"
    return Finding("ok", "development", f"{counted(len(dev), 'row')}, {often}: the best checkpoint is the result")


def prompts_finding(recipe: Recipe, prompts: Prompts, config: PreTrainedConfig) -> Finding:
    """Which of the prepared rows GRPO asks, and whether base and data.max_length have room for them and their answers."""
    longest, most = int(prompts.lengths.max()), recipe.grpo.max_new_tokens
    text = f"{prompts}; the longest has {longest:,} tokens, and its answer up to {most:,}"
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window and longest + most > window:
        return Finding("look", "prompts", f"{text}, and the base was made for {window:,}", f"data.max_length={window}, and prepare again")
    if prompts.num_too_long > MANY_CUT * len(prompts.rows):
        return Finding("look", "prompts", text, "raise data.max_length, which prompt and answer share, or lower grpo.max_new_tokens")
    return Finding("ok", "prompts", text)


def remark_findings(recipe: Recipe, order: Order) -> list[Finding]:
    """What train.py would note at its start."""
    return [Finding("look", "note", sentence, "") for sentence in remarks(recipe, order.num_rows, order.num_steps)]


# ---- memory -----------------------------------------------------------------------------------------------------------------------


def memory_finding(estimate: Estimate, memory: int, measured: bool, recipe: Recipe) -> Finding:
    """Does the peak leave the headroom that train.py's trial wants?"""
    limit, peak = HEADROOM * memory, estimate.total
    how = "measured" if measured else "estimated"
    rows = estimate.limit.tokens
    way = f"{rows:,} tokens at once, checkpointing {in_words(estimate.checkpointing)}"
    text = f"{size_text(peak)} {how} of {size_text(memory)} ({peak / memory:.0%}; up to {HEADROOM:.0%} is used): {way}"
    if fits(estimate, memory):
        return Finding("ok" if peak < 0.98 * limit else "look", "memory", text, "" if peak < 0.98 * limit else "close: see if it holds")
    remedies = []
    if recipe.train.gradient_checkpointing not in (True, "auto"):
        remedies.append("train.gradient_checkpointing=auto")
    if recipe.train.micro_batch not in (1, "auto"):
        remedies.append("train.micro_batch=auto")
    if recipe.model.quantization != "nf4" and recipe.adapter != "none":
        remedies.append("model.quantization=nf4")
    shorter = f"data.max_length={max(256, recipe.data.max_length // 2)} (and prepare again)"
    if recipe.grpo is not None:
        shorter = f"grpo.max_new_tokens={max(1, recipe.grpo.max_new_tokens // 2)}"
    remedies = remedies or [f"{shorter}, a lower adapter.rank"]
    return Finding("fail", "memory", f"{text}: it does not fit", " or ".join([*remedies, "a larger card, or fsdp.yaml on several"][:2]))


def sampling_finding(recipe: Recipe, found: Sampled, answers: int, longest: int, memory: int | None) -> Finding:
    """Of GRPO: how many of a process's `answers` are sampled at once, and in what memory?"""
    many = f"{answers:,} answers" if found.answers == answers else f"{found.answers:,} of {answers:,} answers"
    needs = f"{size_text(found.total)} estimated, {size_text(found.cache)} of it keys and values"
    text = f"{many} of up to {longest:,} tokens at once: {needs}"
    if memory is not None and not fits(found, memory):
        shorter = f"grpo.max_new_tokens={max(1, recipe.grpo.max_new_tokens // 2)}"
        return Finding("fail", "sampling", f"{text}; it does not fit", f"{shorter}, or a larger card")
    if found.answers < answers:
        return Finding("look", "sampling", text, "fewer at once take longer: more memory, or a lower grpo.max_new_tokens, helps")
    return Finding("ok", "sampling", text)


def memory_of_machine() -> int:
    """Bytes that are free for programs; all there are where the system does not say."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- time and disk ------------------------------------------------------------------------------------------------------------------


def rate_of_run(run: Path) -> Rate:
    """Median tokens a second of one process in an earlier run. Raises ValueError if it has none."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    steps = [r for r in read_journal(path) if r.get("tokens_per_second")]
    values = [r["tokens_per_second"] for r in steps]
    if len(values) <= WARM_UP_STEPS:
        raise ValueError(f"{path} has no rate: it wants more than {WARM_UP_STEPS} steps; give --rate a finished run or its metrics.jsonl")
    about = read_json(path.parent / "run.json") if (path.parent / "run.json").exists() else {}
    processes, device = about.get("processes", 1), about.get("hardware", {}).get("device", "unknown hardware")
    source = f"{path} on {processes} x {device}" if processes > 1 else f"{path} on {device}"
    lengths = [r["answer_tokens"] for r in steps[WARM_UP_STEPS:] if "answer_tokens" in r]
    return Rate(float(np.median(values[WARM_UP_STEPS:])) / processes, source, device, float(np.median(lengths)) if lengths else None)


def tabled_rate(skeleton: Skeleton, card: Card | None, checkpointing: float) -> Rate | None:
    """From the operations that a token takes, and what a published run on such a card sustained."""
    products = sum(one.parameters for one in skeleton.weights if len(one.shape) == 2 and "embed" not in one.name)
    adapts = any(".lora_" in name for name in skeleton.trained)
    if card is None or card.teraflops is None or not adapts or not TABLED_SIZES[0] <= products <= TABLED_SIZES[1]:
        return None
    operations = (4 + 2 * checkpointing) * products + 6 * skeleton.num_trained  # forward, to the inputs, and recomputed
    return Rate(card.teraflops * 1e12 / operations, f"tabled, {card.teraflops:g} TFLOP/s: {card.source}")


def known_rate(recipe: Recipe, skeleton: Skeleton | None, where: Place, card: Card | None, estimate: Estimate | None) -> Rate | None:
    """That of the run in output.dir, if such hardware made it; else the table's; else none."""
    try:
        rate = rate_of_run(Path(recipe.output.dir))
    except (ValueError, OSError):
        rate = None
    if rate is not None and rate.is_of(where, card):
        return rate
    return tabled_rate(skeleton, card, estimate.checkpointing) if skeleton and estimate else None


def tokens_of_run(order: Order) -> int:
    """Tokens that the run sees, without padding."""
    mean = float(np.mean(np.asarray(order.lengths)))
    return round(min(order.num_positions, order.num_steps * order.rows_per_step) * mean)


def time_finding(order: Order, rate: Rate | None, where: Place, card: Card | None) -> tuple[float | None, Finding]:
    """(seconds of the training steps, or None; the finding)"""
    tokens = tokens_of_run(order)
    what = f"{counted(order.num_steps, 'step')} x {tokens / order.num_steps:,.0f} tokens = {tokens:,}"
    if rate is None:
        on = "for this hardware" if where.cpu or card is None else f"for such a model on a {card.name}"
        return None, Finding("look", "time", f"{what}; no rate is known {on}", "--rate RUN takes that of an earlier run; 20 steps make one")
    speed = rate.tokens * where.processes
    text = f"{clock(tokens / speed)} for {what}, at {speed:,.0f} tokens/s ({rate.source})"
    if rate.device and not rate.is_of(where, card):
        return tokens / speed, Finding("look", "time", text, "that run was on other hardware: a run of 20 steps here gives its rate")
    if rate.answer_tokens is not None:
        return tokens / speed, Finding("look", "time", text, "that run sampled its answers as well: a run of 20 steps gives a rate without")
    return tokens / speed, Finding("ok", "time", text)


def sampled_time_finding(
    recipe: Recipe, order: Order, rate: Rate | None, where: Place, card: Card | None, checkpointing: float
) -> tuple[float | None, Finding]:
    """Of GRPO. `order`: of the prompts. An earlier run of GRPO tells what sampling, judging and learning take together; any other rate is
    one of training passes, and no word about the rest.
    """
    config, steps = recipe.grpo, order.num_steps
    answers = min(order.num_positions, steps * order.rows_per_step) * config.group_size
    of_prompt = tokens_of_run(order) * config.group_size / answers
    what = f"{counted(steps, 'step')} x {answers / steps:,.0f} answers"
    if rate is None:
        on = "for this hardware" if where.cpu or card is None else f"for such a model on a {card.name}"
        text = f"{what} of up to {of_prompt + config.max_new_tokens:,.0f} tokens with their prompts; no rate is known {on}"
        return None, Finding("look", "time", text, "--rate RUN takes that of an earlier run of GRPO; 20 steps make one")
    speed = rate.tokens * where.processes
    if rate.answer_tokens is None:
        # forward, backward and a share of forward again is what the rate is of; the reference goes forward once
        passes = config.updates + (1 / (2 + checkpointing) if config.beta else 0)
        seconds = answers * (of_prompt + config.max_new_tokens) * passes / speed
        text = f"up to {clock(seconds)} for the training passes of {what}, at {speed:,.0f} tokens/s ({rate.source})"
        remedy = "sampling comes on top: --rate RUN takes the rate of an earlier run of GRPO; 20 steps make one"
        return None, Finding("look", "time", f"{text}; what sampling takes is not known", remedy)
    each = of_prompt + min(rate.answer_tokens, config.max_new_tokens)
    tokens = round(answers * each)
    text = f"{clock(tokens / speed)} for {what} x {each:,.0f} tokens = {tokens:,}, at {speed:,.0f} tokens/s ({rate.source})"
    if rate.device and not rate.is_of(where, card):
        return tokens / speed, Finding("look", "time", text, "that run was on other hardware: a run of 20 steps here gives its rate")
    return tokens / speed, Finding("ok", "time", text)


def limit_seconds(text: str) -> float:
    """A time limit as sbatch takes it: 90, 90:00, 4:00:00, 2-12, 2-12:30:00. Raises ValueError for another form."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"--time {text} is no time; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = (0, *parts)[-3:]
    return hours * 3600 + minutes * 60 + seconds


def slurm_limit() -> float | None:
    """Seconds that are left to the job that this runs in."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return max(0.0, int(end) - time.time()) if end.isdigit() else None


def limit_finding(seconds: float | None, limit: float) -> Finding:
    """Does it end within a job's time, or how often does it go on?"""
    if seconds is not None and seconds <= 0.9 * limit:
        return Finding("ok", "time limit", f"{clock(limit)} is enough")
    if limit < SHORTEST_JOB:
        return Finding(
            "fail",
            "time limit",
            f"{clock(limit)}: jobs are asked to save and stop minutes before their end, and this one would hardly have begun",
            "a longer limit: sbatch --time, slurm/submit.sh --time",
        )
    if seconds is None:
        return Finding("look", "time limit", f"{clock(limit)}, and how long it takes is not known", "--rate RUN gives a rate")
    jobs = math.ceil(seconds / (0.9 * limit))
    return Finding(
        "look",
        "time limit",
        f"{clock(limit)} is not enough: {jobs} jobs, each going on from the last checkpoint",
        f"slurm/submit.sh requeues by itself; where that is forbidden: --chain {jobs}",
    )


def disk_finding(recipe: Recipe, skeleton: Skeleton) -> Finding:
    """Checkpoints that are kept, one being written, and the result, against what is free."""
    folder = Path(recipe.output.dir)
    need = need_of(recipe, skeleton.num_trained)
    free = shutil.disk_usage(existing(folder)).free
    text = f"{size_text(need.total)} needed ({need}), {size_text(free)} free for {folder}"
    if need.total > free:
        return Finding("fail", "disk", text, "another output.dir, or checkpoints.keep: 2")
    tight = need.total > 0.8 * free
    return Finding("look" if tight else "ok", "disk", text, "nearly full: make room" if tight else "")


# ---- the output folder ----------------------------------------------------------------------------------------------------------------


def output_finding(recipe: Recipe, manifest: Mapping[str, Any] | None) -> Finding:
    """Can it be written, is another run at it, and would this one go on there or be refused?"""
    check_path("output.dir", recipe.output.dir)
    folder = Path(recipe.output.dir)
    nearest = existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "is a file" if nearest.is_file() else "may not be written"
        return Finding("fail", "output", f"{folder}: {nearest} {why}", "set output.dir to a folder of yours on the shared disk")
    if not folder.is_dir() or not any(folder.iterdir()):
        return Finding("ok", "output", f"{folder} is new, and can be written")
    if holder := _holder(folder):
        return Finding("fail", "output", f"another run ({holder}) is writing to {folder}", "wait for it, stop it, or set output.dir")
    check_run_folder(folder)
    status = read_json(folder / "status.json") if (folder / "status.json").is_file() else {}
    steps = checkpoint.steps(folder / "checkpoints")
    then = status.get("identity") or {}
    if manifest is not None and then:
        own = rewards.fingerprints(recipe.grpo.rewards) if recipe.grpo else {}
        checkpoint.check_identity(then, {**run_facts.identity(recipe, manifest), **own}, folder)
    if status.get("state") == "finished":
        return Finding("look", "output", f"the run in {folder} is finished: nothing would be trained", "set output.dir to train anew")
    good = next((s for s in reversed(steps) if not checkpoint.complaint_about_checkpoint(folder / "checkpoints" / f"step-{s:06d}")), None)
    if steps and good is None:
        return Finding("fail", "output", f"every checkpoint in {folder} is damaged", "put a good one back, or set output.dir")
    where = f"goes on from step {good}" if good is not None else "starts again: it made no checkpoint"
    return Finding("ok", "output", f"the run in {folder} is this one, and {where}")


def _holder(folder: Path) -> str | None:
    """Who holds the folder's lock, without taking it."""
    path = folder / ".lock"
    if not path.is_file():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"process {file.read().strip() or 'unknown'}"
        except OSError:  # a file system without locks
            return None
    return None


def clock(seconds: float) -> str:
    """90 -> "2 min"; 14,400 -> "4 h 00 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(name: str) -> list[str]:
    """`NVIDIA A100-SXM4-80GB` and `A100 80 GB` have words in common."""
    return re.findall(r"[a-z]+\d+|\d+|ti\b", name.lower().replace("rtx ", "rtx"))
