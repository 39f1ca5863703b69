"""scripts/prepare_data.py: what it writes, what it counts, and what it says when it cannot."""

import json

from conftest import MakeRecipe, run_script

from qlora_suite import dataset
from qlora_suite.recipe import load


def test_run_again_it_reuses_what_is_there(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    first, second = run_script("prepare_data.py", recipe), run_script("prepare_data.py", recipe)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "preparing" in first.stdout
    assert "up to date" in second.stdout
    assert "preparing" not in second.stdout
    manifest = dataset.load_manifest(load(recipe))
    assert manifest["counts"]["train"]["supervised"] > 0
    assert json.dumps(manifest["role_markers"]["token_ids"]) == "[1024, 1025]"
