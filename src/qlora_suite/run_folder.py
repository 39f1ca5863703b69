"""A run's folder: who may write to it, what stands in it, when it is saved and how it ends."""

import contextlib
import math
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_suite import adapter, black_box, checkpoint, compatibility, disk_space, generation, micro_batch, stages
from qlora_suite.batches import Limit, Order
from qlora_suite.checkpoint import State
from qlora_suite.engine import Engine
from qlora_suite.fast_paths import FastPaths
from qlora_suite.files import write_json, write_text
from qlora_suite.leaks import redacted
from qlora_suite.mirror import check_mirrored, refuse_links
from qlora_suite.model import versions
from qlora_suite.preemption import StopRequest
from qlora_suite.ranks import gathered, together
from qlora_suite.recipe import Recipe, flatten
from qlora_suite.recipe_file import to_yaml
from qlora_suite.remarks import remarks
from qlora_suite.result import write_result
from qlora_suite.run_facts import BASE, git_state, hardware, precision_name, processes_text, servable_as
from qlora_suite.run_place import check_mirror, check_path, check_run_folder
from qlora_suite.saves import Saves
from qlora_suite.tracking import Journal, Status, say, start_trackers, sync_command
from qlora_suite.watchdog import explain_lost_peers
from qlora_suite.wording import counted

ON_REQUEST = "on a request to stop"
SEEN_WITHIN_SECONDS = 60.0
"""A network file system may take its time to show a new file to another node."""
LOOK_PAUSE = 50
"""Between two looks at the run's own files, in the time that a look takes: they are a fiftieth of the run at most."""


@contextlib.contextmanager
def open_run(recipe: Recipe, accelerator: Accelerator, num_steps: int) -> Iterator["Run"]:
    """Hold the recipe's output.dir while the run writes to it; an error is noted in status.json before it goes on.

    Raises ValueError, before anything is written, if it is no place for a run, holds something else, or another run writes to it.
    """
    path = Path(recipe.output.dir)
    with contextlib.ExitStack() as held:
        with together(accelerator):
            if accelerator.is_main_process:
                _hold(recipe, path, held)
        _check_shared(path, accelerator)
        run = Run(recipe, path, accelerator, num_steps, held)
        try:
            with explain_lost_peers():
                yield run
        except BaseException as error:
            if accelerator.is_main_process and not run.finished and not run.taken_over:
                run.status.write("failed", run.step, num_steps, redacted(f"{type(error).__name__}: {error}"))
            for tracker in accelerator.trackers if accelerator.is_main_process else ():
                with contextlib.suppress(Exception):
                    tracker.finish()  # or its last numbers would be lost
            raise


def _hold(recipe: Recipe, path: Path, held: contextlib.ExitStack) -> None:
    check_path("output.dir", recipe.output.dir)
    if recipe.output.mirror is not None:
        check_mirror(recipe.output.mirror, recipe.output.dir)
    check_run_folder(path)
    try:
        held.enter_context(checkpoint.lock(path))
        write_text(path / ".shared", " " * 4096)  # a disk that is full would take the lock
    except OSError as error:
        raise ValueError(f"output.dir: nothing can be written to {path} ({error}); name a folder of yours, on a disk with room") from None
    if recipe.output.mirror is not None:
        with contextlib.suppress(OSError):  # a drive that is not there is said at every save
            held.enter_context(checkpoint.lock(Path(recipe.output.mirror)))


def _check_shared(path: Path, accelerator: Accelerator) -> None:
    """Raises ValueError unless every process sees what the first one writes: a resumed run reads it on all nodes."""
    word = gathered(accelerator, uuid.uuid4().hex)[0]
    probe = path / ".shared"
    with together(accelerator):
        if accelerator.is_main_process:
            probe.write_text(word)
    with together(accelerator):
        until = time.monotonic() + SEEN_WITHIN_SECONDS
        while not accelerator.is_main_process and not (probe.is_file() and probe.read_text() == word):
            if time.monotonic() > until:
                raise ValueError(
                    f"process {accelerator.process_index} on {platform.node()} does not see what the first one writes to {path}; "
                    "output.dir must be on a disk that all nodes share"
                )
            time.sleep(0.05)
    if accelerator.is_main_process:
        probe.unlink()


