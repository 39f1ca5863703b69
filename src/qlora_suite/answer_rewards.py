"""What answers to held-out prompts are worth to the rewards that a run of GRPO learnt from: of its base, of its start, and of itself.

    judges, left_out = judges_at_hand(recipe.grpo.rewards, identity)
    judge_answers(asked, texts, judges, left_out)                      # each answer gets `rewards` and `reward`, their weighted sum
    summary(asked, judges, left_out, began="start", samples=2000)      # as it stands in report.json under `rewards`

Training samples its answers; these are greedy, to prompts that it has not seen. Their number of tokens is limited as in training.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_suite import rewards
from qlora_suite.evaluation import MIN_TREES, over_trees
from qlora_suite.generation import Answer
from qlora_suite.recipe import Reward
from qlora_suite.rewards import Candidate, Judge
from qlora_suite.tracking import StepBar, say

Judges = dict[str, tuple[float, Judge]]


def judges_at_hand(wanted: Sequence[Reward], identity: Mapping[str, Any]) -> tuple[Judges, list[str]]:
    """(the rewards that can be asked, which cannot): a file of one's own may be gone by now, or say something else.

    `identity` is the run's own, from status.json, which knows the hash of each file. The console is told why, in full; what is
    returned is published, so that it has neither a folder nor the words of somebody's error.
    """
    judges, left_out = {}, []
    for number, (name, reward) in enumerate(rewards.named(wanted).items()):
        try:
            before = next((value for key, value in identity.items() if key.startswith(f"grpo.rewards.{number}.path (")), None)
            same = before is None or (rewards.is_as_noted(reward.path, before) and before in rewards.fingerprints([reward]).values())
            if not same:
                raise _Changed(f"grpo.rewards: {reward.path} is not what it was in training: its file, or one that it imports, has changed")
            judges[name] = reward.weight, rewards.judge_of(reward)  # which runs the file
        except (ValueError, OSError) as why:
            say(f"not judged: {why}")
            left_out.append(f"{name}: {_of_file(reward, why)}")
    return judges, left_out


class _Changed(ValueError):
    """The file is not the one that was trained on."""


def _of_file(reward: Reward, why: Exception) -> str:
    """What is wrong with a file of one's own, in words that may be published."""
    file, _, function = reward.path.rpartition(":")
    name = Path(file).name
    if isinstance(why, _Changed):
        return f"{name} is not what it was in training: it, or a file that it imports, has changed since"
    if isinstance(why, OSError):  # before its folder is looked into, which may be what cannot be read
        return f"{name} cannot be read: {type(why).__name__}"
    if not Path(file).is_file():
        return f"there is no file {name}"
    return f"{name} cannot be run: {type(why.__cause__).__name__}" if why.__cause__ else f"{name} has no function {function}"


def judge_answers(asked: Mapping[str, Any], texts: Sequence[str], judges: Judges, left_out: list[str]) -> None:
    """Write `rewards` (of each name, before its weight) and `reward` into each answer of report.json's `answers`; nothing without judges.

    `texts`: of each prompt, all that stood before the answer.

    A reward that fails on one of them is taken out of `judges`; its name and the error's type are added to `left_out`, and the console
    is told the rest.
    """
    columns = [column["answers"] for column in asked["columns"].values()]
    found: list[list[dict[str, float]]] = [[{} for _ in answers] for answers in columns]
    of_each = sum(map(len, columns))
    with StepBar("judging the answers", len(judges) * of_each) as bar:
        for number, name in enumerate(list(judges)):
            done = itertools.count(number * of_each + 1)
            try:
                for answers, values in zip(columns, found, strict=True):
                    for one, value, prompt, text in zip(answers, values, asked["prompts"], texts, strict=True):
                        answer = Answer(text, *(one[key] for key in ("text", "num_tokens", "stopped", "repetition")))
                        candidate = Candidate.of(answer, question=prompt["prompt"], expected=prompt["reference"])
                        value.update(rewards.judged(candidate, {name: judges[name]}))
                        bar.advance(next(done), name)
            except rewards.RewardFailed as why:
                say(f"not judged: {why}")
                cause = why.__cause__
                left_out.append(f"{name} failed with {type(cause).__name__}" if cause else f"{name} gave no number from 0 to 1")
                del judges[name]
    for answers, values in zip(columns, found, strict=True) if judges else ():
        for one, value in zip(answers, values, strict=True):
            one["rewards"] = {name: value[name] for name in judges}
            one["reward"] = sum(weight * value[name] for name, (weight, _) in judges.items())


def summary(asked: Mapping[str, Any], judges: Judges, left_out: Sequence[str], began: str | None, samples: int) -> dict[str, Any]:
    """Means over the held-out prompts of `asked` (report.json's `answers`), and how far the run is from its start and from the base.

    `began`: the column that training began as; None if it is not at hand. Prompts are one of a tree each, so they are what is drawn.
    There is no verdict while a reward is left out: it may be the one that has become worse.
    """
    places = [place for place, prompt in enumerate(asked["prompts"]) if prompt["held_out"]]
    found: dict[str, list[dict[str, Any]]] = {
        name: [column["answers"][place] for place in places] for name, column in asked["columns"].items()
    }
    columns = {
        name: {
            "label": asked["columns"][name]["label"],
            "mean": statistics.fmean(one["reward"] for one in answers),
            "each": {judge: statistics.fmean(one["rewards"][judge] for one in answers) for judge in judges},
        }
        for name, answers in found.items()
        if answers and judges
    }
    totals = {name: [one["reward"] for one in found[name]] for name in columns}
    return {
        "prompts": len(places),
        "weights": {name: weight for name, (weight, _) in judges.items()},
        "left_out": list(left_out),
        "began": began,
        "columns": columns,
        "difference_from_start": _difference(totals, began, samples, not left_out),
        "difference": _difference(totals, "base", samples, not left_out),
    }


def _difference(totals: Mapping[str, Sequence[float]], before: str | None, samples: int, whole: bool) -> dict[str, Any] | None:
    """Of the run's mean reward to another one's, with a 95 % interval of a paired bootstrap over the prompts (as `paired_interval`)."""
    if before not in totals or "adapter" not in totals:
        return None
    changes = [now - then for now, then in zip(totals["adapter"], totals[before], strict=True)]
    mean, interval = over_trees([str(place) for place in range(len(changes))], changes, [1.0] * len(changes), samples)
    verdict = None
    if whole and len(changes) >= MIN_TREES:
        verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "not clearly different"
    return {
        "reward": mean,
        "interval_95": interval,
        "verdict": verdict,
        "prompts": len(changes),
        "higher": sum(change > 0 for change in changes),
        "lower": sum(change < 0 for change in changes),
        "samples": samples,
    }
