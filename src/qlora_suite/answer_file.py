"""A JSONL file of answers, a record each, which the same request goes on with.

{"index": 0, "request": "5f0c...", "prompt": "Who are you?", "answer": "...", "tokens": 22, "stopped": true, "repetition": 0.0,
 "prompt_tokens": 9, "seconds": 0.61, "model": {"answers": "adapter", "run": "runs/quickstart", "step": 67, ...},
 "settings": {"max_new_tokens": 256, "sampling": null}}

`request` is a hash of the prompt's ids, the weights and the settings; `seconds` are those of the batch that the answer was made in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_suite.files import hash_of, write_text
from qlora_suite.generation import Answer
from qlora_suite.prompts import Prompt
from qlora_suite.tracking import read_journal


class AnswerFile:
    """Raises ValueError if the file holds anything but the first answers of this very request: nothing is written over."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], model: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path, self.prompts, self.model, self.settings = path, prompts, model, settings
        self.requests = [hash_of([prompt.ids, model["weights"], model["precision"], settings])[:16] for prompt in prompts]
        self.records = read_journal(path)
        found = [(r.get("index"), r.get("request")) if isinstance(r, dict) else None for r in self.records]
        if found != list(enumerate(self.requests))[: len(found)] or (not found and path.exists() and path.stat().st_size):
            raise ValueError(f"{path} holds other answers (other prompts, weights or settings); name another file, or remove it")
        # without a line that was cut short; and now, not after the first answers, it shows whether the file can be written
        write_text(path, "".join(map(_line, self.records)))

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """The next ones."""
        new = []
        for answer in answers:
            index = len(self.records) + len(new)
            prompt = self.prompts[index]
            values = {"answer": answer.text, "tokens": answer.num_tokens, "stopped": answer.stopped, "repetition": answer.repetition}
            names = {"index": index, "request": self.requests[index], **prompt.given}
            record = {**names, **values, "prompt_tokens": len(prompt.ids), "seconds": round(seconds, 3)}
            new.append({**record, "model": self.model, "settings": self.settings})
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, new)))
        self.records += new


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
