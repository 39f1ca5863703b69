"""The base's own chat template is written exactly, for every family, and of it the assistant's words and end token are learnt."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from families import FAMILIES, TEMPLATES, ordinary, tokenizer_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from in_process import column, metrics, prepared, train
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_suite import dataset
from qlora_suite.adapter import load_adapter
from qlora_suite.batches import Limit
from qlora_suite.chat import Renderer
from qlora_suite.chat_templates import jinja
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.evaluation import _pieces, excerpts, score
from qlora_suite.generation import answer
from qlora_suite.model import load_base
from qlora_suite.preparation import template_agreement
from qlora_suite.recipe import Chat, Model
from qlora_suite.recipe_file import load
from qlora_suite.rendered import Rendered, shorten
from qlora_suite.role_markers import RoleMarkers, add_role_markers
from qlora_suite.subject import _renderer as renderer_elsewhere
from qlora_suite.trainable import build_model

WITH_A_TEMPLATE = [family for family in FAMILIES if family != "phi2"]
CASES = [*FAMILIES, "qwen3, no thinking"]
END = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>", "gemma2": "<end_of_turn>", "phi3": "<|end|>", "phi2": "<|im_end|>"}


def end_of(case: str) -> str:
    return next(end for name, end in END.items() if case.startswith(name))


def renderer_of(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> Renderer:
    return Renderer(tokenizer, chat, add_role_markers(tokenizer, len(tokenizer) + 2, chat))


@cache
def renderer(case: str, **keys: Any) -> Renderer:
    """Its tokenizer carries the template that prepare_data.py saves."""
    family, _, thinking = case.partition(", ")
    tokenizer = tokenizer_of(family)
    chat = Chat(format="model", template_arguments={"enable_thinking": False} if thinking else {}, **keys)
    markers = add_role_markers(tokenizer, len(tokenizer) + 2, chat)
    made = Renderer(tokenizer, chat, markers)
    tokenizer.chat_template = jinja(tokenizer, chat, markers)
    return made


def says(*turns: tuple[str, str]) -> Conversation:
    return Conversation("key", (), "tree", tuple(Turn(role, text) for role, text in turns))


def talk(*contents: str) -> Conversation:
    """User and assistant by turns."""
    return says(*(("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.turns]


def applied(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages(conversation), tokenize=True, return_dict=False, **kwargs)


def shown(made: Renderer, rendered: Rendered) -> str:
    """The text of the ids, what is learnt in double brackets."""
    runs: list[tuple[bool, list[int]]] = []
    for token, learnt in zip(rendered.ids, rendered.supervised, strict=True):
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token)
    decode = made.tokenizer.decode
    return "".join(f"⟦{decode(ids)}⟧" if learnt else decode(ids) for learnt, ids in runs)


MARKS = ["<|im_end|>", "<|im_start|>", "[/INST]", "[INST]", "</s>", "<s>", "<end_of_turn>", "<bos>", "<|eot_id|>", "<|end|>", "<|user|>"]
FRAGMENTS = ["<", "|>", "<|", "im_end|>", "_id|>", "\n", "\n\n", " ", "user", ".", "é", "😀", "e\u0301", "\0", "▁", "\ue000", "{{", "%}"]
anything = st.lists(st.one_of(st.sampled_from(FRAGMENTS + MARKS), st.text(max_size=4)), max_size=8).map("".join)
contents = st.lists(anything, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def safe(made: Renderer, text: str) -> str:
    """Without what one long string cannot tell from the template's own, and without white space at the edges."""
    for token in made.tokenizer.added_tokens_decoder.values():
        assume(not token.content.strip() or token.content not in text)
    assume("</think>" not in text)  # words of the template, which it takes apart
    return text.strip()


# ---- golden examples -----------------------------------------------------------------------------------------------------------

