"""What the `loss` of a run's metrics.jsonl is a mean over: it depends on what was learnt from."""

from collections.abc import Mapping, Sequence
from typing import Any


def loss_unit(metrics: Sequence[Mapping[str, Any]]) -> str:
    """In words, of a journal's records: nats a token of SFT, nats a pair of DPO, and a mean over GRPO's answers, which is in no unit."""
    keys = {key for record in metrics for key in record}
    return "nats per pair" if keys & {"accuracy", "dev_accuracy"} else "mean over answers" if "reward" in keys else "nats per token"
