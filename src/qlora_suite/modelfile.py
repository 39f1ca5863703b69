"""Ollama's Modelfile for what a run made: the chat format in Go's template language, and the tokens that end an answer.

    text = modelfile(renderer, source=".", window=2048)

Ollama does not read the tokenizer's Jinja template, so that the format has to be written a second time. What is written here is
held to the Jinja by a test. Each piece of text is a Go string (`{{ "<|prompter|>" }}`): no white space of this file gets into
a prompt. Ollama puts the begin token in front by itself where the tokenizer does, so that it is left out here.
"""

import json

from qlora_suite.chat import Renderer
from qlora_suite.role_markers import Layout

ARCHITECTURES = ("Llama", "Mistral", "Gemma", "Phi3")
"""Of which Ollama reads safetensors (its documentation of `FROM`); for all others it wants a GGUF file."""


def reads_safetensors(architecture: str) -> bool:
    """Does Ollama convert this class of model (`LlamaForCausalLM`) itself?"""
    return any(architecture in (f"{name}ForCausalLM", f"{name}2ForCausalLM") for name in ARCHITECTURES)


def modelfile(renderer: Renderer, source: str, window: int) -> str:
    """`source`: what stands behind FROM, a folder or a GGUF file, relative to the Modelfile. `window`: tokens."""
    lines = ["# ollama create NAME -f Modelfile"]
    if source.endswith(".gguf"):
        lines += ["# Ollama wants this model as a GGUF file: scripts/export_gguf.sh makes it, with a Modelfile beside it."]
    lines += [f"FROM {source}"]
    template = go_template(renderer)
    if template is None:
        lines += [
            "# No TEMPLATE: the chat format is the base's own. Ollama looks for it among those that it knows by the Jinja template in the",
            "# model's file; check with scripts/check_served.py that it found the right one.",
        ]
    else:
        lines += [f'TEMPLATE """{template}"""']
    if renderer.chat.escape_markers:
        lines += ["# Go's templates cannot break up markers that stand in a message, as chat.escape_markers does."]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop_texts(renderer)]
    lines += [f"PARAMETER num_ctx {window}"]
    return "\n".join(lines) + "\n"


def stop_texts(renderer: Renderer) -> list[str]:
    return list(renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_token_ids)))


def go_template(renderer: Renderer) -> str | None:
    """What the saved Jinja template writes with `add_generation_prompt`, without the begin token that the tokenizer adds itself.

    None for a base's own template, which may do anything.
    """
    if renderer.is_plain_text:
        start = "" if renderer.tokenizer.encode("")[:1] == [renderer.start] else renderer.tokenizer.convert_ids_to_tokens(renderer.start)
        return _text(start) + "{{ range .Messages }}{{ .Content }}{{ end }}"
    if renderer.template is None:
        return _of_layout(renderer)
    return _chatml(renderer) if renderer.template.chatml else None


def _chatml(renderer: Renderer) -> str:
    prompt, first = renderer.chat.system_prompt, ""
    if prompt:  # where there is no system turn; an empty one is one
        look = '{{ $given := false }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $given = true }}{{ end }}{{ end }}'
        first = f"{look}{{{{ if not $given }}}}{_text(f'<|im_start|>system{chr(10)}{prompt}<|im_end|>{chr(10)}')}{{{{ end }}}}"
    turn = f"{_text('<|im_start|>')}{{{{ .Role }}}}{_text(chr(10))}{{{{ .Content }}}}{_text('<|im_end|>' + chr(10))}"
    return f"{first}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{_text('<|im_start|>assistant' + chr(10))}"


def _of_layout(renderer: Renderer) -> str:
    """System turns wait in `$held` for the next user turn, as `Renderer._place_system` has it."""
    style, eos = renderer.layout, renderer.tokenizer.eos_token
    assert style is not None
    between = f"{{{{ if $started }}}}{_text(style.between)}{{{{ end }}}}" if style.between else ""
    bos = renderer.tokenizer.bos_token if renderer.bos_before_user else ""
    begin = f"{{{{ if $started }}}}{_text(bos)}{{{{ end }}}}" if bos else ""
    close = style.user_close + (eos if style.user_ends else "")

    def user(content: str) -> str:
        return f"{between}{begin}{_text(style.user + style.lead)}{content}{_text(close)}{{{{ $started = true }}}}"

    held = '{{ $held }}{{ $held = "" }}'
    asked = user(f"{{{{ if $held }}}}{held}{_text(chr(10) * 2)}{{{{ end }}}}{{{{ .Content }}}}")
    leftover = f"{{{{ if $held }}}}{user(held)}{{{{ end }}}}"
    answered = f"{between}{_text(style.assistant + style.lead)}{{{{ .Content }}}}{_text(eos)}{{{{ $started = true }}}}"
    return "".join(
        [
            f"{{{{ $started := false }}}}{{{{ $held := {_string(_system_prompt(style, renderer.chat.system_prompt))} }}}}",
            "{{ range $i, $_ := .Messages }}",
            f'{{{{ if eq .Role "system" }}}}{_hold(style)}',
            f'{{{{ else if eq .Role "user" }}}}{asked}',
            f'{{{{ else if eq .Role "assistant" }}}}{leftover}{answered}',
            "{{ end }}{{ end }}",
            leftover,
            _text(style.between + style.assistant),
        ]
    )


def _system_prompt(style: Layout, prompt: str | None) -> str:
    return style.system_block.format(prompt) if style.system_block and prompt else ""


def _hold(style: Layout) -> str:
    more = '{{ if $held }}{{ $held = print $held "\\n\\n" .Content }}{{ else }}{{ $held = .Content }}{{ end }}'
    if style.system_block is None:
        return more
    before, _, after = style.system_block.partition("{}")
    first = f"{{{{ $held = print {_string(before)} .Content {_string(after)} }}}}"
    block = f'{{{{ if .Content }}}}{first}{{{{ else }}}}{{{{ $held = "" }}}}{{{{ end }}}}'
    return f"{{{{ if eq $i 0 }}}}{block}{{{{ else }}}}{more}{{{{ end }}}}"


def _text(text: str) -> str:
    return f"{{{{ {_string(text)} }}}}" if text else ""


def _string(text: str) -> str:
    """A Go string. JSON's escapes are Go's, as long as other characters stand for themselves."""
    return json.dumps(text, ensure_ascii=False)
