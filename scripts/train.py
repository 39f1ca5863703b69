#!/usr/bin/env python
"""Fine-tune a causal language model: the loop, in the order things happen. On conversations (SFT), or, with a section `dpo`, on pairs of
answers; scripts/train_grpo.py learns from the model's own.

    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train.py recipes/quickstart.yaml
    accelerate launch --config_file accelerate_configs/single_t4.yaml scripts/train.py recipes/phi2_oasst1.yaml optim.learning_rate=1e-4

The same command again goes on where the run stopped. Everything it writes is below the recipe's output.dir:

    checkpoints/     to go on from; each verified                 previews.md     answers to the recipe's prompts over time
    final/           the adapter to use, in PEFT's layout:        status.json     running, stopped, finished or failed
                     the best on the development split if evaluation.every_steps is set, else the last
    metrics.jsonl    one line a step, and what went wrong         run.json        recipe, versions, hashes, hardware
    black_box/       what stood around a step that went wrong     reference.jsonl  dpo: how likely each answer was at the start
"""

from qlora_suite.command_line import parser_for, read_arguments, read_recipe, with_clear_errors

if __name__ == "__main__":  # before the imports below, which take seconds: --help, or a mistake in the recipe, does not wait for them
    parser = parser_for(__doc__)
    parser.add_argument("recipe", help="a recipe's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.learning_rate=1e-4")
    parser.add_argument("--verify-data", action="store_true", help="compare the whole prepared data with its hashes before the run starts")
    args = read_arguments(parser, read_recipe)

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora_suite import (
    anomalies,
    black_box,
    compatibility,
    dataset,
    fast_paths,
    optimizer,
    reference,
    reference_weights,
    run_facts,
    run_folder,
    start_from,
)
from qlora_suite.adapter import size
from qlora_suite.anomalies import anomaly, check_skipped, is_applied, is_scale_search
from qlora_suite.batches import EMPTY, Order, check_division, micro_batches
from qlora_suite.chat import Renderer
from qlora_suite.compiled import check_compiler, compile_layers
from qlora_suite.dpo import MEASURES, in_short
from qlora_suite.engine import engine_for, name_of, seed_for
from qlora_suite.engine import start as start_engine
from qlora_suite.evaluation import check_dev_rows, dev_loss, dev_rows
from qlora_suite.generation import preview
from qlora_suite.loss import Batch, collate, summed_loss
from qlora_suite.micro_batch import as_noted, choose, is_out_of_memory, longest_batch, set_checkpointing, try_step
from qlora_suite.preemption import StopRequest
from qlora_suite.ranks import gathered, taking_turns, together
from qlora_suite.recipe import Recipe
from qlora_suite.remarks import FORGETS, forgetting
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.schedule import lr_at
from qlora_suite.tracking import StepBar, peak_memory_gib, say
from qlora_suite.trainable import build_model
from qlora_suite.watchdog import Watchdog, exit_at_once_on_errors, process_group_timeout, set_timeout_of_every_group
from qlora_suite.wording import counted


