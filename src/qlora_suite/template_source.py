"""The text of a base's chat template: where it comes from, and what is set in front of it when it is saved.

{%- set enable_thinking = false -%}          chat.template_arguments
{%- macro strftime_now(form) -%} ...         one date, always
{%- set takes_system = ... -%} ...           turns placed as they were in training, for a base that refuses a system turn
{#- From here on: the template of the base, unchanged. #}
...
"""

import re
from collections.abc import Sequence
from datetime import date

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from qlora_suite.recipe import Chat

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = """
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
BOUNDARY = "{#- From here on: the template of the base, unchanged. #}\n"
"""Behind what we put in front, so that a tokenizer that was saved with both can be taken apart again. Jinja eats the newline."""
TODAY = date(2024, 7, 26)
"""For templates that write today's date (Llama 3.1 and later): their own fallback, or prepared data would change from day to day."""

# What ModelTemplate.placed does, for every program that applies the saved template. `qlora` keeps the names out of the base's.
_PLACING = """
{%- set qlora = namespace(placed=[], held='', turns=[], content='') -%}
{%- if system_prompt_of_the_recipe and not messages | selectattr('role', 'equalto', 'system') | list -%}
  {%- set qlora.turns = [{'role': 'system', 'content': system_prompt_of_the_recipe}] -%}
{%- endif -%}
{%- for message in qlora.turns + messages -%}
  {%- if message['role'] == 'system' and (takes_system == 'anywhere' or (takes_system == 'first' and loop.first)) -%}
    {%- set qlora.placed = qlora.placed + [message] -%}
  {%- elif message['role'] == 'system' -%}
    {%- set qlora.held = (qlora.held ~ '\\n\\n' if qlora.held else '') ~ message['content'] -%}
  {%- elif message['role'] == 'user' and qlora.held -%}
    {%- set qlora.placed = qlora.placed + [{'role': 'user', 'content': qlora.held ~ '\\n\\n' ~ message['content']}] -%}
    {%- set qlora.held = '' -%}
  {%- elif qlora.held -%}
    {%- set qlora.placed = qlora.placed + [{'role': 'user', 'content': qlora.held}, message] -%}
    {%- set qlora.held = '' -%}
  {%- else -%}
    {%- set qlora.placed = qlora.placed + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- if qlora.held -%}
  {%- set qlora.placed = qlora.placed + [{'role': 'user', 'content': qlora.held}] -%}
{%- endif -%}
{%- set qlora.turns = [] -%}
{%- for message in qlora.placed -%}
  {%- if user_first and message['role'] == 'assistant' and not qlora.turns | rejectattr('role', 'equalto', 'system') | list -%}
    {%- set qlora.turns = qlora.turns + [{'role': 'user', 'content': ''}] -%}
  {%- endif -%}
  {%- if qlora.turns and message['role'] in merges and qlora.turns[-1]['role'] == message['role'] -%}
    {%- set qlora.content = qlora.turns[-1]['content'] ~ '\\n\\n' ~ message['content'] -%}
    {%- set qlora.turns = qlora.turns[:-1] + [{'role': message['role'], 'content': qlora.content}] -%}
  {%- else -%}
    {%- set qlora.turns = qlora.turns + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = qlora.turns -%}
"""


def is_chatml(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> bool:
    """Is it ChatML, by choice or because the base has no template? Only for `format: chatml` and `format: model`."""
    return chat.format == "chatml" or base_template(tokenizer) in (None, chatml(tokenizer))


def base_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The base's own template, without what we once put in front. Raises ValueError if it has several and none is the default."""
    return tokenizer.get_chat_template().rpartition(BOUNDARY)[2] if tokenizer.chat_template else None


def ordinary_turn_tokens(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[AddedToken]:
    """Added tokens that the template writes in brackets and that are not special, so that any message could contain one.

    Not those that come as `<think>` and `</think>`: they are words of the model's own, which messages may contain.
    """
    text = CHATML if is_chatml(tokenizer, chat) else base_template(tokenizer)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}

    def has_other_half(content: str) -> bool:
        name = re.fullmatch(r"</?(\w+)>", content)
        return name is not None and {f"<{name[1]}>", f"</{name[1]}>"} <= added.keys()

    return [
        token
        for content, token in added.items()
        if not token.special and re.fullmatch(r"[<\[].*[>\]]", content) and content in text and not has_other_half(content)
    ]


def chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    bos = tokenizer.bos_token_id
    return ("{{- bos_token -}}" if bos is not None and tokenizer.encode("")[:1] == [bos] else "") + CHATML


def _literal(value: str | bool | int | list[str]) -> str:
    """As Jinja writes it, which reads Python's strings, numbers and lists."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def arguments(chat: Chat) -> str:
    """chat.template_arguments, set in front: any program that applies the template gets what was trained."""
    arguments = dict(chat.template_arguments)
    for name in arguments:
        if not name.isidentifier() or name in ("messages", "add_generation_prompt"):
            raise ValueError(f"chat.template_arguments: {name!r} is no name that a template can be called with; remove it")
    return "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in arguments.items())


def fixed_date(template: str) -> str:
    """A `strftime_now` of our own, for a template that asks for today's date; it knows the formats that this template asks for."""
    if "strftime_now" not in template:
        return ""
    formats = dict.fromkeys(["%d %b %Y", *re.findall(r"strftime_now\(\s*['\"]([^'\"]+)['\"]", template)])
    dates = "{" + ", ".join(f"{form!r}: {TODAY.strftime(form)!r}" for form in formats) + "}"
    return f"{{%- macro strftime_now(form) -%}}{{{{- {dates}[form] -}}}}{{%- endmacro -%}}\n"


def placing(system: str, merges: Sequence[str], user_first: bool, system_prompt: str) -> str:
    """What ModelTemplate.placed does, in Jinja."""
    names = {"takes_system": system, "merges": list(merges), "user_first": user_first, "system_prompt_of_the_recipe": system_prompt}
    return "\n" + "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in names.items()) + _PLACING.lstrip("\n")
