"""Is the model that is served the model that was trained? Its answers against the run's own, token by token.

    findings = [compare(answer, reply, renderer) for ...]
    likeness = likeness_of(assistant, findings)             # only if they are not the same: needs the run's model
    judgement = judge(findings, likeness)

What is told apart, from what is seen:

    the prompt has another number of tokens                       the template differs
    ours are followed to their end, and then it goes on, always   the stop tokens are not set
    other words, which are the trained model's choice as well     rounding
    other words, which are not                                    other weights

Greedy answers of the same model part where two tokens are nearly as likely, and never meet again. So it is not asked how long they
are the same, but whether the trained model, given the server's words so far, would have chosen the server's next one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_suite.assistant import Assistant
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Turn
from qlora_suite.engine import autocast
from qlora_suite.generation import Answer
from qlora_suite.openai_server import Reply

LIKE_NATS = 0.05
"""So much less likely than the trained model's first choices the server's words may be on average, to be its own but for rounding.

On the quickstart's run: 0.006 for the adapter in the published base instead of the 4-bit one (the largest of what is rounding, for each
weight differs), under 0.001 for its bf16 copy, and 0.26 for the base without its adapter."""
Verdict = Literal["trained", "rounding", "template", "stop", "weights"]


@dataclass(frozen=True)
class Finding:
    """One prompt."""

    prompt: str
    ours: str
    theirs: str
    our_ids: tuple[int, ...]
    their_ids: tuple[int, ...]
    common: int
    """Tokens that are the same, from the beginning."""
    we_stopped: bool
    they_stopped: bool | None
    our_prompt_tokens: int
    their_prompt_tokens: int | None
    markers: tuple[str, ...]
    """Control tokens or role markers that stand in their answer as text."""
    logprobs: tuple[float, ...] | None

    @property
    def same(self) -> bool:
        return self.our_ids == self.their_ids and self.they_stopped in (None, self.we_stopped)

    @property
    def goes_on(self) -> bool:
        """Their answer is ours, and more, where ours had ended."""
        return self.we_stopped and self.common == len(self.our_ids) and not self.same

    @property
    def begins_otherwise(self) -> bool:
        return self.ours.split()[:1] != self.theirs.split()[:1]

    @property
    def other_prompt(self) -> bool:
        return self.their_prompt_tokens is not None and self.their_prompt_tokens != self.our_prompt_tokens


@dataclass(frozen=True)
class Likeness:
    """The server's answers, read by the trained model."""

    tokens: int
    chosen: int
    """Tokens that are the trained model's first choice, given the server's words before them."""
    nats: float
    """How much less likely than its first choice they are, summed."""

    @property
    def good(self) -> bool:
        return self.nats <= LIKE_NATS * self.tokens

    def __str__(self) -> str:
        return (
            f"{self.chosen / self.tokens:.0%} of the server's tokens are the trained model's own choice, "
            f"{self.nats / self.tokens:.3f} nats short of it on average"
        )


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    said: str
    good: bool
    """Is it the trained model?"""


def compare(ours: Answer, reply: Reply, renderer: Renderer) -> Finding:
    """White space at the edges does not count, nor do control tokens within our answer, which servers leave out."""
    markers = _markers_in(reply.text, renderer)
    special = [text for text in renderer.tokenizer.all_special_tokens if text]
    any_special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    texts = [any_special.sub("", text).strip() for text in (ours.text, reply.text)]
    ids = [tuple(renderer.tokenizer(_lead(renderer) + text, add_special_tokens=False)["input_ids"]) if text else () for text in texts]
    common = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    return Finding(
        prompt=ours.prompt,
        ours=texts[0],
        theirs=texts[1],
        our_ids=ids[0],
        their_ids=ids[1],
        common=common,
        we_stopped=ours.stopped,
        they_stopped=reply.stopped,
        our_prompt_tokens=len(renderer.prompt([Turn("user", ours.prompt)])),
        their_prompt_tokens=reply.prompt_tokens,
        markers=tuple(marker for marker in markers if marker not in ours.text),
        logprobs=reply.logprobs,
    )


def _lead(renderer: Renderer) -> str:
    """The space that belongs to the marker, and is the first thing that the model says."""
    return renderer.layout.lead if renderer.layout else ""


def _markers_in(text: str, renderer: Renderer) -> list[str]:
    controls = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_token_ids))
    return [marker for marker in dict.fromkeys((*controls, *renderer.plain_markers)) if marker and marker in text]


