"""What answers to held-out prompts are worth to the rewards that a run of GRPO learnt from: of its base, of its start, and of itself.

    judges, left_out = judges_at_hand(recipe.grpo.rewards, identity)
    judge_answers(asked, texts, judges, left_out)                      # each answer gets `rewards` and `reward`, their weighted sum
    summary(asked, judges, left_out, began="start", samples=2000)      # as it stands in report.json under `rewards`

Training samples its answers; these are greedy, to prompts that it has not seen. Their number of tokens is limited as in training.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_suite import rewards
from qlora_suite.evaluation import MIN_TREES, over_trees
from qlora_suite.generation import Answer
from qlora_suite.recipe import Reward
from qlora_suite.rewards import Candidate, Judge

Judges = dict[str, tuple[float, Judge]]


def told(wanted: Sequence[Reward]) -> str:
    """The rewards in words that may be published: of a function of one's own its name and its file's, without the folder."""
    found = []
    for reward in wanted:
        keys = {key: getattr(reward, key) for key in ("words", "min_words", "pattern") if getattr(reward, key) is not None}
        given = f" ({', '.join(f'{key}: {value}' for key, value in keys.items())})" if keys else ""
        file, _, function = (reward.path or "").rpartition(":")
        what = f"{reward.name}{given}" if reward.name else f"{function} (a function of its maker's own, in {Path(file).name})"
        found.append(what if reward.weight == 1 else f"{reward.weight:g} x {what}")
    return " + ".join(found)


def judges_at_hand(wanted: Sequence[Reward], identity: Mapping[str, Any]) -> tuple[Judges, list[str]]:
    """(the rewards that can be asked, why others cannot): a file of one's own may be gone by now, or say something else.

    `identity` is the run's own, from status.json, which knows the hash of each file.
    """
    kept, left_out = [], []
    for number, reward in enumerate(wanted):
        try:
            now = next(iter(rewards.fingerprints([reward]).values()), None)
            before = next((value for key, value in identity.items() if key.startswith(f"grpo.rewards.{number}.path (")), now)
            if now != before:
                raise ValueError(f"grpo.rewards: {reward.path} is not what it was in training: its file has changed since")
            rewards.judge_of(reward)  # which runs the file
            kept.append(reward)
        except ValueError as why:
            left_out.append(str(why))
    return rewards.judges_of(kept), left_out


def judge_answers(asked: Mapping[str, Any], texts: Sequence[str], judges: Judges, left_out: list[str]) -> None:
    """Write `rewards` (of each name, before its weight) and `reward` into each answer of report.json's `answers`.

    `texts`: of each prompt, all that stood before the answer.

    A reward that fails on one of them is taken out of `judges`, and why is added to `left_out`.
    """
    columns = [column["answers"] for column in asked["columns"].values()]
    for name in list(judges):
        try:
            for answers in columns:
                for one, prompt, text in zip(answers, asked["prompts"], texts, strict=True):
                    answer = Answer(text, *(one[key] for key in ("text", "num_tokens", "stopped", "repetition")))
                    candidate = Candidate.of(answer, question=prompt["prompt"], expected=prompt["reference"])
                    one.setdefault("rewards", {}).update(rewards.judged(candidate, {name: judges[name]}))
        except ValueError as why:
            left_out.append(str(why))
            del judges[name]
    for answers in columns:
        for one in answers:
            one["rewards"] = {name: one["rewards"][name] for name in judges}
            one["reward"] = sum(weight * one["rewards"][name] for name, (weight, _) in judges.items())


def summary(asked: Mapping[str, Any], judges: Judges, left_out: Sequence[str], began: str | None, samples: int) -> dict[str, Any]:
    """Means over the held-out prompts of `asked` (report.json's `answers`), and how far the run is from its start and from the base.

    `began`: the column that training began as; None if it is not at hand. Prompts are one of a tree each, so they are what is drawn.
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
        "difference_from_start": _difference(totals, began, samples),
        "difference": _difference(totals, "base", samples),
    }


def _difference(totals: Mapping[str, Sequence[float]], before: str | None, samples: int) -> dict[str, Any] | None:
    """Of the run's mean reward to another one's, with a 95 % interval of a paired bootstrap over the prompts (as `paired_interval`)."""
    if before not in totals or "adapter" not in totals:
        return None
    changes = [now - then for now, then in zip(totals["adapter"], totals[before], strict=True)]
    mean, interval = over_trees([str(place) for place in range(len(changes))], changes, [1.0] * len(changes), samples)
    verdict = None
    if len(changes) >= MIN_TREES:
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
