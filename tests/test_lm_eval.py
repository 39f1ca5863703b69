"""evaluate.py --lm-eval: the harness on base and adapter as they are loaded here, offline, on a task of four choices."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import write_recipe
from in_process import prepared, script, train

from qlora_suite.assistant import load
from qlora_suite.files import read_json
from qlora_suite.harness import Benchmarks
from qlora_suite.subject import subject_of

CHOICES = [" the", " of", " and the", " to"]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path, messages: list[dict]) -> Path:
    """With a finished run, and a task in `tasks`: 24 questions whose answer is anybody's guess."""
    folder = tmp_path_factory.mktemp("harness")
    recipe = write_recipe(folder, tiny_base, oasst_file, "train.max_steps=30", "train.epochs=5", "optim.learning_rate=0.02")
    train(prepared(recipe))
    (folder / "tasks").mkdir()
    rows = [{"question": message["text"][:60].strip(), "answer": i % 4} for i, message in enumerate(messages[:24])]
    (folder / "tasks" / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks" / "local_choices.yaml").write_text(TASK.format(file=folder / "tasks" / "rows.json", choices=json.dumps(CHOICES)))
    return folder


def evaluate(folder: Path, **options: Any) -> dict[str, Any]:
    benchmarks = Benchmarks(("local_choices",), folder / "tasks", **options)
    try:
        script("evaluate").run(folder / "run", [], num_answers=0, benchmarks=benchmarks)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return read_json(folder / "run" / "report.json")


@torch.no_grad()
def right(net: torch.nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> list[bool]:
    """By hand: is the right choice the likeliest continuation?"""
    found = []
    for row in rows:
        start = tokenizer(row["question"])["input_ids"]
        sums = []
        for choice in CHOICES:
            ids = tokenizer(row["question"] + choice)["input_ids"]
            logs = net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        found.append(max(range(4), key=sums.__getitem__) == row["answer"])
    return found


def test_base_and_adapter_are_scored_with_their_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = evaluate(folder)["lm_eval"]["columns"]
    assistant = load(subject_of(folder / "run", []), torch.device("cpu"), torch.float32)
    rows = [json.loads(line) for line in (folder / "tasks" / "rows.json").read_text().splitlines()]
    by_hand = {"adapter": right(assistant.net, assistant.renderer.tokenizer, rows)}
    with assistant.as_base():
        by_hand["base"] = right(assistant.net, assistant.renderer.tokenizer, rows)
    assert by_hand["base"] != by_hand["adapter"]
    for name, answers in by_hand.items():
        share = sum(answers) / len(answers)
        found = columns[name]["results"]["local_choices"]["acc"]
        assert found["value"] == pytest.approx(share)
        assert found["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(answers) - 1)))
    written = f"{columns['adapter']['results']['local_choices']['acc']['value']:.4f} ± "
    assert (
        f"| local_choices | acc | {columns['base']['results']['local_choices']['acc']['value']:.4f} ± "
        in (folder / "run/report.md").read_text()
    )
    for text in ((folder / "run" / name).read_text() for name in ("report.md", "report.html")):
        assert written in text

    # kept, and made again for other examples
    asked = []
    real = script("evaluate").harness_scores
    monkeypatch.setattr(script("evaluate"), "harness_scores", lambda *args: (asked.append(args), real(*args))[1])
    assert evaluate(folder)["lm_eval"]["columns"] == columns
    assert asked == []
    limited = evaluate(folder, limit=4)["lm_eval"]
    assert len(asked) == 2
    assert limited["limit"] == 4
    assert limited["columns"]["base"]["results"]["local_choices"]["acc"]["value"] == sum(by_hand["base"][:4]) / 4


def test_what_is_missing_is_said_before_anything_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="knows no task nonesuch, nor does"):
        Benchmarks(("local_choices", "nonesuch"), folder / "tasks").check()
    with pytest.raises(ValueError, match="there is no folder"):
        Benchmarks(("local_choices",), folder / "nowhere").check()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest))
    monkeypatch.setattr(script("evaluate"), "scores_or_reason", None)
    with pytest.raises(ValueError, match="python -m pip install 'lm-eval"):
        evaluate(folder)
