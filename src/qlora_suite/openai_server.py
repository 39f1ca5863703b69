"""An OpenAI-compatible server, asked for greedy answers: vLLM, llama-server, Ollama, `transformers serve`.

    with connect("http://127.0.0.1:8000/v1", timeout=120) as client:
        reply = ask(client, model_name(client, None), [{"role": "user", "content": "hi"}], max_tokens=64)

The key comes from OPENAI_API_KEY alone: a command line is read by everybody on the machine.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Reply:
    text: str
    stopped: bool | None
    """Did the answer end by itself, and not at the limit? None if the server does not say."""
    prompt_tokens: int | None
    """As the server counts them, if it does."""
    logprobs: tuple[float, ...] | None
    """Of each token of the answer, natural logarithms, if the server gives them."""


def connect(url: str, timeout: float) -> httpx.Client:
    """A client for everything below `url`. Raises ValueError if it is no address, or would send the key in the clear."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is no address of a server; it looks like http://127.0.0.1:8000/v1")
    here = _is_loopback(parts.hostname)
    key = os.environ.get(KEY)
    if key and parts.scheme == "http" and not here:
        raise ValueError(f"{KEY} is set, and {url} would send it over the network as plain text; use https, or unset it")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    anew = httpx.Limits(max_keepalive_connections=0)  # a server that failed at one request may close the connection under the next
    trust_env = not here  # no proxy leads back here
    return httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, trust_env=trust_env, limits=anew)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_names(client: httpx.Client) -> list[str]:
    """What the server offers; nothing if it does not list it."""
    response = _sent(client, "GET", "models")
    if response.status_code != 200:
        return []
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def model_name(client: httpx.Client, asked: str | None) -> str:
    """The model to ask for. Raises ValueError if the server has another one, or several and none is named."""
    names = model_names(client)
    if asked is not None and names and asked not in names and f"{asked}:latest" not in names:  # Ollama's own tag
        raise ValueError(f"{client.base_url} has no model {asked}; it has {', '.join(names)}")
    if asked is not None:
        return asked
    if len(names) != 1:
        has = f"has {', '.join(names)}" if names else "does not list its models"
        raise ValueError(f"{client.base_url} {has}; name one with --model")
    return names[0]


def ask(client: httpx.Client, model: str, messages: Sequence[dict[str, str]], max_tokens: int) -> Reply:
    """A greedy answer. Raises ValueError, with the server's own words, if there is none."""
    body = {"model": model, "messages": list(messages), "temperature": 0, "max_tokens": max_tokens, "stream": False}
    response = _sent(client, "POST", "chat/completions", {**body, "logprobs": True})
    if response.status_code in (400, 422):  # not every server knows logprobs
        response = _sent(client, "POST", "chat/completions", body)
    if response.status_code == 404:
        names = model_names(client)
        known = f"it has the models {', '.join(names)}" if names else "the address of such a server mostly ends in /v1"
        raise ValueError(f"{client.base_url}chat/completions with the model {model} is not there (404: {_words(response)}); {known}")
    if response.status_code in (401, 403):
        raise ValueError(f"{client.base_url} wants a key ({response.status_code}); set {KEY} in the environment")
    if response.status_code != 200:
        raise ValueError(f"{client.base_url} answered with {response.status_code}: {_words(response)}")
    try:
        answer = response.json()
        choice = answer["choices"][0]
        logprobs = [float(token["logprob"]) for token in ((choice.get("logprobs") or {}).get("content") or [])]
        reason = choice.get("finish_reason")
        return Reply(
            text=str(choice["message"].get("content") or ""),
            stopped=None if reason is None else reason != "length",
            prompt_tokens=(answer.get("usage") or {}).get("prompt_tokens"),
            logprobs=tuple(logprobs) or None,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{client.base_url} answered with something else than a chat completion: {_words(response)}") from None


def _sent(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        return client.request(method, path, json=body)
    except httpx.ConnectError as error:
        raise ValueError(f"nothing answers at {client.base_url} ({error}); is the server running, and is this its port?") from None
    except httpx.TimeoutException:
        seconds = client.timeout.read
        raise ValueError(f"{client.base_url} gave no answer within {seconds:g} s; wait until it has loaded, or raise --timeout") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{client.base_url} broke off: {error}") from None


def _words(response: httpx.Response) -> str:
    """The beginning of what came, in one line."""
    text = " ".join(response.text.split())
    return text[:200] + ("..." if len(text) > 200 else "") or "nothing"
