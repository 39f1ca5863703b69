"""scripts/check_served.py against servers that are right, and against those that are wrong in the ways that servers are."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import run_script
from in_process import script
from trained_runs import QUESTIONS, trained_run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora_suite.assistant import load
from qlora_suite.conversations import Turn
from qlora_suite.generation import Answer
from qlora_suite.openai_server import KEY, Reply, ask, connect, model_name
from qlora_suite.served_check import Finding, Likeness, compare, judge, likeness_of
from qlora_suite.subject import renderer_of, subject_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Server:
    """How it answers. Changed by each test."""

    model: PreTrainedModel
    tokenizer: Any
    stop_ids: list[int]
    template: str | None = None
    counts_prompt: bool = True
    knows_logprobs: bool = True
    skip_special: bool = True
    names: list[str] = field(default_factory=lambda: ["mine"])
    status: int = 200
    raw: bytes | None = None
    wait: float = 0.0
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def greedy(self, prompt: torch.Tensor, max_tokens: int) -> tuple[list[int], torch.Tensor]:
        """(ids with the stop token, logits before each of them)"""
        made = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids or [10**6],
            return_dict_in_generate=True,
            output_logits=True,
        )
        return made.sequences[0, prompt.shape[1] :].tolist(), torch.cat(made.logits).float()

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body)
        time.sleep(self.wait)
        if self.status != 200 or self.raw is not None:
            return self.status, self.raw or {"error": {"message": "out of order"}}
        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if "logprobs" in body and not self.knows_logprobs:
            return 422, {"detail": "Unexpected fields in the request: {'logprobs'}"}
        asked = self.tokenizer.apply_chat_template(
            body["messages"], chat_template=self.template, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = asked["input_ids"]
        ids, logits = self.greedy(prompt, body["max_tokens"])
        logs = [float(row[token]) for row, token in zip(logits.log_softmax(-1), ids, strict=False)]
        stopped = ids[-1] in self.stop_ids
        text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=self.skip_special)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop" if stopped else "length"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": self.tokenizer.decode([i]), "logprob": p} for i, p in zip(ids, logs, strict=False)]}
        usage = {"prompt_tokens": prompt.shape[1]} if self.counts_prompt else {}
        return 200, {"choices": [choice], "usage": usage}


@contextmanager
def listening(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            listed = self.path == "/v1/models" and server.names
            self.reply(200 if listed else 404, {"data": [{"id": name} for name in server.names]} if listed else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.reply(401, {"error": "no key"})
            elif self.path == "/v1/chat/completions":
                self.reply(*server.answer(body))
            else:
                self.reply(404, {"detail": "Not Found"})

        def log_message(self, *_: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


@dataclass(frozen=True)
class Made:
    run: Path
    merged: Path
    base: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("served")
    run = trained_run(folder, "phi2", "chat.format=human_assistant")
    script("merge").run(run, folder / "merged", "dequantised", "bfloat16", 256, "cpu")
    return Made(run, folder / "merged", folder / "base")


@pytest.fixture
def server(made: Made) -> Server:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made.merged), AutoTokenizer.from_pretrained(made.merged)
    return Server(model, tokenizer, list(model.generation_config.eos_token_id))


Check = Callable[..., tuple[bool, str]]


@pytest.fixture
def check(made: Made, server: Server, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(name: str | None = None) -> tuple[bool, str]:
        with listening(server) as url:
            capsys.readouterr()
            good = script("check_served").run(made.run, url, name, 20.0)
        return good, capsys.readouterr().out

    return run


def verdict(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("verdict")).removeprefix("verdict    ")


# --- the verdict


def test_the_trained_model_is_recognised(check: Check, server: Server) -> None:
    good, said = check()
    assert good
    assert verdict(said).startswith("THE TRAINED MODEL: every answer is the run's own")
    assert "loading" not in said, "the run was loaded for nothing"
    assert [body["messages"] for body in server.asked] == [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert {(body["temperature"], body["max_tokens"]) for body in server.asked} == {(0, 24)}


def test_another_template_is_named_by_the_length_of_its_prompt(check: Check, server: Server) -> None:
    server.template = CHATML
    good, said = check()
    assert not good
    assert verdict(said).startswith("THE TEMPLATE DIFFERS: the server writes a prompt of ")
    assert "chat_template.jinja" in said


def test_another_template_is_named_without_a_count_too(check: Check, server: Server) -> None:
    server.template, server.counts_prompt = "{% for m in messages %}{{ m['content'] }} world{% endfor %}", False
    good, said = check()
    assert not good
    assert verdict(said).startswith("THE TEMPLATE DIFFERS: every answer begins in another way"), said


def test_a_server_without_the_stop_token_is_named(check: Check, server: Server) -> None:
    server.stop_ids = []
    good, said = check()
    assert not good
    assert verdict(said).startswith("IT DOES NOT STOP: its answers go on where the run's have ended")


def test_a_stop_token_that_is_written_out_is_named(check: Check, server: Server) -> None:
    server.stop_ids, server.skip_special = [], False
    good, said = check()
    assert not good
    assert verdict(said).startswith("IT DOES NOT STOP: it writes <|endoftext|> as text")


def test_the_base_without_its_adapter_is_other_weights(check: Check, server: Server, made: Made) -> None:
    server.model = AutoModelForCausalLM.from_pretrained(made.base)
    good, said = check()
    assert not good
    assert verdict(said).startswith("OTHER WEIGHTS: ")
    assert "the prompts have the right length" in said


def test_a_near_tie_that_falls_the_other_way_is_rounding(made: Made, server: Server) -> None:
    """What rounding does to a greedy answer: the runner-up where it is nearest, and then other words to the end."""
    assistant = load(subject_of(made.run, []), torch.device("cpu"), torch.float32)
    found = []
    for question in ("What is the answer?", "the world", "December 2023", "It's a fine day", "thank you", "system"):
        prompt = torch.tensor([assistant.renderer.prompt(_asked(question))])
        ids, logits = server.greedy(prompt, 24)
        two = logits.topk(2)
        gaps = two.values[:, 0] - two.values[:, 1]
        begun = [*ids[: int(gaps.argmin())], int(two.indices[gaps.argmin(), 1])]
        rest, _ = server.greedy(torch.cat([prompt, torch.tensor([begun])], dim=1), 24 - len(begun)) if len(begun) < 24 else ([], None)
        stopped = [each[-1] in server.stop_ids for each in (ids, begun + rest)]
        ours, theirs = (tuple(i for i in each if i not in server.stop_ids) for each in (ids, begun + rest))
        length = prompt.shape[1]
        finding = Finding(question, "a b", "a c", ours, theirs, len(begun) - 1, *stopped, length, length, (), None)
        found.append((gaps.min().item(), finding))
    away, finding = min(found, key=lambda pair: pair[0])
    assert away < 0.2, "no near tie to be had"
    judgement = judge([finding], likeness_of(assistant, [finding]))
    assert (judgement.verdict, judgement.good) == ("rounding", True), judgement.said


def test_one_answer_that_goes_on_is_no_missing_stop_token_if_others_end(made: Made) -> None:
    renderer = renderer_of(subject_of(made.run, []))
    ours = [Answer("say hi", "hi, world!", 4, True, 0.0), Answer("Hello you", "I am well.", 4, True, 0.0)]
    theirs = [Reply("hi, world! Hello", False, None, None), Reply("I am well.", True, None, None)]
    findings = [compare(one, reply, renderer) for one, reply in zip(ours, theirs, strict=True)]
    assert judge(findings, Likeness(10, 9, 0.2)).verdict == "rounding"
    assert judge(findings, Likeness(10, 9, 2.0)).verdict == "weights"
    assert judge(findings[:1], Likeness(10, 9, 0.2)).verdict == "stop"


def test_the_servers_words_are_read_by_the_trained_model(made: Made) -> None:
    """Its own answer is its own choice at every token, the end included; another word costs what it is less likely."""
    assistant = load(subject_of(made.run, []), torch.device("cpu"), torch.float32)
    ours = Answer("say hi", "hi, world!", 4, True, 0.0)
    other = compare(ours, Reply("hi, well!", True, None, None), assistant.renderer)
    own = replace(other, their_ids=other.our_ids, their_prompt_tokens=0, we_stopped=False)
    likeness = likeness_of(assistant, [own])
    assert (likeness.chosen, likeness.tokens) == (len(own.our_ids) + 1,) * 2
    assert likeness.nats == pytest.approx(0, abs=1e-6)
    prompt = assistant.renderer.prompt(_asked("say hi"))
    ids = [*prompt, *other.their_ids, assistant.renderer.eos]
    with torch.no_grad():
        logs = assistant.net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = sum((logs[i - 1].max() - logs[i - 1, ids[i]]).item() for i in range(len(prompt), len(ids)))
    assert likeness_of(assistant, [other]).nats == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0.01


def _asked(text: str) -> list[Turn]:
    return [Turn("user", text)]


def test_the_servers_log_probabilities_are_compared_with_the_runs(check: Check, server: Server) -> None:
    server.stop_ids = []
    line = next(line for line in check()[1].splitlines() if line.startswith("logprobs"))
    assert float(line.split()[3]) < 0.05, line
    server.knows_logprobs = False
    assert "logprobs" not in check()[1]


def test_without_stored_answers_the_run_answers_first(check: Check, made: Made) -> None:
    path = made.run / "previews.jsonl"
    before = path.read_text()
    path.write_text(before.splitlines()[0] + "\n")  # of step 0 alone
    try:
        good, said = check()
    finally:
        path.write_text(before)
    assert good
    assert "it has no previews of the chosen step" in said


def test_the_leading_space_of_a_plain_marker_and_white_space_at_the_end_do_not_count(made: Made) -> None:
    renderer = renderer_of(subject_of(made.run, []))
    assert compare(Answer("say hi", "hi, world!\n", 4, False, 0.0), Reply(" hi, world!", False, None, None), renderer).same


# --- errors


def test_the_exit_code_tells_the_verdict(server: Server, made: Made) -> None:
    with listening(server) as url:
        server.stop_ids = []
        assert run_script("check_served.py", made.run, "--url", url).returncode == 1


def test_a_model_of_another_name_is_answered_with_those_that_there_are(check: Check, server: Server) -> None:
    server.names = ["mine", "yours"]
    with pytest.raises(ValueError, match="has mine, yours; name one with --model"):
        check()
    with pytest.raises(ValueError, match="has no model theirs; it has mine, yours"):
        check("theirs")
    assert check("mine")[0]


def test_nobody_there_is_said_in_a_sentence() -> None:
    with connect("http://127.0.0.1:1/v1", 5) as client, pytest.raises(ValueError, match=r"nothing answers at http://127.0.0.1:1/v1/"):
        model_name(client, None)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"status": 500}, "answered with 500: .*out of order"),
        ({"raw": b"<html>hello</html>"}, "something else than a chat completion: <html>hello</html>"),
        ({"raw": b'{"choices": []}'}, "something else than a chat completion"),
        ({"wait": 1.0}, "gave no answer within 0.3 s"),
        ({"key": "secret-of-the-server"}, f"wants a key \\(401\\); set {KEY} in the environment"),
        ({"names": []}, "is not there \\(404: .*mostly ends in /v1"),
    ],
)
def test_a_servers_refusal_is_said_in_a_sentence(settings: dict[str, Any], complaint: str, server: Server) -> None:
    for name, value in settings.items():
        setattr(server, name, value)
    with listening(server) as url, connect(url, 0.3) as client, pytest.raises(ValueError, match=complaint):
        ask(client, "mine", [{"role": "user", "content": "hi"}], 4)


def test_a_wrong_path_is_said(server: Server) -> None:
    with listening(server) as url, connect(url.removesuffix("/v1"), 5) as client, pytest.raises(ValueError, match="mostly ends in /v1"):
        ask(client, "mine", [{"role": "user", "content": "hi"}], 4)


def test_the_key_comes_from_the_environment_and_does_not_travel_in_the_clear(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret-of-the-server"
    monkeypatch.setenv(KEY, server.key)
    with listening(server) as url, connect(url, 20) as client:
        assert ask(client, "mine", [{"role": "user", "content": "hi"}], 2).text is not None
    with pytest.raises(ValueError, match="would send it over the network as plain text") as caught:
        connect("http://models.example.org/v1", 5)
    assert server.key not in str(caught.value)
    with pytest.raises(ValueError, match="is no address of a server"):
        connect("127.0.0.1:8000", 5)


def test_a_run_of_plain_text_has_no_chat_to_ask_for(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{question} {i}"}) + "\n" for i in range(9) for question in QUESTIONS))
    run = trained_run(tmp_path, "phi2", "chat.format=text", f"data.source={texts}", "train.max_steps=2")
    with pytest.raises(ValueError, match="was trained on plain text"):
        script("check_served").run(run, "http://127.0.0.1:1/v1", None, 5.0)


def test_transformers_own_server_serves_the_merged_folder(made: Made, tmp_path: Path) -> None:
    """The real thing, on a loopback port. `transformers serve` needs the types of the openai package."""
    pytest.importorskip("openai", reason="transformers serve needs the openai package")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(made.merged), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            time.sleep(0.2)
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert script("check_served").run(made.run, f"http://127.0.0.1:{port}/v1", str(made.merged), 60.0)
    finally:
        process.terminate()
        process.wait()