A_DATE = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
QWEN_IS = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
A_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = f"{A_HEADER.format('user')}hi<|eot_id|>{A_HEADER.format('assistant')}⟦oh!<|eot_id|>⟧{A_HEADER.format('user')}how?<|eot_id|>"
LLAMA += f"{A_HEADER.format('assistant')}⟦so<|eot_id|>⟧"
CHATML_TALK = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦oh!<|im_end|>⟧\n<|im_start|>user\nhow?<|im_end|>\n"
CHATML_TALK += "<|im_start|>assistant\n⟦so<|im_end|>⟧\n"
QWEN3_TALK = CHATML_TALK.partition("⟦so")[0].replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("llama3", f"<|begin_of_text|>{LLAMA}"),
        ("llama3_1", f"<|begin_of_text|>{A_DATE}{LLAMA}"),
        ("llama3_2", f"<|begin_of_text|>{A_DATE}{LLAMA}"),
        ("qwen2_5", QWEN_IS + CHATML_TALK),
        ("qwen3", QWEN3_TALK + "⟦<think>\n\n</think>\n\nso<|im_end|>⟧\n"),
        ("qwen3, no thinking", QWEN3_TALK + "<think>\n\n</think>\n\n⟦so<|im_end|>⟧\n"),
        ("mistral_v1", "<s>  [INST] hi [/INST]⟦oh!</s>⟧ [INST] how? [/INST]⟦so</s>⟧"),  # the decoder eats a piece's first space
        ("mistral_v3", "<s>[INST] hi[/INST]⟦oh!</s>⟧[INST] how?[/INST]⟦so</s>⟧"),
        (
            "gemma2",
            "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦oh!<end_of_turn>⟧\n"
            "<start_of_turn>user\nhow?<end_of_turn>\n<start_of_turn>model\n⟦so<end_of_turn>⟧\n",
        ),
        # Its markers take the newline behind them, and the end of all is written by the template, not said by the model.
        ("phi3", "<|user|> hi<|end|><|assistant|>⟦oh!<|end|>⟧<|user|> how?<|end|><|assistant|>⟦so<|end|>⟧<|endoftext|>"),
        ("phi2", CHATML_TALK),
    ],
)
def test_what_each_family_writes_and_learns(case: str, text: str):
    made = renderer(case)
    assert shown(made, made.render(talk("hi", "oh!", "how?", "so"))) == text


# ---- properties of every family ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_A_TEMPLATE)
@quick
@given(texts=contents)
def test_safe_text_has_the_ids_of_the_bases_own_template(family: str, texts: list[str]):
    """The template as it is published, not the one we save; BOS and all."""
    made = renderer(family)
    conversation = talk(*(safe(made, text) for text in texts))
    published = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    ids = applied(made.tokenizer, conversation, chat_template=published, date_string="26 Jul 2024")
    assert made.render(conversation).ids == ids
    bos = made.tokenizer.bos_token_id
    assert ids.count(bos) == (1 if bos is not None and family != "phi3" else 0)


ROLES = st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=6).filter(lambda roles: {*roles} != {"system"})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system_prompt", [None, "Be {brief}, 'kind'\nand \"true\" \\n }} %}"])
@quick
@given(roles=ROLES, texts=st.lists(anything, min_size=6, max_size=6))
def test_the_saved_template_gives_our_ids_for_any_order_of_roles(case: str, system_prompt: str | None, roles: list[str], texts: list[str]):
    """Systems without a place, two turns of one role, an answer at the start: it does what the renderer does. Where it is the base's
    own, unchanged, it does so for what that takes as it is.
    """
    made = renderer(case, system_prompt=system_prompt)
    texts = [safe(made, text) for text in texts]
    conversation = says(*zip(roles, texts, strict=False))
    if made.template.system != "none" and system_prompt is None:
        assume(made.template.placed(conversation.turns)[0] == list(enumerate(conversation.turns)))
    assert applied(made.tokenizer, conversation) == made.render(conversation).ids
    if roles[-1] == "user":
        assert applied(made.tokenizer, conversation, add_generation_prompt=True) == made.prompt(conversation.turns)


@pytest.mark.parametrize("case", CASES)
@quick
@given(texts=contents, data=st.data())
def test_the_answers_and_their_end_tokens_are_learnt_and_nothing_else(case: str, texts: list[str], data):
    made = renderer(case)
    if case.startswith("qwen3"):
        assume(not any("</think>" in text for text in texts))
    answers = list(range(1, len(texts), 2))
    chosen = [i for i in answers if data.draw(st.booleans())]
    conversation = talk(*texts)
    conversation = replace(conversation, turns=tuple(replace(t, learn=i in chosen) for i, t in enumerate(conversation.turns)))
    rendered = made.render(conversation)
    decode, end = made.tokenizer.decode, made.tokenizer.convert_tokens_to_ids(end_of(case))

    assert [turn.index for turn in rendered.turns] == answers
    learnt = [i for i in chosen if not made.rewrites_history or i == answers[-1]]
    assert [turn.index for turn in rendered.turns if turn.learn] == learnt
    lead = "<think>\n\n</think>" if case == "qwen3" else ""
    supervised = []
    for turn in rendered.turns:
        assert rendered.ids[turn.end] == end
        # An unknown character, or one that a normalizer changes, does not come back; white space may have been trimmed.
        said = decode(rendered.ids[turn.start : turn.end])
        assert said.strip() == decode(made.encode(texts[turn.index].strip(), made.tokenizer.eos_token_id)[0]).strip()
        assert len(turn.byte_ends) == turn.end - turn.start
        assert all(a <= b for a, b in pairwise(turn.byte_ends))
        assert turn.num_bytes == (len(texts[turn.index].encode()) if turn.byte_ends else 0)
        if turn.learn:
            first = len(made.prompt(conversation.turns[: turn.index]))
            supervised += range(first, turn.end + 1)
            assert decode(rendered.ids[first : turn.start]).strip() == lead
    assert [i for i, flag in enumerate(rendered.supervised) if flag] == supervised


