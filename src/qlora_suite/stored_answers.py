"""The greedy answers that a run gave to its preview prompts, at the step that became its result."""

from pathlib import Path

from qlora_suite.files import read_json
from qlora_suite.generation import Answer
from qlora_suite.tracking import read_journal


def stored_answers(folder: Path) -> list[Answer] | None:
    """None if the run has none of the chosen step: it has no preview prompts, or an earlier step than the last one was chosen."""
    step = read_json(folder / "final" / "chosen.json")["step"]
    found = [record for record in read_journal(folder / "previews.jsonl") if record["step"] == step]
    return [Answer(**answer) for answer in found[-1]["answers"]] if found and found[-1]["answers"] else None
