"""Conversations become ids and a mask of which every token can be accounted for, and the Jinja template writes the same."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_suite.chat import ZERO_WIDTH_SPACE, Renderer
from qlora_suite.chat_templates import jinja
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.recipe import Chat
from qlora_suite.rendered import Rendered, shorten
from qlora_suite.role_markers import ASSISTANT, PROMPTER, RoleMarkers, add_role_markers

CORPUS = [
    "### Human: hello you, how are you? ### Assistant: I am well, thank you. Hello, hello!",
    "Instruct: say hi to the world.\nOutput: hi, world!\n\nIt's a fine day, isn't it?\n",
    "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhow are you? [/INST] I am fine <|prompter|> <|assistant|>|>>)",
] * 4
EVERY_BYTE = pre_tokenizers.ByteLevel.alphabet()
# The way Llama 3 and Qwen cut words: `.` and a newline behind it are one word, and a letter takes any character in front of it.
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(words: pre_tokenizers.PreTokenizer, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=EVERY_BYTE, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(prepend: str) -> Tokenizer:
    """Like Llama 2: a space in front of the text (`first`) or behind every control token (`always`), bytes for unknown characters."""
    specials = ["<unk>", "<s>", "</s>"]
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=specials, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(learnt.to_str())["model"]["merges"]]
    vocabulary = learnt.get_vocab(with_added_tokens=True)
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def adding_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def backends() -> dict[str, str]:
    """Name -> tokenizer JSON, trained once."""
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen_words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return {
        "phi": byte_level(gpt2_words, ["<|endoftext|>"]).to_str(),
        "qwen": byte_level(qwen_words, ["<|endoftext|>"]).to_str(),
        "llama3": byte_level(qwen_words, ["<unk>", "<s>", "</s>"]).to_str(),
        "llama2": sentencepiece("first").to_str(),
        "llama2-legacy": sentencepiece("always").to_str(),
    }


def build(backends: dict[str, str], name: str) -> PreTrainedTokenizerFast:
    """A fresh one, for role markers are added in place."""
    tokenizer = Tokenizer.from_str(backends[name])
    if name in ("phi", "qwen"):
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return adding_bos(tokenizer)


TOKENIZERS = ["phi", "qwen", "llama3", "llama2", "llama2-legacy"]
CHATS = {
    "oasst, control tokens": Chat(format="oasst", role_markers="special"),
    "oasst, plain text": Chat(format="oasst", role_markers="text"),
    "human_assistant": Chat(format="human_assistant"),
    "instruct_output": Chat(format="instruct_output"),
    "llama2": Chat(format="llama2", system_prompt="Be {brief}, 'kind'\nand \"true\" \\n 😀 }} %}"),
    "text": Chat(format="text"),
}
DIALOGUES = [name for name in CHATS if name != "text"]


@pytest.fixture(scope="session")
def renderers(backends: dict[str, str]) -> Callable[[str, str], Renderer]:
    """(tokenizer, format) -> its renderer; its tokenizer has the template."""

    @cache
    def make(tokenizer_name: str, chat_name: str) -> Renderer:
        tokenizer, chat = build(backends, tokenizer_name), CHATS[chat_name]
        markers = add_role_markers(tokenizer, len(tokenizer) + 2, chat)
        tokenizer.chat_template = jinja(tokenizer, chat, markers)
        return Renderer(tokenizer, chat, markers)

    return make


def talk(*contents: str, learn: tuple[int, ...] | None = None) -> Conversation:
    """User and assistant by turns. `learn`: which turns are learnt (all)."""
    turns = [Turn("assistant" if i % 2 else "user", text, learn is None or i in learn) for i, text in enumerate(contents)]
    return Conversation("key", (), "tree", tuple(turns))


def written(text: str) -> Conversation:
    return Conversation("key", (), "tree", (Turn("assistant", text),))


def shown(renderer: Renderer, rendered: Rendered) -> str:
    """The text of the ids, what is learnt in double brackets."""
    decode = renderer.tokenizer.decode
    runs: list[tuple[bool, list[int]]] = []
    for token, learnt in zip(rendered.ids, rendered.supervised, strict=True):
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token)
    return "".join(f"⟦{decode(ids)}⟧" if learnt else decode(ids) for learnt, ids in runs)


# Pieces that want to join with a marker, or look like one, between any characters at all.
FRAGMENTS = ["|>", ">", "<", "#", "###", ":", ".\n", "\n\n", "  ", "'s", " a", "é", "😀", "e\u0301", "\0", "▁", "hello"]
MARKER_TEXTS = ["<|endoftext|>", "</s>", "<s>", PROMPTER, ASSISTANT, "### Human:", "Output:", "[/INST]", "<</SYS>>"]
anything = st.lists(st.one_of(st.sampled_from(FRAGMENTS + MARKER_TEXTS), st.text(max_size=4)), max_size=8).map("".join)
contents = st.lists(anything, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


# ---- golden examples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "name", "text"),
    [
        ("phi", "oasst, control tokens", "<|prompter|>hi<|endoftext|>\n<|assistant|>⟦oh!<|endoftext|>⟧\n<|prompter|>yes<|endoftext|>"),
        ("phi", "oasst, plain text", "<|prompter|> hi<|endoftext|>\n<|assistant|>⟦ oh!<|endoftext|>⟧\n<|prompter|> yes<|endoftext|>"),
        ("phi", "human_assistant", "### Human: hi ### Assistant:⟦ oh!<|endoftext|>⟧ ### Human: yes"),
        ("phi", "instruct_output", "Instruct: hi\nOutput:⟦ oh!<|endoftext|>⟧\nInstruct: yes"),
        ("phi", "llama2", "[INST] <<SYS>>\nBE\n<</SYS>>\n\nhi [/INST]⟦ oh!<|endoftext|>⟧[INST] yes [/INST]"),
        ("llama3", "oasst, control tokens", "<s><|prompter|>hi</s>\n<|assistant|>⟦oh!</s>⟧\n<|prompter|>yes</s>"),
        ("llama3", "llama2", "<s>[INST] <<SYS>>\nBE\n<</SYS>>\n\nhi [/INST]⟦ oh!</s>⟧<s>[INST] yes [/INST]"),
    ],
)
def test_what_each_format_writes_and_learns(renderers, tokenizer: str, name: str, text: str):
    renderer = renderers(tokenizer, name)
    shown_text = shown(renderer, renderer.render(talk("hi", "oh!", "yes")))
    assert shown_text == text.replace("BE", str(renderer.chat.system_prompt))


def test_a_plain_text_has_a_start_and_an_end_token(renderers):
    for tokenizer, text in (("phi", "<|endoftext|>⟦hi\n you<|endoftext|>⟧"), ("llama3", "<s>⟦hi\n you</s>⟧")):
        renderer = renderers(tokenizer, "text")
        assert shown(renderer, renderer.render(written("hi\n you"))) == text


def test_a_turn_that_is_taught_elsewhere_is_not_learnt(renderers):
    renderer = renderers("phi", "instruct_output")
    rendered = renderer.render(talk("a", "b", "c", "d", learn=(3,)))
    assert shown(renderer, rendered) == "Instruct: a\nOutput: b<|endoftext|>\nInstruct: c\nOutput:⟦ d<|endoftext|>⟧"
    assert [(turn.index, turn.learn, turn.num_bytes) for turn in rendered.turns] == [(1, False, 1), (3, True, 1)]


@pytest.mark.parametrize("name", DIALOGUES)
def test_loss_on_all_leaves_out_the_first_token_alone(backends, name: str):
    tokenizer, chat = build(backends, "phi"), CHATS[name].model_copy(update={"loss_on": "all"})
    renderer = Renderer(tokenizer, chat, add_role_markers(tokenizer, 1000, chat))
    rendered = renderer.render(talk("a", "b", learn=()))
    assert rendered.supervised == [False] + [True] * (len(rendered.ids) - 1)


def test_a_system_turn_without_a_place_goes_into_the_next_user_turn(renderers):
    turns = (Turn("system", "Rhyme."), *talk("a", "b").turns, Turn("system", "Stop."), Turn("assistant", "c"))
    conversation = replace(talk(), turns=turns)
    renderer = renderers("phi", "instruct_output")
    rendered = renderer.render(conversation)
    end = "<|endoftext|>"
    assert shown(renderer, rendered) == f"Instruct: Rhyme.\n\na\nOutput:⟦ b{end}⟧\nInstruct: Stop.\nOutput:⟦ c{end}⟧"
    assert [turn.index for turn in rendered.turns] == [2, 4]
    assert rendered.num_system_moved == 2

    renderer = renderers("phi", "llama2")
    rendered = renderer.render(conversation)
    assert shown(renderer, rendered) == f"[INST] <<SYS>>\nRhyme.\n<</SYS>>\n\na [/INST]⟦ b{end}⟧[INST] Stop. [/INST]⟦ c{end}⟧"
    assert rendered.num_system_moved == 1


def test_text_that_looks_like_a_marker_is_counted_and_by_choice_broken_up(backends):
    tokenizer = build(backends, "phi")
    conversation = talk("a ### Assistant: b ### Human: c", "### Human: d")
    for escape in (False, True):
        chat = Chat(format="human_assistant", escape_markers=escape)
        renderer = Renderer(tokenizer, chat, add_role_markers(tokenizer, 1000, chat))
        rendered = renderer.render(conversation)
        assert rendered.num_marker_texts == 3
        text = shown(renderer, rendered)
        assert text.count("### ") == (2 if escape else 5)
        assert text.replace(ZERO_WIDTH_SPACE, "").count("### ") == 5


# ---- properties ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["phi", "qwen", "llama3"])
@pytest.mark.parametrize("name", DIALOGUES)
@quick
@given(texts=contents, data=st.data())
def test_the_answers_and_their_end_tokens_are_learnt_and_nothing_else(renderers, tokenizer: str, name: str, texts: list[str], data):
    renderer = renderers(tokenizer, name)
    answers = range(1, len(texts), 2)
    learn = tuple(i for i in answers if data.draw(st.booleans()))
    rendered = renderer.render(talk(*texts, learn=learn))

    supervised = {i for turn in rendered.turns if turn.learn for i in range(turn.start, turn.end + 1)}
    assert {i for i, learnt in enumerate(rendered.supervised) if learnt} == supervised
    assert [turn.index for turn in rendered.turns] == list(answers)
    for turn in rendered.turns:
        ids = rendered.ids[turn.start : turn.end]
        assert renderer.tokenizer.decode(ids) == renderer.layout.lead + texts[turn.index]
        assert rendered.ids[turn.end] == renderer.tokenizer.eos_token_id
        assert turn.num_bytes == len(texts[turn.index].encode())
        assert len(turn.byte_ends) == len(ids)
        assert all(a <= b for a, b in pairwise(turn.byte_ends))
        assert renderer.answer_text([*ids, renderer.tokenizer.eos_token_id, ids[0] if ids else 0]) == texts[turn.index]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", DIALOGUES)
@quick
@given(texts=contents)
def test_no_message_becomes_a_control_token(renderers, tokenizer: str, name: str, texts: list[str]):
    renderer = renderers(tokenizer, name)
    control = set(renderer.tokenizer.all_special_ids) - {renderer.tokenizer.unk_token_id}

    def control_ids(conversation: Conversation) -> list[int]:
        return [token for token in renderer.render(conversation).ids if token in control]

    assert control_ids(talk(*texts)) == control_ids(talk(*["a"] * len(texts)))


@pytest.mark.parametrize("tokenizer", ["phi", "qwen"])
@quick
@given(text=anything)
def test_every_text_can_be_read_back(renderers, tokenizer: str, text: str):
    renderer = renderers(tokenizer, "text")
    rendered = renderer.render(written(text))
    assert renderer.tokenizer.decode(rendered.ids[1:-1]) == text


def for_a_template(renderer: Renderer, text: str) -> str:
    for special in renderer.tokenizer.all_special_tokens:
        assume(special not in text)
    return text.strip()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", CHATS)
@quick
@given(texts=contents, system=st.none() | anything)
def test_the_jinja_template_gives_the_same_ids(renderers, tokenizer: str, name: str, texts: list[str], system: str | None):
    renderer = renderers(tokenizer, name)
    texts = [for_a_template(renderer, text) for text in texts]
    conversation = talk(*texts) if name != "text" else written(texts[0])
    if system is not None and name != "text":
        turn = Turn("system", for_a_template(renderer, system))
        conversation = replace(conversation, turns=(turn, *conversation.turns))
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]

    apply = renderer.tokenizer.apply_chat_template
    assert apply(messages, tokenize=True, return_dict=False) == renderer.render(conversation).ids
    opened = messages if name == "text" else messages[:-1]
    ids = apply(opened, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ids == renderer.prompt(conversation.turns[: len(opened)])


def test_the_template_of_escaped_markers_and_odd_system_turns(backends):
    tokenizer = build(backends, "phi")
    turns = tuple(
        Turn(role, f"{role} ### Human: Output: [INST] {i}")
        for i, role in enumerate(("system", "system", "assistant", "user", "user", "system", "user", "assistant", "system"))
    )
    for name in ("human_assistant", "instruct_output", "llama2"):
        chat = CHATS[name].model_copy(update={"escape_markers": True})
        markers = add_role_markers(tokenizer, 1000, chat)
        tokenizer.chat_template = jinja(tokenizer, chat, markers)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        rendered = Renderer(tokenizer, chat, markers).render(replace(talk(), turns=turns))
        assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == rendered.ids


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_template_marks_what_is_learnt(renderers, name: str):
    renderer = renderers("phi", name)
    conversation = talk("hello you", "I am well.", "how?", "hello, hello!")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    encoded = renderer.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert [bool(m) for m in encoded["assistant_masks"]] == renderer.render(conversation).supervised


def test_a_saved_tokenizer_renders_the_same(renderers, tmp_path):
    renderer = renderers("phi", "oasst, control tokens")
    conversation = talk(f"hello {PROMPTER}", f"<|endoftext|> {ASSISTANT}")
    renderer.tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    markers = RoleMarkers("special", (1, 2))
    assert Renderer(reloaded, renderer.chat, markers).render(conversation) == renderer.render(conversation)
    assert reloaded.chat_template == renderer.tokenizer.chat_template
    assert RoleMarkers.from_json(asdict(markers) | {"token_ids": [1, 2]}) == markers


# ---- too long ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIALOGUES)
@quick
@given(texts=contents, data=st.data(), max_length=st.integers(1, 60))
def test_a_long_conversation_is_cut_behind_a_whole_turn(renderers, name: str, texts: list[str], data, max_length: int):
    too_long = data.draw(st.sampled_from(["truncate", "drop"]))
    learn = tuple(i for i in range(1, len(texts), 2) if data.draw(st.booleans()))
    rendered = renderers("phi", name).render(talk(*texts, learn=learn))
    result = shorten(rendered, max_length, too_long)

    assert len(result.pieces) <= 1
    kept = result.pieces[0] if result.pieces else Rendered([], [], [])
    num_kept = len(kept.ids)
    assert num_kept <= max_length
    assert kept.ids == rendered.ids[:num_kept]
    assert kept.supervised == rendered.supervised[:num_kept]
    assert result.num_tokens_cut == rendered.num_supervised - kept.num_supervised
    assert result.num_bytes_cut == rendered.num_bytes - kept.num_bytes
    if result.pieces:
        assert any(kept.supervised)
        assert [turn.start for turn in kept.turns] == [turn.start for turn in rendered.turns if turn.start < num_kept]
        content = kept.ids[kept.turns[-1].start : kept.turns[-1].end]
        read = renderers("phi", name).tokenizer.decode(content).rstrip("\ufffd").removeprefix(renderers("phi", name).layout.lead)
        assert kept.turns[-1].num_bytes == len(read.encode()) or "\ufffd" in texts[kept.turns[-1].index]

    fitting = [turn for turn in rendered.turns if turn.end < max_length]
    if len(rendered.ids) <= max_length and learn:
        assert kept == rendered
    elif any(turn.learn for turn in fitting):
        assert num_kept == fitting[-1].end + 1
    elif too_long == "drop":
        assert not result.pieces
    else:
        assert num_kept == (max_length if any(rendered.supervised[:max_length]) else 0)


def test_a_turn_that_is_taught_elsewhere_does_not_count_as_a_fit(renderers):
    rendered = renderers("phi", "instruct_output").render(talk("a", "b", "c", "hello hello hello", learn=(3,)))
    length = len(rendered.ids) - 2
    assert shorten(rendered, length, "drop").pieces == []
    (piece,) = shorten(rendered, length, "truncate").pieces
    assert piece.num_bytes == len("hello hello")
    assert piece.turns[-1].end == len(piece.ids) == length
    assert shorten(rendered, length, "truncate").num_bytes_cut == len(" hello")


def test_bytes_of_a_character_count_where_it_is_complete(renderers):
    rendered = renderers("phi", "text").render(written("a😀b"))
    assert rendered.turns[0].byte_ends == (1, 1, 1, 1, 5, 6)


@quick
@given(text=anything, max_length=st.integers(2, 12))
def test_a_split_text_loses_nothing(renderers, text: str, max_length: int):
    rendered = renderers("llama3", "text").render(written(text))
    result = shorten(rendered, max_length, "split")
    start, *rest = rendered.ids

    assert [token for piece in result.pieces for token in piece.ids[1:]] == rest
    for piece in result.pieces:
        assert piece.ids[0] == start
        assert piece.supervised == [False] + [True] * (len(piece.ids) - 1)
        assert 1 < len(piece.ids) <= max_length
        (turn,) = piece.turns
        assert (turn.start, turn.end) == (1, len(piece.ids) - (piece is result.pieces[-1]))
        assert len(turn.byte_ends) == turn.end - turn.start
    assert all(len(piece.ids) == max_length for piece in result.pieces[:-1])
    assert sum(piece.num_bytes for piece in result.pieces) == len(text.encode())
    assert (result.num_tokens_cut, result.num_bytes_cut) == (0, 0)


@quick
@given(parts=st.lists(anything, min_size=1, max_size=6), max_length=st.integers(2, 12))
@pytest.mark.parametrize("tokenizer", ["phi", "llama3"])
def test_parts_of_a_text_are_encoded_as_one_text_and_only_the_learnt_ones_are_learnt(
    renderers, tokenizer: str, parts: list[str], max_length: int
):
    renderer, conversation = renderers(tokenizer, "text"), talk(*parts)
    rendered, whole = renderer.render(conversation), renderer.render(written("".join(parts)))
    assert rendered.ids == whole.ids
    learnt_chars = set()
    done = 0
    for turn in conversation.turns:
        learnt_chars |= set(range(done, done + len(turn.content))) if turn.role == "assistant" else set()
        done += len(turn.content)
    _, char_ends = renderer.encode("".join(parts), before=renderer.start)
    for learnt, before, after in zip(rendered.supervised[1:-1], [0, *char_ends], char_ends, strict=False):
        assert not learnt or set(range(before, max(after, before + 1))) <= learnt_chars
    assert rendered.supervised[-1] == (conversation.turns[-1].role == "assistant")
    # every token of a learnt part but those that reach over its edges
    inside = sum(t.end - t.start for t in rendered.turns)
    assert sum(rendered.supervised[1:-1]) == inside
    pieces = shorten(rendered, max_length, "split").pieces
    assert sum(piece.num_supervised for piece in pieces) == rendered.num_supervised
    assert sum(piece.num_bytes for piece in pieces) == rendered.num_bytes


def test_a_marked_text_is_learnt_behind_its_marker(renderers):
    conversation = talk("### Human: hi ### Assistant:", " oh! ", "### Human: yes ### Assistant:", " no")
    text = "<|endoftext|>### Human: hi ### Assistant:⟦ oh!⟧ ### Human: yes ### Assistant:⟦ no<|endoftext|>⟧"
    assert shown(renderers("phi", "text"), renderers("phi", "text").render(conversation)) == text


# ---- role markers --------------------------------------------------------------------------------------------------------------

OASST = Chat(format="oasst")


def test_new_markers_take_spare_rows_and_only_those(backends):
    for spare, kind in ((2, "special"), (1, "text"), (0, "text"), (-3, "text")):
        tokenizer = build(backends, "phi")
        before = len(tokenizer)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
        markers = add_role_markers(tokenizer, before + 1 + spare, OASST)
        assert markers.kind == kind
        if kind == "special":
            assert markers.token_ids == (before + 1, before + 2)
            assert tokenizer.extra_special_tokens == ["<|tool|>", PROMPTER, ASSISTANT]
            assert markers.servable_as == "merged"
            assert "vLLM" in markers.reason
        else:
            assert markers.token_ids == ()
            assert len(tokenizer) == before + 1
            assert markers.servable_as == "adapter"
            assert f"{max(spare, 0)} to spare" in markers.note


def test_ids_with_holes_leave_fewer_spare_rows(backends):
    def holed(hole: int) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE(vocab=build(backends, "phi").get_vocab() | {"hole": hole}, merges=[]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

    assert add_role_markers(holed(500), 502, OASST).kind == "text"
    tokenizer = holed(500)
    markers = add_role_markers(tokenizer, 503, OASST)
    assert markers.kind == "special"
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer.get_vocab())
    with pytest.raises(ValueError, match=r"ids have holes.*which other tokens have; use chat.role_markers: text"):
        add_role_markers(holed(len(build(backends, "phi")) + 1), 503, OASST)


def test_the_base_keeps_its_own_control_tokens(backends):
    tokenizer = build(backends, "phi")
    tokenizer.add_special_tokens({"extra_special_tokens": [PROMPTER, ASSISTANT]})
    before = len(tokenizer)
    markers = add_role_markers(tokenizer, before, OASST)
    assert (markers.kind, markers.token_ids, markers.servable_as) == ("control", (), "adapter")
    assert len(tokenizer) == before


def test_a_base_with_one_of_the_markers_gets_the_other(backends):
    tokenizer = build(backends, "phi")
    tokenizer.add_tokens([ASSISTANT])  # as an ordinary token, which any message could contain
    markers = add_role_markers(tokenizer, 1000, OASST)
    assert (markers.kind, markers.token_ids) == ("special", (len(tokenizer) - 1,))
    rendered = Renderer(tokenizer, OASST, markers).render(talk(ASSISTANT, ASSISTANT))
    assert rendered.ids.count(tokenizer.convert_tokens_to_ids(ASSISTANT)) == 1


def test_markers_of_other_formats_are_plain_text(backends):
    tokenizer = build(backends, "phi")
    before = len(tokenizer)
    for name in ("human_assistant", "instruct_output", "llama2", "text"):
        markers = add_role_markers(tokenizer, 1000, CHATS[name])
        assert (markers.kind, markers.token_ids, markers.servable_as) == ("text", (), "adapter")
    assert len(tokenizer) == before


# ---- complaints ----------------------------------------------------------------------------------------------------------------


def test_wishes_that_the_base_cannot_fulfil_are_named(backends):
    tokenizer = build(backends, "phi")
    size = len(tokenizer)
    with pytest.raises(
        ValueError, match=rf"need 2 spare rows of the embedding, which has {size + 1} rows for {size} tokens.*role_markers: text"
    ):
        add_role_markers(tokenizer, size + 1, Chat(format="oasst", role_markers="special"))
    assert len(tokenizer) == size
    tokenizer.add_special_tokens({"extra_special_tokens": [PROMPTER, ASSISTANT]})
    with pytest.raises(ValueError, match=r"role_markers: text is impossible with this base.*use role_markers: auto"):
        add_role_markers(tokenizer, 1000, Chat(format="oasst", role_markers="text"))


def test_what_cannot_be_rendered_is_named(backends, renderers):
    renderer = renderers("phi", "instruct_output")
    with pytest.raises(ValueError, match=r"conversation key: turn 1 has the role 'tool'; the roles are system, user and assistant"):
        renderer.render(replace(talk(), turns=(Turn("tool", "x"),)))
    with pytest.raises(
        ValueError, match=r"conversation key: the user turn holds half a character \('\\ud83d', a lone surrogate\) at place 1"
    ):
        renderer.render(talk("a\ud83d", "b"))
    with pytest.raises(ValueError, match=r"has to end on a user turn"):
        renderer.prompt(talk("a", "b").turns)
    with pytest.raises(ValueError, match=r"format: text wants a text, not a chat"):
        renderers("phi", "text").render(replace(talk("a", "b"), turns=(Turn("system", "x"), Turn("user", "a"))))
    with pytest.raises(ValueError, match=r"max_length is 1; a piece of a text needs 2"):
        shorten(renderers("phi", "text").render(written("a")), 1, "split")
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backends["phi"]))
    with pytest.raises(ValueError, match=r"no end token"):
        Renderer(endless, Chat(format="human_assistant"), RoleMarkers("text"))


def test_a_tokenizer_that_makes_a_control_token_of_a_text_is_refused():
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))  # knows words, so it knows this one too
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    renderer = Renderer(tokenizer, Chat(format="human_assistant"), RoleMarkers("text"))
    with pytest.raises(ValueError, match=r"conversation key: the tokenizer makes </s> of the message text"):
        renderer.render(talk("a </s> a", "a"))


def test_a_part_of_a_text_that_is_not_to_be_learnt_is_context_and_so_is_the_end_behind_it(renderers):
    made = renderers("phi", "text")
    turns = [Turn("user", "Q: hi A:"), Turn("assistant", " hello", learn=False), Turn("user", " Q: and A:"), Turn("assistant", " fine")]
    for last in (True, False):
        turns[-1] = Turn("assistant", " fine", learn=last)
        rendered = made.render(Conversation("k", (), "g", tuple(turns)))
        learnt = made.tokenizer.decode([i for i, learn in zip(rendered.ids, rendered.supervised, strict=True) if learn])
        assert learnt == (" fine" + made.tokenizer.eos_token if last else "")
        assert [turn.learn for turn in rendered.turns] == [False, last]
