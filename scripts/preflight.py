#!/usr/bin/env python
"""One page before a run is started or a queue slot is spent: does it fit, how long does it take, what would fail?

    python scripts/preflight.py recipes/phi2_oasst1.yaml --config accelerate_configs/single_t4.yaml --card t4
    python scripts/preflight.py recipes/phi2_oasst1.yaml --config accelerate_configs/ddp.yaml --processes 4 --card a100-80gb --time 4:00:00
    python scripts/preflight.py recipes/quickstart.yaml --config accelerate_configs/cpu.yaml --rate runs/quickstart

Seconds on a login node: no GPU is needed and no weights are loaded. Memory is estimated by running the real model on tensors without
memory; where a GPU is and no --card is named (or --measure is given, for the CPU too), the base is loaded and the longest step made.
Hours come from --rate (an earlier run), from the run in output.dir, or from a table of published runs; the page says which.

Every line is ok (green), to be looked at (yellow) or will fail (red), and names one remedy. Exit code: 1 if a line is red, 2 for a
mistake in the recipe or the arguments.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # as compute nodes are: what is missing is said, not fetched. The hub's client reads it once

from qlora_suite import cards
from qlora_suite.command_line import parser_for, read_arguments, read_recipe, with_clear_errors

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("recipe", help="a recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.max_length=1024")
    parser.add_argument("--config", type=Path, required=True, help="the accelerate config, e.g. accelerate_configs/single_t4.yaml")
    parser.add_argument("--card", help=f"the GPU that it will run on: {', '.join(cards.KNOWN)}, or its memory: 24GiB")
    parser.add_argument("--processes", type=int, help="processes over all machines, one a GPU (what the config says)")
    parser.add_argument("--time", help="time limit of a job, as sbatch takes it: 4:00:00 (inside a job: what is left)")
    parser.add_argument("--rate", type=Path, metavar="RUN", help="take the tokens a second from this run's metrics.jsonl")
    parser.add_argument("--measure", action="store_true", help="load the base and make the longest step here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything on the page, and more digits")
    args = read_arguments(parser, read_recipe)

import sys
from dataclasses import asdict, replace

import torch

from qlora_suite import accelerate_config, compatibility, dataset, measured_step, memory_estimate, module_table
from qlora_suite import preflight_checks as checks
from qlora_suite.base_config import load_config
from qlora_suite.batches import Order
from qlora_suite.files import write_json
from qlora_suite.preflight_checks import Finding, caught, refused
from qlora_suite.preflight_page import page_console, show, show_findings
from qlora_suite.recipe import Recipe
from qlora_suite.train_prompts import read_prompts


def preflight(
    recipe: Recipe,
    config: Path,
    card_name: str | None = None,
    processes: int | None = None,
    time_limit: str | None = None,
    rate_of: Path | None = None,
    measure: bool = False,
    json_file: Path | None = None,
) -> bool:
    """Show the page. True if nothing on it is red."""
    named = cards.named(card_name) if card_name else None
    limit = checks.limit_seconds(time_limit) if time_limit else checks.slurm_limit()
    rate = checks.rate_of_run(rate_of) if rate_of else None
    findings: list[Finding] = []
    console = page_console()

    # ---- where: the accelerate config and the card --------------------------------------------------------------------------
    try:
        where = checks.place(config, processes)
    except ValueError as error:
        findings.append(refused("config", error))
        where = checks.Place({"distributed_type": "NO"}, compatibility.ONE, processes or 1, cpu=False)
    if where.cpu and named:
        raise ValueError(
            f"--card {card_name} has no effect on a run on the CPU, which {config} or ACCELERATE_USE_CPU asks for; leave it out"
        )
    card = None if where.cpu else named or cards.here()
    memory = checks.memory_of_machine() if where.cpu else card.memory if card else None
    dtype, precision = checks.precision(where, card)
    findings += [checks.config_finding(recipe, where), checks.gpus_finding(where, card, named is not None), precision]
    findings.append(caught("step", lambda: checks.step_finding(recipe, where)))
    compiles = caught("compile", lambda: checks.compile_finding(recipe, where))
    findings += filter(None, [checks.compiler_finding(where), compiles, checks.trackers_finding(recipe)])

    # ---- what: base, prepared data, adapter ---------------------------------------------------------------------------------
    base_config = skeleton = manifest = rows = prompts = order = None
    try:
        accelerate_config.check_base(recipe)
        base_config = load_config(recipe.model)
        findings.append(caught("base", lambda: checks.base_finding(recipe, base_config)))
    except ValueError as error:
        findings.append(refused("base", error))
    try:
        manifest = dataset.load_manifest(recipe)
        folder = Path(recipe.data.prepared)
        rows, dev = dataset.Rows(folder / "train.arrow"), dataset.Rows(folder / "dev.arrow")
    except ValueError as error:
        findings.append(refused("data", error))
    if manifest is not None:
        findings += filter(None, [caught("start", lambda: checks.start_finding(recipe, manifest))])
    findings += filter(None, [caught("rewards", lambda: checks.rewards_finding(recipe))])
    if base_config is not None:
        try:
            skeleton = module_table.build(recipe, manifest["role_markers"] if manifest else None, dtype)
            findings.append(checks.coverage_finding(recipe, skeleton))
        except ValueError as error:
            findings.append(refused("adapter", error))
    if rows is not None and base_config is not None:
        findings += checks.data_findings(recipe, manifest, rows, dev, base_config)
        lengths = rows.lengths
        if recipe.grpo is not None:
            try:
                prompts = read_prompts(rows, recipe.data.max_length - recipe.grpo.max_new_tokens, visible=True)
                findings.append(checks.prompts_finding(recipe, prompts, base_config))
            except ValueError as error:
                findings.append(refused("prompts", error))
            lengths = None if prompts is None else prompts.lengths
        if lengths is not None:
            train = recipe.train
            order = Order(recipe.seed, lengths, train.rows_per_step, train.epochs, train.max_steps, not recipe.data.packing)
            findings += checks.remark_findings(recipe, order)

    # ---- does it fit, and how long does it take -----------------------------------------------------------------------------
    estimate, sampled, how = None, None, "estimated"
    if skeleton is not None:
        per_rank = max(1, recipe.train.rows_per_step // where.processes)
        parts = memory_estimate.stored(skeleton, recipe.optim.name, where.engine, where.processes)
        parts += memory_estimate.copies(skeleton, where.engine, memory)
        if where.engine == compatibility.ZERO3:  # which gathers the weights of one module at a time
            skeleton = replace(skeleton, speed=skeleton.speed.model_copy(update={"lora": "plain"}))
        if recipe.grpo is None:
            longest = int(rows.lengths.max()) if rows is not None else recipe.longest_row
        else:
            per_rank *= recipe.grpo.group_size
            longest_prompt = recipe.data.max_length - recipe.grpo.max_new_tokens if prompts is None else int(prompts.lengths.max())
            longest = longest_prompt + recipe.grpo.max_new_tokens
            parts += [memory_estimate.reference(skeleton)] if recipe.grpo.beta else []
            try:
                sampled = memory_estimate.sampled(skeleton, parts, where.engine, per_rank, longest_prompt, longest, memory, where.cpu)
                findings.append(checks.sampling_finding(recipe, sampled, per_rank, longest, memory))
            except (RuntimeError, TypeError, AttributeError) as error:  # a model whose cache cannot be made without memory
                text = f"not estimated, for {type(skeleton.base).__name__} cannot generate without memory ({type(error).__name__})"
                findings.append(Finding("look", "sampling", text, "memory that is short is found by trial: fewer answers at once"))
        loss = memory_estimate.loss_of(recipe)
        estimate = memory_estimate.suggested(skeleton, parts, recipe.train, per_rank, longest, memory, where.cpu, loss)
        possible = order is not None and named is None and where.engine in (compatibility.ONE, compatibility.DDP)
        if (measure or (card is not None and torch.cuda.is_available())) and possible and all(f.level != "fail" for f in findings):
            device = torch.device("cpu") if where.cpu or card is None else torch.device("cuda", 0)
            estimate = measured_step.measure(recipe, manifest, rows, dtype, device, per_rank, longest, parts, estimate)
            how = "measured"
        elif measure:
            why = "it wants prepared data, no --card, one process or DDP, and nothing red above"
            findings.append(Finding("look", "measure", f"--measure had no effect: {why}", "see the lines above"))
        if memory:
            findings.append(checks.memory_finding(estimate, memory, how == "measured", recipe))
        findings.append(caught("disk", lambda: checks.disk_finding(recipe, skeleton)))
    if order is not None:
        rate = rate or checks.known_rate(recipe, skeleton, where, card, estimate)
        if recipe.grpo is None:
            seconds, finding = checks.time_finding(order, rate, where, card)
        else:
            seconds, finding = checks.sampled_time_finding(recipe, order, rate, where, card, estimate.checkpointing if estimate else 0.0)
        findings.append(finding)
        if limit is not None:
            findings.append(checks.limit_finding(seconds, limit))
    findings.append(caught("output", lambda: checks.output_finding(recipe, manifest)))

    table = module_table.rows(skeleton) if skeleton else []
    on = card.name if card else "CPU" if where.cpu else "unknown card"
    of_what = how if sampled is None else f"{how}, while it learns"
    show(console, f"preflight: {recipe.command_line} on {on} ({config})", table, estimate, memory, of_what)
    show_findings(console, findings)
    if json_file:
        values = {"recipe": recipe.command_line, "config": str(config), "card": asdict(card) if card else None, "engine": where.engine}
        values |= {"processes": where.processes, "modules": [asdict(row) for row in table], "how": how, "memory_of_card": memory}
        values |= {"memory": {**asdict(estimate), "total": estimate.total} if estimate else None}
        values |= {"sampling": asdict(sampled) if sampled else None, "findings": [asdict(f) for f in findings]}
        write_json(json_file, values)
    return all(finding.level != "fail" for finding in findings)


if __name__ == "__main__":

    def run() -> None:
        if not preflight(args.recipe, args.config, args.card, args.processes, args.time, args.rate, args.measure, args.json):
            sys.exit(1)

    with_clear_errors(run, debug=args.debug)
