"""What an answer is worth, as GRPO asks it: small pure functions, from an answer to a number from 0 to 1.

    grpo:
      rewards:
        - {name: within_words, words: 60}
        - {name: no_repetition, weight: 0.5}
        - {path: "my_rewards.py:right"}         # a function of your own

    import re

    def right(answer):                          # my_rewards.py: is the last number the one that the data has?
        said, wanted = (re.findall(r"-?[0-9.]*[0-9]", text) for text in (answer.text, answer.expected or ""))
        return float(bool(said) and said[-1:] == wanted[-1:])

It gets a `Candidate`: `text`, `num_tokens`, `stopped` (did the model end it by itself?), `repetition`, `question` (what the user said
last), `expected` (the answer that the data has) and `prompt` (all that stands before the answer, with the format's markers). Its file is
run as Python, in every process of the run, and may import others beside it, at its top (not within a function: by then they cannot be
found any more). Each file gets those of its own folder, even where two folders have a helpers.py, and the run knows the hash of all of
them: that one has changed is said when it resumes. It may take its time: as long as stop.hung_after_minutes for an answer, and on several
processes for all of a step's, for they wait for each other (in an evaluation 20 minutes for all answers: one process has no limit). If it
fails, the run ends with its last step saved; mended, it goes on from there.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import numbers
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from qlora_suite.files import sha256
from qlora_suite.generation import Answer
from qlora_suite.recipe import Reward


@dataclass(frozen=True)
class Candidate(Answer):
    """An answer as a reward gets it."""

    question: str = ""
    """What the user said last. In training a system message may stand in front, in formats that write it as the beginning of a user turn
    (oasst, human_assistant, instruct_output, some templates), and behind a tool's result it may be that, as the template writes it; at
    evaluation neither is.
    """
    expected: str | None = None
    """The answer that the data has to this prompt, cut where that passed data.max_length; of several the first. None: it has none."""

    @classmethod
    def of(cls, answer: Answer, question: str, expected: str | None) -> "Candidate":
        return cls(**vars(answer), question=question, expected=expected)


Judge = Callable[[Candidate], float]


class RewardFailed(ValueError):
    """A reward raised an error, or gave no number from 0 to 1."""


def within_words(answer: Answer, words: int, min_words: int = 1) -> float:
    """1 for an answer that ends by itself and has at most so many words (what white space separates), else 0."""
    return float(answer.stopped and min_words <= len(answer.text.split()) <= words)


def has_format(answer: Answer, pattern: str) -> float:
    """1 if the regular expression is found in the text, else 0."""
    return float(re.search(pattern, answer.text) is not None)


def no_repetition(answer: Answer) -> float:
    """The share of windows of 4 tokens that did not stand in the answer before: 1 for none, near 0 for a loop."""
    return 1 - answer.repetition


def judges_of(rewards: Sequence[Reward]) -> dict[str, tuple[float, Judge]]:
    """{name: (weight, function)}. Raises ValueError for a file without the function."""
    return {name: (reward.weight, judge_of(reward)) for name, reward in named(rewards).items()}


def named(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """Of one's own the function's name; one that comes again gets a number."""
    found: dict[str, Reward] = {}
    for reward in rewards:
        name = reward.name or reward.path.rpartition(":")[2]
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        found[next(free for free in names if free not in found)] = reward
    return found


def judge_of(reward: Reward) -> Judge:
    if reward.path is not None:
        return _own(reward.path)
    if reward.name == "within_words":
        return partial(within_words, words=reward.words, min_words=reward.min_words or 1)
    return partial(has_format, pattern=reward.pattern) if reward.name == "format" else no_repetition


def fingerprints(rewards: Sequence[Reward]) -> dict[str, str]:
    """Of the files of own functions, and of what they import from their folders: what a run must find again when it resumes.

    Runs them, for what they import is known only then. Raises ValueError for a file that is not there, or cannot be run.
    """
    return {f"grpo.rewards.{i}.path (function, and hash of its file)": _name_of(r.path) for i, r in enumerate(rewards) if r.path}


def is_as_noted(path: str, fingerprint: str) -> bool:
    """Is the file of an own function the one of this fingerprint? It is not run; what it imports is not looked at."""
    return sha256(_parts(path)[0]) == fingerprint.rpartition(" ")[2].partition("+")[0]


def judged(answer: Answer, judges: dict[str, tuple[float, Judge]]) -> dict[str, float]:
    """Each reward of an answer, before its weight. One that is no `Candidate` has no `expected`, and its prompt is its question.

    Raises RewardFailed, naming the function.
    """
    candidate = answer if isinstance(answer, Candidate) else Candidate.of(answer, question=answer.prompt, expected=None)
    values = {}
    for name, (_, judge) in judges.items():
        try:
            value = judge(candidate)
            good = isinstance(value, numbers.Real | np.bool_) and bool(0 <= value <= 1)  # which nan is not
            said = "" if good else repr(value)[:80]
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RewardFailed(f"reward {name} failed with {what}; the answer was {answer.text[:80]!r}") from error
        if not good:
            raise RewardFailed(f"reward {name} gave {said}, not a number from 0 to 1; the answer was {answer.text[:80]!r}")
        values[name] = float(value)
    return values


def most(rewards: Sequence[Reward]) -> float:
    """What the best answer is worth."""
    return sum(reward.weight for reward in rewards)


def in_words(rewards: Sequence[Reward], published: bool = False) -> str:
    """What judges, with which weight. For the console with the files that are run for it; `published`: with their names, no folder.

    Raises ValueError for a file that is not there; not where it is `published`.
    """
    of_each = []
    for reward in rewards:
        keys = {key: getattr(reward, key) for key in ("words", "min_words", "pattern") if getattr(reward, key) is not None}
        given = f" ({', '.join(f'{key}: {value}' for key, value in keys.items())})" if keys else ""
        if reward.name:
            what = f"{reward.name}{given}"
        elif published:
            file, _, function = reward.path.rpartition(":")
            what = f"{function} (a function of its maker's own, in {Path(file).name})"
        else:
            what = f"{reward.path} (runs {_parts(reward.path)[0]})"
        of_each.append(what if reward.weight == 1 else f"{reward.weight:g} x {what}")
    return " + ".join(of_each)


def _own(path: str) -> Judge:
    file, function = _parts(path)
    found = getattr(_run(file).module, function, None)
    if not callable(found):
        raise ValueError(f"grpo.rewards: {file} has no function {function}; define it there, or name another behind the colon")
    return found


@dataclass(frozen=True)
class _Ran:
    """A file of own functions, as it was run."""

    module: ModuleType
    digest: str
    helpers: dict[Path, str]
    """The files beside it (or in folders there) that it imported, and their hashes."""

    def still_says(self, file: Path) -> bool:
        return all(path.is_file() and sha256(path) == digest for path, digest in {file: self.digest, **self.helpers}.items())

    def fingerprint(self, file: Path) -> str:
        """The hash that `sha256sum` gives, and behind a + one of what it imports."""
        if not self.helpers:
            return self.digest
        lines = sorted(f"{path.relative_to(file.parent).as_posix()} {digest}" for path, digest in self.helpers.items())
        return f"{self.digest}+{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


_ran: dict[Path, _Ran] = {}


def _run(file: Path) -> _Ran:
    """The file as a module; run once as it and what it imports stand, however many of its functions are named."""
    if file in _ran and _ran[file].still_says(file):
        return _ran[file]
    digest, helpers = sha256(file), {}
    name = f"own_rewards_{file.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    try:
        with _beside(file, helpers):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"grpo.rewards: {file} cannot be run: {type(error).__name__}: {error}") from error
    _ran[file] = _Ran(module, digest, helpers)
    return _ran[file]


@contextlib.contextmanager
def _beside(file: Path, helpers: dict[Path, str]) -> Iterator[None]:
    """Modules in the file's folder can be imported; one that has the name of another module does not take its place. Nor do our scripts,
    whose folder is the first in the path of one that runs: libraries and helpers are named evaluate, generate or chat as well.

    Afterwards they are forgotten by their names, so that the next file gets its own `helpers`, and their files are in `helpers`.
    """
    folder, before, wrote_bytecode = str(file.parent), set(sys.modules), sys.dont_write_bytecode
    of_scripts = {place: entry for place, entry in enumerate(sys.path) if entry != folder and (Path(entry) / "train_grpo.py").is_file()}
    importlib.invalidate_caches()
    sys.path[:] = [*(entry for entry in sys.path if entry not in of_scripts.values()), folder]
    sys.dont_write_bytecode = True  # Python would take it for a file that was changed within the second, to as many bytes
    try:
        yield
    finally:
        sys.dont_write_bytecode = wrote_bytecode
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]  # the last of them, which is ours
        for place, entry in of_scripts.items():  # what the file itself has put into the path stays
            sys.path.insert(place, entry)
        for name in [name for name in sys.modules if name.partition(".")[0] not in before and _lies_in(file.parent, name)]:
            helper = vars(sys.modules.pop(name)).get("__file__")
            if helper is not None:  # a folder without __init__.py has none
                helpers[Path(helper)] = sha256(Path(helper))


def _lies_in(folder: Path, name: str) -> bool:
    """Is it a module of the person's own in this folder? A package that is installed below it is none."""
    package = name.partition(".")[0]
    if package in sys.stdlib_module_names or package == __name__.partition(".")[0]:
        return False
    known = getattr(sys.modules[name], "__dict__", {})  # not by getattr: lazy modules would import what is asked for
    path = known.get("__file__") or next(iter(known.get("__path__") or ()), None)
    if not isinstance(path, str) or not Path(path).is_relative_to(folder):
        return False
    return not {"site-packages", "dist-packages"} & set(Path(path).relative_to(folder).parts)


def _name_of(path: str) -> str:
    file, function = _parts(path)
    return f"{function} {_run(file).fingerprint(file)}"


def _parts(path: str) -> tuple[Path, str]:
    name, _, function = path.rpartition(":")
    file = Path(name).resolve()
    if not file.is_file():
        raise ValueError(f"grpo.rewards: there is no file {file}; write FILE.py:FUNCTION, from the working folder or with its whole path")
    return file, function