@pytest.mark.parametrize("case", CASES)
@quick
@given(texts=contents)
def test_no_message_becomes_a_control_token(case: str, texts: list[str]):
    made = renderer(case)

    def control_ids(conversation: Conversation) -> list[int]:
        return [token for token in made.render(conversation).ids if token in made.encode.control_ids]

    assert control_ids(talk(*texts)) == control_ids(talk(*["a"] * len(texts)))


@pytest.mark.parametrize("case", CASES)
@quick
@given(texts=contents)
def test_a_prompts_ids_are_the_first_ids_of_its_conversation(case: str, texts: list[str]):
    """Whatever an answer begins with: no token spans the place where the model goes on by itself."""
    made = renderer(case)
    assume(not any("</think>" in text for text in texts))
    rendered, (last,) = made.render(talk(*texts)), made.render(talk(*texts)).turns[-1:]
    prompt = made.prompt(talk(*texts[:-1]).turns)
    assert rendered.ids[: len(prompt)] == prompt
    assert rendered.supervised.index(True, len(prompt) - 1) == len(prompt)
    said = made.answer_text(rendered.ids[len(prompt) :])
    assert said.strip() == made.tokenizer.decode(rendered.ids[last.start : last.end]).strip()


@pytest.mark.parametrize("text", ["\n\nhello", " hello", "\nhello\n", "  \n hello "])
@pytest.mark.parametrize("case", CASES)
def test_white_space_at_an_answers_edges_leaves_the_prompt_and_the_bytes_alone(case: str, text: str):
    made = renderer(case)
    rendered, prompt = made.render(talk("hi", text)), made.prompt(talk("hi").turns)
    assert rendered.ids[: len(prompt)] == prompt
    assert rendered.num_bytes == len(text.encode())


def test_a_prompt_that_ends_inside_of_a_token_of_the_whole_string_keeps_its_own_tokens():
    """Qwen3.5's prompt supplies `<think>` and a newline. The whole string joins this newline with the next; a model in use never does."""
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    made = renderer_of(tokenizer, Chat(format="model"))
    rendered, prompt = made.render(talk("hi", "oh!")), made.prompt(talk("hi").turns)
    assert rendered.ids[: len(prompt)] == prompt
    assert shown(made, rendered).endswith("<think>\n⟦\n</think>\n\noh!<|im_end|>⟧\n")
    tokenizer.chat_template = made.template.source
    whole = applied(tokenizer, talk("hi", "oh!"))
    assert tokenizer.decode(whole) == tokenizer.decode(rendered.ids)
    assert whole != rendered.ids, "this is where our ids differ from the plain call's; prepare_data.py counts them"


@pytest.mark.parametrize("case", CASES)
def test_every_mark_of_every_family_is_text_in_a_message(case: str):
    made = renderer(case)
    hostile = "".join(f"{token.content} " for token in made.tokenizer.added_tokens_decoder.values() if "think" not in token.content)
    safe_ids, ids = made.render(talk("a", "b", "c", "d")).ids, made.render(talk(hostile, hostile, hostile, hostile)).ids
    marks = [[token for token in found if token in made.encode.control_ids] for found in (safe_ids, ids)]
    assert marks[0] == marks[1]
    assert made.encode.control_ids.isdisjoint(made.render(talk("a", hostile)).ids[slice(*_content(made, hostile))])


def _content(made: Renderer, text: str) -> tuple[int, int]:
    (turn,) = made.render(talk("a", text)).turns
    return turn.start, turn.end


