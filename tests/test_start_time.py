"""A script answers --help, and refuses a mistake, before it imports what takes seconds; until it has, Ctrl-C is one sentence."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT, MakeRecipe
from in_process import script

from qlora_suite import dataset, hub_space

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
HEAVY = (
    *("accelerate", "bitsandbytes", "datasets", "deepspeed", "gradio", "matplotlib"),
    *("numpy", "peft", "pyarrow", "rich", "torch", "transformers"),
)
WATCHED = f"""
import os, runpy, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY}:
            on_import(name)
sys.meta_path.insert(0, Watch())
def on_import(name):
    sys.stderr.write("imports " + name)
    os._exit(99)
"""
"""In front of a script: the first import of a heavy library ends the process."""
INTERRUPTED = """
def on_import(name):  # Ctrl-C during the first import; the second one ends the process
    if os.environ.get("FIRST"):
        sys.stderr.write("goes on")
        os._exit(99)
    os.environ["FIRST"] = "done"
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(name: str, *args: str | Path, before: str = WATCHED, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    program = (
        before + ("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if ignored else "") + "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", f"import sys; del sys.argv[0]\n{program}", str(ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_imports_no_heavy_library(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}")


MISTAKES = {
    "an unknown key": ("recipes/quickstart.yaml", "optim.lr=1e-4", "here it is optim.learning_rate"),
    "a wrong value": ("recipes/quickstart.yaml", "train.epochs=many", "train.epochs: input should be"),
    "a broken override": ("recipes/quickstart.yaml", "=3", "is not an override"),
    "a missing file": ("recipes/quickstrat.yaml", "seed=1", "did you mean recipes/quickstart.yaml?"),
}
TAKES_RECIPE = {
    "train.py": (),
    "train_grpo.py": (),
    "prepare_data.py": (),
    "make_tiny_phi.py": ("folder",),
    "quantize_base.py": ("folder",),
    "preflight.py": ("--config", "accelerate_configs/cpu.yaml"),
    "evaluate.py": (),
    "chat.py": (),
    "generate.py": (),
}


@pytest.mark.parametrize(
    ("name", "mistake"),
    [*(("train.py", mistake) for mistake in MISTAKES), *itertools.product([*TAKES_RECIPE][1:], ["an unknown key", "a missing file"])],
)
def test_a_mistake_in_the_recipe_is_told_before_anything_heavy_is_imported(name: str, mistake: str) -> None:
    recipe, override, complaint = MISTAKES[mistake]
    done = run(name, recipe, *TAKES_RECIPE[name], override)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_without_a_mistake_goes_on_to_the_libraries() -> None:
    """So that the tests above can fail."""
    for name, more in TAKES_RECIPE.items():
        done = run(name, "recipes/quickstart.yaml", *more)
        assert (done.returncode, done.stderr[:8]) == (99, "imports "), (name, done.stderr)


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_is_one_sentence(name: str) -> None:
    done = run(name, "recipes/quickstart.yaml", before=WATCHED + INTERRUPTED)
    assert (done.returncode, done.stderr) == (130, "interrupted before it began; the same command starts again\n")


def test_behind_nohup_ctrl_c_is_ignored_during_the_imports_too() -> None:
    done = run("train.py", "recipes/quickstart.yaml", before=WATCHED + INTERRUPTED, ignored=True)
    assert (done.returncode, done.stderr) == (99, "goes on")


def interrupted_in_train() -> None:
    """Prelude: Ctrl-C as soon as the run begins."""
    from qlora_suite import engine

    engine.start = lambda *_: os.kill(os.getpid(), signal.SIGINT)


def test_after_the_imports_ctrl_c_says_what_it_has_left(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    ended = processes.run("train.py", make_recipe(), log=tmp_path / "log", prelude=(interrupted_in_train,))
    assert ended.process.exitcode == 130, ended.output
    assert ended.output == "interrupted; the same command goes on from the last checkpoint\n"


def test_preparing_data_does_without_what_computes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Their imports would take longer than the preparation of a small file."""
    computing = ("bitsandbytes", "peft", "torch._dynamo", "transformers.modeling_utils")
    told = f"import atexit, runpy\natexit.register(lambda: print([name for name in {computing} if name in sys.modules], file=sys.stderr))\n"
    done = run("prepare_data.py", make_recipe(), f"data.prepared={tmp_path / 'prepared'}", before=told)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert (tmp_path / "prepared" / "manifest.json").is_file()
    assert "'peft'" in run("train.py", make_recipe("data.prepared=nowhere"), before=told).stderr


def tell_verify() -> None:
    """Prelude: what `load_manifest` was asked."""

    def told(recipe: object, verify: bool) -> None:
        raise ValueError(f"verify is {verify}")

    dataset.load_manifest = told


@pytest.mark.parametrize("option", [[], ["--verify-data"]])
def test_verify_data_reaches_the_data(make_recipe: MakeRecipe, tmp_path: Path, option: list[str]) -> None:
    ended = processes.run("train.py", make_recipe(), *option, log=tmp_path / "log", prelude=(tell_verify,))
    assert f"error: verify is {bool(option)}" in ended.output


def test_the_places_of_a_space_are_those_that_can_be_built() -> None:
    assert tuple(hub_space.MACHINES) == script("publish").HARDWARE
