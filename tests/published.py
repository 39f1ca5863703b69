"""A finished and evaluated run on a base that lies in the hub's cache, as it does for everybody who trains a model of the hub."""

import contextlib
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, write_recipe
from in_process import prepared, script, train

from qlora_suite.command_line import with_clear_errors

BASE, COMMIT = "someone/tiny-base", "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-oasst"


def into_cache(cache: Path, repo: str, commit: str, folder: Path) -> Path:
    """Lay a folder where huggingface_hub would keep that commit of the repository."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A hub cache with the base and its licence."""
    folder = tmp_path_factory.mktemp("cache")
    base = into_cache(folder, BASE, COMMIT, tiny_base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (base / "LICENSE").write_text("MIT License\n")
    return folder


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, cache: Path, oasst_file: Path) -> Path:
    """Trained in 4 bits and scored. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("home")
    base = cache / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT
    previews = ("previews.prompts=['Who are you?', 'What is a tree?']", "previews.every_steps=20", "previews.max_new_tokens=12")
    recipe = write_recipe(folder, base, oasst_file, *previews, "evaluation.every_steps=10", "evaluation.bootstrap_samples=200")
    run = train(prepared(recipe))
    with contextlib.redirect_stdout(io.StringIO()):
        script("evaluate").run(run, [])
    return run


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def publish(*args: str | Path) -> SimpleNamespace:
    """scripts/publish.py in this process: `code` and `text`, all that it said."""
    module = script("publish")
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    sys.argv = [str(ROOT / "scripts" / "publish.py"), *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args = module.arguments().parse_intermixed_args()
            with_clear_errors(lambda: module.run(args), debug=args.debug)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return SimpleNamespace(code=code, text=out.getvalue() + err.getvalue(), said=out.getvalue(), error=err.getvalue())
