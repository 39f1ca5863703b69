"""A run's folder: who may write to it, what stands in it, when it is saved and how it ends."""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate.utils.other
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_suite import adapter, checkpoint, generation
from qlora_suite.batches import Limit, Order
from qlora_suite.checkpoint import State, Trained
from qlora_suite.dataset import data_hash
from qlora_suite.engine import Engine
from qlora_suite.files import flush, write_json, write_text
from qlora_suite.model import base_fingerprint, load_config, versions
from qlora_suite.preemption import StopRequest
from qlora_suite.prequantized import record_of, source_of
from qlora_suite.ranks import gathered, together
from qlora_suite.recipe import Recipe, curve_keys, flatten, names_files
from qlora_suite.recipe_file import to_yaml
from qlora_suite.remarks import remarks
from qlora_suite.tracking import Journal, Status, say, start_trackers, sync_command
from qlora_suite.watchdog import explain_lost_peers

ON_REQUEST = "on a request to stop"
SEEN_WITHIN_SECONDS = 60.0
"""A network file system may take its time to show a new file to another node."""
DATA = "data (hash of rows and tokenizer)"
BASE = "base (commit, or hash of its files)"


def prepared_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the rows were made with, role markers and chat template included."""
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def identity(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change between two starts of one run."""
    keys = {key: value for key, value in curve_keys(recipe).items() if not names_files(key)}
    everything = {**keys, DATA: data_hash(manifest), BASE: base_fingerprint(recipe.model)}
    return json.loads(json.dumps(everything))  # tuples as lists, as they come back from a file


@contextlib.contextmanager
def open_run(recipe: Recipe, accelerator: Accelerator, num_steps: int) -> Iterator["Run"]:
    """Hold the recipe's output.dir while the run writes to it; an error is noted in status.json before it goes on."""
    path = Path(recipe.output.dir)
    with contextlib.ExitStack() as held:
        with together(accelerator):
            if accelerator.is_main_process:
                held.enter_context(checkpoint.lock(path))
        _check_shared(path, accelerator)
        run = Run(recipe, path, accelerator, num_steps)
        try:
            with explain_lost_peers():
                yield run
        except BaseException as error:
            if accelerator.is_main_process and not run.finished:
                run.status.write("failed", run.step, num_steps, f"{type(error).__name__}: {error}")
            for tracker in accelerator.trackers if accelerator.is_main_process else ():
                with contextlib.suppress(Exception):
                    tracker.finish()  # or its last numbers would be lost
            raise


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