@pytest.mark.parametrize("case", CASES)
@quick
@given(texts=contents, max_length=st.integers(4, 80))
def test_a_long_conversation_is_cut_behind_a_whole_answer(case: str, texts: list[str], max_length: int):
    made = renderer(case)
    rendered = made.render(talk(*texts))
    short = shorten(rendered, max_length, "truncate")
    kept = sum(piece.num_supervised for piece in short.pieces)
    assert kept + short.num_tokens_cut == rendered.num_supervised
    for piece in short.pieces:
        assert len(piece.ids) <= max_length
        assert piece.ids == rendered.ids[: len(piece.ids)]


@pytest.mark.parametrize("case", CASES)
def test_loss_on_all_leaves_out_the_first_token_alone(case: str):
    made = renderer(case, loss_on="all")
    rendered = made.render(talk("a", "b", "c", "d"))
    assert rendered.supervised == [False] + [True] * (len(rendered.ids) - 1)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_tokenizer_renders_the_same_and_saves_the_same_template_again(case: str, tmp_path: Path):
    made = renderer(case, system_prompt="Be brief.")
    made.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    reloaded = Renderer(again, made.chat, RoleMarkers("control"))
    conversation = talk("<|im_end|> hi", "oh </s>", "[/INST] how?", "so <end_of_turn>")
    assert reloaded.render(conversation) == made.render(conversation)
    assert reloaded.stop_token_ids == made.stop_token_ids
    assert jinja(again, made.chat, RoleMarkers("control")) == made.tokenizer.chat_template


@pytest.mark.parametrize("case", CASES)
def test_the_stop_tokens_are_the_end_of_text_and_the_end_of_an_answer_once_each(case: str):
    made = renderer(case)
    stops = made.tokenizer.convert_ids_to_tokens(list(made.stop_token_ids))
    assert stops == list(dict.fromkeys([made.tokenizer.eos_token, end_of(case)]))


@pytest.mark.parametrize("case", CASES)
def test_real_conversations_have_the_ids_of_the_saved_template(case: str, messages: list[dict[str, Any]]):
    from qlora_suite.oasst1 import conversations
    from qlora_suite.recipe import Filters

    made = renderer(case)
    found = [c for c in (c.without_open_end() for c in conversations(messages, "all_paths", Filters())[0]) if c][:40]
    agreement = template_agreement(found, made)
    assert agreement["agreed"] == agreement["checked"] > 10


@pytest.mark.parametrize("case", ["qwen3, no thinking", "gemma2", "phi2", "llama3_2"])
def test_a_template_that_we_saved_is_written_as_it_is_by_whoever_does_not_know_the_recipe(case: str, tmp_path: Path):
    """A model of ours that is the base of another run, or is scored beside another recipe."""
    made = renderer(case, system_prompt="Be brief.")
    made.tokenizer.save_pretrained(tmp_path)
    again = Renderer(AutoTokenizer.from_pretrained(tmp_path), Chat(format="model"), RoleMarkers("control"))
    for conversation in (talk("a", "b", "c", "d"), says(("system", "s"), ("user", "a"), ("assistant", "b"))):
        ours, theirs = made.render(conversation), again.render(conversation)
        assert (theirs.ids, theirs.supervised) == (ours.ids, ours.supervised)


# ---- what a template can and cannot do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "system", "merges", "tools"),
    [
        ("llama3", "anywhere", (), True),
        ("qwen2_5", "anywhere", (), True),
        ("qwen3", "anywhere", ("assistant",), True),
        ("mistral_v1", "first", ("user", "assistant"), False),
        ("mistral_v3", "none", ("user", "assistant"), False),
        ("gemma2", "none", ("user", "assistant"), False),
        ("phi3", "anywhere", (), False),
        ("phi2", "anywhere", (), True),
    ],
)
def test_what_a_template_takes_is_seen_by_trying(case: str, system: str, merges: tuple[str, ...], tools: bool):
    template = renderer(case).template
    assert (template.system, template.merges, template.takes_tools) == (system, merges, tools)


def test_a_system_turn_without_a_place_goes_into_the_next_user_turn_and_is_counted():
    made = renderer("gemma2")
    turns = says(("system", "Rhyme."), ("user", "hi"), ("assistant", "oh!"), ("system", "Stop."), ("assistant", "so"))
    rendered = made.render(turns)
    expected = "<bos><start_of_turn>user\nRhyme.\n\nhi<end_of_turn>\n<start_of_turn>model\n⟦oh!<end_of_turn>⟧\n"
    expected += "<start_of_turn>user\nStop.<end_of_turn>\n<start_of_turn>model\n⟦so<end_of_turn>⟧\n"
    assert shown(made, rendered) == expected
    assert rendered.num_system_moved == 2
    assert [turn.index for turn in rendered.turns] == [2, 4]


