"""Benchmarks by the lm-evaluation-harness, on a model that is loaded already.

    scores = harness_scores(net, tokenizer, Benchmarks(("arc_easy",)))
    scores["arc_easy"]["acc"]                      {"value": 0.7, "stderr": 0.01}

Tasks are asked as the harness writes them, as plain text without a chat template, so that numbers compare with published ones.
"""

import copy
import functools
import importlib.util
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_suite.files import file_table

Scores = dict[str, dict[str, dict[str, float | None]]]
"""By task and metric: `value` and `stderr` (None where the harness has none)."""


@dataclass(frozen=True)
class Benchmarks:
    tasks: tuple[str, ...]
    folder: Path | None = None
    """With YAML files of tasks of one's own."""
    limit: int | None = None
    """Examples of each task; None for all."""

    def record(self) -> dict[str, Any]:
        """What the scores depend on, beside the model."""
        files = file_table(self.folder, but="") if self.folder else None
        return {"tasks": sorted(self.tasks), "limit": self.limit, "lm_eval": version("lm_eval"), "files": files}

    def check(self) -> None:
        """Raises ValueError if the harness is not installed or does not know a task."""
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("--lm-eval needs the lm-evaluation-harness; install it: python -m pip install 'lm-eval>=0.4.13,<1'")
        if self.folder and not self.folder.is_dir():
            raise ValueError(f"there is no folder {self.folder} (--lm-eval-tasks-folder), where YAML files of your own tasks would stand")
        if unknown := [task for task in self.tasks if task not in _manager(self).all_tasks]:
            raise ValueError(
                f"lm-eval {version('lm_eval')} knows no task {', '.join(unknown)}{f', nor does {self.folder}' if self.folder else ''}; "
                "`lm-eval ls tasks` lists its own, and --lm-eval-tasks-folder names a folder with yours"
            )


def harness_scores(net: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: Benchmarks, batch_size: int = 8) -> Scores:
    """Raises ValueError with what the harness says if it cannot get a task's data."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = copy.deepcopy(tokenizer)  # the harness sets its padding token
    language_model = HFLM(pretrained=net, tokenizer=own, backend="causal", batch_size=batch_size)
    try:
        found = simple_evaluate(
            language_model, tasks=list(wanted.tasks), task_manager=_manager(wanted), limit=wanted.limit, log_samples=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"lm-eval could not run {', '.join(wanted.tasks)}: {str(error).strip().partition(chr(10))[0]}") from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` -> acc; other filters stand in brackets behind the metric."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return found


@functools.cache
def _manager(wanted: Benchmarks) -> Any:
    """Of the tasks in the folder alone if they are enough: the harness takes seconds to look through its own."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if wanted.folder:
        own = TaskManager(include_path=str(wanted.folder), include_defaults=False)
        if set(wanted.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=str(wanted.folder) if wanted.folder else None)