class Run:
    """The folder of one run. Methods that write do so on the main process alone; all processes call them."""

    def __init__(self, recipe: Recipe, path: Path, accelerator: Accelerator, num_steps: int) -> None:
        self.recipe, self.path, self.accelerator, self.num_steps = recipe, path, accelerator, num_steps
        self.main = accelerator.is_main_process
        self.checkpoints = path / "checkpoints"
        self.status = Status(path / "status.json")
        self.step = self.status.step
        done = self.main and self.status.state == "finished" and checkpoint.complaint_about_checkpoint(path / "final") is None
        self.finished: bool = gathered(accelerator, done)[0]
        """The status says so and the result is whole; a damaged result is written again from the last checkpoint."""
        self.failed_saves = 0
        self.resumed_from: Path | None = None

    # ---- beginning ----------------------------------------------------------------------------------------------------------

    def check_finished(self, now: Mapping[str, Any]) -> None:
        """Raises ValueError if a finished run was started again with other curve keys."""
        checkpoint.check_identity(self.status.identity, now, self.path)

    def resume(self, net: nn.Module, now: Mapping[str, Any], precision: str) -> State:
        """Load the newest good checkpoint's weights, before an engine shards them, or begin.

        Raises ValueError if it belongs to another recipe, data set or base.
        """
        with together(self.accelerator):
            if self.main:
                if self.recipe.output.mirror and not checkpoint.steps(self.checkpoints):
                    self._restore_from_mirror(Path(self.recipe.output.mirror))
                self.resumed_from = checkpoint.latest(self.checkpoints)  # it sets damaged ones aside
        self.resumed_from = found = gathered(self.accelerator, self.resumed_from)[0]
        state = State(identity=dict(now))
        with together(self.accelerator):
            if found is not None:
                state = checkpoint.read_state(found)
                checkpoint.check_identity(state.identity, now, self.path)
                checkpoint.load_weights(found, net)
        self.step = state.step
        if self.main:
            say(f"goes on from {found}" if found else f"starts in {self.path}")
            if found and self.recipe.draws_noise and state.processes != self.accelerator.num_processes:
                before, now_on = _processes(state.processes), _processes(self.accelerator.num_processes)
                say(
                    f"not exact: {before} saved it and {now_on} go on, where adapter.dropout or neftune_noise_alpha draws other noise "
                    "(at 0 the curve would be the same)"
                )
            if found and state.precision not in ("", precision):
                say(f"not exact: it was computed in {state.precision} and goes on in {precision}")
            self.metrics = Journal(self.path / "metrics.jsonl", state.step)
            self.previews = Journal(self.path / "previews.jsonl", state.step)
            self.status.write("running", state.step, self.num_steps, identity=now)
            write_text(self.path / "recipe.yaml", to_yaml(self.recipe))
            if self.recipe.tracking.trackers:
                start_trackers(self.accelerator, self.recipe.tracking.project, self.path, _scalars(self.recipe))
        return state

    def resume_engine(self, engine: Engine, state: State) -> None:
        """Give the engine what the checkpoint knows beside the weights: the optimiser's moments and the loss scale."""
        if self.resumed_from is not None:
            checkpoint.restore_optimizer(self.resumed_from, engine)
        engine.load_state(state.scaler)

    def describe(
        self, manifest: Mapping[str, Any], sizes: adapter.Size, engine: Engine, order: Order, *, limit: Limit, checkpointing: bool
    ) -> None:
        """Say, and keep in run.json, what runs where."""
        if not self.main:
            return
        world = self.accelerator.num_processes
        servable, because = servable_as(self.recipe, manifest)
        precision = precision_name(engine.dtype)
        rows_per_step = self.recipe.train.rows_per_step
        write_json(
            self.path / "run.json",
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "data_manifest": {key: manifest[key] for key in ("counts", "sources", "role_markers")},
                "parameters": vars(sizes),
                "base": self.status.identity.get(BASE),
                "servable_as": servable,
                "servable_because": because,
                "precision": precision,
                "engine": engine.name,
                "processes": world,
                "micro_batch": {"rows": limit.rows, "tokens": limit.tokens},
                "gradient_checkpointing": checkpointing,
                "hardware": hardware(self.accelerator.device),
                "versions": {"python": platform.python_version(), **versions()},
                "git": git_state(),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "attempt": self.status.attempt,
            },
        )
        where = engine.name if world == 1 else f"{_processes(world)} ({engine.name})"
        how = "all weights" if self.recipe.adapter == "none" else "adapter"
        say(f"model      {self.recipe.model.base}, {self.recipe.model.quantization} base, {how}: {sizes}")
        say(f"markers    {manifest['role_markers']['note'].removeprefix('role markers: ')}")
        say(f"servable   as {servable}: {because}")
        say(f"data       {order.num_rows:,} rows, {manifest['counts']['train']['supervised']:,} supervised tokens; {order.num_steps} steps")
        say(
            f"step       {rows_per_step} rows on {where}, up to {limit.rows} rows or {limit.tokens:,} tokens at once; "
            f"{precision} on {hardware(self.accelerator.device)['device']}, checkpointing {'on' if checkpointing else 'off'}"
        )
        config = getattr(engine.unwrapped, "peft_config", {}).get("default")
        for remark in remarks(self.recipe, order.num_rows, order.num_steps, config and config.target_modules):
            say(f"note       {remark}")
        if any(adapter.drops_bias(module) for module in engine.unwrapped.modules()):
            say("note       rows of the output head are trained, and PEFT then leaves its bias out, here and wherever it is loaded")

    # ---- while it learns ----------------------------------------------------------------------------------------------------

    def add_metrics(self, step: int, **values: Any) -> None:
        self.step = step
        if self.main:
            self.metrics.add({"step": step, "attempt": self.status.attempt, **values})
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def add_event(self, step: int, event: str, **details: Any) -> None:
        """Note in metrics.jsonl what went wrong without ending the run; `event` is a few words, the same for all of its kind."""
        if self.main:
            self.metrics.add({"step": step, "attempt": self.status.attempt, "event": event, **details})

    def add_preview(self, step: int, answers: Sequence[generation.Answer] | None) -> None:
        """Note the answers of a step; None stands for answers that were cut short."""
        if self.main and answers:
            self.previews.add(generation.record(step, answers))
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

    def add_dev_loss(self, state: State, loss: float) -> None:
        """Note an evaluation on the development split, and whether it is the best."""
        state.evaluated = state.step
        better = math.isfinite(loss) and (state.best is None or loss < state.best["loss"])
        state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
        if better:
            state.best = {"step": state.step, "loss": loss}
        if self.main:
            self.metrics.add({"step": state.step, "attempt": self.status.attempt, "dev_loss": loss})
            self.accelerator.log({"dev_loss": loss}, step=state.step)
            say(f"step {state.step}: development loss {loss:.4f} nats a token" + (" (best so far)" if better else ""))

    def reason_to_stop(self, state: State, engine: Engine, request: StopRequest, seconds: float) -> str:
        """Why the run should end now, agreed by all ranks; empty if it should not."""
        if early := self.reason_to_stop_early(state):
            return early
        limit = self.recipe.stop.after_minutes
        if limit is not None and engine.any_rank(seconds >= limit * 60):
            return f"after {limit:g} minutes, as stop.after_minutes asks"
        return ON_REQUEST if engine.any_rank(request.asked()) else ""

    def reason_to_stop_early(self, state: State) -> str:
        """Why no further step would help; empty while it may."""
        patience = self.recipe.evaluation.patience
        enough = patience is not None and state.evaluations_without_gain >= patience
        return f"early: no better development loss in {patience} evaluations" if enough else ""

    def time_to_save(self, state: State, seconds: float, engine: Engine) -> bool:
        """Is a periodic checkpoint due: by steps, by minutes, or because this is the best so far?"""
        every, minutes = self.recipe.checkpoints.every_steps, self.recipe.checkpoints.every_minutes
        if every is not None and state.step % every == 0:
            return True
        if state.best is not None and state.best["step"] == state.step:
            return True
        return minutes is not None and engine.any_rank(seconds >= minutes * 60)

    def save(self, state: State, net: nn.Module, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, required: bool) -> bool:
        """Write, verify, mirror; then prune. Was it written?

        A disk that is full for a while must not cost the run: a periodic save that fails is said, counted and tried again. Raises
        OSError if the run cannot go on without this one (`required`).
        """
        saved = True
        state.scaler, state.processes = engine.state(), self.accelerator.num_processes
        state.precision = rounding(self.recipe, engine.dtype)
        learnt = checkpoint.trained(net, engine)
        with together(self.accelerator):
            if learnt is not None:
                try:
                    self._save(state, net, learnt, tokenizer)
                except OSError as error:
                    if required:
                        raise
                    saved, self.failed_saves = False, self.failed_saves + 1
                    said = f"checkpoint at step {state.step} FAILED ({error}); training goes on from memory"
                    say(f"{said}, failed so far: {self.failed_saves}")
        return saved

    def _save(self, state: State, net: nn.Module, learnt: Trained, tokenizer: PreTrainedTokenizerBase) -> None:
        source = source_of(self.recipe.model.base) or self.recipe.model  # the published base, not a folder with its quantised form
        base = (source.base, source.revision)
        written = checkpoint.save(self.checkpoints, state, net, learnt, tokenizer, to_yaml(self.recipe), base)
        best = int(state.best["step"]) if state.best else None
        checkpoint.prune(self.checkpoints, self.recipe.checkpoints.keep, best)
        self.status.write("running", state.step, self.num_steps)
        if self.recipe.output.mirror:
            mirror = Path(self.recipe.output.mirror) / "checkpoints"
            try:
                checkpoint.copy_checked(written, mirror / written.name)
                checkpoint.prune(mirror, self.recipe.checkpoints.keep, best)
            except OSError as error:
                self.failed_saves += 1
                say(f"mirroring {written.name} FAILED ({error}); it is safe in {self.checkpoints}, failed so far: {self.failed_saves}")

    # ---- end ----------------------------------------------------------------------------------------------------------------

    def end(self, state: State, net: nn.Module, tokenizer: PreTrainedTokenizerBase, outcome: str, request: StopRequest) -> None:
        """Write `final/` if the run is over (its last step, or early stopping), else say how to go on."""
        with together(self.accelerator):  # the request stays until all have seen it
            pass
        if self.main:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            if command := sync_command(self.recipe.tracking.trackers, self.path):
                say(f"offline     the tracker's files can be sent from a machine with a network: {command}")
            request.honoured()
            self._end(state, net, tokenizer, outcome)

    def _end(self, state: State, net: nn.Module, tokenizer: PreTrainedTokenizerBase, outcome: str) -> None:
        if (state.step < self.num_steps or self.evaluation_due(state)) and not outcome.startswith("early"):
            self.status.write("stopped", state.step, self.num_steps, outcome)
            say(f"stopped {outcome}, at step {state.step} of {self.num_steps}; the same command goes on from there")
            return
        chosen = int(state.best["step"]) if state.best else state.step
        why = f"lowest development loss ({state.best['loss']:.4f})" if state.best else "the last step"
        folder = self.checkpoints / f"step-{chosen:06d}"
        if chosen != state.step and (complaint := checkpoint.complaint_about_checkpoint(folder)):
            chosen, why = state.step, f"the last step, for the best checkpoint ({folder.name}) is damaged: {complaint}"
        self._write_final(self.checkpoints / f"step-{chosen:06d}", net, tokenizer, {"step": chosen, "chosen_by": why})
        self.finished = True
        self.status.write("finished", state.step, self.num_steps, outcome)
        say(f"finished: {self.path / 'final'} holds step {chosen} ({why})")

    def _write_final(self, source: Path, net: nn.Module, tokenizer: PreTrainedTokenizerBase, choice: dict[str, Any]) -> None:
        """The result, from a checkpoint's files: `net` may be sharded by now, and tells only how the weights are to be laid out."""
        final, aside = self.path / "final", self.path / ".final.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        if isinstance(net, PeftModel):
            for name in (checkpoint.ADAPTER, CONFIG_NAME):
                shutil.copyfile(source / name, aside / name)
            checkpoint.check_weights(aside / checkpoint.ADAPTER, load_file(source / checkpoint.ADAPTER), trained=True)
        else:
            dtype = getattr(torch, self.recipe.output.final_dtype or "float32")
            weights = {name: tensor.to(dtype) for name, tensor in load_file(source / checkpoint.WEIGHTS).items()}
            save_pretrained(net, aside, weights)
            config = load_config(self.recipe.model)  # as its maker wrote it: ours was changed for training
            config.architectures, config.dtype = [model_class(net).__name__], dtype
            config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_json(aside / "chosen.json", choice)
        checkpoint.seal(aside)
        if final.exists():  # it is damaged, or status.json was not written any more; half of it must not stay in its place
            final.rename(self.path / ".final.old.tmp")
        aside.rename(final)
        flush(self.path)
        shutil.rmtree(self.path / ".final.old.tmp", ignore_errors=True)

    def _restore_from_mirror(self, mirror: Path) -> None:
        """A machine that lost its disk goes on from the mirror."""
        found = checkpoint.latest(mirror / "checkpoints")
        if found is not None:
            say(f"{self.checkpoints} is empty; taking {found} from the mirror")
            best = checkpoint.read_state(found).best
            wanted = [found.with_name(f"step-{int(best['step']):06d}")] if best else []
            for source in (*(w for w in wanted if w != found and w.is_dir()), found):  # the newest last: then all are there
                aside = self.checkpoints / f".{source.name}.tmp"  # a copy cut short must not look like a damaged checkpoint
                checkpoint.copy_checked(source, aside)
                aside.rename(self.checkpoints / source.name)