def needs_the_model(findings: Sequence[Finding]) -> bool:
    """Can it be told only by asking the trained model how likely their tokens are?"""
    return not all(finding.same for finding in findings) and not any(finding.other_prompt for finding in findings)


@torch.no_grad()
def likeness_of(assistant: Assistant, findings: Sequence[Finding]) -> Likeness | None:
    """Over the answers that are not the same, their ends included. None if the server said nothing there."""
    renderer = assistant.renderer
    tokens = chosen = 0
    nats = 0.0
    for finding in findings:
        if finding.same:
            continue
        prompt = renderer.prompt([Turn("user", finding.prompt)])
        ids = torch.tensor([[*prompt, *finding.their_ids]], device=assistant.device)
        with autocast(assistant.device, assistant.dtype):
            logits = assistant.net(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        logs = logits.log_softmax(-1)  # [tokens of the answer + 1, vocabulary]
        theirs = logs[:-1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        if finding.they_stopped is not False:
            theirs = torch.cat([theirs, logs[-1, list(renderer.stop_token_ids)].max()[None]])
        short = logs[: len(theirs)].max(dim=-1).values - theirs
        tokens, chosen, nats = tokens + len(short), chosen + int((short <= 0).sum()), nats + short.sum().item()
    return Likeness(tokens, chosen, nats) if tokens else None


@torch.no_grad()
def logprob_difference(assistant: Assistant, findings: Sequence[Finding]) -> tuple[float, int] | None:
    """(mean absolute difference of the server's log-probabilities from ours, tokens) where the answers agree; None without any."""
    differences: list[float] = []
    for finding in findings:
        n = min(finding.common, len(finding.logprobs or ()))
        if n == 0:
            continue
        prompt = assistant.renderer.prompt([Turn("user", finding.prompt)])
        ids = torch.tensor([[*prompt, *finding.our_ids[:n]]], device=assistant.device)
        with autocast(assistant.device, assistant.dtype):
            logits = assistant.net(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        ours = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        differences += (ours - torch.tensor(finding.logprobs[:n])).abs().tolist()
    return (sum(differences) / len(differences), len(differences)) if differences else None


def judge(findings: Sequence[Finding], likeness: Likeness | None) -> Judgement:
    """`likeness` is None where the trained model was not asked."""
    others = [finding for finding in findings if finding.other_prompt]
    if all(finding.same for finding in findings):
        more = f"; it counts {_lengths(others[0])}, which changed nothing" if others else ""
        return Judgement("trained", f"every answer is the run's own, token by token{more}", good=True)
    if others:
        said = f"the server writes {_lengths(others[0])} for {others[0].prompt!r}: give it the run's chat template (chat_template.jinja)"
        return Judgement("template", said, good=False)
    marked = [finding for finding in findings if finding.markers]
    # A server that ends any answer by itself knows the stop token; one that has it goes on where ours ends in none.
    on = any(finding.goes_on for finding in findings) and not any(finding.they_stopped for finding in findings)
    if marked or on:
        which = f"it writes {', '.join(marked[0].markers)} as text" if marked else "its answers go on where the run's have ended"
        return Judgement("stop", f"{which}: the server does not know the stop tokens; see generation_config.json", good=False)
    share = f"{same_share(findings):.0%} of the tokens are the same from the beginning"
    if likeness and likeness.good:
        return Judgement("rounding", f"{share}, and where the answers have parted, {likeness}", good=True)
    counted = findings[0].their_prompt_tokens is not None
    if not counted and all(finding.begins_otherwise for finding in findings):
        return Judgement("template", "every answer begins in another way: the chat template differs, or it is another model", good=False)
    why = "the prompts have the right length, so that it is another model" if counted else "it is another model, or the template differs"
    return Judgement("weights", f"{share}, and {likeness or 'it says nothing'}: {why} (the base without its adapter?)", good=False)


def same_share(findings: Sequence[Finding]) -> float:
    """Share of tokens that are the same from the beginning, of the longer answer's."""
    longest = sum(max(len(finding.our_ids), len(finding.their_ids), 1) for finding in findings)
    return sum(finding.common if finding.our_ids or finding.their_ids else 1 for finding in findings) / longest


def _lengths(finding: Finding) -> str:
    return f"a prompt of {finding.their_prompt_tokens} tokens, where the run's has {finding.our_prompt_tokens},"
