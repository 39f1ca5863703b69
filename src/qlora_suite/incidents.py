"""What went wrong in a run without ending it, as metrics.jsonl has it, for the report: a line for each kind.

spike, clipped                     2 x  steps 212, 840     gradient norm 91.3, median gradient norm 2.1
checkpoint failed                  1 x  step 300           error No space left on device
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

SCALE_SEARCH = "overflow of fp16, not applied"
_ITS_OWN = ("step", "attempt", "event", "applied")
_MOST_STEPS = 5


def incidents(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{"what", "count", "steps", "last"} of each kind in the order of their first steps; `last` says the details of the last one."""
    # A step that is done again after a resume goes wrong again in the same way; a disk that fails twice has failed twice.
    once = {
        (record["event"], record["step"], record["attempt"] if "applied" not in record else 0): record
        for record in metrics
        if "event" in record
    }
    events = [(_name(record), record) for record in once.values()]
    known = {record["step"] for _, record in events}
    events += [(SCALE_SEARCH, r) for r in metrics if r.get("applied") is False and "loss" in r and r["step"] not in known]
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, record in sorted(events, key=lambda event: event[1]["step"]):
        groups[name].append(record)
    return [
        {"what": name, "count": len(records), "steps": _steps([r["step"] for r in records]), "last": _details(records[-1])}
        for name, records in groups.items()
    ]


def _name(record: Mapping[str, Any]) -> str:
    applied = record.get("applied")
    return record["event"] if applied is None else f"{record['event']}, {'clipped' if applied else 'not applied'}"


def _steps(steps: Sequence[int]) -> str:
    """`step 3`, `steps 3, 9` or `steps 3, 9, 12, 14 ... 88`."""
    steps = sorted(set(steps))
    shown = [f"{step:,}" for step in steps]
    if len(shown) > _MOST_STEPS:
        shown = [*shown[: _MOST_STEPS - 2], "...", shown[-1]]
    return f"step{'s'[: len(steps) > 1]} {', '.join(shown).replace(', ..., ', ' ... ')}"


def _details(record: Mapping[str, Any]) -> str:
    if "event" not in record:
        return ""
    values = {key.replace("_", " "): value for key, value in record.items() if key not in _ITS_OWN and value not in (None, False)}
    return ", ".join(key if value is True else f"{key} {_written(value)}" for key, value in values.items())


def _written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
