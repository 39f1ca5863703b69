"""A file that a newer version of the suite wrote is refused with a sentence and left alone: it is good, only not for us.

Checkpoints: test_checkpoint.py::test_a_newer_format_is_refused_and_left_alone. docs/maintaining.md has the table of formats.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MakeRecipe

from qlora_suite import comparison, dataset, hub_folder, prequantized
from qlora_suite.compared_runs import read_run
from qlora_suite.files import read_json, write_json
from qlora_suite.recipe_file import load

FORMATS = {
    "quantized_base.json": (prequantized.FORMAT_VERSION, lambda run: prequantized.source_of(str(run))),
    "merged/merge.json": (hub_folder.MERGED_VERSION, lambda run: hub_folder.check_merged(SimpleNamespace(folder=run))),
    "report.json": (comparison.REPORT_VERSION, read_run),
    "report.json, published": (comparison.REPORT_VERSION, lambda run: hub_folder.report_of(SimpleNamespace(folder=run))),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_a_newer_format_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    version, read = FORMATS[name]
    path = tmp_path / name.partition(",")[0]
    path.parent.mkdir(exist_ok=True)
    for beside in ("recipe.yaml", "run.json"):
        (tmp_path / beside).write_text("{}")
    write_json(path, {"format_version": version + 1})
    with pytest.raises(ValueError, match=rf"{path.name} was written by a newer version \(format {version + 1}, this one reads {version}\)"):
        read(tmp_path)
    assert read_json(path) == {"format_version": version + 1}


@pytest.mark.parametrize("step", [-1, 1], ids=["older", "newer"])
def test_prepared_data_of_another_format_is_answered_with_the_command_that_makes_it_anew(make_recipe: MakeRecipe, step: int) -> None:
    recipe = load(make_recipe())
    sections: dict[str, Any] = {key: {} for key in ("recipe", "sources", "source_stats", "files", "counts", "role_markers")}
    Path(recipe.data.prepared).mkdir()
    write_json(Path(recipe.data.prepared) / dataset.MANIFEST, {**sections, "format_version": dataset.FORMAT_VERSION + step})
    with pytest.raises(ValueError, match=rf"has format {dataset.FORMAT_VERSION + step}, .*run: python scripts/prepare_data\.py"):
        dataset.load_manifest(recipe)