def _scalars(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it: one flat level of numbers and words."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(recipe).items()}


def model_class(net: nn.Module) -> type[nn.Module]:
    """The model's class; FSDP2 puts a subclass of its own in its place."""
    return next(kind for kind in type(net).__mro__ if not issubclass(kind, FSDPModule))


def save_pretrained(net: nn.Module, folder: Path, weights: dict[str, Tensor], **options: Any) -> None:
    """Without importing deepspeed, which accelerate does to unwrap a model wherever it is installed; this one is not wrapped."""
    known = accelerate.utils.other.is_deepspeed_available
    accelerate.utils.other.is_deepspeed_available = lambda: False
    try:
        net.save_pretrained(folder, state_dict=weights, **options)
    finally:
        accelerate.utils.other.is_deepspeed_available = known


def precision_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounding(recipe: Recipe, dtype: torch.dtype) -> str:
    """What a run is computed in, and what its quantised base was rounded to before, where that is another type."""
    record = record_of(recipe.model.base)
    if record is None or record["precision"] == precision_name(dtype):
        return precision_name(dtype)
    return f"{precision_name(dtype)} on a base rounded to {record['precision']}"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def servable_as(recipe: Recipe, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """(`adapter`, `merged` or `model`, why): in which form other programs can serve what this run makes."""
    if recipe.adapter == "none":
        return "model", "every weight is trained"
    if recipe.adapter.init not in ("default", "gaussian"):
        return "merged", f"adapter.init: {recipe.adapter.init} has changed the base that the adapter stands on"
    return manifest["role_markers"]["servable_as"], manifest["role_markers"]["reason"]


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computes on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "count": torch.cuda.device_count()}
    return {"device": f"CPU ({torch.get_num_threads()} threads)", "machine": platform.machine(), "cores": os.cpu_count()}


def git_state() -> dict[str, Any] | None:
    """Commit of the suite and whether files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603, S607

    return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
