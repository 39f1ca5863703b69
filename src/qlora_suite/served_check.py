"""Is the model that is served the model that was trained? Its answers against the run's own, token by token.

    findings = [compare(answer, reply, renderer) for ...]
    gaps = [gap(assistant, finding) for finding in findings]
    verdict = judge(findings, gaps)

What is told apart, from what is seen:

    the prompt has another number of tokens            the template differs
    every answer begins with another token             the template differs, or the weights
    the answer goes on where ours has ended            the stop tokens are not set
    another token, which ours found nearly as likely   rounding
    another token, which ours found unlikely           other weights
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_suite.assistant import Assistant
from qlora_suite.chat import Renderer
from qlora_suite.chat_server import Reply
from qlora_suite.conversations import Turn
from qlora_suite.engine import autocast
from qlora_suite.generation import Answer

ROUNDING_NATS = 1.0
"""A token that is less likely than ours by no more than this may win by rounding: 16-bit sums, or another quantisation of the base."""
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
    def other_prompt(self) -> bool:
        return self.their_prompt_tokens is not None and self.their_prompt_tokens != self.our_prompt_tokens


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
def gap(assistant: Assistant, finding: Finding) -> float | None:
    """How much less likely their first other token is to the trained model than its own, in nats. None if they are the same.

    Where one of the two ends, it is the stop token that counts.
    """
    if finding.same:
        return None
    renderer, n = assistant.renderer, finding.common
    ids = [*renderer.prompt([Turn("user", finding.prompt)]), *finding.our_ids[:n]]
    with autocast(assistant.device, assistant.dtype):
        logits = assistant.net(input_ids=torch.tensor([ids], device=assistant.device), use_cache=False).logits[0, -1].float()
    logs = logits.log_softmax(-1)
    if n < len(finding.their_ids):
        theirs = logs[finding.their_ids[n]]
    elif finding.they_stopped is False:  # cut off by the server's limit, which is ours, or by white space that does not count
        return None
    else:
        theirs = logs[list(renderer.stop_token_ids)].max()
    return (logs.max() - theirs).item()


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


def judge(findings: Sequence[Finding], gaps: Sequence[float | None]) -> Judgement:
    """`gaps` is in the order of the findings; all None where the model was not asked."""
    share = same_share(findings)
    others = [finding for finding in findings if finding.other_prompt]
    if all(finding.same for finding in findings):
        more = f"; it counts {_lengths(others[0])}, which changed nothing" if others else ""
        return Judgement("trained", f"every answer is the run's own, token by token{more}", good=True)
    if others:
        return Judgement(
            "template",
            f"the server writes {_lengths(others[0])} for {others[0].prompt!r}: give it the run's chat template (chat_template.jinja)",
            good=False,
        )
    far = [(finding, away) for finding, away in zip(findings, gaps, strict=True) if away is not None and away > ROUNDING_NATS]
    running_on = [finding for finding in findings if finding.markers or (finding.goes_on and any(finding is one for one, _ in far))]
    if running_on and all(finding.markers or finding.goes_on for finding, _ in far):
        written = next((finding.markers for finding in running_on if finding.markers), ())
        which = f"it writes {', '.join(written)} as text" if written else "its answers go on where the run's have ended"
        return Judgement("stop", f"{which}: the server does not know the stop tokens; see generation_config.json", good=False)
    if not far:
        return Judgement(
            "rounding",
            f"{share:.0%} of the tokens are the same from the beginning; where they part, the trained model finds the server's token "
            f"nearly as likely as its own (within {ROUNDING_NATS:g} nats)",
            good=True,
        )
    if all(finding.common == 0 for finding in findings) and findings[0].their_prompt_tokens is None:
        return Judgement("template", "every answer begins in another way: the chat template differs, or it is another model", good=False)
    worst = max(far, key=lambda pair: pair[1])
    length = (
        "the prompts have the right length, so that" if worst[0].their_prompt_tokens is not None else "the answers begin alike, so that"
    )
    return Judgement(
        "weights",
        f"only {share:.0%} of the tokens are the same, and the server's answer to {worst[0].prompt!r} has a token that the trained model "
        f"finds {worst[1]:.1f} nats less likely than its own; {length} it is another model (the base without its adapter?)",
        good=False,
    )


def same_share(findings: Sequence[Finding]) -> float:
    """Share of tokens that are the same from the beginning, of the longer answer's."""
    longest = sum(max(len(finding.our_ids), len(finding.their_ids), 1) for finding in findings)
    return sum(finding.common if finding.our_ids or finding.their_ids else 1 for finding in findings) / longest


def _lengths(finding: Finding) -> str:
    return f"a prompt of {finding.their_prompt_tokens} tokens, where the run's has {finding.our_prompt_tokens},"
