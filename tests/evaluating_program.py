"""One rank of tests/test_evaluate_on_two_processes.py: evaluates runs under adverse conditions, writes what came of it. Not a test."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from in_process import script

from qlora_suite import evaluation, ranks

FOLDER = Path(sys.argv[1])
evaluate = script("evaluate")
PartialState(cpu=True)
RANK = PartialState().process_index
real_losses, real_load, real_score = evaluation.token_losses, evaluate.load_column, evaluation.score


def on_rank_1(when: Any) -> Any:
    """In place of a call: out of memory on rank 1 when the arguments say so."""

    def wrapper(real: Any) -> Any:
        def call(*args: Any) -> Any:
            if RANK == 1 and when(*args):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*args)

        return call

    return wrapper


def run(name: str, losses: Any = real_losses, load: Any = real_load) -> dict[str, Any]:
    """Evaluate the run in FOLDER/name. Returns the error, if any, and what happened here: columns loaded, limits tried, tokens scored."""
    loaded, limits, tokens = [], [], []
    evaluation.token_losses = lambda model, batch: (tokens.append(len(batch.targets)), losses(model, batch))[1]
    evaluate.load_column = lambda column, *args: (loaded.append(column.name), load(column, *args))[1]
    evaluation.score = lambda *args: (limits.append(args[4].rows), real_score(*args))[1]
    error = None
    try:
        evaluate.run(FOLDER / name, [], num_answers=2, answer_tokens=12)
    except (Exception, ranks.EndedByAnotherRank) as caught:
        error = [type(caught).__name__, str(caught)]
    return {"error": error, "loaded": loaded, "limits": limits, "tokens": sum(tokens)}


def broken(*_: Any) -> None:
    if RANK == 1:
        raise ValueError("this rank cannot read it")


def forget_the_adapter(name: str) -> None:
    if RANK == 0:
        for path in (FOLDER / name / "evaluation").glob("adapter-*"):
            path.unlink()
    PartialState().wait_for_everyone()


outcomes = {
    "plain": run("plain"),
    "again": run("plain"),
    "own disk": run("plain" if RANK == 0 else "elsewhere"),
    "short of memory": run("short", losses=on_rank_1(lambda model, batch: len(batch.input_ids) > 3)(real_losses)),
    "too large": run("too_large", load=on_rank_1(lambda column, *_: column.name == "base_unquantised")(real_load)),
    "too large adapter": run("hopeless", losses=on_rank_1(lambda model, *_: hasattr(model, "peft_config"))(real_losses)),
    "mistake": run("mistake", load=broken),
    "a mistake of all": run("nowhere"),
}
forget_the_adapter("plain")
outcomes["adapter only"] = run("plain")
(FOLDER / f"outcomes-{RANK}.json").write_text(json.dumps(outcomes))
PartialState().destroy_process_group()  # a process that just ends may be aborted: gloo's threads are still there