def train(recipe: Recipe, verify_data: bool = False) -> None:
    if recipe.grpo is not None:
        raise ValueError("the recipe has a section grpo, which is for scripts/train_grpo.py; use that, or remove the section")
    hung_after = recipe.stop.hung_after_minutes
    accelerator, dtype = start_engine(recipe.tracking.trackers, recipe.output.dir, process_group_timeout(hung_after))
    say_once = say if accelerator.is_main_process else lambda _: None
    stop = StopRequest(Path(recipe.output.dir))
    began = time.monotonic()

    # ---- data: prepared once by scripts/prepare_data.py; here only read ---------------------------------------------------
    with together(accelerator):  # a mistake is one sentence, however many processes there are
        compatibility.check(recipe, name_of(accelerator))
        if recipe.speed.compile:
            check_compiler(accelerator.device)
        manifest = dataset.load_manifest(recipe, verify=verify_data and accelerator.is_main_process)
        remark = start_from.check_recipe(recipe, manifest)
        folder = Path(recipe.data.prepared)
        rows, dev = dataset.Rows(folder / "train.arrow"), dataset.Rows(folder / "dev.arrow")
        check_division(recipe.train.rows_per_step, accelerator.num_processes, recipe.train.micro_batch)
        check_dev_rows(recipe.evaluation, len(dev))
    order = Order(
        seed=recipe.seed,
        lengths=rows.lengths,
        rows_per_step=recipe.train.rows_per_step,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        group_by_length=not recipe.data.packing,
    )
    num_steps = order.num_steps

    if remark:
        say_once(f"note       {remark}")
    with (
        run_folder.open_run(recipe, accelerator, num_steps) as run,
        Watchdog(run.path, accelerator.process_index, hung_after * 60, accelerator.num_processes) as watch,
    ):
        with watch.allow("hashing the base"), together(accelerator):
            identity = run_facts.identity(recipe, manifest) if accelerator.is_main_process else None
        identity = gathered(accelerator, identity)[0]
        if run.finished:
            with together(accelerator):
                run.check_finished(identity)
            say_once(
                f"{run.path} is finished: {counted(run.step, 'step')}, result in {run.path / 'final'} (another output.dir trains anew)"
            )
            return

        # ---- model, adapter, optimiser; then whatever a checkpoint knows better ---------------------------------------------
        tokenizer = run_facts.prepared_tokenizer(folder)
        renderer = Renderer(tokenizer, recipe.chat, RoleMarkers.from_json(manifest["role_markers"]))
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with watch.allow("loading the base", minutes=hung_after * accelerator.num_processes):
            with taking_turns(accelerator):  # eight processes of a machine do not need eight copies in its memory
                sharded = name_of(accelerator) == compatibility.FSDP2
                net, base = build_model(recipe, manifest, dtype, accelerator.device, sharded)
                watch.beat("the trial of the faster ways")
                longest, several = recipe.longest_row, recipe.several_in_a_row
                paths = fast_paths.take(net, base, recipe.speed, dtype, longest, several, name_of(accelerator))
                at_start = reference_weights.kept(net) if recipe.dpo else None
            state = run.resume(net, identity, run_facts.rounding(recipe, dtype))

        def asked(doing: str) -> bool:
            """For what takes long beside the steps, again and again: it goes on, and should it end?"""
            watch.beat(doing)
            return stop.asked()

        # ---- dpo: how likely each answer was at the start, whatever a checkpoint holds; computed once, and kept --------------
        if recipe.dpo:
            to_come = {row for step in range(state.step, num_steps) for row in order.rows_for_step(step) if row != EMPTY}
            evaluated = dev_rows(dev, recipe.evaluation.budget_tokens) if recipe.evaluation.every_steps else ()
            splits = {"train": (rows, to_come), "dev": (dev, evaluated)}
            of, cut_short = reference.name_of(identity, manifest), lambda: asked("the log-probabilities of the reference")
            with at_start():
                found = reference.with_reference(run.path, of, net, splits, recipe.dpo, pad_id, dtype, accelerator, cut_short)
            if found is None:
                run.end(state, net, tokenizer, run_folder.ON_REQUEST, stop)
                return
            rows, dev = found
            del at_start  # a copy of what is trained
        net.train()

        # ---- how much fits at once ------------------------------------------------------------------------------------------
        def trial(num_rows: int, share: float) -> None:
            watch.beat(f"the trial of {num_rows} rows")
            batch = longest_batch(rows, num_rows, recipe.dpo).to(accelerator.device)
            try_step(net, base, share, lambda: summed_loss(net, batch)[0], dtype, accelerator.device)

        # Dropout draws its noise by micro-batch: there, and only there, a resumed run keeps the one that it began with.
        if recipe.draws_noise and recipe.train.micro_batch == "auto" and state.micro_batch:
            limit, checkpointing = as_noted(state.micro_batch, recipe.train)
        else:
            limit, checkpointing = choose(
                recipe.train,
                recipe.train.rows_per_step // accelerator.num_processes,
                int(rows.lengths.max()),
                accelerator.device,
                trial,
                lambda largest: min(gathered(accelerator, largest)),
                optimizer.state_bytes(net),
            )
        limit, checkpointing = run.within_memory(limit, checkpointing)
        state.micro_batch = {**asdict(limit), "checkpointing": checkpointing}
        set_checkpointing(base, checkpointing)

        sizes = size(net)  # before an engine shards what is counted here
        with watch.allow("starting the engine"):
            engine = engine_for(accelerator, net, optimizer.build(net, recipe.optim), dtype, recipe.optim.max_grad_norm)
            if recipe.speed.compile:
                compile_layers(base)
            run.resume_engine(engine, state)
        set_timeout_of_every_group(process_group_timeout(hung_after))  # engines make groups of their own
        run.describe(manifest, sizes, engine, order, limit=limit, checkpointing=checkpointing, paths=paths)

        def batch_of(row_numbers: list[int]) -> Batch:
            return collate([rows[r] if r != EMPTY else None for r in row_numbers], pad_id, dpo=recipe.dpo).to(accelerator.device)

        def backward_of(row_numbers: list[int], divisor: int, last: bool) -> torch.Tensor:
            """Forward and backward pass of one micro-batch. Returns its sums, on the device, which hold on to nothing: [1 + measures]"""
            with engine.accumulate(last):
                sums = summed_loss(engine.model, batch_of(row_numbers))
                engine.backward(sums[0], divisor)
            return sums.detach()

        def gradients_of(step: int, step_rows: list[int], divisor: int) -> tuple[list[list[int]], list[torch.Tensor]]:
            """Forward and backward pass of this rank's rows of a step, in micro-batches; the engine adds up the gradients.

            Returns the micro-batches and the sums of each (loss and measures, on the device). What does not fit into memory is done
            again in smaller ones.
            """
            nonlocal limit, checkpointing
            while True:
                micro, losses = micro_batches(step_rows, rows.lengths, limit, accelerator.process_index, accelerator.num_processes), []
                try:
                    for i, row_numbers in enumerate(micro):
                        watch.beat(f"step {step + 1}, micro-batch {i + 1}")
                        seed_for(recipe.seed, step, i, accelerator.process_index)
                        losses.append(backward_of(row_numbers, divisor, last=i == len(micro) - 1))
                    return micro, losses
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                # not in the block above: there the error's traceback still holds the tensors
                limit, checkpointing = run.with_less_memory(state, engine, limit, checkpointing, micro, rows.lengths)
                set_checkpointing(base, checkpointing)

        def looked_at(step: int, micro: list[list[int]], losses: list[torch.Tensor]) -> dict[str, Any] | None:
            """A black box of the step, whose gradients are there and not yet applied; None if there are enough of them."""
            if state.black_boxes >= black_box.MOST_BOXES:
                return None
            state.black_boxes += 1

            def forward(i: int) -> None:
                seed_for(recipe.seed, step, i, accelerator.process_index)
                summed_loss(engine.unwrapped, batch_of(micro[i]))

            return black_box.look(engine, forward, micro, [sums[0] for sums in losses], rows, tokenizer)

        def look_around() -> bool:
            """Evaluation and previews where they are due: none of it changes the curve. A request to stop cuts them short, and the
            resumed run makes up for it. Was anything due?
            """
            evaluating, previewing = run.evaluation_due(state), run.preview_due(state, engine)
            if evaluating:
                budget, cut_short = recipe.evaluation.budget_tokens, lambda: engine.any_rank(asked(f"the evaluation at step {state.step}"))
                found = dev_loss(engine, dev, pad_id, limit, budget, cut_short, recipe.dpo)
                if found is not None:
                    run.add_dev_loss(state, found[0], **dict(zip(MEASURES, found[1:], strict=False)))
            if previewing:
                run.add_preview(state.step, preview(engine, renderer, recipe.previews, lambda: asked(f"previews at step {state.step}")))
            return evaluating or previewing

        # ---- the loop -------------------------------------------------------------------------------------------------------
        look_around()
        # An evaluation that a second request cut short as well has to be made up for before the next step, too.
        outcome = run.reason_to_stop_early(state) or (run_folder.ON_REQUEST if engine.any_rank(stop.asked()) else "")
        last_save = time.monotonic()
        with StepBar("training", num_steps, state.step, visible=accelerator.is_main_process) as bar:
            for step in range(state.step, num_steps if not outcome else state.step):
                step_began = time.monotonic()
                step_rows = order.rows_for_step(step)
                num_tokens = int(sum(rows.num_supervised[r] for r in step_rows if r != EMPTY))  # of the whole step, on all ranks
                divisor = sum(row != EMPTY for row in step_rows) if recipe.dpo else num_tokens  # its pairs, or supervised tokens
                micro, losses = gradients_of(step, step_rows, divisor)

                # the gradient was divided by `divisor` in engine.backward; engine.step clips, applies and clears it
                learning_rate = lr_at(step, recipe.optim, num_steps)
                engine.set_lr(learning_rate)
                # `signs`: does this rank see a reason to stop or to save? Asked of all ranks together with loss and norm, in the one
                # exchange of a step for which the host waits (DeepSpeed has others of its own)
                signs = run.signs(state, stop, time.monotonic() - began, time.monotonic() - last_save)
                loss_sum, grad_norm, *rest = engine.totals(losses, *signs)
                measured, counts = rest[: -len(signs)], rest[-len(signs) :]
                loss, seen = loss_sum / divisor, run_folder.Signs.of(counts)
                of_pairs = {name: value / divisor for name, value in zip(MEASURES, measured, strict=False)}
                found = anomaly(loss, grad_norm, state.norms, recipe.optim.spike_ratio)
                applied = is_applied(found, recipe.optim)
                if found and not is_scale_search(found, loss, dtype, engine.loss_scale(), state.skipped_in_a_row):
                    run.add_anomaly(state, found, looked_at(step, micro, losses), loss, grad_norm, applied)
                engine.step(applied)

                state.step = step + 1
                anomalies.count(state, grad_norm, applied)
                seconds = time.monotonic() - step_began
                tokens = int(sum(rows.lengths[r] for r in step_rows if r != EMPTY))
                state.tokens, state.seconds = state.tokens + tokens, state.seconds + seconds
                run.add_metrics(
                    step=state.step,
                    loss=loss,
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    applied=applied,
                    skipped_steps=state.skipped_steps,
                    supervised_tokens=num_tokens,
                    tokens=state.tokens,
                    tokens_per_second=round(tokens / seconds, 1),
                    **of_pairs,
                    peak_memory_gib=round(peak_memory_gib(accelerator.device), 3),
                    **({} if applied else {"rows": step_rows}),
                )
                bar.advance(state.step, f"loss {loss:.3f}{in_short(of_pairs)}  {state.tokens / state.seconds:,.0f} tokens/s")
                if accelerator.is_main_process and (remark := forgetting(of_pairs, run.metrics.records)):
                    say(f"step {state.step}: {remark}")
                    run.add_event(state.step, FORGETS, log_ratio=of_pairs["log_ratio"])
                if not applied:
                    with together(accelerator):
                        check_skipped(state.skipped_in_a_row, recipe.train.max_skipped_steps, dtype, engine.loss_scale(), found, step_rows)

                if look_around() or engine.alone:  # it took its time; and a single process learns of a request at no cost
                    signs = run.signs(state, stop, time.monotonic() - began, time.monotonic() - last_save)
                    seen = run_folder.Signs.of(counts, engine.sum_over_ranks(*signs))
                outcome, last = run.reason_to_stop(state, seen), state.step == num_steps
                if last or outcome or run.time_to_save(state, seen):
                    with watch.allow(f"saving step {state.step}"):
                        saved = run.save(state, net, engine, tokenizer, required=last or bool(outcome))
                    last_save = time.monotonic() if saved else last_save
                if outcome:
                    break

        with watch.allow("writing the result"):
            run.end(state, net, tokenizer, outcome, stop)


if __name__ == "__main__":
    with exit_at_once_on_errors():
        with_clear_errors(lambda: train(args.recipe, args.verify_data), debug=args.debug)
