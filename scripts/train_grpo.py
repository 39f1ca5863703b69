#!/usr/bin/env python
"""Make answers likelier that are better than others to the same prompt (GRPO): the loop, in the order things happen.

    python scripts/prepare_data.py recipes/quickstart_grpo.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train_grpo.py recipes/quickstart_grpo.yaml

A step samples a group of answers to each of its prompts, judges them by the recipe's rewards, and learns from the differences within
the groups. One process, or several under accelerate_configs/ddp.yaml. The same command again goes on where the run stopped. It writes
what scripts/train.py writes, and

    samples.md       the answers to one prompt of each of the last steps, with their rewards: to look at
    samples.jsonl    the same for every step

but no black boxes: what stood around a step that went wrong is in these two.
"""

from qlora_suite.command_line import parser_for, read_arguments, read_recipe, with_clear_errors

if __name__ == "__main__":  # before the imports below, which take seconds: --help, or a mistake in the recipe, does not wait for them
    parser = parser_for(__doc__)
    parser.add_argument("recipe", help="a recipe's YAML file, with a section `grpo`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. grpo.beta=0.1")
    parser.add_argument("--verify-data", action="store_true", help="compare the whole prepared data with its hashes before the run starts")
    args = read_arguments(parser, read_recipe)

import contextlib
import time
from dataclasses import asdict
from pathlib import Path

import torch

from qlora_suite import (
    anomalies,
    compatibility,
    dataset,
    fast_paths,
    grpo,
    optimizer,
    reference_weights,
    rewards,
    run_facts,
    run_folder,
    samples,
    start_from,
)
from qlora_suite.adapter import size
from qlora_suite.anomalies import anomaly, check_skipped, is_applied, is_scale_search
from qlora_suite.batches import EMPTY, Order
from qlora_suite.chat import Renderer
from qlora_suite.engine import engine_for, name_of
from qlora_suite.engine import start as start_engine
from qlora_suite.generation import preview
from qlora_suite.loss import collate
from qlora_suite.micro_batch import as_noted, choose, is_out_of_memory, set_checkpointing, try_step
from qlora_suite.preemption import StopRequest
from qlora_suite.ranks import gathered, taking_turns, together
from qlora_suite.recipe import Recipe
from qlora_suite.role_markers import RoleMarkers
from qlora_suite.samples import Sample, Sampler
from qlora_suite.schedule import lr_at
from qlora_suite.tracking import Journal, StepBar, peak_memory_gib, say
from qlora_suite.train_prompts import read_prompts
from qlora_suite.trainable import build_model
from qlora_suite.watchdog import Watchdog, exit_at_once_on_errors, process_group_timeout, set_timeout_of_every_group
from qlora_suite.wording import counted