class Signs(NamedTuple):
    """What there is to look after between two steps, seen by this rank or by any."""

    lost: bool
    """Is the newest checkpoint gone?"""
    taken_over: bool
    """Does another run write to the folder?"""
    time_is_up: bool
    save_is_due: bool
    asked: bool
    """To stop."""

    @classmethod
    def of(cls, *counts: Sequence[float]) -> "Signs":
        """From how many ranks have seen each, at one time or several."""
        return cls(*(any(column) for column in zip(*counts, strict=True)))


class Run:
    """The folder of one run. Methods that write do so on the main process alone; all processes call them."""

    def __init__(self, recipe: Recipe, path: Path, accelerator: Accelerator, num_steps: int, held: contextlib.ExitStack) -> None:
        self.recipe, self.path, self.accelerator, self.num_steps = recipe, path, accelerator, num_steps
        self.main = accelerator.is_main_process
        self.status = Status(path / "status.json", quiet=not self.main)
        self.step = self.status.step
        done = self.main and self.status.state == "finished" and checkpoint.complaint_about_checkpoint(path / "final") is None
        self.finished: bool = gathered(accelerator, done)[0]
        """The status says so and the result is whole; a damaged result is written again from the last checkpoint."""
        self.saves = Saves(recipe, path, accelerator, self.add_event)
        self.failed_tracking = 0
        self.resumed_from: Path | None = None
        self.taken_over = False
        """By another run; main process only, as the next three."""
        self._held = held
        self._next_look = 0.0
        self._about: dict[str, Any] = {}

    # ---- beginning ----------------------------------------------------------------------------------------------------------

    def check_finished(self, now: Mapping[str, Any]) -> None:
        """Raises ValueError if a finished run was started again with other curve keys."""
        changed = checkpoint.check_identity(self.status.identity, now, self.path)
        if changed and self.main:
            say(f"note       the file of the reward {' and '.join(changed)}, or one that it imports, has changed since this run was made")

    def resume(self, net: nn.Module, now: Mapping[str, Any], precision: str) -> State:
        """Load the newest good checkpoint's weights, before an engine shards them, or begin.

        Raises ValueError if it belongs to another recipe, data set or base.
        """
        with together(self.accelerator):
            if self.main:
                if self.recipe.output.mirror:
                    check_mirrored(Path(self.recipe.output.mirror), now)
                self.resumed_from = self.saves.newest_good()
        self.resumed_from = found = gathered(self.accelerator, self.resumed_from)[0]
        state, changed = State(), []
        with together(self.accelerator):
            if found is not None:
                state = checkpoint.read_state(found)
                changed = checkpoint.check_identity(state.identity, now, self.path)
                checkpoint.load_weights(found, net)
        state.identity = dict(now)
        self.step = state.step
        with together(self.accelerator):
            if self.main:
                self._begin(state, found, now, precision, changed)
        return state

    def _begin(self, state: State, found: Path | None, now: Mapping[str, Any], precision: str, changed: Sequence[str]) -> None:
        """Say where it goes on, and open what it writes. `changed`: rewards whose file is another one than before."""
        say(f"goes on from {found}" if found else f"starts in {self.path}")
        if found and self.recipe.draws_noise and state.processes != self.accelerator.num_processes:
            before, now_on = processes_text(state.processes), processes_text(self.accelerator.num_processes)
            say(
                f"not exact: {before} saved it and {now_on} go on, where adapter.dropout or neftune_noise_alpha draws other noise "
                "(at 0 the curve would be the same)"
            )
        if found and state.precision not in ("", precision):
            say(f"not exact: it was computed in {state.precision} and goes on in {precision}")
        for reward in changed:
            say(f"not exact: the file of the reward {reward}, or one that it imports, has changed since the checkpoint")
        self.saves.newest = found
        self.metrics = Journal(self.path / "metrics.jsonl", state.step)
        self.previews = Journal(self.path / "previews.jsonl", state.step)
        for reward in changed:
            self.add_event(state.step, "the file of a reward has changed", reward=reward)
        self.status.write("running", state.step, self.num_steps, identity=now)
        write_text(self.path / "recipe.yaml", to_yaml(self.recipe))
        if self.recipe.tracking.trackers:
            start_trackers(self.accelerator, self.recipe.tracking.project, self.path, _scalars(self.recipe))

    def resume_engine(self, engine: Engine, state: State) -> None:
        """Give the engine what the checkpoint knows beside the weights: the optimiser's moments and the loss scale."""
        if self.resumed_from is not None:
            checkpoint.restore_optimizer(self.resumed_from, engine)
        engine.load_state(state.scaler)

    def describe(
        self,
        manifest: Mapping[str, Any],
        sizes: adapter.Size,
        engine: Engine,
        order: Order,
        *,
        limit: Limit,
        checkpointing: float,
        paths: FastPaths,
    ) -> None:
        """Say, and keep in run.json, what runs where. Raises ValueError if its checkpoints will not fit on the disk."""
        with together(self.accelerator):
            if self.main:
                disk_space.check_free(self.recipe, sizes.trainable, self.num_steps)
                world = self.accelerator.num_processes
                servable, because = servable_as(self.recipe, manifest)
                precision = precision_name(engine.dtype)
                noted = stages.noted_in(self.path) if self.resumed_from else None
                before = stages.stages_before(self.recipe) if noted is None else noted
                self._about = {
                    "recipe": self.recipe.model_dump(mode="json"),
                    "data_manifest": {key: manifest[key] for key in ("counts", "sources", "role_markers")},
                    "num_rows": order.num_rows,
                    "parameters": vars(sizes),
                    "base": self.status.identity.get(BASE),
                    "servable_as": servable,
                    "servable_because": because,
                    "precision": precision,
                    "engine": engine.name,
                    "processes": world,
                    "micro_batch": {"rows": limit.rows, "tokens": limit.tokens},
                    "gradient_checkpointing": checkpointing,
                    "fast_paths": vars(paths),
                    "hardware": hardware(self.accelerator.device),
                    "versions": {"python": platform.python_version(), **versions()},
                    "git": git_state(),
                    "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                    "stages_before": stages.record(before),
                    "attempt": self.status.attempt,
                }
                write_json(self.path / "run.json", self._about)
                where = engine.name if world == 1 else f"{processes_text(world)} ({engine.name})"
                how = "all weights" if self.recipe.adapter == "none" else "adapter"
                say(f"model      {self.recipe.model.base}, {self.recipe.model.quantization} base, {how}: {sizes}")
                say(f"markers    {manifest['role_markers']['note'].removeprefix('role markers: ')}")
                say(f"servable   as {servable}: {because}")
                if begins := begins_with(self.recipe):
                    say(f"begins     {begins}")
                data, step, at_once = _units(self.recipe, manifest, order)
                say(f"data       {data}; {counted(order.num_steps, 'step')}")
                say(
                    f"step       {step} on {where}, up to {limit.rows} {at_once} or {limit.tokens:,} tokens at once; "
                    f"{precision} on {hardware(self.accelerator.device)['device']}, checkpointing {micro_batch.in_words(checkpointing)}"
                )
                say(f"faster     {paths}")
                config = getattr(engine.unwrapped, "peft_config", {}).get("default")
                for remark in remarks(self.recipe, order.num_rows, order.num_steps, config and config.target_modules):
                    say(f"note       {remark}")
                if any(adapter.drops_bias(module) for module in engine.unwrapped.modules()):
                    say("note       rows of the output head are trained, and PEFT then leaves its bias out, here and wherever it is loaded")

    # ---- while it learns ----------------------------------------------------------------------------------------------------

    def add_metrics(self, step: int, **values: Any) -> None:
        self.step = step
        if self.main:
            self._add(self.metrics, {"step": step, "attempt": self.status.attempt, **values})
            self._track({k: v for k, v in values.items() if isinstance(v, int | float)}, step)

    def add_event(self, step: int, event: str, **details: Any) -> None:
        """Note in metrics.jsonl what went wrong without ending the run; `event` is a few words, the same for all of its kind."""
        assert not details.keys() & {"loss", "dev_loss"}, "by which the lines of steps and evaluations are told"
        if self.main:
            self._add(self.metrics, {"step": step, "attempt": self.status.attempt, "event": event, **details})

    def _add(self, journal: Journal, record: dict[str, Any]) -> None:
        """A journal that cannot be written is said once, and noted when it can be: its lines are kept until then."""
        before = journal.unwritten
        journal.add(record)
        if journal.unwritten and not before:
            say(f"{journal.path.name} CANNOT BE WRITTEN ({journal.error}); its lines are kept and written when the disk takes them")
        if before and not journal.unwritten:
            say(f"{journal.path.name} is written again, with the {before} lines that were kept")
            self.add_event(record["step"], "log could not be written", file=journal.path.name, lines=before, error=journal.error)

    def _track(self, values: dict[str, Any], step: int) -> None:
        """A tracker that fails costs its numbers, not the run."""
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:  # trackers raise whatever their libraries do
            self.failed_tracking += 1
            if self.failed_tracking == 1:
                say(f"tracking FAILED ({type(error).__name__}: {error}); training goes on, and metrics.jsonl has every number")
                self.add_event(step, "tracker failed", error=f"{type(error).__name__}: {error}")

    def add_anomaly(self, state: State, found: str, box: Mapping[str, Any] | None, loss: float, grad_norm: float, applied: bool) -> None:
        """Say and note a step that went wrong, and keep its black box if there is one."""
        if not self.main:
            return
        step, usual = state.step + 1, statistics.median(state.norms) if state.norms else None
        seen = {"grad_norm": grad_norm, "median_grad_norm": usual, "applied": applied}
        where = black_box.write(self.path, step, {"event": found, "loss": loss, **seen, **box}, self.metrics.records) if box else ""
        beside = f", the median of the last steps is {usual:.3g}" if usual is not None else ""
        done = "clipped" if applied else "not applied"
        say(f"step {step}: {found}: loss {loss:.3f}, gradient norm {grad_norm:.3g}{beside}; {done}{where}")
        self.add_event(step, found, **seen)

    def within_memory(self, limit: Limit, checkpointing: float) -> tuple[Limit, float]:
        """The limit, or less if an earlier start on this hardware ran out of memory; the same for all ranks."""
        with together(self.accelerator):
            found = micro_batch.within_note(
                self.path, limit, checkpointing, hardware(self.accelerator.device), self.accelerator.num_processes
            )
        ended = micro_batch.ended_attempt(self.path) if self.main else None
        if ended is not None and ended == self.status.attempt - 1:
            rows, tokens = found[0].rows, found[0].tokens
            self.add_event(self.step, "out of memory", rows=rows, tokens_at_once=tokens, checkpointing=found[1])
        return gathered(self.accelerator, found)[0]

    def with_less_memory(
        self, state: State, engine: Engine, limit: Limit, checkpointing: float, micro: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Limit, float]:
        """What to do a step again with that ran out of memory in one of these micro-batches; written down for later starts.

        Raises ValueError if nothing is left to try, or if others are waiting in the middle of the step: then the next start does it.
        """
        less, checkpointing = micro_batch.smaller(limit, checkpointing, self.recipe.train, micro, lengths)
        on_the_spot, step = engine.name == compatibility.ONE, state.step + 1
        with contextlib.suppress(OSError) if on_the_spot else contextlib.nullcontext():  # the next start would find it out again
            micro_batch.write_note(
                self.path,
                less,
                checkpointing,
                hardware(self.accelerator.device),
                self.accelerator.num_processes,
                None if on_the_spot else self.status.attempt,
            )
        unit = "answers" if self.recipe.grpo else "pairs" if self.recipe.dpo else "rows"
        now = f"at most {less.rows} {unit} or {less.tokens:,} tokens at once" + (
            f", checkpointing {micro_batch.in_words(checkpointing)}" if checkpointing else ""
        )
        if not on_the_spot:
            raise ValueError(
                f"rank {self.accelerator.process_index} ran out of memory in step {step}; the same command goes on from the last "
                f"checkpoint, with {now}"
            )
        engine.drop_gradients()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        noise = (
            "; not exact from here on, for adapter.dropout or neftune_noise_alpha draws by micro-batch" if self.recipe.draws_noise else ""
        )
        say(f"step {step}: out of memory; done again, and from now on, with {now}{noise}")
        self.add_event(step, "out of memory", rows=less.rows, tokens_at_once=less.tokens, checkpointing=checkpointing)
        state.micro_batch = {**asdict(less), "checkpointing": checkpointing}
        return less, checkpointing

    def add_preview(self, step: int, answers: Sequence[generation.Answer] | None) -> None:
        """Note the answers of a step; None stands for answers that were cut short."""
        if self.main and answers:
            self._add(self.previews, generation.record(step, answers))
            with contextlib.suppress(OSError):  # it is made from previews.jsonl, whole, each time
                generation.write_timeline(self.path / "previews.md", self.previews.records)
            say(f"previews at step {step}: {generation.summary(answers)['stopped']:.0%} stop by themselves (previews.md)")

    def preview_due(self, state: State, engine: Engine) -> bool:
        """Do answers to the prompts belong to this step, and are they not there yet?"""
        every, step = self.recipe.previews.every_steps, state.step
        if not self.recipe.previews.prompts or not (step % every == 0 or step == self.num_steps):
            return False
        return engine.any_rank(self.main and not any(record["step"] == step for record in self.previews.records))

    def evaluation_due(self, state: State) -> bool:
        """Does an evaluation on the development split belong to this step, and is it not made yet?"""
        every, step = self.recipe.evaluation.every_steps, state.step
        return every is not None and 0 < step != state.evaluated and (step % every == 0 or step == self.num_steps)

    def add_dev_loss(self, state: State, loss: float, **measured: float) -> None:
        """Note an evaluation on the development split, and whether it is the best. `measured`: dpo.MEASURES."""
        state.evaluated = state.step
        better = math.isfinite(loss) and (state.best is None or loss < state.best["loss"])
        state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
        if better:
            state.best = {"step": state.step, "loss": loss}
        if self.main:
            values = {"dev_loss": loss, **{f"dev_{name}": value for name, value in measured.items()}}
            self._add(self.metrics, {"step": state.step, "attempt": self.status.attempt, **values})
            self._track(values, state.step)
            of = f"nats a pair, the chosen answer preferred in {measured['accuracy']:.1%}" if measured else "nats a token"
            say(f"step {state.step}: development loss {loss:.4f} {of}" + (" (best so far)" if better else ""))

    def signs(self, state: State, request: StopRequest, seconds: float, since_save: float) -> Signs:
        """What this rank sees; `seconds` of training, and since the last save. Looks after the folder, too."""
        limit, minutes = self.recipe.stop.after_minutes, self.recipe.checkpoints.every_minutes
        lost, taken_over = self._look_after_folder(state.step)
        time_is_up = limit is not None and seconds >= limit * 60
        return Signs(lost, taken_over, time_is_up, minutes is not None and since_save >= minutes * 60, request.asked())

    def reason_to_stop(self, state: State, seen: Signs) -> str:
        """Why the run should end now; empty if it should not. `seen` by any rank.

        Raises ValueError if the folder was deleted and another run is writing there now.
        """
        if seen.taken_over:
            with together(self.accelerator):
                if self.main:
                    raise ValueError(f"the folder {self.path} was deleted, and another run is writing there now; this one ends unsaved")
        if seen.lost:
            self.saves.retry_at = state.step
        if early := self.reason_to_stop_early(state):
            return early
        if seen.time_is_up:
            return f"after {self.recipe.stop.after_minutes:g} minutes, as stop.after_minutes asks"
        return ON_REQUEST if seen.asked else ""

    def reason_to_stop_early(self, state: State) -> str:
        """Why no further step would help; empty while it may."""
        patience = self.recipe.evaluation.patience
        enough = patience is not None and state.evaluations_without_gain >= patience
        return f"early: no better development loss in {patience} evaluations" if enough else ""

    def time_to_save(self, state: State, seen: Signs) -> bool:
        """Is a periodic checkpoint due: by steps, by minutes, or because this is the best so far?"""
        every = self.recipe.checkpoints.every_steps
        if state.best is not None and state.best["step"] == state.step:
            return True
        if self.saves.retry_at is not None:  # a disk that is dead must not cost an attempt at every step
            return state.step >= self.saves.retry_at
        return seen.save_is_due or (every is not None and state.step % every == 0)

    def save(self, state: State, net: nn.Module, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, required: bool) -> bool:
        """Was a checkpoint written? Raises OSError if the run cannot go on without this one (`required`)."""
        saved = self.saves.save(state, net, engine, tokenizer, required=required)
        if saved and self.main:
            self.status.write("running", state.step, self.num_steps)
        return saved

    # ---- if it is deleted ---------------------------------------------------------------------------------------------------

    def _look_after_folder(self, step: int) -> tuple[bool, bool]:
        """(is a new checkpoint needed, does another run hold the folder?) What was deleted is written anew as far as it is known.

        A file system that answers slowly is asked less often.
        """
        began = time.monotonic()
        if not self.main or began < self._next_look:
            return False, False
        try:
            return self._look(step)
        except OSError as error:
            if self.saves.retry_at is None:
                say(f"{self.path} IS GONE and cannot be made anew, or cannot be looked at ({error}); tried again later")
            return self.saves.retry_at is None, False
        except ValueError:  # another run has come in between
            self.taken_over = True
            return False, True
        finally:
            self._next_look = time.monotonic() + LOOK_PAUSE * (time.monotonic() - began)

    def _look(self, step: int) -> tuple[bool, bool]:
        wanted = [".lock", "status.json", "metrics.jsonl", "recipe.yaml", "run.json"]
        missing = [name for name in wanted[1:] if not (self.path / name).exists()]
        locked = checkpoint.is_locked_by_us(self.path)
        unsaved = self.saves.newest is not None and not (self.saves.newest / checkpoint.MANIFEST).exists()
        if locked and not missing and not unsaved:
            return False, False
        gone = [*([] if locked else wanted[:1]), *missing, *([self.saves.newest.name] if unsaved else [])]
        if not locked:
            self._held.enter_context(checkpoint.lock(self.path))
        write_text(self.path / "recipe.yaml", to_yaml(self.recipe))
        write_json(self.path / "run.json", self._about)
        if self.previews.records:
            generation.write_timeline(self.path / "previews.md", self.previews.records)
        self.status.write("running", step, self.num_steps)
        self.metrics.flush()
        self.previews.flush()
        self.saves.newest = self.saves.newest if not unsaved else None
        say(f"files of the run WERE DELETED ({', '.join(gone)}) and are written anew; a checkpoint follows")
        self.add_event(step, "files of the run were deleted", files=gone)
        return True, False

    # ---- end ----------------------------------------------------------------------------------------------------------------

    def end(self, state: State, net: nn.Module, tokenizer: PreTrainedTokenizerBase, outcome: str, request: StopRequest) -> None:
        """Write `final/` if the run is over (its last step, or early stopping), else say how to go on."""
        with together(self.accelerator):  # the request stays until all have seen it
            pass
        if self.main:
            for tracker in self.accelerator.trackers:
                try:
                    tracker.finish()
                except Exception as error:
                    say(f"tracker {tracker.name} FAILED at its end ({type(error).__name__}: {error})")
            if command := sync_command(self.recipe.tracking.trackers, self.path):
                say(f"offline     the tracker's files can be sent from a machine with a network: {command}")
            request.honoured()
            self._end(state, net, tokenizer, outcome)

    def _end(self, state: State, net: nn.Module, tokenizer: PreTrainedTokenizerBase, outcome: str) -> None:
        if (state.step < self.num_steps or self.evaluation_due(state)) and not outcome.startswith("early"):
            self._write_status("stopped", state.step, outcome)
            say(f"stopped {outcome}, at step {state.step} of {self.num_steps}; the same command goes on from there")
            return
        chosen = int(state.best["step"]) if state.best else state.step
        why = f"lowest development loss ({state.best['loss']:.4f})" if state.best else "the last step"
        folder = self.saves.folder / f"step-{chosen:06d}"
        if chosen != state.step and (complaint := checkpoint.complaint_about_checkpoint(folder)):
            chosen, why = state.step, f"the last step, for the best checkpoint ({folder.name}) is damaged: {complaint}"
        source, choice = self.saves.folder / f"step-{chosen:06d}", {"step": chosen, "chosen_by": why}
        try:
            try:
                self._write_result(source, net, tokenizer, choice)
            except OSError as error:
                if not (disk_space.is_full(error) and checkpoint.make_room(self.saves.folder, chosen)):
                    raise
                self._write_result(source, net, tokenizer, choice)
        except OSError as error:
            self.add_event(state.step, "result failed", error=str(error))
            raise OSError(
                f"the result could not be written to {self.path / 'final'} ({error}); every step is saved ({self.saves.newest.name}): see "
                "to the disk, and the same command writes it"
            ) from error
        self._write_status("finished", state.step, outcome)
        self.finished = True
        say(f"finished: {self.path / 'final'} holds step {chosen} ({why})")

    def _write_status(self, state: str, step: int, reason: str) -> None:
        """The last word: other programs rely on it. Raises OSError if the disk does not take it, or lacks lines of the journals."""
        written = self.metrics.flush() and self.previews.flush()
        if not (self.status.write(state, step, self.num_steps, reason) and written):
            why = self.status.error or self.metrics.error or self.previews.error
            raise OSError(f"step {step} is saved, but not all that it notes in {self.path} ({why}); see to the disk, and start again")

    def _write_result(self, source: Path, net: nn.Module, tokenizer: PreTrainedTokenizerBase, choice: dict[str, Any]) -> None:
        refuse_links(self.path)
        write_result(self.path, source, self.recipe, net, tokenizer, choice)


