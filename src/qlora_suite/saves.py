"""When a checkpoint is written, mirrored and pruned, and what becomes of a run whose disk does not take it."""

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_suite import checkpoint, disk_space
from qlora_suite.checkpoint import State, Trained
from qlora_suite.engine import Engine
from qlora_suite.mirror import copy_to, refuse_links, restore_from
from qlora_suite.prequantized import source_of
from qlora_suite.ranks import gathered, together
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import to_yaml
from qlora_suite.run_facts import rounding
from qlora_suite.tracking import say

LONGEST_PAUSE = 64
"""Steps from a save that failed to the next try, at most: the first comes after one step, and each pause is twice the one before."""


class Saves:
    """The checkpoints of one run, RUN/checkpoints and the same in the mirror. The main process writes; all processes call."""

    def __init__(self, recipe: Recipe, path: Path, accelerator: Accelerator, add_event: Callable[..., None]) -> None:
        """add_event(step, event, **details) notes in metrics.jsonl what went wrong."""
        self.recipe, self.path, self.accelerator, self.add_event = recipe, path, accelerator, add_event
        self.folder = path / "checkpoints"
        self.mirror = None if recipe.output.mirror is None else Path(recipe.output.mirror)
        self.newest: Path | None = None
        """The newest checkpoint; main process only."""
        self.retry_at: int | None = None
        """The step at which a save is due, whatever the recipe says: one has failed, or what was saved is gone. The same on all ranks."""
        self.num_failed = self.failed_in_a_row = 0

    def newest_good(self) -> Path | None:
        """The checkpoint to go on from, its own or the mirror's; damaged ones are set aside. None at a beginning.

        Raises ValueError if there are some and none is good.
        """
        try:
            if (found := checkpoint.latest(self.folder)) or not self.mirror:
                return found
            restore_from(self.mirror, self.folder)
        except ValueError:  # all of them are damaged
            if not self.mirror or checkpoint.steps(self.folder) or not checkpoint.steps(self.mirror / "checkpoints"):
                raise
            restore_from(self.mirror, self.folder)
        return checkpoint.latest(self.folder)

    def save(self, state: State, net: nn.Module, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, required: bool) -> bool:
        """Write, verify, mirror; then prune. Was it written?

        A disk that is full for a while must not cost the run: a periodic save that fails is said, counted, noted and tried again, after
        a step, after two more, after four more, ... Raises OSError if the run cannot go on without this one (`required`).
        """
        error = None
        state.scaler, state.processes = engine.state(), self.accelerator.num_processes
        state.precision = rounding(self.recipe, engine.dtype)
        learnt = checkpoint.trained(net, engine)
        with together(self.accelerator):
            if learnt is not None:
                try:
                    self._write_or_make_room(state, net, learnt, tokenizer)
                except OSError as caught:
                    error = str(caught)
                    self.num_failed += 1
                    if required:
                        self.add_event(state.step, "checkpoint failed", error=error, failed_saves=self.num_failed)
                        before = f"the newest one is {self.newest.name}" if self.newest else "there is none before it"
                        raise OSError(
                            f"the checkpoint of step {state.step} could not be written to {self.folder} ({error}), and {before}; "
                            "see to the disk, and the same command goes on from there"
                        ) from caught
        error = gathered(self.accelerator, error)[0]
        if error is None:
            self.failed_in_a_row, self.retry_at = 0, None
            return True
        self.failed_in_a_row += 1
        self.retry_at = state.step + min(2 ** (self.failed_in_a_row - 1), LONGEST_PAUSE)
        if self.accelerator.is_main_process:
            said = f"checkpoint at step {state.step} FAILED ({error}); training goes on from memory, next try at step {self.retry_at}"
            say(f"{said}, failed so far: {self.num_failed}")
            self.add_event(state.step, "checkpoint failed", error=error, failed_saves=self.num_failed, next_try=self.retry_at)
        return False

    def _write_or_make_room(self, state: State, net: nn.Module, learnt: Trained, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write; on a full disk at once again, without the checkpoints that need not stay."""
        best = int(state.best["step"]) if state.best else None
        try:
            written = self._write(state, net, learnt, tokenizer)
        except OSError as error:
            deleted = checkpoint.make_room(self.folder, best) if disk_space.is_full(error) else []
            if not deleted:
                raise
            say(f"the disk of {self.path} is FULL: {', '.join(deleted)} deleted to save step {state.step}")
            self.add_event(state.step, "disk full", error=str(error), deleted=deleted)
            written = self._write(state, net, learnt, tokenizer)
        self.newest = written
        try:
            checkpoint.prune(self.folder, self.recipe.checkpoints.keep, best)
        except OSError as error:
            say(f"an old checkpoint in {self.folder} COULD NOT BE DELETED ({error})")
            self.add_event(state.step, "old checkpoint could not be deleted", error=str(error))
        if self.mirror:
            self._copy(self.mirror, written, state.step, best)

    def _write(self, state: State, net: nn.Module, learnt: Trained, tokenizer: PreTrainedTokenizerBase) -> Path:
        source = source_of(self.recipe.model.base) or self.recipe.model  # the published base, not a folder with its quantised form
        base = (source.base, source.revision)
        refuse_links(self.path)
        return checkpoint.save(self.folder, state, net, learnt, tokenizer, to_yaml(self.recipe), base)

    def _copy(self, mirror: Path, written: Path, step: int, best: int | None) -> None:
        """That it fails is said, counted and noted; the next save brings the next copy."""
        try:
            copy_to(mirror, written, self.recipe.checkpoints.keep, best)
        except OSError as error:
            self.num_failed += 1
            say(f"mirroring {written.name} FAILED ({error}); it is safe in {self.folder}, failed so far: {self.num_failed}")
            self.add_event(step, "mirroring failed", error=str(error), failed_saves=self.num_failed)
