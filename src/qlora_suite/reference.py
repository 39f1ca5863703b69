"""What the reference of DPO gives each answer: computed once, before the first step, from the model as it is then.

The reference is the model at its start: adapter.start_from with its token rows, or, of a new adapter, the base itself. Its
log-probabilities never change, so that no second model has to be kept, sharded and gone through in each step. They are kept in
RUN/reference.jsonl, one line a row, and a run that is stopped on the way goes on behind the last of them:

    {"of": "8c1f..."}                                       what the reference is
    {"split": "train", "row": 17, "log_probs": [-41.3, -38.9]}        of the chosen answer and of the rejected one, in nats
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from qlora_suite import dpo
from qlora_suite.batches import EMPTY, Limit, micro_batches
from qlora_suite.dataset import Rows
from qlora_suite.engine import autocast
from qlora_suite.evaluation import release_memory
from qlora_suite.files import hash_of, write_text
from qlora_suite.loss import collate, token_losses
from qlora_suite.micro_batch import is_out_of_memory
from qlora_suite.ranks import gathered, together
from qlora_suite.recipe import Dpo
from qlora_suite.run_facts import BASE, DATA, START
from qlora_suite.tracking import StepBar, say

FILE = "reference.jsonl"
AT_ONCE = Limit(rows=64, tokens=8192)
"""Rows and tokens in a forward pass without gradients; a longer row still goes through by itself."""


def name_of(identity: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Names what the log-probabilities depend on: the data, the base and how it is stored, and the adapter at the start, or what a new
    one makes of the base.
    """
    keys = (DATA, BASE, START, "model.quantization", "model.double_quantization", "adapter.init")
    return hash_of([{key: identity.get(key) for key in keys}, manifest["files"]["dev.arrow"]["sha256"]])


class WithReference(Sequence[dict[str, Any]]):
    """Prepared rows that also have a `reference`. Its lengths and numbers are those of the rows."""

    def __init__(self, rows: Rows, log_probs: np.ndarray) -> None:
        self.rows, self.log_probs = rows, log_probs
        """[rows, 2] float64, in nats; NaN where it is not known"""
        self.lengths, self.num_supervised, self.examples = rows.lengths, rows.num_supervised, rows.examples

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], "reference": tuple(self.log_probs[row].tolist())}


def with_reference(
    folder: Path,
    of: str,
    net: nn.Module,
    splits: dict[str, tuple[Rows, Iterable[int]]],
    settings: Dpo,
    pad_id: int,
    dtype: torch.dtype,
    accelerator: Accelerator,
    asked: Callable[[], bool],
) -> list[WithReference] | None:
    """Each split's rows with the log-probabilities of those that are wanted, from the run's folder or else computed now and kept there.

    of      names the reference: what another one has left in the folder is not used
    net     the model at its start, not wrapped by an engine
    splits  name -> (rows, numbers of those that are wanted)
    asked   is there a request to stop? Then the answer is None, on all ranks alike, and the next start goes on from here

    All ranks must call it; each goes through a share of the rows. A disk that is full later on is said, and ends nothing. Raises OSError
    if it is full at once, and ValueError for a pair that has no finite probability.
    """
    with together(accelerator):
        known = _read(folder / FILE, of) if accelerator.is_main_process else None
    known = gathered(accelerator, known)[0]
    tables = {name: np.full((len(rows), 2), np.nan) for name, (rows, _) in splits.items()}
    for name, row, values in known:
        if name in tables and row < len(tables[name]):
            tables[name][row] = values
    missing = {name: [r for r in sorted(set(wanted)) if np.isnan(tables[name][r, 0])] for name, (_, wanted) in splits.items()}
    done, total = 0, sum(map(len, missing.values()))
    unwritten: list[dict[str, Any]] = []
    was_training = net.training
    net.eval()
    try:
        with StepBar("log-probabilities of the reference", total, visible=accelerator.is_main_process and total > 0) as bar:
            for name, (rows, _) in splits.items():
                longest_first = sorted(missing[name], key=lambda r: -rows.lengths[r])
                for piece in micro_batches(longest_first, rows.lengths, AT_ONCE, accelerator.process_index, accelerator.num_processes):
                    with together(accelerator):
                        mine = _log_probs(net, rows, piece, settings, pad_id, dtype, accelerator.device)
                        _check_finite(name, mine, dtype)
                    shares = gathered(accelerator, (mine, asked()))
                    found = [line for share, _ in shares for line in share]
                    for row, values in found:
                        tables[name][row] = values
                    if accelerator.is_main_process:
                        records = [{"split": name, "row": row, "log_probs": values} for row, values in found]
                        unwritten = _added(folder / FILE, unwritten, records)
                    done += len(found)
                    bar.advance(done, "pairs")
                    if any(stop for _, stop in shares):
                        return None
    finally:
        net.train(was_training)
    return [WithReference(rows, tables[name]) for name, (rows, _) in splits.items()]


@torch.no_grad()
def _log_probs(
    net: nn.Module, rows: Rows, numbers: Sequence[int], settings: Dpo, pad_id: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, list[float]]]:
    """(row, [log p of the chosen answer, of the rejected one]) of each; in halves where memory is short."""
    numbers = [number for number in numbers if number != EMPTY]
    if not numbers:
        return []
    try:
        batch = collate([rows[number] for number in numbers], pad_id, dpo=settings).to(device)
        with autocast(device, dtype):
            losses = token_losses(net, batch)
        return list(zip(numbers, dpo.log_probs(losses, batch.pairs).tolist(), strict=True))
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(numbers) == 1:
            raise
    release_memory()  # not in the block above: there the error's traceback still holds the tensors
    half = len(numbers) // 2
    return [pair for part in (numbers[:half], numbers[half:]) for pair in _log_probs(net, rows, part, settings, pad_id, dtype, device)]


def _check_finite(split: str, found: Sequence[tuple[int, list[float]]], dtype: torch.dtype) -> None:
    for row, values in found:
        if not np.isfinite(values).all():
            raise ValueError(
                f"the model at the start gives the answers of row {row} of {split}.arrow no finite probability in {dtype}; use "
                "mixed_precision: bf16 where the card has it, or look at that pair"
            )


def _read(path: Path, of: str) -> list[tuple[str, int, list[float]]]:
    """(split, row, log-probabilities) of each line; makes the file anew if it is another reference's. A line that a kill has cut is left
    out, and the file is written without it.
    """
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.split("\n")[:-1]  # what stands behind the last newline was cut
    if lines and _parsed(lines[0]) == {"of": of}:
        for line in lines[1:]:
            record = _parsed(line)
            if not _is_known(record):
                break
            found.append((record["split"], record["row"], record["log_probs"]))
    whole = "".join(f"{line}\n" for line in [json.dumps({"of": of}), *lines[1 : len(found) + 1]])
    if whole != text:
        write_text(path, whole)
    return found


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_known(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != {"split", "row", "log_probs"}:
        return False
    row, values = record["row"], record["log_probs"]
    finite = isinstance(values, list) and len(values) == 2 and all(isinstance(v, float) and np.isfinite(v) for v in values)
    return isinstance(record["split"], str) and type(row) is int and row >= 0 and finite


def _added(path: Path, before: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Append what is not written yet. Returns what still is not: on a full disk all of it, for the next time; that is said once."""
    records = before + records
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                left = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)  # half a line would hide those after it
                raise
    except OSError as error:
        if not before:
            say(f"{path.name} CANNOT BE WRITTEN ({error}); training goes on, and what is not there is computed again after a stop")
        return records
    return []
