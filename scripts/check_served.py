#!/usr/bin/env python
"""Ask a server for what the run answered, and say whether it serves the model that was trained.

    vllm serve runs/quickstart/merged --served-model-name quickstart --host 127.0.0.1 --port 8000
    python scripts/check_served.py runs/quickstart --url http://127.0.0.1:8000/v1

Any server with an OpenAI-compatible /chat/completions: vLLM, llama-server, Ollama (http://127.0.0.1:11434/v1), transformers serve.
It gets the run's preview prompts as chats, with temperature 0 and the previews' limit; its answers are compared with the run's own
greedy ones (previews.jsonl; without those of the chosen step, the run is loaded and answers first).

The verdict: the trained model; the trained model but for rounding, as a merged or otherwise quantised one may be; the template
differs; the answers do not stop; or other weights. Exit code 0 for the first two, 1 for the others, 2 if there is nothing to compare.
A key is read from OPENAI_API_KEY alone.
"""

from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--url", required=True, help="of the API, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the model's name there, if it serves several")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer (%(default)g)")
    args = read_arguments(parser)

import sys
from functools import partial

import torch
from rich.progress import track

from qlora_suite.assistant import Assistant, load
from qlora_suite.conversations import Turn
from qlora_suite.engine import autocast
from qlora_suite.files import read_json
from qlora_suite.generation import Answer, answer
from qlora_suite.openai_server import ask, connect, model_name
from qlora_suite.served_check import Finding, Judgement, compare, judge, likeness_of, logprob_difference, needs_the_model, same_share
from qlora_suite.stored_answers import stored_answers
from qlora_suite.subject import Subject, renderer_of, subject_of
from qlora_suite.tracking import console, say

HEADLINES = {
    "trained": "THE TRAINED MODEL",
    "rounding": "THE TRAINED MODEL, but for rounding",
    "template": "THE TEMPLATE DIFFERS",
    "stop": "IT DOES NOT STOP",
    "weights": "OTHER WEIGHTS",
}


def run(target: Path, url: str, name: str | None, timeout: float) -> bool:
    """Does the server serve what was trained?"""
    subject = subject_of(target, [])
    renderer = renderer_of(subject)
    if renderer.is_plain_text:
        raise ValueError(f"{target} was trained on plain text, without roles: there is no chat to ask a server for")
    with connect(url, timeout) as client:
        model = model_name(client, name)
        assistant = None
        ours = stored_answers(subject.folder)
        if ours is None:
            assistant = loaded(subject, "it has no previews of the chosen step")
            ours = answered(assistant)
        say(f"asking     {model} at {client.base_url} for {len(ours)} greedy answers of up to {limit_of(subject)} tokens")
        prompts = track(ours, description="asking", console=console, transient=True, disable=not console.is_terminal)
        asked = [(one, ask(client, model, [{"role": "user", "content": one.prompt}], limit_of(subject))) for one in prompts]
    findings = [compare(one, reply, renderer) for one, reply in asked]
    likeness = None
    if needs_the_model(findings):
        assistant = assistant or loaded(subject, "to see whether the server's words could be its own")
        likeness = likeness_of(assistant, findings)
    judgement = judge(findings, likeness)
    show(findings, judgement, assistant)
    return judgement.good


def limit_of(subject: Subject) -> int:
    return subject.recipe.previews.max_new_tokens


def loaded(subject: Subject, why: str) -> Assistant:
    """On the CPU: the GPU is the server's."""
    say(f"loading    {subject.folder}, {why}")
    return load(subject, torch.device("cpu"), getattr(torch, read_json(subject.folder / "run.json")["precision"]))


def answered(assistant: Assistant) -> list[Answer]:
    """The run's greedy answers to its preview prompts."""
    prompts = assistant.recipe.previews.prompts
    if not prompts:
        raise ValueError("the run's recipe has no previews.prompts, so there is nothing to ask; add key=value overrides to train with some")
    with autocast(assistant.device, assistant.dtype):
        found = answer(assistant.net, assistant.renderer, [[Turn("user", text)] for text in prompts], limit_of(assistant.subject))
    assert found is not None
    return found


def show(findings: list[Finding], judgement: Judgement, assistant: Assistant | None) -> None:
    for finding in findings:
        say("")
        say(f"prompt     {one_line(finding.prompt)}")
        say(f"  run      {one_line(finding.ours)}{ending(finding.we_stopped)}")
        if finding.same:
            say(f"  server   the same, {len(finding.our_ids)} tokens")
            continue
        say(f"  server   {one_line(finding.theirs)}{ending(finding.they_stopped)}")
        say(f"           {finding.common} of {len(finding.our_ids)} tokens the same from the beginning")
    say("")
    say(f"same       {same_share(findings):.1%} of the tokens, from the beginning of each answer")
    if assistant and (difference := logprob_difference(assistant, findings)):
        say(f"logprobs   differ by {difference[0]:.3f} nats on average from the run's, over {difference[1]} tokens that are the same")
    say(f"verdict    {HEADLINES[judgement.verdict]}: {judgement.said}")


def one_line(text: str, most: int = 110) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= most else f"{text[:most]}..."


def ending(stopped: bool | None) -> str:
    return {True: "  [ends]", False: "  [cut at the limit]", None: ""}[stopped]


def verdict(target: Path, url: str, name: str | None, timeout: float) -> None:
    if not run(target, url, name, timeout):
        sys.exit(1)


if __name__ == "__main__":
    with_clear_errors(partial(verdict, args.run, args.url, args.model, args.timeout), debug=args.debug)