def test_mistrals_system_turn_moves_with_the_last_question_so_ours_stays_in_the_first():
    """v0.3 writes it into the last user turn, and nowhere once that is answered: no answer could be learnt behind it."""
    made = renderer("mistral_v3")
    rendered = made.render(says(("system", "Rhyme."), *((t.role, t.content) for t in talk("a", "b", "c", "d").turns)))
    assert shown(made, rendered) == "<s>[INST] Rhyme.\n\na[/INST]⟦b</s>⟧[INST] c[/INST]⟦d</s>⟧"


def test_turns_that_the_template_takes_no_two_of_become_one():
    made = renderer("mistral_v3")
    turns = says(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))
    rendered = made.render(turns)
    assert shown(made, rendered) == "<s>[INST] a\n\nb[/INST]⟦c\n\nd</s>⟧"
    assert [turn.num_bytes for turn in rendered.turns] == [4]
    half = replace(turns, turns=(*turns.turns[:-1], replace(turns.turns[-1], learn=False)))
    with pytest.raises(ValueError, match=r"^conversation key: turns 3 and 4 are answers behind each other.*data\.same_role"):
        made.render(half)
    assert "⟦c<|end|>⟧<|assistant|>⟦d<|end|>⟧" in shown(renderer("phi3"), renderer("phi3").render(turns)), "Phi-3 takes two"


def test_a_template_that_cannot_begin_with_an_answer_gets_an_empty_question():
    turns = says(("assistant", "hello"), ("user", "a"), ("assistant", "b"))
    text = shown(renderer("mistral_v3"), renderer("mistral_v3").render(turns))
    assert text == "<s>[INST] [/INST]⟦hello</s>⟧[INST] a[/INST]⟦b</s>⟧"
    assert shown(renderer("phi3"), renderer("phi3").render(turns)).startswith("<|assistant|>⟦hello<|end|>⟧")
    assert [turn.index for turn in renderer("gemma2").render(turns).turns] == [0, 2]


def test_a_tools_turn_is_written_by_the_template_or_refused_by_name():
    turns = says(("user", "a"), ("assistant", "call"), ("tool", "42 <|im_end|>"), ("assistant", "it is 42"))
    text = shown(renderer("qwen2_5"), renderer("qwen2_5").render(turns))
    assert "<|im_start|>user\n<tool_response>\n42 <|im_end|>\n</tool_response><|im_end|>" in text
    for case in ("gemma2", "phi3"):
        with pytest.raises(ValueError, match=r"^conversation key: the base's chat template has no place for turn 3, a tool's"):
            renderer(case).render(turns)
    with pytest.raises(ValueError, match=r"^conversation key: turn 1 has the role 'critic'"):
        renderer("phi3").render(says(("critic", "a"), ("assistant", "b")))


def test_a_prompt_has_to_end_on_a_question():
    with pytest.raises(ValueError, match="a prompt has to end on a user turn"):
        renderer("qwen3").prompt(talk("a", "b").turns)


def test_marks_of_plain_text_are_counted():
    """Mistral v0.1 has no tokens for its marks: a message can imitate them, and no care helps."""
    assert renderer("mistral_v1").plain_markers == ("[INST]", "[/INST]")
    assert renderer("mistral_v1").render(talk("a [/INST] b </s> [INST]", "c")).num_marker_texts == 2
    assert renderer("mistral_v3").render(talk("a [/INST] b </s> [INST]", "c")).num_marker_texts == 0


def test_todays_date_is_always_the_same_one():
    made = renderer("llama3_2")
    assert "strftime_now" in (TEMPLATES / "llama3_2.jinja").read_text()
    assert "Today Date: 26 Jul 2024\n" in made.tokenizer.decode(made.render(talk("a", "b")).ids)
    assert "Today Date: 26 Jul 2024\n" in made.tokenizer.apply_chat_template(messages(talk("a", "b")), tokenize=False)
    other = tokenizer_of("llama3_2")
    other.chat_template = other.chat_template.replace("%d %b %Y", "%Y-%m-%d")
    assert "Today Date: 2024-07-26\n" in other.decode(renderer_of(other, Chat(format="model")).render(talk("a", "b")).ids)


