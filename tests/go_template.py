"""As much of Go's text/template as our Modelfiles use, for there is no Go here: written from its documentation, and strict.

    render('{{ range $i, $_ := .Messages }}{{ .Content }}{{ end }}', messages)

Actions: `{{ "text" }}`, `{{ .Content }}`, `{{ $name }}`, `{{ $name := value }}`, `{{ $name = value }}`, `if`, `else if`, `else`,
`range $i, $m := .Messages`, `end`; functions: eq, not, print. Anything else is an error. The messages come as Ollama gives them to a
template: neighbours of one role joined by a blank line, and every system message once more in `.System`.
"""

import json
import re
from typing import Any

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|=|,|\$\w*|\.\w*|\w+)')


def render(template: str, messages: list[dict[str, str]]) -> str:
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"]:
            collated[-1] = {**message, "content": collated[-1]["content"] + "\n\n" + message["content"]}
        else:
            collated.append(message)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in collated]}
    nodes, rest = _block(_lexed(template))
    assert not rest, f"an {rest[0]} too many"
    out: list[str] = []
    _run(nodes, data, [{}], out)
    return "".join(out)


def _lexed(template: str) -> list[Any]:
    parts: list[Any] = []
    for i, part in enumerate(ACTION.split(template)):
        if i % 2 == 0:
            assert not {"{{", "}}"} & {part[j : j + 2] for j in range(len(part))}, part
            parts += [part] if part else []
        else:
            assert part[0] == part[-1] == " ", f"no trimming, please: {part!r}"
            words, place = [], 0
            while place < len(part.rstrip()):
                match = TOKEN.match(part, place)
                assert match, f"not understood: {part[place:]!r}"
                words.append(match[1])
                place = match.end()
            parts.append(tuple(words))
    return parts


def _block(parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Nodes up to `end` or `else`, which stays in front of the rest."""
    nodes: list[Any] = []
    while parts and not (isinstance(parts[0], tuple) and parts[0][0] in ("end", "else")):
        part, parts = parts[0], parts[1:]
        if isinstance(part, tuple) and part[0] in ("if", "range"):
            node, parts = _control(part, parts)
            nodes.append(node)
        else:
            nodes.append(part)
    return nodes, parts


def _control(head: tuple[str, ...], parts: list[Any]) -> tuple[Any, list[Any]]:
    inside, parts = _block(parts)
    assert parts, f"{head} has no end"
    closing, parts = parts[0], parts[1:]
    otherwise: list[Any] = []
    if closing[0] == "else":
        if closing[1:2] == ("if",):
            node, parts = _control(closing[1:], parts)
            return (head, inside, [node]), parts
        assert closing == ("else",)
        otherwise, parts = _block(parts)
        assert parts
        assert parts[0] == ("end",)
        parts = parts[1:]
    else:
        assert closing == ("end",)
    return (head, inside, otherwise), parts


def _run(nodes: list[Any], dot: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif isinstance(node[0], tuple):
            _branch(node, dot, scopes, out)
        elif node[0].startswith("$") and node[1:2] == (":=",):
            scopes[-1][node[0]] = _value(node[2:], dot, scopes)
        elif node[0].startswith("$") and node[1:2] == ("=",):
            scope = next(scope for scope in reversed(scopes) if node[0] in scope)
            scope[node[0]] = _value(node[2:], dot, scopes)
        else:
            value = _value(node, dot, scopes)
            assert isinstance(value, str), f"{node} writes {value!r}"
            out.append(value)


def _branch(node: Any, dot: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
    head, inside, otherwise = node
    if head[0] == "if":
        _run(inside if _value(head[1:], dot, scopes) else otherwise, dot, [*scopes, {}], out)
        return
    names, pipe = ((head[1], head[3]), head[5:]) if ":=" in head else ((), head[1:])
    for i, item in enumerate(_value(pipe, dot, scopes)):
        _run(inside, item, [*scopes, dict(zip(names, (i, item), strict=False))], out)


def _value(words: tuple[str, ...], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    name, *arguments = words
    if name == "not":
        return not _value(tuple(arguments), dot, scopes)
    if name in ("eq", "print"):
        values = [_operand(word, dot, scopes) for word in arguments]
        assert name == "eq" or all(isinstance(value, str) for value in values)
        return values[0] == values[1] if name == "eq" else "".join(values)
    assert not arguments, f"not understood: {words}"
    return _operand(name, dot, scopes)


def _operand(word: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.startswith("$"):
        return next(scope[word] for scope in reversed(scopes) if word in scope)
    if word.startswith("."):
        return dot[word[1:]]
    return {"true": True, "false": False}[word] if word in ("true", "false") else int(word)