def train(recipe: Recipe, verify_data: bool = False) -> None:
    if recipe.grpo is None:
        raise ValueError("the recipe has no section grpo, which says what answers are worth; add one, or use scripts/train.py")
    config, hung_after = recipe.grpo, recipe.stop.hung_after_minutes
    accelerator, dtype = start_engine(recipe.tracking.trackers, recipe.output.dir, process_group_timeout(hung_after))
    rank, world = accelerator.process_index, accelerator.num_processes
    say_once = say if accelerator.is_main_process else lambda _: None
    stop = StopRequest(Path(recipe.output.dir))
    began = time.monotonic()

    # ---- prompts: of the prepared data's conversations; and what judges the answers ---------------------------------------
    with together(accelerator):  # a mistake is one sentence, however many processes there are
        compatibility.check(recipe, name_of(accelerator))
        judges = rewards.judges_of(config.rewards)
        manifest = dataset.load_manifest(recipe, verify=verify_data and accelerator.is_main_process)
        folder = Path(recipe.data.prepared)
        remark = start_from.check_recipe(recipe, manifest)
        answers_each = grpo.answers_of_a_process(recipe, world)
        rows, longest_prompt = dataset.Rows(folder / "train.arrow"), recipe.data.max_length - config.max_new_tokens
        prompts = read_prompts(rows, longest_prompt, visible=accelerator.is_main_process)
    order = Order(
        seed=recipe.seed,
        lengths=prompts.lengths,
        rows_per_step=recipe.train.rows_per_step,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        group_by_length=True,  # prompts of like length are padded little when they are answered together
    )
    num_steps = order.num_steps

    if remark:
        say_once(f"note       {remark}")
    with (
        run_folder.open_run(recipe, accelerator, num_steps) as run,
        Watchdog(run.path, rank, hung_after * 60, world) as watch,
    ):
        with watch.allow("hashing the base"), together(accelerator):
            identity = {**run_facts.identity(recipe, manifest), **rewards.fingerprints(config.rewards)} if run.main else None
        identity = gathered(accelerator, identity)[0]
        if run.finished:
            with together(accelerator):
                run.check_finished(identity)
            steps = counted(run.step, "step")
            say_once(f"{run.path} is finished: {steps}, result in {run.path / 'final'} (another output.dir trains anew)")
            return

        # ---- model, adapter, reference, optimiser; then whatever a checkpoint knows better ----------------------------------
        tokenizer = run_facts.prepared_tokenizer(folder)
        renderer = Renderer(tokenizer, recipe.chat, RoleMarkers.from_json(manifest["role_markers"]))
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with watch.allow("loading the base", minutes=hung_after * world):
            with taking_turns(accelerator):
                net, base = build_model(recipe, manifest, dtype, accelerator.device)
                reference = reference_weights.kept(net) if config.beta else None  # as the run begins, whatever a checkpoint holds
                watch.beat("the trial of the faster ways")
                paths = fast_paths.take(net, base, recipe.speed, dtype, recipe.data.max_length, packed=False, engine=name_of(accelerator))
            state = run.resume(net, identity, run_facts.rounding(recipe, dtype))
        net.train()
        longest = int(prompts.lengths.max()) + config.max_new_tokens

        def trial(num_answers: int, share: float) -> None:
            """Does this micro-batch fit? Tried on the longest answers to the longest prompts, every token supervised: beside prompts of
            other lengths, the answer to one may stand anywhere.
            """
            watch.beat(f"the trial of {num_answers} answers")
            batch = collate([samples.blank_row(longest)] * num_answers, pad_id, all_supervised=True).to(accelerator.device)
            try_step(net, base, share, lambda: grpo.log_probabilities(net, batch, config.temperature).sum(), dtype, accelerator.device)

        # Another micro-batch rounds otherwise, and the model that comes of it samples other answers: a resumed run keeps its own.
        if recipe.train.micro_batch == "auto" and state.micro_batch:
            limit, checkpointing = as_noted(state.micro_batch, recipe.train)
        else:
            limit, checkpointing = choose(
                recipe.train,
                answers_each,
                longest,
                accelerator.device,
                trial,
                lambda largest: min(gathered(accelerator, largest)),
                optimizer.state_bytes(net),
            )
        limit, checkpointing = run.within_memory(limit, checkpointing)
        state.micro_batch = {**asdict(limit), "checkpointing": checkpointing}
        set_checkpointing(base, checkpointing)

        sizes = size(net)
        with watch.allow("starting the engine"):
            engine = engine_for(accelerator, net, optimizer.build(net, recipe.optim), dtype, recipe.optim.max_grad_norm)
            run.resume_engine(engine, state)
        set_timeout_of_every_group(process_group_timeout(hung_after))
        run.describe(manifest, sizes, engine, order, limit=limit, checkpointing=checkpointing, paths=paths)
        say_once(f"prompts    {prompts}")
        say_once(f"rewards    {rewards.in_words(config.rewards)}")
        with together(accelerator):
            journal = Journal(run.path / "samples.jsonl", state.step) if run.main else None
        sampler = Sampler(engine.unwrapped, renderer, config, judges, recipe.seed, accelerator.device, dtype, state.answers_at_once)

        def asked() -> bool:
            """At each token, and each answer that is judged: the step has taken another bit of its time; should the run end?"""
            watch.beat(f"answers at step {state.step + 1}")
            return stop.asked()

        def backward_of(answers: list[Sample], num_answers: int, first: bool, last: bool) -> torch.Tensor:
            """Forward and backward pass of one micro-batch. Returns its sums, on the device: the loss and grpo.MEASURES. [2 or 3] float64

            `first`: in a step's first update nothing has been learnt since they were sampled, and ratios are 1.
            """
            batch = collate([s.row for s in answers] or [None], pad_id).to(accelerator.device)
            if first and reference is not None:
                with reference():
                    samples.keep(answers, "reference", grpo.log_probabilities(engine.unwrapped, batch, config.temperature))
            with engine.accumulate(last):
                now = grpo.log_probabilities(engine.model, batch, config.temperature)
                if first:
                    samples.keep(answers, "old", now)
                before = samples.kept(answers, now.device, has_reference=reference is not None)
                measured = grpo.summed_loss(now, *before, config.beta, config.clip)
                engine.backward(measured.loss, num_answers)
            return torch.stack([value.detach().double() for value in measured if value is not None])

        def gradients_of(answers: list[Sample], num_answers: int, first: bool) -> list[torch.Tensor]:
            """Forward and backward pass of this rank's answers, in micro-batches. Returns the sums of each, as above. What does not fit
            into memory is done again in smaller ones.
            """
            nonlocal limit, checkpointing
            lengths = [s.num_tokens for s in answers]
            longest_first = sorted(range(len(answers)), key=lambda i: -lengths[i])
            while True:
                micro, sums = limit.cut(longest_first, lengths) or [[]], []  # a rank without a prompt exchanges gradients all the same
                try:
                    for i, numbers in enumerate(micro):
                        watch.beat(f"step {state.step + 1}, micro-batch {i + 1}")
                        sums.append(backward_of([answers[n] for n in numbers], num_answers, first, last=i == len(micro) - 1))
                    return sums
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                # not in the block above: there the error's traceback still holds the tensors
                limit, checkpointing = run.with_less_memory(state, engine, limit, checkpointing, micro, lengths)
                set_checkpointing(base, checkpointing)

        def learn(places: dict[int, int], answers: list[Sample], teaches: bool) -> list[list[float]]:
            """The updates of one step, which has a prompt's row at each of `places`, from this rank's answers to them. Returns of each its
            loss, its gradient's norm, and the sums of grpo.MEASURES; where nothing `teaches`, of one that measures the loss alone.
            """
            updates, num_answers = [], len(places) * config.group_size
            for update in range(config.updates if teaches else 1):
                loss_sum, grad_norm, *measured = engine.totals(gradients_of(answers, num_answers, first=update == 0))
                loss = loss_sum / num_answers
                updates.append([loss, grad_norm, *measured])
                found = anomaly(loss, grad_norm, state.norms, recipe.optim.spike_ratio)
                if not teaches and found != anomalies.NOT_FINITE:
                    engine.step(False)  # of the KL divergence there is a gradient, whose rounding errors Adam would make whole steps
                    continue
                applied = is_applied(found, recipe.optim)
                if found and not is_scale_search(found, loss, dtype, engine.loss_scale(), state.skipped_in_a_row):
                    run.add_anomaly(state, found, None, loss, grad_norm, applied)
                engine.step(applied)
                anomalies.count(state, grad_norm, applied)
                if not applied:
                    with together(accelerator):
                        step_rows = [int(prompts.row_numbers[number]) for number in places.values()]
                        most, scale = recipe.train.max_skipped_steps, engine.loss_scale()
                        check_skipped(state.skipped_in_a_row, most, dtype, scale, found, step_rows, has_box=False)
            return updates

        def end_before_the_step(failed: rewards.RewardFailed | None, anywhere: bool) -> None:
            """For a request to stop, or a reward that `failed`, here or `anywhere`, no rank has begun the step: save the last one."""
            saved = False
            if state.step:
                with watch.allow(f"saving step {state.step}"):
                    saved = run.save(state, net, engine, tokenizer, required=not anywhere)
            with together(accelerator):
                if failed:
                    kept = f"step {state.step} is {'' if saved else 'NOT '}saved" if state.step else "nothing has been learnt yet"
                    raise ValueError(f"{failed}; {kept}: mend the function, and the same command goes on") from failed

        def look_around() -> None:
            """Previews where they are due. A request to stop cuts them short, and the resumed run makes up for it."""
            if run.preview_due(state, engine):
                run.add_preview(state.step, preview(engine, renderer, recipe.previews, asked))

        # ---- the loop -------------------------------------------------------------------------------------------------------
        look_around()
        outcome = run_folder.ON_REQUEST if engine.any_rank(stop.asked()) else ""
        last_save, said_alike = time.monotonic(), False
        with StepBar("training", num_steps, state.step, visible=run.main) as bar:
            for step in range(state.step, num_steps if not outcome else state.step):
                step_began = time.monotonic()
                places = {place: row for place, row in enumerate(order.rows_for_step(step)) if row != EMPTY}
                num_answers = len(places) * config.group_size  # of the whole step, on all ranks
                mine = {place: row for place, row in places.items() if place % world == rank}
                failed = None
                with together(accelerator):
                    try:
                        expected = {place: prompts.expected(row) for place, row in mine.items()}
                        answers = sampler(step, {place: prompts[row] for place, row in mine.items()}, asked, expected)
                    except rewards.RewardFailed as error:
                        answers, failed = None, error
                none, fails = engine.sum_over_ranks(answers is None, failed is not None)
                if none:
                    end_before_the_step(failed, anywhere=fails > 0)
                    outcome = run_folder.ON_REQUEST
                    break

                learning_rate = lr_at(step, recipe.optim, num_steps)
                engine.set_lr(learning_rate)
                sums = samples.sums(answers, judges)
                total = dict(zip(sums, engine.sum_over_ranks(*sums.values()), strict=True))
                teaches = total["groups_alike"] < num_answers
                if not teaches and not said_alike:
                    said_alike = True
                    say_once(
                        f"step {step + 1}: within each of its groups all answers earned the same, so nothing is learnt from it (said once; "
                        "groups_alike in metrics.jsonl is their share)"
                    )
                skipped_before = state.skipped_steps
                updates = learn(places, answers, teaches)

                state.step = step + 1
                means = samples.means(total, num_answers)
                losses, norms, *measured = zip(*updates, strict=True)
                tokens_learnt = total["answer_tokens"] * len(updates)
                seconds = time.monotonic() - step_began
                state.tokens, state.seconds = state.tokens + int(total["tokens"]), state.seconds + seconds
                run.add_metrics(
                    step=state.step,
                    loss=sum(losses) / len(updates),
                    **means,
                    **{name: sum(values) / tokens_learnt for name, values in zip(grpo.MEASURES, measured, strict=False)},
                    learning_rate=learning_rate,
                    grad_norm=max(norms),
                    applied=state.skipped_steps == skipped_before,
                    skipped_steps=state.skipped_steps,
                    tokens=state.tokens,
                    tokens_per_second=round(total["tokens"] / seconds, 1),
                    peak_memory_gib=round(peak_memory_gib(accelerator.device), 3),
                )
                shown = list(places)[step % len(places)]  # another one of the step's prompts each time, from the rank that has it
                group = list(mine).index(shown) * config.group_size if shown in mine else None
                record = None if group is None else samples.record(state.step, answers[group : group + config.group_size])
                records, sizes = zip(*gathered(accelerator, (record, sampler.at_once)), strict=True)
                state.answers_at_once = sampler.at_once = min(filter(None, sizes), default=None)  # from now on the same on all ranks
                if journal is not None:
                    journal.add(next(filter(None, records)))
                    with contextlib.suppress(OSError):  # it is made anew each time
                        samples.write_page(run.path / "samples.md", journal.records)
                worth = f"reward {means['reward']:.3f} of {rewards.most(config.rewards):g}"
                note = f"{worth}  finished {means['finished']:.0%}  {means['words']:.0f} words"
                bar.advance(state.step, f"{note}  {state.tokens / state.seconds:,.0f} tokens/s")

                look_around()
                signs = run.signs(state, stop, time.monotonic() - began, time.monotonic() - last_save)
                seen = run_folder.Signs.of(engine.sum_over_ranks(*signs))
                outcome, last = run.reason_to_stop(state, seen), state.step == num_steps
                if last or outcome or run.time_to_save(state, seen):
                    with watch.allow(f"saving step {state.step}"):
                        saved = run.save(state, net, engine, tokenizer, required=last or bool(outcome))
                    last_save = time.monotonic() if saved else last_save
                if outcome:
                    break

        if journal is not None and not journal.flush():
            say(f"samples.jsonl LACKS its last lines ({journal.error}); the same command does not write them again")
        with together(accelerator):
            if state.step == num_steps and not state.norms and state.skipped_steps:
                raise ValueError(
                    f"none of the {state.skipped_steps} updates from which something could be learnt was applied, so there is no result; "
                    "metrics.jsonl says why of each. Where it is fp16 in search of its loss scale, more steps or bf16 help; choose another "
                    "output.dir"
                )
            if state.step == num_steps and not state.norms:
                raise ValueError(
                    f"in none of the {num_steps} steps did two answers to one prompt earn differently, so nothing was learnt, and there is "
                    f"no result: look at {run.path / 'samples.md'}, change grpo.rewards so that some answers earn more than others (by "
                    "degrees, or for what some answers reach already), and choose another output.dir"
                )
        with watch.allow("writing the result"):
            run.end(state, net, tokenizer, outcome, stop)


if __name__ == "__main__":
    with exit_at_once_on_errors():
        with_clear_errors(lambda: train(args.recipe, args.verify_data), debug=args.debug)