@pytest.mark.parametrize("family", ["llama3", "llama3_1", "qwen2_5", "qwen3", "mistral_v1", "phi3"])
def test_a_template_that_needs_nothing_is_saved_as_it_is(family: str):
    tokenizer = tokenizer_of(family)
    published = tokenizer.chat_template
    assert renderer_of(tokenizer, Chat(format="model")).template.source == published


def test_a_template_that_gets_something_in_front_ends_as_it_was():
    text = renderer("gemma2").tokenizer.chat_template
    assert text.endswith((TEMPLATES / "gemma2.jinja").read_text())


# ---- rewritten history ---------------------------------------------------------------------------------------------------------


def test_rewritten_history_is_detected_and_refused_by_choice():
    assert [case for case in CASES if renderer(case).rewrites_history] == ["qwen3", "qwen3, no thinking"]
    assert [renderer(case).render(talk("a", "b", "c", "d", "e", "f")).num_rewritten for case in CASES] == [
        2 * ("qwen3" in case) for case in CASES
    ]
    with pytest.raises(ValueError, match=r"writes an earlier answer in another way than the last one.*rewritten_history is refuse"):
        renderer_of(tokenizer_of("qwen3"), Chat(format="model", rewritten_history="refuse"))
    assert renderer("qwen2_5", rewritten_history="refuse").render(talk("a", "b", "c", "d")).num_supervised == 4


def test_an_answers_own_thoughts_are_learnt_where_it_is_the_last():
    thought = "<think>\nlong\n</think>\n\nhi"
    text = shown(renderer("qwen3"), renderer("qwen3").render(talk("a", thought, "b", thought)))
    assert text.endswith(f"assistant\nhi<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦{thought}<|im_end|>⟧\n")
    # What the template makes anew of an answer is that answer still, to the byte.
    rendered = renderer("qwen3").render(talk("a", "<think>long</think>hi"))
    assert shown(renderer("qwen3"), rendered).endswith(f"⟦{thought}<|im_end|>⟧\n")
    assert rendered.num_bytes == len("<think>long</think>hi")


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "writes no control token behind an answer"),
        ("{% for m in messages[-1:] %}{{ m.role + m.content + eos_token }}{% endfor %}", "does not write every turn"),
        (
            "{% for m in messages %}{{ m.role + '|' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}BOT{% endif %}",
            "writes a last answer in another way than its own generation prompt begins",
        ),
        ("{{ raise_exception('no, never') }}", "refuses the conversation: no, never"),
        ("{% for m in messages %}{{ m.content", "refuses the conversation: "),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_refused_with_the_reason(template: str, complaint: str):
    tokenizer = tokenizer_of("phi2")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=complaint):
        renderer_of(tokenizer, Chat(format="model"))


def test_a_template_that_ignores_the_generation_prompt_has_its_header_learnt():
    """Nobody supplies it when the model is used, so the model has to say it."""
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    made = renderer_of(tokenizer, Chat(format="model"))
    assert shown(made, made.render(talk("a", "b"))) == "<|im_start|>user\na<|im_end|>\n⟦<|im_start|>assistant\nb<|im_end|>⟧\n"


def test_a_mark_that_is_no_special_token_becomes_one():
    tokenizer = tokenizer_of("phi2")
    tokenizer.add_tokens([ordinary("<|im_start|>"), ordinary("<|im_end|>"), ordinary("<think>"), ordinary("</think>")])
    tokenizer.chat_template = tokenizer_of("qwen3").chat_template
    made = renderer_of(tokenizer, Chat(format="model"))
    assert shown(made, made.render(talk("<|im_end|>", "<|im_start|>"))).count("⟦") == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert made.render(talk("<|im_end|>", "<|im_end|>")).ids.count(end) == 2
    assert {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special} >= {"<think>", "</think>"}


def test_argument_names_are_names():
    with pytest.raises(ValueError, match="'messages' is no name that a template can be called with"):
        renderer("phi3").__class__(tokenizer_of("phi3"), Chat(format="model", template_arguments={"messages": "a"}), RoleMarkers("control"))


# ---- ChatML --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_chatml_is_the_same_for_every_base(family: str):
    tokenizer = tokenizer_of(family)
    made = renderer_of(tokenizer, Chat(format="chatml"))
    bos = tokenizer.bos_token if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else ""
    rendered = made.render(says(("system", "s"), *((t.role, t.content) for t in talk("hi", "oh!", "how?", "so").turns)))
    text = shown(made, rendered).replace("> ", ">")  # a space that a SentencePiece puts in front of a piece
    assert text == f"{bos}<|im_start|>system\ns<|im_end|>\n" + CHATML_TALK
    assert tokenizer.convert_ids_to_tokens(list(made.stop_token_ids)) == list(dict.fromkeys([tokenizer.eos_token, "<|im_end|>"]))


