"""Secrets: tokens that are planted where a person keeps them are in nothing that the scripts write, print or start."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, write_recipe
from planted import hub_that_tells, library_that_tells
from processes import Started, run

from qlora_suite import leaks

OF_THE_HUB, OF_A_FILE = "hf_" + "planted" * 5, "hf_" + "infile" * 6
OF_NO_LOOK = "correct-horse-battery-staple"
PLANTED = {"HF_TOKEN": OF_THE_HUB, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "OPENAI_API_KEY": "sk-proj-" + "planted" * 5}
PLANTED |= {"COMPANY_SECRET": OF_NO_LOOK}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def environment(work: Path) -> dict[str, str]:
    """With a token in the file where `hf auth login` leaves it, too."""
    (work / "token").write_text(OF_A_FILE)
    return {**PLANTED, "HF_TOKEN_PATH": str(work / "token")}


@pytest.fixture(scope="module")
def recipe(work: Path, tiny_base: Path, oasst_file: Path) -> Path:
    few = work / "few.jsonl"
    few.write_text("".join(oasst_file.read_text().splitlines(keepends=True)[:150]))
    more = ("train.max_steps=2", "previews={prompts: ['Who?'], every_steps: 1}", "tracking.trackers=[tensorboard]", "chat.format=chatml")
    return write_recipe(work, tiny_base, few, *more)


def found_in(text: str) -> list[str]:
    return [name for name, token in {**PLANTED, "the file": OF_A_FILE}.items() if token in text]


@contextmanager
def watched_command_lines() -> Iterator[set[str]]:
    """Names of the tokens that any process of this machine has among its arguments meanwhile."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.update(found_in(path.read_bytes().decode(errors="replace")))
                except OSError:  # it has ended
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def ended(work: Path, script: str, *args: str | Path, **how: object) -> Started:
    return run(script, *args, log=work / f"{len(list(work.glob('*.log')))}-{script}.log", **how)


def test_no_token_is_in_anything_that_is_written_printed_or_started(work: Path, recipe: Path, environment: dict[str, str]) -> None:
    """Prepare, train, evaluate, generate, merge, publish: every file, every log, every command line."""
    finished = work / "run"
    steps = [
        ("prepare_data.py", recipe),
        ("train.py", recipe),
        ("evaluate.py", finished, "--answers", "1", "--answer-tokens", "2"),
        ("generate.py", finished, "--max-new-tokens", "2", "--jsonl", work / "answers.jsonl", "Who?"),
        ("merge.py", finished, "--into", "dequantised", "--tokens", "64"),
        ("publish.py", finished, "--repo", "someone/tiny", "--dry-run", "--base-id", "someone/base", "--space"),
        ("preflight.py", recipe, "--config", "accelerate_configs/cpu.yaml", "--json", work / "preflight.json"),
    ]
    with watched_command_lines() as on_command_lines:
        for script, *args in steps:
            done = ended(work, script, *args, **environment)
            assert done.process.exitcode == 0, done.output
    assert not on_command_lines
    files = [path for path in work.rglob("*") if path.is_file() and path != work / "token"]
    names = {path.name for path in files}
    assert {"run.json", "recipe.yaml", "metrics.jsonl", "status.json", "report.html", "report.json", "manifest.json", "README.md"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {str(path): found for path in files if (found := found_in(path.read_bytes().decode(errors="replace")))} == {}


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["plain", "debug"])
@pytest.mark.parametrize("kind", ["OSError", "RuntimeError", "KeyError"])
@pytest.mark.parametrize("token", [OF_THE_HUB, OF_A_FILE, OF_NO_LOOK], ids=["of the hub", "of a file", "of no look"])
def test_a_failing_call_does_not_tell_the_token(
    token: str, kind: str, debug: tuple[str, ...], work: Path, recipe: Path, environment: dict[str, str]
) -> None:
    more = (f"model.base=someone/gated-{kind}", f"data.prepared={work}/never")
    done = ended(work, "prepare_data.py", recipe, *more, *debug, prelude=(hub_that_tells, kind, token), **environment)
    assert done.process.exitcode in (1, 2)
    assert "Bearer [token]" in done.output
    assert found_in(done.output) == []
    assert ("Traceback" in done.output) == bool(debug)


@pytest.mark.parametrize("script", ["train.py", "prepare_data.py", "evaluate.py", "generate.py", "preflight.py", "quantize_base.py"])
def test_the_traceback_of_an_unexpected_error_does_not_tell_the_token(
    script: str, work: Path, recipe: Path, environment: dict[str, str]
) -> None:
    more = {"preflight.py": ["--config", "accelerate_configs/cpu.yaml"], "quantize_base.py": [work / "never"], "generate.py": ["Who?"]}
    done = ended(work, script, recipe, *more.get(script, []), prelude=(library_that_tells, OF_NO_LOOK), **environment)
    assert done.process.exitcode == 1, done.output
    assert "RuntimeError: no way to send [token]" in done.output
    assert found_in(done.output) == []


SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


ARGUMENTS = (f"--unknown={PLANTED['OPENAI_API_KEY']}", f"data.source={OF_A_FILE}", OF_NO_LOOK, "--hf-token=x", "--token")


@pytest.mark.parametrize(("script", "argument"), [(s, ARGUMENTS[0]) for s in SCRIPTS] + [("train.py", a) for a in ARGUMENTS[1:]])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(
    script: str, argument: str, work: Path, environment: dict[str, str]
) -> None:
    """By every script, before it reads anything else: by its look, by its value, by the name of an option."""
    done = ended(work, script, "recipe.yaml", argument, **environment)
    assert done.process.exitcode == 2, done.output
    assert "a token does not belong on the command line" in done.output
    assert found_in(done.output) == []


def test_a_token_of_the_file_alone_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of no look: a token of another hub, as `hf auth login` keeps it."""
    from huggingface_hub import constants

    (tmp_path / "token").write_text(OF_NO_LOOK)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "COMPANY_SECRET"):
        monkeypatch.delenv(name, raising=False)
    assert leaks.redacted(f"<{OF_NO_LOOK}>") == "<[token]>"
    with pytest.raises(ValueError, match="command line"):
        leaks.refuse_tokens([f"x={OF_NO_LOOK}"])


@pytest.mark.parametrize(
    "text", ["--tokens", "4096", "hf_dataset", "runs/hf_short", "sk-learn", "risk-" + "a" * 30, "data.max_length=512", "the token's text"]
)
def test_what_is_no_token_is_left_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "the token")
    monkeypatch.setenv("SHORT_TOKEN", "4096")
    leaks.refuse_tokens([text])
    assert leaks.redacted(text) == text


@pytest.mark.parametrize("name", ["data/sk-oasst-translated-filtered", "runs/sk-wikipedia-cleaned-2024", "hf_transfer", "task-" + "a" * 30])
def test_a_name_is_no_token(name: str) -> None:
    assert not leaks.holds_token(name)


@pytest.mark.parametrize("token", ["hf_" + "a1" * 15, "sk-proj-" + "a-b_" * 8, "sk-" + "a1B2" * 12, "sk-ant-api03-" + "a_b-" * 10])
def test_a_token_is_known_by_its_look(token: str) -> None:
    assert leaks.holds_token(f"base: {token}")
