"""What stood around a step that went wrong, while it can still be seen: RUN/black_box/step-000123.json.

rows             of each micro-batch: its summed loss, and the conversations in it (keys and hashes of their texts, which
                 scripts/prepare_data.py --ids or a search in the raw data leads back to)
layers           of the micro-batch with the worst loss on each rank, gone through once more: each layer's largest output
tensors          each trained tensor and its gradient: largest magnitude, and how many values are not finite
last_steps       the lines of metrics.jsonl before it
beside           loss scale and the scaler's state, learning rate, precision, engine
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_suite.batches import EMPTY
from qlora_suite.dataset import Rows
from qlora_suite.engine import Engine, extremes_of
from qlora_suite.files import write_json
from qlora_suite.ranks import gathered

FOLDER = "black_box"
MOST_BOXES = 20
"""Of a run. A run in which everything goes wrong must not fill the disk; what comes later is only noted."""
LAST_STEPS = 20


def look(
    engine: Engine,
    forward: Callable[[int], Any],
    micro: Sequence[Sequence[int]],
    losses: Sequence[Tensor],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """See what can be seen between the backward pass and `engine.step`. All ranks must call it, and all get it.

    micro       this rank's micro-batches, as row numbers
    losses      their summed losses, device scalars
    forward     goes through a micro-batch of this rank once more, by its number, without keeping anything
    """
    rank, found = engine.accelerator.process_index, [loss.item() for loss in losses]
    worst = max(range(len(found)), key=lambda i: found[i] if math.isfinite(found[i]) else math.inf)
    outputs = _outputs(engine.unwrapped, lambda: forward(worst))
    engine.after_a_look()
    mine = {
        "micro_batches": [
            {
                "rank": rank,
                "micro_batch": i + 1,
                "loss": loss,
                "rows": [_row(rows, number, tokenizer) for number in numbers if number != EMPTY],
            }
            for i, (numbers, loss) in enumerate(zip(micro, found, strict=True))
        ],
        "layers": {"rank": rank, "micro_batch": worst + 1, "outputs": outputs},
    }
    of_ranks = gathered(engine.accelerator, mine)
    return {
        "micro_batches": [one for each in of_ranks for one in each["micro_batches"]],
        "layers": [each["layers"] for each in of_ranks],
        "tensors": engine.extremes(),
        "beside": {"engine": engine.name, "precision": str(engine.dtype), "loss_scale": engine.loss_scale(), "scaler": engine.state()},
    }


def write(run: Path, step: int, box: Mapping[str, Any], journal: Sequence[Mapping[str, Any]]) -> str:
    """Write a step's black box into the run's folder. Returns where it is, or why it is not, for the end of a sentence."""
    path = run / FOLDER / f"step-{step:06d}.json"
    last = [record for record in journal if "loss" in record][-LAST_STEPS:]
    try:
        write_json(path, _as_json({"step": step, **box, "last_steps": last}))
    except OSError as error:
        return f"; its black box could not be written ({error})"
    return f"; {path} shows what stood around it"


def _as_json(value: Any) -> Any:
    """NaN and infinity as words, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(rows: Rows, number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    row, conversations, start = rows[number], [], 0
    for key, length in zip(rows.examples(number), row["lengths"], strict=True):
        text = tokenizer.decode(row["input_ids"][start : start + length])
        conversations.append({"key": key, "tokens": length, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        start += length
    return {"row": number, "supervised": int(row["supervised"].sum()), "conversations": conversations}


def _outputs(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Any]:
    """Each layer's extremes in one forward pass; beside those that came before it, an `error`: a look must not end the run."""
    found: dict[str, dict[str, float]] = {}
    try:
        with _hooked(model, found), torch.no_grad():
            forward()
    except RuntimeError as error:
        return {**found, "error": str(error).splitlines()[0]}
    return found


@contextlib.contextmanager
def _hooked(model: nn.Module, found: dict[str, dict[str, float]]) -> Iterator[None]:
    layers = model.config.get_text_config().num_hidden_layers
    stacks = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    stack, modules = next(stacks, ("", []))

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = extremes_of("output", output[0] if isinstance(output, tuple) else output)

        return note

    handles = [module.register_forward_hook(hook(f"{stack}.{i}")) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
