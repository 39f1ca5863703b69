"""What an answer is worth, by cases; and a person's own function, which is run and watched."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from conftest import MakeRecipe

from qlora_suite import rewards
from qlora_suite.checkpoint import changed_rewards
from qlora_suite.files import sha256
from qlora_suite.generation import Answer
from qlora_suite.recipe import Reward
from qlora_suite.recipe_file import load
from qlora_suite.rewards import (
    Candidate,
    RewardFailed,
    fingerprints,
    has_format,
    in_words,
    is_as_noted,
    judged,
    judges_of,
    no_repetition,
    within_words,
)

GRPO = ("data.packing=false", "grpo.max_new_tokens=16")


def answer(text: str, stopped: bool = True, repetition: float = 0.0) -> Answer:
    return Answer("prompt", text, len(text.split()), stopped, repetition)


@pytest.mark.parametrize(
    ("text", "stopped", "worth"),
    [
        ("one two three", True, 1.0),
        ("one two three", False, 0.0),  # cut off by the limit
        ("one two three four", True, 0.0),
        ("one  two\n\nthree", True, 1.0),  # words, not spaces
        ("one", True, 0.0),  # below min_words
        ("", True, 0.0),
    ],
)
def test_short_answers_count_that_end_by_themselves_and_say_something(text: str, stopped: bool, worth: float) -> None:
    assert within_words(answer(text, stopped), words=3, min_words=2) == worth


def test_saying_nothing_is_no_short_answer() -> None:
    assert within_words(answer(""), words=3) == within_words(answer("   "), words=3) == 0
    assert within_words(answer("Yes"), words=3) == 1


@pytest.mark.parametrize(
    ("pattern", "text", "worth"),
    [("^Yes|^No", "No, never", 1.0), ("^Yes|^No", "Oh no", 0.0), (r"(?s)^<a>.*</a>$", "<a>x\ny</a>", 1.0), (r"\d", "", 0.0)],
)
def test_a_format_is_found_or_not(pattern: str, text: str, worth: float) -> None:
    assert has_format(answer(text), pattern) == worth


def test_repetition_costs_its_share() -> None:
    assert [no_repetition(answer("x", repetition=r)) for r in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_names_that_come_again_are_numbered_and_none_is_lost() -> None:
    found = judges_of([Reward(name="format", pattern="a"), Reward(name="format", pattern="b", weight=0.5), Reward(name="no_repetition")])
    assert {name: weight for name, (weight, _) in found.items()} == {"format": 1.0, "format_2": 0.5, "no_repetition": 1.0}
    assert judged(answer("b"), found) == {"format": 0.0, "format_2": 1.0, "no_repetition": 1.0}


# --- a person's own


def own(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(f"def polite(answer):\n    {body}\n")
    return f"{file}:polite"


def test_a_function_of_ones_own_is_run_from_the_file_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own(tmp_path, "return 'please' in answer.text and not answer.prompt.startswith('x')")
    monkeypatch.chdir(tmp_path)
    for name in (path, "mine.py:polite"):
        judges = judges_of([Reward(path=name)])
        assert [judged(answer(text), judges) for text in ("yes please", "no")] == [{"polite": 1.0}, {"polite": 0.0}]
        assert in_words([Reward(path=name, weight=2)]) == f"2 x {name} (runs {tmp_path / 'mine.py'})"


@pytest.mark.parametrize("given", ["numpy.float32(0.5)", "numpy.float64(0.5)", "fractions.Fraction(1, 2)", "0.5"])
def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, given: str) -> None:
    judges = judges_of([Reward(path=own(tmp_path, f"import fractions, numpy; return {given}"))])
    assert judged(answer("x"), judges) == {"polite": 0.5}
    yes = judges_of([Reward(path=own(tmp_path, "import numpy; return numpy.ones(1)[0] == 1"))])
    assert judged(answer("x"), yes) == {"polite": 1.0}


def test_what_a_file_says_belongs_to_the_run_and_where_it_lies_does_not(tmp_path: Path) -> None:
    before = fingerprints([Reward(name="no_repetition"), Reward(path=own(tmp_path, "return 1"))])
    assert list(before) == ["grpo.rewards.1.path (function, and hash of its file)"]
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "moved" / "mine.py")
    moved = [Reward(name="no_repetition"), Reward(path=f"{tmp_path}/moved/mine.py:polite")]
    assert fingerprints(moved) == before
    (tmp_path / "moved" / "mine.py").write_text("def polite(answer):\n    return 0\n")
    assert fingerprints(moved) != before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1.5", "reward polite gave 1.5, not a number from 0 to 1; the answer was 'hello'"),
        ("return None", "gave None"),
        ("return float('nan')", "gave nan"),
        ("return float('inf')", "gave inf"),
        ("return 10**400", "reward polite gave 10{79}, not a number from 0 to 1; the answer was 'hello'"),
        ("return 10**9999", "reward polite failed with ValueError: .*limit.*; the answer was 'hello'"),
        ("return answer.txt", "reward polite failed with AttributeError"),
        ("raise SystemExit", "reward polite failed with SystemExit; the answer was 'hello'"),
        ("raise SystemExit(3)", "reward polite failed with SystemExit: 3; the answer was 'hello'"),
    ],
)
def test_a_function_that_fails_or_gives_no_share_is_named(tmp_path: Path, body: str, words: str) -> None:
    judges = judges_of([Reward(path=own(tmp_path, body))])
    with pytest.raises(RewardFailed, match=words):
        judged(answer("hello"), judges)


def test_files_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    path = own(tmp_path, "return 1")
    with pytest.raises(ValueError, match=f"there is no file {tmp_path}/other.py"):
        judges_of([Reward(path=f"{tmp_path}/other.py:polite")])
    with pytest.raises(ValueError, match="has no function rude"):
        judges_of([Reward(path=path.replace("polite", "rude"))])
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"mine.py cannot be run: ModuleNotFoundError"):
        judges_of([Reward(path=path)])


# --- in a recipe


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("{}", "give either a name"),
        ("{name: no_repetition, path: 'x.py:f'}", "give either a name"),
        ("{name: within_words}", "grpo.rewards.0: within_words needs words"),
        ("{name: format}", "format needs pattern"),
        ("{name: format, pattern: '('}", "pattern is no regular expression"),
        ("{name: no_repetition, words: 3}", "words has no effect with no_repetition"),
        ("{path: 'x.py:f', pattern: a}", "pattern has no effect with a function of your own"),
        ("{path: x.py}", "grpo.rewards.0.path: 'x.py' names no function in a file; write FILE.py:FUNCTION"),
        ("{name: within_words, words: 3, min_words: 4}", "no answer could be good"),
        ("{name: within_words, words: 3, weight: 0}", "grpo.rewards.0.weight"),
    ],
)
def test_a_reward_that_cannot_work_is_a_mistake_in_the_recipe(make_recipe: MakeRecipe, reward: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load(make_recipe(*GRPO), [f"grpo.rewards=[{reward}]"])
    first, complaint = str(caught.value).splitlines()
    assert first.endswith("has 1 problem:")
    assert not re.search(r"tuple|pattern '|validation", complaint)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.packing=true", "grpo needs data.packing: false"),
        ("grpo.max_new_tokens=256", "leave no room for a prompt"),
        ("grpo.group_size=1", "grpo.group_size"),
        ("grpo.rewards=[]", "grpo.rewards: nothing says what an answer is worth; name a reward"),
        ("chat.loss_on=all", "answers that are told from their prompts"),
        ("adapter.dropout=0.1", "adapter.dropout and neftune_noise_alpha change that at random"),
        ("evaluation.every_steps=5", "evaluation.every_steps keeps the checkpoint with the lowest development loss"),
        ("speed.compile=true", "speed.compile"),
    ],
)
def test_what_does_not_go_with_grpo_is_refused(make_recipe: MakeRecipe, override: str, words: str) -> None:
    good = ["grpo.rewards=[{name: no_repetition}]"]
    assert load(make_recipe(*GRPO), good).grpo.rewards[0].name == "no_repetition"
    with pytest.raises(ValueError, match=words):
        load(make_recipe(*GRPO), [*good, override])


def test_every_name_of_the_recipe_is_a_function() -> None:
    judges = judges_of([Reward(name="within_words", words=3), Reward(name="format", pattern="x"), Reward(name="no_repetition")])
    assert judged(answer("x"), judges) == {"within_words": 1.0, "format": 1.0, "no_repetition": 1.0}
    assert rewards.in_words([Reward(name="within_words", words=3)]) == "within_words (words: 3)"


def test_a_file_with_dataclasses_is_run_once_for_all_of_its_functions(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    log = tmp_path / "log"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"open({str(log)!r}, 'a').write('run ')\n"
        "@dataclass\nclass Limit:\n    words: int = 3\n"
        "def short(answer):\n    return len(answer.text.split()) <= Limit().words\n"
        "def long(answer):\n    return not short(answer)\n"
    )
    judges = judges_of([Reward(path=f"{file}:short"), Reward(path=f"{file}:long")])
    assert list(judges) == ["short", "long"]
    assert log.read_text() == "run "


def test_a_file_that_exits_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match=r"cannot be run: SystemExit: 3"):
        judges_of([Reward(path=f"{file}:mine")])


def test_a_file_may_import_the_files_beside_it_and_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`colorsys` of Python is not the file of that name; and the path is as it was, also after a file that fails."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "words_of_ours.py").write_text("POLITE = 'please'\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not me')\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not me')\n")
    (tmp_path / "own.py").write_text(
        "import json, colorsys\nfrom words_of_ours import POLITE\n\n"
        "def polite(answer):\n    return json.loads('1') * (POLITE in answer.text)\n"
    )
    before = list(sys.path)
    judges = judges_of([Reward(path=f"{tmp_path}/own.py:polite")])
    assert sys.path == before
    assert "words_of_ours" not in sys.modules
    assert "colorsys" in sys.modules
    assert [judged(answer(text), judges)["polite"] for text in ("please", "now")] == [1, 0]
    (tmp_path / "own.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(ValueError, match="cannot be run: RuntimeError: broken"):
        judges_of([Reward(path=f"{tmp_path}/own.py:polite")])
    assert sys.path == before


HELPED = "from helpers import VALUE\nfrom more.of_them import HALF\n\ndef worth(answer):\n    return VALUE * HALF\n"


def helped(folder: Path, value: int) -> Reward:
    (folder / "more").mkdir(parents=True, exist_ok=True)
    (folder / "my.py").write_text(HELPED)
    (folder / "helpers.py").write_text(f"VALUE = {value}\n")
    (folder / "more" / "of_them.py").write_text("HALF = 0.5\n")
    return Reward(path=f"{folder}/my.py:worth")


def test_each_file_gets_the_helpers_of_its_own_folder(tmp_path: Path) -> None:
    judges = judges_of([helped(tmp_path / "a", 1), helped(tmp_path / "b", 0)])
    assert judged(answer("x"), judges) == {"worth": 0.5, "worth_2": 0.0}
    (tmp_path / "b" / "more" / "of_them.py").write_text("raise KeyError('broken')\n")
    with pytest.raises(ValueError, match=r"my.py cannot be run: KeyError: 'broken'"):
        judges_of([Reward(path=f"{tmp_path}/b/my.py:worth")])
    assert not {"helpers", "more", "more.of_them"} & sys.modules.keys()


def test_what_a_helper_says_belongs_to_the_run_and_is_what_is_run(tmp_path: Path) -> None:
    def found(folder: Path) -> tuple[str, float]:
        reward = Reward(path=f"{folder}/my.py:worth")
        return next(iter(fingerprints([reward]).values())), judged(answer("x"), judges_of([reward]))["worth"]

    helped(tmp_path / "a", 1)
    before = found(tmp_path / "a")
    assert before[1] == 0.5
    helped(tmp_path / "b", 1)
    assert found(tmp_path / "b") == before
    helped(tmp_path / "a", 0)  # within the second, and as many bytes
    changed = found(tmp_path / "a")
    assert changed[1] == 0
    (tmp_path / "a" / "more" / "of_them.py").write_text("HALF = 1.5\n")
    assert len({before[0], changed[0], found(tmp_path / "a")[0]}) == 3
    assert is_as_noted(f"{tmp_path}/a/my.py:worth", before[0]), "the file itself, which imports others now"
    (tmp_path / "a" / "my.py").write_text(HELPED + "\n")
    assert not is_as_noted(f"{tmp_path}/a/my.py:worth", before[0])
    key = next(iter(fingerprints([Reward(path=f"{tmp_path}/a/my.py:worth")])))
    assert changed_rewards({key: before[0]}, {key: changed[0]}) == {key: "worth"}


def test_our_scripts_take_no_library_and_no_helper_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a script that runs is the first in Python's path, and ours holds an evaluate.py and a generate.py."""
    scripts = str(Path(__file__).parents[1] / "scripts")
    monkeypatch.setattr(sys, "path", [scripts, *sys.path])
    for name in ("evaluate", "generate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "generate.py").write_text("HALF = 0.5\n")
    (tmp_path / "my.py").write_text(
        "import sys\nimport evaluate\nfrom generate import HALF\nsys.path.append('of_its_own')\n\n"
        "def f(answer):\n    return HALF * hasattr(evaluate, 'load')\n"
    )
    before = list(sys.path)
    try:
        assert judged(answer("x"), judges_of([Reward(path=f"{tmp_path}/my.py:f")])) == {"f": 0.5}
        assert sys.path == [*before, "of_its_own"]
    finally:
        sys.modules.pop("evaluate", None)


def test_a_package_that_was_loaded_before_keeps_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout below the file's folder: its classes must not come twice, nor belong to the reward."""
    package = tmp_path / "checkout" / "loaded_one"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    try:
        importlib.import_module("loaded_one")
        file = tmp_path / "my.py"
        file.write_text("import loaded_one.part\n\ndef f(answer):\n    return 1\n")
        assert list(fingerprints([Reward(path=f"{file}:f")]).values()) == [f"f {sha256(file)}"]
        assert "loaded_one.part" in sys.modules
    finally:
        for name in ("loaded_one", "loaded_one.part"):
            sys.modules.pop(name, None)


def test_installed_packages_are_no_helpers(tmp_path: Path) -> None:
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "installed_one.py").write_text("VALUE = 1\n")
    file = tmp_path / "my.py"
    file.write_text(
        f"import sys\nsys.path.append({str(installed)!r})\nimport installed_one\nsys.path.pop()\n\ndef f(answer):\n    return 1\n"
    )
    try:
        assert list(fingerprints([Reward(path=f"{file}:f")]).values()) == [f"f {sha256(file)}"]
        assert "installed_one" in sys.modules
    finally:
        sys.modules.pop("installed_one", None)


def test_the_example_of_the_docstring_compares_with_the_answer_of_the_data(tmp_path: Path) -> None:
    example = re.search(r"    import re\n.*?\n\n(?=It gets)", rewards.__doc__, re.DOTALL)[0]
    (tmp_path / "my_rewards.py").write_text(re.sub("^    ", "", example, flags=re.MULTILINE))
    judges = judges_of([Reward(path=f"{tmp_path}/my_rewards.py:right")])

    def worth(said: str, expected: str | None) -> float:
        return judged(Candidate.of(answer(said), question="6 x 7?", expected=expected), judges)["right"]

    assert [worth("6 x 7 = 42.", said) for said in ("That is #### 42", "#### 41", None, "")] == [1, 0, 0, 0]
    assert worth("many", "42") == worth("", None) == 0


def test_an_answer_without_its_data_is_judged_by_its_prompt(tmp_path: Path) -> None:
    judges = judges_of([Reward(path=own(tmp_path, "return answer.question == 'prompt' and answer.expected is None"))])
    assert judged(answer("x"), judges) == {"polite": 1}