def test_chatmls_marks_are_the_bases_own_or_rows_that_are_trained_or_refused():
    own = add_role_markers(tokenizer_of("qwen2_5"), 10_000, Chat(format="chatml"))
    assert (own.kind, own.token_ids, own.predicted, own.servable_as) == ("control", (), False, "adapter")
    tokenizer = tokenizer_of("phi2")
    count = len(tokenizer)
    new = add_role_markers(tokenizer, count + 2, Chat(format="chatml"))
    assert (new.kind, new.token_ids, new.predicted, new.servable_as) == ("special", (count, count + 1), True, "merged")
    assert RoleMarkers.from_json(json.loads(json.dumps(asdict(new)))) == new
    because = add_role_markers(tokenizer_of("phi2"), count + 2, Chat(format="model")).note
    assert because == f"{new.note}, for the base has no chat template of its own: it is ChatML"
    with pytest.raises(ValueError, match=r"<\|im_start\|> and <\|im_end\|> need 2 spare rows .* use chat\.format: human_assistant"):
        add_role_markers(tokenizer_of("phi2"), count + 1, Chat(format="chatml"))


def test_a_model_of_somebody_else_gets_no_untrained_rows(tmp_path: Path):
    tokenizer = tokenizer_of("phi2")
    config_of("phi", 500).save_pretrained(tmp_path)
    model = Model(base=str(tmp_path))
    for chat, words in ((Chat(format="chatml"), "has no token"), (Chat(format="model"), "has no chat template, and has no token")):
        with pytest.raises(ValueError, match=rf"{words} <\|im_start\|> and <\|im_end\|>.*--format"):
            renderer_elsewhere(tokenizer, chat, model)
    assert len(tokenizer) == len(tokenizer_of("phi2"))
    assert renderer_elsewhere(tokenizer_of("qwen3"), Chat(format="chatml"), model).render(talk("a", "b")).num_supervised == 2


# ---- evaluation and generation -------------------------------------------------------------------------------------------------


def config_of(architecture: str, rows: int, **keys: Any) -> Any:
    """A tiny model's config for another vocabulary; a config's own class copies what it is given."""
    config = type(CONFIGS[architecture]).from_dict({**CONFIGS[architecture].to_dict(), "vocab_size": rows, "max_position_embeddings": 512})
    for key, value in keys.items():
        setattr(config, key, value)
    return config


def test_every_answer_is_scored_once_although_only_last_ones_are_learnt():
    made, plain = renderer("qwen3"), renderer_of(tokenizer_of("qwen3"), Chat(format="human_assistant"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("qwen3", len(made.tokenizer) + 4))
    found, cut = excerpts([talk("a", "b", "c", "d", "e", "f")], [made, plain], 200)
    assert cut.answers == 0
    answers = {name: score(model, r, found, 200, Limit(8, 400)) for name, r in (("qwen3", made), ("plain", plain))}
    for scores in answers.values():
        assert [(a.number, a.bytes, a.end_tokens) for a in scores] == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]
    assert len(excerpts([talk("a", "b", "c", "d")], [plain], 200)[0]) == 1


def test_formats_that_merge_turns_or_not_score_the_same_answers():
    made, plain = renderer("gemma2"), renderer_of(tokenizer_of("gemma2"), Chat(format="human_assistant"))
    found, _ = excerpts([says(("user", "a"), ("assistant", "b"), ("assistant", "c"))], [made, plain], 200)
    assert [r.render(found[0].conversation).num_bytes for r in (made, plain)] == [4, 4]


def test_an_answer_ends_at_the_templates_end_token():
    made = renderer("phi3")
    model = AutoModelForCausalLM.from_config(config_of("phi3", len(made.tokenizer) + 4)).eval()
    said = made.encode("hello you", made.role_ids["assistant"] if made.layout else made.tokenizer.eos_token_id)[0]
    said = [*said, made.tokenizer.convert_tokens_to_ids("<|end|>"), *said]
    calls: Callable[..., Any] = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said])], dim=1)  # noqa: E731
    model.generate = calls
    (found,) = answer(model, made, [talk("a").turns], 20)
    assert (found.text, found.stopped) == ("hello you", True)


# ---- training ------------------------------------------------------------------------------------------------------------------

