"""Answers that a model gives while it learns from them, in groups to each prompt, and what they are worth.

    sampler = Sampler(net, renderer, recipe.grpo, judges, recipe.seed, device, dtype)
    samples = sampler(step, {0: ids, 2: ids, ...})         # place of the prompt in the step -> its ids

A sample is a function of the seed, the step, its prompt's place in the step, its number in the group, and the weights. It does not
depend on what else is in its batch, but for rounding: in fp32 where a number that was drawn lies within 1e-6 of the edge between two
tokens; in 16 bits, where logits change with the batch by a hundredth, another batch gives other answers now and then. So a resumed
run goes on with batches of the size that it had come to (`Sampler.at_once`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_suite.chat import Renderer
from qlora_suite.engine import autocast
from qlora_suite.evaluation import release_memory
from qlora_suite.files import write_text
from qlora_suite.generation import answer_of, decode
from qlora_suite.grpo import advantages, are_alike
from qlora_suite.micro_batch import is_out_of_memory
from qlora_suite.recipe import Grpo
from qlora_suite.rewards import Candidate, Judge, judged
from qlora_suite.sample_answers import words
from qlora_suite.sampling import Draw, Sampling
from qlora_suite.train_prompts import question_finder

SHOWN_STEPS = 20
"""In samples.md; samples.jsonl has all."""


@dataclass(eq=False)
class Sample:
    """One answer to a prompt."""

    prompt: Sequence[int]
    ids: Sequence[int]
    """What was generated: one token at least, and the end token if there is one."""
    answer: Candidate
    rewards: dict[str, float]
    """Before their weights."""
    reward: float
    """Their weighted sum."""
    advantage: float
    alike: bool = False
    """Did all answers of its group earn the same? Then it teaches nothing."""
    old: Tensor | None = None
    """[ids] float32: log-probabilities of the ids when they were sampled, and"""
    reference: Tensor | None = None
    """before training, where a KL divergence is asked for; both come with the first update."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.ids)

    @property
    def row(self) -> dict[str, Any]:
        """As `loss.collate` takes it: every token of the answer is supervised."""
        supervised = [False] * len(self.prompt) + [True] * len(self.ids)
        return {"input_ids": [*self.prompt, *self.ids], "supervised": supervised, "lengths": [self.num_tokens]}


def blank_row(length: int) -> dict[str, Any]:
    """As `Sample.row`, of so many tokens of which nothing is said: to try what memory the longest answer takes."""
    return {"input_ids": [0] * length, "supervised": [False] * length, "lengths": [length]}


class Sampler:
    def __init__(
        self,
        net: nn.Module,
        renderer: Renderer,
        grpo: Grpo,
        judges: Mapping[str, tuple[float, Judge]],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        at_once: int | None = None,
    ) -> None:
        self.net, self.renderer, self.grpo, self.judges = net, renderer, grpo, dict(judges)
        self.sampling, self.device, self.dtype = Sampling(grpo.temperature, seed=seed), device, dtype
        self.question_of = question_finder(renderer)
        self.at_once = at_once
        """Answers in one batch: all (None), until memory is short."""

    def __call__(
        self,
        step: int,
        prompts: Mapping[int, Sequence[int]],
        stop: Callable[[], bool] = lambda: False,
        expected: Mapping[int, Sequence[int]] | None = None,
    ) -> list[Sample] | None:
        """A group of answers to each prompt, by its place in the step; None if `stop`, which is asked at every token and before every
        answer that is judged, says so. `expected`: ids of the answer that the data has, by place too, for the rewards.

        Raises RewardFailed, or ValueError if memory is too short for a single answer.
        """
        keys = [(step, place, number) for place in prompts for number in range(self.grpo.group_size)]
        found: list[list[int]] = []
        while len(found) < len(keys):
            batch = keys[len(found) : len(found) + (self.at_once or len(keys))]
            try:
                ids = self._drawn(batch, prompts, stop)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    length, most = len(prompts[batch[0][1]]), self.grpo.max_new_tokens
                    raise ValueError(
                        f"a single answer of up to {most:,} tokens to a prompt of {length:,} ran out of memory while it was sampled; does "
                        "another program use this device? Else lower grpo.max_new_tokens"
                    ) from None
                ids, self.at_once = [], len(batch) // 2
            if ids is None:
                return None
            if not ids:  # not in the block above, where the error's traceback holds on to tensors
                release_memory()
            found += ids
        samples: list[Sample] = []
        for i, place in enumerate(prompts):
            answers = found[i * self.grpo.group_size : (i + 1) * self.grpo.group_size]
            group = self._judged(prompts[place], answers, (expected or {}).get(place, ()), stop)
            if group is None:
                return None
            samples += group
        return samples

    def _drawn(
        self, keys: Sequence[tuple[int, int, int]], prompts: Mapping[int, Sequence[int]], stop: Callable[[], bool]
    ) -> list[list[int]] | None:
        asked = [prompts[place] for _, place, _ in keys]
        generators = self.sampling.generators([(*key, *ids) for key, ids in zip(keys, asked, strict=True)])
        with autocast(self.device, self.dtype):
            draw = Draw(self.sampling, generators)
            return decode(self.net, asked, self.renderer.stop_token_ids, self.grpo.max_new_tokens, stop, draw)

    def _judged(
        self, prompt: Sequence[int], group: Sequence[Sequence[int]], expected: Sequence[int], stop: Callable[[], bool]
    ) -> list[Sample] | None:
        """The answers to one prompt, each against the others. A person's own reward may take its time: `stop` is asked before each."""
        text = self.renderer.tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        question, wanted = self.question_of(text), self.renderer.answer_text(expected)
        wanted = wanted if wanted.strip() else None
        answers = [Candidate.of(answer_of(text, ids, self.renderer), question, wanted) for ids in group]
        rewards = []
        for answer in answers:
            if stop():
                return None
            rewards.append(judged(answer, self.judges))
        totals = [sum(weight * of_one[name] for name, (weight, _) in self.judges.items()) for of_one in rewards]
        parts, alike = zip(group, answers, rewards, totals, advantages(totals), strict=True), are_alike(totals)
        return [Sample(prompt, *one, alike=alike) for one in parts]


