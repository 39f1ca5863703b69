"""scripts/verify.py: the certificate passes here, and fails as soon as one number of one run is another."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MakeRecipe
from in_process import script

from qlora_suite.tracking import console

verify = script("verify")


def test_the_certificate(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "RECIPE", make_recipe())
    runs = tmp_path / "runs"
    with console.capture() as said:
        assert verify.verify(["ddp"], runs, processes=2, gpu=False)
    last = said.get().strip().splitlines()[-1]
    assert last.startswith("verify: one curve: 7 of 7 pass (torch")

    def verdicts(folder: Path, complaints: dict | None = None) -> dict[tuple[str, str], bool]:
        return {(engine, way): ok for engine, way, _, ok in verify.judged(["ddp"], folder, complaints or {})}

    assert all(verdicts(runs).values())
    assert [key for key, ok in verdicts(runs, {("ddp", "row by row"): "failed"}).items() if not ok] == [("ddp", "row by row")]
    for run, change, wrong in (
        ("ddp/row-by-row", 1 + 1e-4, ("ddp", "row by row")),
        ("ddp/killed-resumed", 1 + 1e-7, ("ddp", "killed, resumed")),  # close is not equal
        ("handed-on", float("nan"), ("all in turn", "handed on")),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(runs, broken)
        metrics = broken / run / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        records[4]["loss"] *= change
        metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert [key for key, ok in verdicts(broken).items() if not ok] == [wrong]
        shutil.rmtree(broken)
    shutil.rmtree(runs / "handed-on" / "final")
    assert not verdicts(runs)[("all in turn", "handed on")]