TRAINED = {
    "llama3": "llama",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "mistral_v3": "mistral",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "phi2": "phi",
}
SAID = [("user", "Hello you, how are you?"), ("assistant", "I am well, thank you."), ("user", "say hi"), ("assistant", "hi, world!")]


def base_of(folder: Path, family: str) -> Path:
    """A tiny random base with a few spare rows."""
    tokenizer = tokenizer_of(family)
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = config_of(TRAINED[family], len(tokenizer) + 6, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chats(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    lines = []
    for i in range(24):
        turns = [("system", "Be brief."), *SAID] if i % 3 == 0 else SAID
        lines.append(json.dumps({"messages": [{"role": r, "content": f"{text} {i}" if r == "user" else text} for r, text in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_of(tmp_path: Path, base: Path, *overrides: str) -> Path:
    return write_recipe(
        tmp_path,
        base,
        chats(tmp_path),
        "data.policy=null",
        "data.filters=null",
        "data.split=all",
        "chat.format=model",
        "optim.learning_rate=0.02",
        "train.max_steps=20",
        "train.rows_per_step=2",
        "train.epochs=50",
        *overrides,
    )


@pytest.mark.parametrize("family", TRAINED)
def test_a_4_bit_base_of_each_family_learns_its_own_template(family: str, tmp_path: Path):
    recipe = prepared(recipe_of(tmp_path, base_of(tmp_path / "base", family)))
    manifest = dataset.load_manifest(load(recipe))
    assert manifest["chat_template"]["agreed"] == manifest["chat_template"]["checked"] > 0
    run = train(recipe)
    losses = column(metrics(run), "loss")
    assert losses[-1] < 0.92 * losses[0]
    final = AutoTokenizer.from_pretrained(run / "final")
    assert final.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], tokenize=False)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("gemma", True)])
def test_chatmls_new_rows_are_learnt_saved_and_read_back_tied_or_not(architecture: str, tied: bool, tmp_path: Path):
    tokenizer = tokenizer_of("phi2")
    torch.manual_seed(0)
    config = config_of(architecture, len(tokenizer) + 6, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = load(recipe_of(tmp_path, tmp_path / "base", "chat.format=chatml"))
    markers = add_role_markers(tokenizer, len(tokenizer) + 6, recipe.chat)
    made = Renderer(tokenizer, recipe.chat, markers)
    net, _ = build_model(recipe, {"role_markers": asdict(markers)}, torch.float32, torch.device("cpu"))
    rows = {name: p for name, p in net.named_parameters() if p.requires_grad and "tokens_delta" in name}
    assert len({id(p) for p in rows.values()}) == (1 if tied else 2)

    rendered = made.render(talk("hello you", "I am well."))
    end = rendered.ids.index(markers.token_ids[1], rendered.turns[0].start)
    ids = torch.tensor([rendered.ids])

    def loss_of_the_end() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(input_ids=ids).logits[:, end - 1].float(), ids[:, end])

    optimizer = torch.optim.AdamW(rows.values(), lr=0.05)
    before = loss_of_the_end().item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of_the_end().backward()
        optimizer.step()
    assert loss_of_the_end().item() < before - 0.5, "the end token's own row in the head is trained"
    net.eval()
    net.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_adapter(load_base(recipe.model, torch.float32, torch.device("cpu")), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, net(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


# ---- scored within the window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_answers_of_every_length_are_scored_whole_or_cut_and_never_reach_over_the_window(case: str) -> None:
    made, window = renderer(case, system_prompt="Be brief."), 90
    talks = [talk("hi", "well " * words + "?", "and", "now " * (words % 7) + "!") for words in range(1, 90)]
    found, cut = excerpts(talks, [made], window)
    pieces = _pieces(made, found, window)
    lengths = [len(piece.ids) for _, piece in pieces]
    assert window - 1 <= max(lengths) <= window, "the sweep has to meet the edge"
    answers = [turn for _, piece in pieces for turn in piece.turns if turn.learn]
    assert len(answers) + cut.answers == 2 * len(talks)
    for _, piece in pieces:
        assert all(piece.supervised[turn.end] for turn in piece.turns if turn.learn), "with its end token"
        assert len(piece.ids) == piece.turns[-1].end + 1


def test_a_conversation_that_the_saved_template_refuses_is_trained_on_and_said_not_to_agree() -> None:
    made = renderer("mistral_v1")
    first = says(("assistant", "hello"), ("user", "hi"), ("assistant", "oh"))
    assert made.render(first).num_supervised > 0
    assert template_agreement([talk("a", "b"), first], made) == {"checked": 2, "agreed": 1}