def keep(samples: Sequence[Sample], name: str, values: Tensor) -> None:
    """Give each sample its part of log-probabilities [tokens], answers end to end, as `old` or `reference`."""
    for sample, of_answer in zip(samples, values.detach().split([len(s.ids) for s in samples]) if samples else (), strict=True):
        setattr(sample, name, of_answer)


def kept(samples: Sequence[Sample], device: torch.device, has_reference: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(old [tokens], reference [tokens], advantages [answers], lengths [answers]), as `grpo.summed_loss` takes them; there may be none."""
    nothing = [torch.zeros(0, device=device)]
    old = torch.cat(nothing + [s.old for s in samples])
    reference = torch.cat(nothing + [s.reference for s in samples]) if has_reference else None
    advantage = torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device)
    return old, reference, advantage, torch.tensor([len(s.ids) for s in samples], dtype=torch.int64, device=device)


def sums(samples: Sequence[Sample], rewards: Iterable[str]) -> dict[str, float]:
    """Of this rank's samples; the same keys for none at all."""
    return {
        "reward": sum(s.reward for s in samples),
        **{f"reward_{name}": sum(s.rewards[name] for s in samples) for name in rewards},
        "finished": sum(s.answer.stopped for s in samples),
        "words": sum(words(s.answer.text) for s in samples),
        "answer_tokens": sum(len(s.ids) for s in samples),
        "advantage_std": sum(s.advantage**2 for s in samples),
        "groups_alike": sum(s.alike for s in samples),  # divided by the number of answers it is a share of the groups
        "tokens": sum(s.num_tokens for s in samples),
    }


def means(total: Mapping[str, float], num_answers: int) -> dict[str, float]:
    """What a step's answers were like, from the sums of all ranks."""
    found = {name: value / num_answers for name, value in total.items() if name != "tokens"}
    found["advantage_std"] **= 0.5  # their mean is 0 in every group
    return found


def record(step: int, group: Sequence[Sample]) -> dict[str, Any]:
    """One line of samples.jsonl: the answers to one prompt."""
    answers = [
        {
            "text": s.answer.text,
            "tokens": s.answer.num_tokens,
            "stopped": s.answer.stopped,
            "rewards": s.rewards,
            "reward": s.reward,
            "advantage": s.advantage,
        }
        for s in group
    ]
    asked = group[0].answer
    expected = {} if asked.expected is None else {"expected": asked.expected}
    return {"step": step, "prompt": asked.prompt, **expected, "answers": answers}


def write_page(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """samples.md: the last steps, newest first, and of each the best answer first."""
    lines = ["# Samples", "", "What the model answered in its last steps, and what it was worth. `samples.jsonl` has every step."]
    for r in reversed(records[-SHOWN_STEPS:]):
        lines += ["", f"## Step {r['step']}", "", *_quoted(r["prompt"])]
        for a in sorted(r["answers"], key=lambda a: -a["advantage"]):
            each = ", ".join(f"{name} {value:.2f}" for name, value in a["rewards"].items())
            end = "stopped by itself" if a["stopped"] else "ran into the limit"
            lines += ["", f"**{a['reward']:.2f}** ({each}), advantage {a['advantage']:+.2f}, {a['tokens']} tokens, {end}", ""]
            lines += _quoted(a["text"] or "(nothing)")
    write_text(path, "\n".join(lines) + "\n")


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]