def begins_with(recipe: Recipe) -> str:
    """For the console: the weights that training begins with, and what DPO or GRPO hold them to. Empty where there is nothing to say."""
    start = recipe.adapter.start_from if recipe.adapter != "none" else None
    key, beta = ("dpo.beta", recipe.dpo.beta) if recipe.dpo else ("grpo.beta", recipe.grpo.beta) if recipe.grpo else ("", 0)
    if start is None and not key:
        return ""
    what = f"with the adapter of {start}" if start else "with a new adapter" if recipe.adapter != "none" else "with the weights of the base"
    if not key:
        return what
    held = "the model is held to it as it is now" if recipe.adapter != "none" else "the model is held to them as they are now"
    return f"{what}; {held} ({key} {beta:g})" if beta else f"{what}; nothing holds the model to it ({key} 0)"


def _units(recipe: Recipe, manifest: Mapping[str, Any], order: Order) -> tuple[str, str, str]:
    """For the console: what there is to learn from, what a step is, and what a micro-batch is of."""
    if recipe.grpo is not None:
        prompts = counted(recipe.train.rows_per_step, "prompt")
        return counted(order.num_rows, "prompt"), f"{prompts} x {recipe.grpo.group_size} answers", "answers"
    unit = "pair" if recipe.dpo else "row"
    learnt = manifest["counts"]["train"]["supervised"]
    data = f"{counted(order.num_rows, unit)}, {learnt:,} supervised tokens"
    return data, counted(recipe.train.rows_per_step, unit), f"{unit}s"


def _scalars(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: one flat level of numbers and words."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(recipe).items()}
