"""SFT, then DPO, then GRPO of a tiny base, each beginning with the adapter of the one before; three seconds of training each.

The windows are 256, 200 and 160 tokens. GRPO is rewarded by a function of the test's own and by one of the suite's.
"""

from pathlib import Path

import pytest
from conftest import write_recipe
from in_process import prepared, train

WINDOWS = {"sft": 256, "dpo": 200, "grpo": 160}
LETTERS = "def letters(answer):\n    return min(1.0, answer.text.count('e') / 8)\n"
SHARED = ("model.quantization=none", "data.validation_share=0.5", "evaluation.bootstrap_samples=200")
OF_PAIRS = ("data.policy=preference_pairs", "data.pairs={choose: all}", "data.packing=false", "dpo={beta: 0.2}")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, oasst_file: Path) -> dict[str, Path]:
    """The runs' folders, not evaluated. Tests that change one copy it first."""
    folder = tmp_path_factory.mktemp("chain")
    own = folder / "own.py"
    own.write_text(LETTERS)
    rewards = f"grpo.rewards=[{{path: '{own}:letters'}}, {{name: no_repetition, weight: 0.25}}]"
    steps = {
        "sft": ("train={rows_per_step: 8, max_steps: 12}",),
        "dpo": (*OF_PAIRS, "train={rows_per_step: 8, max_steps: 6}", f"adapter.start_from={folder / 'sft'}", "optim.learning_rate=5e-3"),
        "grpo": (
            "data.packing=false",
            *(rewards, "grpo.group_size=4", "grpo.max_new_tokens=24", "optim.learning_rate=1e-2"),
            *("train={rows_per_step: 4, max_steps: 2}", f"adapter.start_from={folder / 'dpo'}"),
        ),
    }
    runs = {}
    for name, ours in steps.items():
        places = (f"data.prepared={folder / 'prepared' / name}", f"output.dir={folder / name}", f"data.max_length={WINDOWS[name]}")
        recipe = prepared(write_recipe(folder, tiny_base, oasst_file, *SHARED, *places, *ours))
        runs[name] = train(recipe, by="train_grpo" if name == "grpo" else "train")
    return runs
