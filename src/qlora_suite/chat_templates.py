"""The Jinja chat template that writes what `chat.Renderer` writes, for every program that reads a tokenizer's template.

    tokenizer.chat_template = jinja(tokenizer, recipe.chat, markers)
    tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)      # the ids of Renderer.render

The ids are the same for every message without a special token's text and without white space at its edges. A template makes one
long string, and so it cannot tell a user who types `<|endoftext|>` from the end of a turn: our own programs use the renderer.
"""

from transformers import PreTrainedTokenizerBase

from qlora_suite.chat import Renderer, broken_up
from qlora_suite.recipe import Chat
from qlora_suite.role_markers import RoleMarkers

# The names in here that nothing sets are set in front by jinja(). Every text stands in a literal, every tag eats the white space
# around it. The lead stands inside of `generation`: it is encoded with the content, so that the assistant's mask is ours.
_TURNS = """
{%- set ns = namespace(turns=[], held=system_prompt, content='') -%}
{%- for message in messages -%}
  {%- set ns.content = message['content'] -%}
  {%- for marker, broken in escapes -%}
    {%- set ns.content = ns.content | replace(marker, broken) -%}
  {%- endfor -%}
  {%- if message['role'] == 'system' and has_system and loop.first -%}
    {%- set ns.held = (system_open ~ ns.content ~ system_close) if ns.content else '' -%}
  {%- elif message['role'] == 'system' -%}
    {%- set ns.held = (ns.held ~ '\\n\\n' if ns.held else '') ~ ns.content -%}
  {%- elif message['role'] == 'user' -%}
    {%- set ns.turns = ns.turns + [['user', (ns.held ~ '\\n\\n' if ns.held else '') ~ ns.content]] -%}
    {%- set ns.held = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- if ns.held -%}
      {%- set ns.turns = ns.turns + [['user', ns.held]] -%}
      {%- set ns.held = '' -%}
    {%- endif -%}
    {%- set ns.turns = ns.turns + [['assistant', ns.content]] -%}
  {%- else -%}
    {{- raise_exception('the roles are system, user and assistant') -}}
  {%- endif -%}
{%- endfor -%}
{%- if ns.held -%}
  {%- set ns.turns = ns.turns + [['user', ns.held]] -%}
{%- endif -%}
{{- at_start -}}
{%- for turn in ns.turns -%}
  {{- '' if loop.first else between -}}
  {%- if turn[0] == 'user' -%}
    {{- user ~ turn[1] ~ user_close -}}
  {%- else -%}
    {{- assistant -}}
    {%- generation -%}
      {{- lead ~ turn[1] ~ eos_token -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- between ~ assistant -}}
{%- endif -%}
"""

_TEXT = """
{%- for message in messages -%}
  {{- at_start -}}
  {%- generation -%}
    {{- message['content'] ~ ('' if add_generation_prompt else eos_token) -}}
  {%- endgeneration -%}
{%- endfor -%}
"""


def jinja(tokenizer: PreTrainedTokenizerBase, chat: Chat, markers: RoleMarkers) -> str:
    """The template's source. It knows `add_generation_prompt`, and marks what the assistant says with `generation`.

    For `format: model` it is the base's own template, with what the recipe says set in front of it; it marks nothing, as it was.
    """
    renderer = Renderer(tokenizer, chat, markers)
    if renderer.template:
        return renderer.template.source
    style = renderer.layout
    if style is None:
        return _set(at_start="eos_token" if renderer.bos is None else "bos_token") + _TEXT
    before, _, after = (style.system_block or "").partition("{}")
    system_prompt = style.system_block.format(chat.system_prompt) if style.system_block and chat.system_prompt else ""
    return (
        _set(  # Jinja reads Python's literals, so repr() writes any text safely
            system_prompt=repr(system_prompt),
            has_system=str(style.system_block is not None).lower(),
            system_open=repr(before),
            system_close=repr(after),
            escapes=repr([[marker, broken_up(marker)] for marker in renderer.plain_markers if chat.escape_markers]),
            at_start="bos_token" if renderer.bos_at_start else "''",
            between=repr(style.between),
            user=("bos_token ~ " if renderer.bos_before_user else "") + repr(style.user + style.lead),
            user_close=repr(style.user_close) + (" ~ eos_token" if style.user_ends else ""),
            assistant=repr(style.assistant),
            lead=repr(style.lead),
        )
        + _TURNS
    )


def _set(**expressions: str) -> str:
    return "\n".join(f"{{%- set {name} = {expression} -%}}" for name, expression in expressions.items())
