"""Chats: rows of every form become the same turns, what is learnt is what the row says, and what is no chat is named."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_suite.chats import conversation_of, form_of, recognise
from qlora_suite.conversations import Conversation, Turn
from qlora_suite.recipe import FIELDS, Source
from qlora_suite.sources import BadRow, Place, Row

TALK = (("user", "hi"), ("assistant", "hello"), ("user", "and you?"), ("assistant", "fine"))
MESSAGES = [{"role": role, "content": text} for role, text in TALK]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def row(values: dict[str, Any]) -> Row:
    return Row(Place("chats.json", 7), values)


def source(**keys: Any) -> Source:
    return Source.model_validate({"source": "chats.json", **keys})


def result(values: dict[str, Any], form: str, **keys: Any) -> Conversation | BadRow:
    return conversation_of(row(values), form, source(form=form, **keys))


def turns(values: dict[str, Any], form: str = "messages", **keys: Any) -> list[tuple[str, str]]:
    found = result(values, form, **keys)
    assert isinstance(found, Conversation), found
    return [(turn.role, turn.content) for turn in found.turns]


def learnt(values: dict[str, Any], form: str = "messages", **keys: Any) -> list[str]:
    """The assistant turns that are learnt."""
    found = result(values, form, **keys)
    assert isinstance(found, Conversation), found
    return [turn.content for turn in found.turns if turn.role == "assistant" and turn.learn]


def complaint(values: dict[str, Any], form: str = "messages", **keys: Any) -> str:
    found = result(values, form, **keys)
    assert isinstance(found, BadRow), found
    assert len(found.reason) < 80
    return str(found)


def said(*pairs: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


def with_last(**more: Any) -> dict[str, Any]:
    """A question and an answer that has these keys too."""
    return {"messages": [MESSAGES[0], {"role": "assistant", "content": "hello", **more}]}


# --- forms


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        ("messages", {"messages": MESSAGES}, TALK),
        ("messages", {"messages": [{"from": r, "value": t} for r, t in TALK]}, TALK),
        ("sharegpt", {"conversations": [{"from": r, "value": t} for r, t in TALK]}, TALK),
        ("sharegpt", {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TALK]}, TALK),
        ("sharegpt", {"conversations": MESSAGES}, TALK),
        ("alpaca", {"instruction": "hi", "output": "hello"}, TALK[:2]),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "history": None, "system": None}, TALK[:2]),
        ("alpaca", {"instruction": "Say:", "input": "hi", "output": "hello"}, [("user", "Say:\n\nhi"), TALK[1]]),
        ("alpaca", {"instruction": "", "input": "hi", "output": "hello"}, TALK[:2]),
        ("alpaca", {"instruction": "and you?", "output": "fine", "history": [["hi", "hello"]]}, TALK),
        ("alpaca", {"instruction": "hi", "output": "hello", "system": "Be short."}, [("system", "Be short."), *TALK[:2]]),
        ("prompt", {"prompt": "hi", "completion": "hello"}, TALK[:2]),
        ("prompt", {"prompt": "hi", "response": "hello"}, TALK[:2]),
        ("prompt", {"prompt": "hi", "completion": None, "response": "hello"}, TALK[:2]),
        ("prompt", {"prompt": MESSAGES[:3], "completion": "fine", "system": "S"}, [("system", "S"), *TALK]),
        ("prompt", {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, TALK),
        ("text", {"text": " as it\nis "}, [("assistant", " as it\nis ")]),
    ],
)
def test_rows_of_every_form_become_turns(form, values, expected):
    assert turns(values, form) == list(expected)
    assert form_of(values, {}) == form
    found = result(values, form)
    assert (found.key, found.ids) == ("chats.json:7", ("chats.json:7",))


@pytest.mark.parametrize("name", ["system", "developer", "User", "HUMAN", "prompter", "assistant", "GPT", "chatgpt", "bot", "model", "ai"])
def test_the_usual_names_of_roles_are_known(name):
    role = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"}.get(name.lower(), "assistant")
    assert turns(said((name, "x"))) == [(role, "x")]


@pytest.mark.parametrize(
    ("form", "fields", "values", "expected"),
    [
        ("messages", {"messages": "chat", "role": "who", "content": "what"}, {"chat": [{"who": r, "what": t} for r, t in TALK]}, TALK),
        ("sharegpt", {"conversations": "c", "from": "f", "value": "v"}, {"c": [{"f": r, "v": t} for r, t in TALK]}, TALK),
        ("alpaca", {"instruction": "q", "output": "a", "input": "i"}, {"q": "hi", "a": "hello", "i": None, "input": "no"}, TALK[:2]),
        ("prompt", {"prompt": "question", "completion": "answer"}, {"question": "hi", "answer": "hello"}, TALK[:2]),
        ("prompt", {"prompt": "q", "completion": "a", "system": "s"}, {"q": "hi", "a": "hello", "s": "S"}, [("system", "S"), *TALK[:2]]),
        ("text", {"text": "body"}, {"body": "x", "text": "no"}, [("assistant", "x")]),
    ],
)  # fmt: skip
def test_keys_of_another_name_are_read(form, fields, values, expected):
    assert turns(values, form, fields=fields) == list(expected)
    assert form_of(values, fields) == form


def test_roles_of_another_name_are_read_and_go_before_the_usual_ones():
    row = said(("Kunde", "hi"), ("model", "hello"), ("agent", "bye"))
    assert turns(row, roles={"Kunde": "user", "model": "user", "agent": "assistant"}) == [("user", "hi\n\nhello"), ("assistant", "bye")]
    assert "unknown role" in complaint(said(("kunde", "hi")), roles={"Kunde": "user"})


def test_weights_under_another_name_are_seen():
    row = {"messages": [MESSAGES[0], MESSAGES[1] | {"loss": 0}, MESSAGES[2], MESSAGES[3] | {"loss": 1}]}
    assert learnt(row) == ["hello", "fine"]
    assert learnt(row, fields={"weight": "loss"}) == learnt(row, fields={"train": "loss"}) == ["fine"]


def test_the_system_column_stands_in_front_and_an_empty_one_nowhere():
    for form, values in (("messages", {"messages": MESSAGES}), ("sharegpt", {"conversations": MESSAGES})):
        assert turns(values | {"system": "Be short."}, form) == [("system", "Be short."), *TALK]
        assert turns(values | {"system": " "}, form) == turns(values | {"system": None}, form) == list(TALK)
    assert turns(said(("system", "B"), *TALK, system="A"))[0] == ("system", "A\n\nB")
    assert turns(said(("system", ""), *TALK)) == list(TALK)
    assert "content is not text, system: 3" in complaint(said(*TALK, system=3))


def test_the_group_is_the_first_question_and_for_texts_the_whole():
    one, two, other = (
        result(said(*pairs), "messages") for pairs in ((("system", "S"), *TALK), TALK[:2], (("user", "ho"), TALK[1]))
    )  # fmt: skip
    assert one.group == two.group == result({"instruction": "hi", "output": "x"}, "alpaca").group
    assert other.group != one.group
    texts = [result({"text": text}, "text", **more) for text, more in (("a b", {}), ("a b", {"learn_after": ("a",)}), ("a", {}))]
    assert texts[0].group == texts[1].group != texts[2].group


def test_the_question_of_a_marked_text_stands_in_front_of_what_is_learnt_and_a_marker_alone_is_none():
    def group(text: str) -> str:
        return result({"text": text}, "text", learn_after="A:").group

    assert group("Q: hi A: hello") == group("Q: hi A: oh! Q: and? A: fine") != group("Q: ho A: hello")
    assert group("A: one poem") != group("A: another")


@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_what_is_neither_a_text_nor_messages_is_named_so(key):
    values = {"prompt": "x", "completion": "y", key: None}
    assert complaint(values, "prompt") == f"chats.json line 7: no text and no list of messages, {key}: null"


# --- content


def test_text_parts_are_joined_and_others_are_named():
    parts = [{"type": "text", "text": "Look: "}, {"text": "here"}]
    assert turns(said(("user", parts), ("assistant", [{"type": "text", "text": "I see", "image": None}]))) == [
        ("user", "Look: here"),
        ("assistant", "I see"),
    ]
    image = [*parts, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert complaint(said(("user", image))) == 'chats.json line 7: a content part is not text, content: "image_url"'
    for parts in (["text"], [{"type": "text"}], [{"type": "text", "text": None}], [None]):
        assert "a content part is not text, content" in complaint(said(("user", parts)))


@pytest.mark.parametrize("content", [None, 3, {"text": "x"}, True])
def test_content_that_is_no_text_is_named(content):
    assert "content is not text, content: " in complaint(said(("user", content)))
    assert "content is not text, value: " in complaint({"conversations": [{"from": "human", "value": content}]}, "sharegpt")
    for name in ("instruction", "output"):
        assert f"content is not text, {name}: " in complaint({"instruction": "hi", "output": "hello", name: content}, "alpaca")
    assert "no list of messages, prompt: " in complaint({"prompt": content, "completion": "x"}, "prompt")
    assert "no list of messages, completion: " in complaint({"prompt": "x", "completion": content}, "prompt")
    assert "no text, text: " in complaint({"text": content}, "text")


@pytest.mark.parametrize(
    ("values", "form", "words"),
    [
        (said(("user", " "), ("assistant", "x")), "messages", 'empty, user: " "'),
        (said(("user", "x"), ("assistant", "")), "messages", 'empty, assistant: ""'),
        ({"messages": []}, "messages", "empty"),
        (said(("system", "")), "messages", "empty"),
        ({"instruction": "", "output": "x"}, "alpaca", 'empty, user: ""'),
        ({"prompt": "x", "completion": "\n"}, "prompt", 'empty, assistant: "\\n"'),
        ({"text": "\n"}, "text", 'empty, text: "\\n"'),
    ],
)
def test_empty_contents_are_named(values, form, words):
    assert complaint(values, form) == f"chats.json line 7: {words}"


@pytest.mark.parametrize("values", [{"messages": None}, {"messages": "hi"}, {"messages": {"role": "user"}}])
def test_what_is_no_list_of_messages_is_named(values):
    assert "no list of messages, messages: " in complaint(values)


@pytest.mark.parametrize(
    ("form", "key"),
    [("messages", "messages"), ("sharegpt", "conversations"), ("alpaca", "instruction"), ("prompt", "prompt"), ("text", "text")],
)
def test_a_missing_key_is_named_with_those_that_are_there(form, key):
    assert complaint({"else": 1, "and": 2}, form) == f'chats.json line 7: the key {key} is missing, keys: ["else", "and"]'


def test_a_message_that_is_no_object_is_named():
    assert complaint({"messages": [MESSAGES[0], "hello"]}) == 'chats.json line 7: a message is no object, messages: "hello"'


@pytest.mark.parametrize("role", ["narrator", None, 3, ["user"]])
def test_an_unknown_role_names_key_and_value(role):
    shown = {"narrator": '"narrator"', None: "null", 3: "3"}.get(role if not isinstance(role, list) else "", '["user"]')
    assert complaint(said((role, "x"))) == f"chats.json line 7: unknown role (see data.roles), role: {shown}"
    assert (
        complaint({"conversations": [{"from": role, "value": "x"}]}, "sharegpt")
        == f"chats.json line 7: unknown role (see data.roles), from: {shown}"
    )
    assert complaint({"messages": [{"who": role, "content": "x"}]}, fields={"role": "who"}).endswith(
        f"unknown role (see data.roles), who: {shown}"
    )


@pytest.mark.parametrize("history", [5, True, "hi", {"hi": "hello"}, [["hi"]], ["hi"], [None], [["a", "b", "c"]]])
def test_a_history_that_is_no_list_of_pairs_is_named(history):
    assert "history" in complaint({"instruction": "x", "output": "y", "history": history}, "alpaca")


# --- what is learnt


def test_every_answer_is_learnt_unless_the_row_says_otherwise():
    assert learnt({"messages": MESSAGES}) == ["hello", "fine"]
    assert learnt({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "alpaca") == ["b", "y"]


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize(("value", "kept"), [(0, False), (1, True), (0.0, False), (1.0, True), (False, False), (True, True), (None, True)])
def test_a_weight_or_train_flag_decides_over_its_message_alone(key, value, kept):
    messages = [MESSAGES[0], MESSAGES[1] | {key: value}, *MESSAGES[2:]]
    assert learnt({"messages": messages}) == (["hello", "fine"] if kept else ["fine"])
    assert turns({"messages": messages}) == list(TALK)
    everywhere = [message | {"weight": None, "train": None} for message in messages[2:]]  # as a table gives it
    assert learnt({"messages": [*messages[:2], *everywhere]}) == (["hello", "fine"] if kept else ["fine"])


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [], {}])
def test_a_weight_between_is_refused(value):
    for key in ("weight", "train"):
        assert f"{key} is neither 0 nor 1, {key}: " in complaint(with_last(**{key: value}))


def test_what_a_prompt_holds_is_context_and_what_a_completion_holds_is_learnt():
    assert learnt({"prompt": MESSAGES[:3], "completion": "fine"}, "prompt") == ["fine"]
    assert learnt({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt") == ["hello", "fine"]
    assert learnt({"prompt": MESSAGES[:1], "completion": [MESSAGES[1] | {"weight": 0}, *MESSAGES[2:]]}, "prompt") == ["fine"]


# --- tools


TOOLS = [
    MESSAGES[0],
    {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
    {"role": "tool", "content": "22 degrees"},
    {"role": "assistant", "content": "Warm."},
]
WRITTEN_TOOLS = [("human", "hi"), ("function_call", "f()"), ("observation", "22 degrees"), ("gpt", "Warm.")]


def test_rows_with_tools_are_skipped_by_default():
    assert 'tools are called (data.tool_turns: skip), role: "assistant"' in complaint({"messages": TOOLS})
    assert 'tools are called (data.tool_turns: skip), role: "tool"' in complaint({"messages": [TOOLS[0], *TOOLS[2:]]})
    assert 'tools are called (data.tool_turns: skip), role: "function_call"' in complaint(said(*WRITTEN_TOOLS))
    for nothing in (None, []):
        assert learnt(with_last(tool_calls=nothing)) == ["hello"]


def test_dropped_tools_leave_what_the_assistant_said():
    assert turns({"messages": TOOLS}, tool_turns="drop") == [TALK[0], ("assistant", "Let me see.\n\nWarm.")]
    assert turns(said(*WRITTEN_TOOLS), tool_turns="drop") == [TALK[0], ("assistant", "Warm.")]
    for content in ("", None, []):
        silent = [TOOLS[0], TOOLS[1] | {"content": content}, *TOOLS[2:]]
        assert turns({"messages": silent}, tool_turns="drop") == [TALK[0], ("assistant", "Warm.")]


def test_kept_tools_are_turns_and_calls_are_learnt():
    found = result(said(*WRITTEN_TOOLS), "messages", tool_turns="keep")
    assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
    assert learnt(said(*WRITTEN_TOOLS), tool_turns="keep") == ["f()", "Warm."]
    two = said(*WRITTEN_TOOLS[:3], *WRITTEN_TOOLS[2:])
    assert [role for role, _ in turns(two, tool_turns="keep")].count("tool") == 2  # each is the answer to a call of its own
    assert "structured tool calls; write them as text, tool_calls: " in complaint({"messages": TOOLS}, tool_turns="keep")


# --- turns of one role behind each other


TWICE = said(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))


def test_turns_of_one_role_are_merged_kept_or_skipped():
    assert turns(TWICE) == [("user", "a\n\nb"), ("assistant", "c\n\nd")]
    assert turns(TWICE, same_role="keep") == [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    assert complaint(TWICE, same_role="skip") == 'chats.json line 7: two turns of one role (data.same_role: skip), user: "b"'
    assert turns({"messages": MESSAGES}, same_role="skip") == list(TALK)


def test_answers_of_which_one_is_not_to_be_learnt_are_never_merged():
    mixed = {"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}, MESSAGES[3]]}
    assert "two answers behind each other, one of them not to be learnt, assistant: " in complaint(mixed)
    assert learnt(mixed, same_role="keep") == ["fine"]
    both = {"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}, MESSAGES[3] | {"train": False}]}
    assert (turns(both)[-1], learnt(both)) == (("assistant", "hello\n\nfine"), [])


# --- plain text with markers


markers = st.sampled_from(["A:", "Q:", "A", "\n", "A: ", "é", ".*", "["])
marked = st.lists(st.one_of(markers, st.text(max_size=4)), max_size=12).map("".join)


def learnt_characters(text: str, after: list[str], until: list[str]) -> list[bool]:
    """Walks along the text: a marker is never learnt, and of several at one place the longest counts."""
    flags: list[bool] = []
    learn = False
    while len(flags) < len(text):
        found = [marker for marker in (*after, *until) if text.startswith(marker, len(flags))]
        if found:
            longest = max(found, key=len)
            flags += [False] * len(longest)
            learn = longest in after
        else:
            flags.append(learn)
    return flags


@settings(max_examples=300, deadline=None)
@given(text=marked, after=st.lists(markers, min_size=1, max_size=3), until=st.lists(markers, max_size=3))
def test_the_pieces_of_a_text_are_the_text_and_what_stands_behind_a_marker_is_learnt(text, after, until):
    found, flags = result({"text": text}, "text", learn_after=tuple(after), learn_until=tuple(until)), learnt_characters(text, after, until)
    if isinstance(found, BadRow):
        assert not text.strip() or not any(flags)
        return
    assert "".join(turn.content for turn in found.turns) == text
    assert [turn.role == "assistant" for turn in found.turns for _ in turn.content] == flags
    assert all(turn.content and turn.learn and turn.role in ("user", "assistant") for turn in found.turns)
    assert all(a.role != b.role for a, b in pairwise(found.turns))


@pytest.mark.parametrize(
    ("after", "until", "text", "expected"),
    [
        (["A:"], ["Q:"], "Q: hi A: hello Q: and you? A: fine", ["Q: hi A:", "[ hello ]", "Q: and you? A:", "[ fine]"]),
        (["A:"], [], "Q: hi A: hello Q: and A: fine", ["Q: hi A:", "[ hello Q: and ]", "A:", "[ fine]"]),
        (["A:"], ["Q:"], "A:x", ["A:", "[x]"]),
        (["A:"], ["Q:"], "Q: A: Q:", ["Q: A:", "[ ]", "Q:"]),
        (["A", "A:"], [], "A: x", ["A:", "[ x]"]),
        (["."], [], "a.b|c", ["a.", "[b|c]"]),
        (["A:"], ["A"], "A: x A y", ["A:", "[ x ]", "A y"]),
    ],
)
def test_what_stands_behind_a_marker_is_learnt(after, until, text, expected):
    found = result({"text": text}, "text", learn_after=tuple(after), learn_until=tuple(until))
    assert [f"[{turn.content}]" if turn.role == "assistant" else turn.content for turn in found.turns] == expected


def test_a_text_without_a_marker_is_named():
    assert complaint({"text": "no mark"}, "text", learn_after=("A:",)).endswith(
        'nothing stands behind a marker of data.learn_after, text: "no mark"'
    )


# --- pairs

BAD = {"role": "assistant", "content": "bad"}
CONTEXT = (Turn("user", "hi"), Turn("assistant", "hello", learn=False), Turn("user", "and you?"))


def pair(values: dict[str, Any], **keys: Any) -> tuple[tuple[Turn, ...], str | None]:
    """(turns, rejected)"""
    found = result(values, "pairs", **keys)
    assert isinstance(found, Conversation), found
    return found.turns, found.rejected


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": MESSAGES[:3], "chosen": "fine", "rejected": "bad"},
        {"prompt": MESSAGES[:3], "chosen": [MESSAGES[3]], "rejected": [BAD]},
        {"prompt": MESSAGES[:3], "chosen": MESSAGES, "rejected": [*MESSAGES[:3], BAD]},
        {"prompt": MESSAGES[:3], "chosen": MESSAGES, "rejected": "bad"},
        {"prompt": "and you?", "chosen": MESSAGES, "rejected": [*MESSAGES[:3], BAD]},
        {"prompt": "hi ", "chosen": MESSAGES, "rejected": [*MESSAGES[:3], BAD]},
        {"prompt": None, "chosen": MESSAGES, "rejected": [*MESSAGES[:3], BAD]},
        {"chosen": MESSAGES, "rejected": [*MESSAGES[:3], BAD], "messages": MESSAGES, "score_chosen": 8.5},
        {"chosen": [{"from": r, "value": t} for r, t in TALK], "rejected": [*MESSAGES[:3], BAD]},
    ],
)
def test_pairs_are_the_same_however_the_prompt_is_written(values):
    assert pair(values) == ((*CONTEXT, Turn("assistant", "fine")), "bad")
    assert form_of(values, {}) == "pairs"
    assert recognise([row(values)], source()) == "pairs"


def test_a_pair_of_texts_with_a_system_column_and_other_names():
    asked = (Turn("system", "S"), Turn("user", "hi"), Turn("assistant", "good"))
    assert pair({"prompt": "hi", "chosen": "good", "rejected": "bad", "system": "S"}) == (asked, "bad")
    values = {"question": "hi", "a": "good", "b": "bad", "about": "S"}
    fields = {"prompt": "question", "chosen": "a", "rejected": "b", "system": "about"}
    assert pair(values, fields=fields) == (asked, "bad")
    assert form_of(values, fields) == "pairs"
    said = {
        "chosen": [{"role": "system", "content": "S"}, *MESSAGES[:2]],
        "rejected": [{"role": "system", "content": "S"}, MESSAGES[0], BAD],
    }
    assert pair({"prompt": "hi", **said}) == ((*asked[:2], Turn("assistant", "hello")), "bad")


def test_the_group_of_a_pair_is_its_first_question():
    first, second = (result({"prompt": "hi", "chosen": a, "rejected": b}, "pairs") for a, b in (("x", "y"), ("y", "z")))
    assert first.group == second.group == result({"prompt": "hi", "completion": "x"}, "prompt").group


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "hi", "chosen": "x"}, 'the key rejected is missing, keys: ["prompt", "chosen"]'),
        ({"prompt": "hi", "rejected": "x"}, "the key chosen is missing"),
        ({"chosen": "x", "rejected": "y"}, "no prompt in front of the answers, prompt: null"),
        ({"prompt": [], "chosen": "x", "rejected": "y"}, "no prompt in front of the answers, prompt: []"),
        ({"chosen": [MESSAGES[1]], "rejected": [BAD]}, "no prompt in front of the answers"),
        ({"prompt": " ", "chosen": "x", "rejected": "y"}, 'empty, prompt: " "'),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "no text and no list of messages, prompt: 3"),
        ({"prompt": "hi", "chosen": 3, "rejected": "y"}, "no text and no list of messages, chosen: 3"),
        ({"prompt": "hi", "chosen": "x", "rejected": None}, "no text and no list of messages, rejected: null"),
        ({"prompt": "hi", "chosen": "x", "rejected": " "}, 'empty, rejected: " "'),
        ({"prompt": "hi", "chosen": "x", "rejected": "x "}, 'chosen and rejected are the same answer, chosen: "x"'),
        ({"prompt": "hi", "chosen": "x", "rejected": []}, "rejected does not end on an answer, rejected: []"),
        ({"prompt": "hi", "chosen": MESSAGES[:1], "rejected": "y"}, "chosen does not end on an answer, chosen: [{"),
        ({"prompt": "hi", "chosen": MESSAGES[:3], "rejected": "y"}, "chosen does not end on an answer"),
        ({"prompt": "ho", "chosen": MESSAGES, "rejected": "y"}, "chosen is a conversation that does not repeat the prompt"),
        ({"prompt": "hi", "chosen": "x", "rejected": MESSAGES[1:]}, "rejected is a conversation that does not repeat the prompt"),
        ({"chosen": MESSAGES, "rejected": MESSAGES[:2]}, "chosen and rejected differ before their last turn, rejected: [{"),
        ({"prompt": "hi", "chosen": MESSAGES, "rejected": "y"}, "chosen and rejected differ before their last turn"),
        ({"prompt": "hi", "chosen": [MESSAGES[1] | {"weight": 0}], "rejected": "y"}, "chosen is an answer that is not to be learnt"),
        ({"prompt": "hi", "chosen": "x", "rejected": [{"role": "narrator", "content": "x"}]}, 'unknown role (see data.roles), role: "nar'),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_named(values, words):
    assert words in complaint(values, "pairs")


# --- nothing else than a conversation or a bad row


names = st.sampled_from(["role", "content", "from", "value", "text", "type"])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 2), st.text(max_size=2), st.sampled_from(["user", "assistant", "tool", "text"])
)
messages_like = st.lists(
    st.one_of(leaves, st.fixed_dictionaries({"role": leaves, "content": leaves}, optional={"weight": leaves, "tool_calls": leaves})),
    max_size=3,
)
anything = st.one_of(leaves, messages_like, st.lists(st.lists(leaves, max_size=2), max_size=2), st.dictionaries(names, leaves, max_size=3))


def rows_of(form: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(form), st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS[form], anything)))


@settings(max_examples=500, deadline=None)
@given(
    form_and_values=st.sampled_from(["messages", "sharegpt", "alpaca", "prompt", "pairs", "text"]).flatmap(rows_of),
    tools=st.sampled_from(["skip", "drop", "keep"]),
    same=st.sampled_from(["merge", "keep", "skip"]),
)
def test_any_row_is_a_conversation_without_empty_turns_or_a_bad_row(form_and_values, tools, same):
    form, values = form_and_values
    found = result(values, form, **({} if form == "text" else {"tool_turns": tools, "same_role": same}))
    assert isinstance(found, Conversation | BadRow)
    if isinstance(found, Conversation):
        assert found.turns
        assert all(turn.content.strip() and turn.role in ("system", "user", "assistant", "tool") for turn in found.turns)
        assert (found.rejected is not None) is (form == "pairs")
        if form == "pairs":
            assert found.rejected.strip() not in ("", found.turns[-1].content.strip())
            assert [turn.learn for turn in found.turns if turn.role == "assistant"][-1]
    else:
        assert str(found)


# --- recognition


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({"message_id": "a", "parent_id": None, "text": "x", "role": "prompter"}, "oasst"),
        ({"messages": None, "id": 3}, "messages"),
        ({"conversations": [], "text": "x"}, "sharegpt"),
        ({"instruction": "x", "output": "y", "text": "both in one"}, "alpaca"),
        ({"prompt": "x", "completion": "y"}, "prompt"),
        ({"prompt": "x", "response": "y"}, "prompt"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "pairs"),
        ({"prompt": "x", "chosen": [], "rejected": [], "messages": []}, "pairs"),
        ({"chosen": "x", "rejected": None, "score": 3}, "pairs"),
        ({"prompt": "x", "chosen": "y"}, None),
        ({"text": "x"}, "text"),
        ({"prompt": "x"}, None),
        ({"instruction": "x"}, None),
        ({}, None),
    ],
)
def test_the_form_is_seen_from_the_keys(values, form):
    assert form_of(values, {}) == form
    if form is not None:
        assert recognise([row(values), row({"id": 3})], source()) == form


def test_a_form_that_the_recipe_names_is_not_looked_for():
    assert recognise([row({"q": 1})], source(form="prompt")) == "prompt"
    assert recognise([row({"text": "x"})], source(policy="all_paths")) == "oasst"


def test_several_forms_in_one_file_are_one_sentence_with_a_remedy():
    rows = [row({"text": "x"}), row({"text": "y"}), row({"messages": []}), BadRow("chats.json line 3", "not JSON")]
    with pytest.raises(
        ValueError, match=r"2 of form text and 1 of form messages; set data\.form to one of them, or make two files"
    ) as caught:
        recognise(rows, source())
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_named_with_an_example():
    with pytest.raises(ValueError, match="the rows have the keys question, answer, which are no form that is known") as caught:
        recognise([row({"question": "x", "answer": "y"}), row({"z": 1})], source())
    assert "data.form=prompt data.fields='{prompt: question, completion: answer}'" in str(caught.value)
    assert "alpaca: instruction, input, output" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_of_the_unknown_keys_helps():
    fields = {"prompt": "question", "completion": "answer"}
    assert recognise([row({"question": "x", "answer": "y"})], source(fields=fields)) == "prompt"


def test_rows_that_cannot_be_read_are_no_form():
    with pytest.raises(ValueError, match=r"none of the first 2 rows can be read; chats\.json line 1: not JSON"):
        recognise([BadRow("chats.json line 1", "not JSON"), BadRow("chats.json line 2", "not JSON")], source())


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "prompt", "pairs", "text"])
def test_a_later_row_of_another_form_is_a_bad_row(form):
    rows = {
        "messages": {"messages": MESSAGES},
        "sharegpt": {"conversations": MESSAGES},
        "alpaca": {"instruction": "x", "output": "y"},
        "prompt": {"prompt": "x", "completion": "y"},
        "pairs": {"prompt": "x", "chosen": "y", "rejected": "z"},
        "text": {"text": "x"},
    }
    assert [other for other, values in rows.items() if isinstance(result(values, form), Conversation)] == [form]


def test_turns_carry_no_flag_but_that_of_an_answer():
    found = result({"prompt": [{"role": "system", "content": "S"}, *MESSAGES[:3]], "completion": "fine"}, "prompt")
    context = Turn("assistant", "hello", learn=False)
    assert found.turns == (Turn("system", "S"), Turn("user", "hi"), context, Turn("user", "and you?"), Turn("assistant", "fine"))


# --- prompts without answers, for GRPO


ASKED = (Turn("user", "hi"), Turn("assistant", ""))


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("prompt", {"prompt": "hi"}),
        ("prompt", {"prompt": "hi", "completion": None}),
        ("prompt", {"prompt": "hi", "completion": " "}),
        ("prompt", {"prompt": "hi", "response": ""}),
        ("prompt", {"prompt": MESSAGES[:1], "completion": []}),
        ("messages", {"messages": MESSAGES[:1]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}]}),
        ("alpaca", {"instruction": "hi", "input": "", "output": ""}),
    ],
)
def test_a_prompt_needs_no_answer_where_the_model_gives_one(form, values):
    assert form_of(values, {}, prompts=True) == recognise([row(values)], source(), prompts=True) == form
    found = conversation_of(row(values), form, source(form=form), prompts=True)
    assert found.turns == ASKED
    assert found.is_prompt
    without = conversation_of(row(values), form, source(form=form))
    assert isinstance(without, BadRow) or without.without_open_end() is None, "nothing that could be learnt"


def test_answers_that_are_there_stay_and_a_pair_gives_its_chosen_one():
    for form, values in {
        "prompt": {"prompt": "hi", "completion": "hello"},
        "messages": {"messages": MESSAGES[:2]},
        "alpaca": {"instruction": "hi", "output": "hello"},
        "pairs": {"prompt": "hi", "chosen": "hello", "rejected": "what"},
    }.items():
        found = conversation_of(row(values), form, source(form=form), prompts=True)
        assert (found.turns, found.rejected, found.is_prompt) == ((Turn("user", "hi"), Turn("assistant", "hello")), None, False)
    later = conversation_of(row({"messages": MESSAGES[:3]}), "messages", source(form="messages"), prompts=True)
    assert later.turns == (*(Turn(role, text) for role, text in TALK[:3]), Turn("assistant", ""))


def test_of_a_pair_of_one_answer_the_prompt_is_taken():
    values = {"prompt": "hi", "chosen": "hello", "rejected": "hello "}
    found = conversation_of(row(values), "pairs", source(form="pairs"), prompts=True)
    assert isinstance(found, Conversation), found
    assert (found.turns, found.rejected) == ((Turn("user", "hi"), Turn("assistant", "hello")), None)
    assert "the same answer" in complaint(values, "pairs")


def test_what_a_tool_said_last_is_answered_by_the_model():
    values = said(("user", "hi"), ("assistant", "look"), ("tool", "found"))
    found = conversation_of(row(values), "messages", source(form="messages", tool_turns="keep"), prompts=True)
    assert isinstance(found, Conversation), found
    assert [(t.role, t.content) for t in found.turns[-2:]] == [("tool", "found"), ("assistant", "")]
    assert found.is_prompt


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("prompt", {"prompt": " "}),
        ("prompt", {"prompt": "hi", "completion": 3}),
        ("prompt", {"completion": "x"}),
        ("messages", {"messages": []}),
        ("text", {"text": " "}),
    ],
)
def test_what_asks_nothing_is_no_prompt_either(form, values):
    assert isinstance(conversation_of(row(values), form, source(form=form), prompts=True), BadRow)
