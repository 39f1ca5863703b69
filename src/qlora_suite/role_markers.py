"""Which marks tell the roles apart, and what they are made of: control tokens or ordinary text.

    layout(chat, markers)                 how the recipe's format writes a turn
    add_role_markers(tokenizer, rows, chat)   decides for `oasst`, and adds the control tokens where rows are spare

A control token is safe, for no message can contain it; a marker of plain text can be typed by anybody. But a new control token
needs a row of the embedding that the base left unused, and this row has to be trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from qlora_suite.recipe import Chat
from qlora_suite.template_source import IM_END, IM_START, is_chatml, ordinary_turn_tokens

PROMPTER, ASSISTANT = "<|prompter|>", "<|assistant|>"


@dataclass(frozen=True)
class RoleMarkers:
    """Belongs into the manifest of the prepared data: a tokenizer that was saved with markers no longer tells that they were new."""

    kind: Literal["control", "special", "text"]
    """`control`: the base's own control tokens; `special`: control tokens in spare embedding rows; `text`: ordinary text."""
    token_ids: tuple[int, ...] = ()
    """Rows of the embedding and the output layer to be trained (only with `special`)."""
    note: str = ""
    """One line for the console."""
    servable_as: Literal["adapter", "merged"] = "adapter"
    reason: str = ""
    """Why it is servable so."""
    predicted: bool = False
    """Is one of the trained rows an end token? The model has to say it, so these rows of the output layer are trained too."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RoleMarkers":
        """The reverse of `dataclasses.asdict` after a journey through JSON, which knows no tuples."""
        return cls(**{**values, "token_ids": tuple(values["token_ids"])})


@dataclass(frozen=True)
class Layout:
    """A turn is `marker`, `lead` + content + `close`, and the end token; two turns have `between` between them.

        ### Human: hello ### Assistant: hi<eos>     user="### Human:" assistant="### Assistant:" lead=" " between=" "

    The lead is a space that is encoded with the content: `: hi` is `:` and ` hi` to every byte-pair vocabulary, so that the ids
    of the parts are the ids of the whole.
    """

    user: str
    assistant: str
    between: str
    lead: str = " "
    user_close: str = ""
    user_ends: bool = False
    """Has the user's turn an end token as well?"""
    control: bool = False
    """Are the markers control tokens?"""
    bos_before_user: bool = False
    system_block: str | None = None
    """How a system prompt at the start is written (None: no place for one)."""
    plain_markers: tuple[str, ...] = ()
    """Texts that a message should not contain, because here they mean a change of roles."""


# With text markers a space follows the marker here too. Without it byte-pair merges could join the marker's last characters with
# the content's first ones (`|>` and `>` for example): the marker would have other ids before other contents.
_OASST_TEXT = Layout(PROMPTER, ASSISTANT, "\n", user_ends=True, plain_markers=(PROMPTER, ASSISTANT))
_OASST_CONTROL = Layout(PROMPTER, ASSISTANT, "\n", lead="", user_ends=True, control=True)
_PLAIN = {
    "human_assistant": Layout("### Human:", "### Assistant:", " ", plain_markers=("### Human:", "### Assistant:")),
    "instruct_output": Layout("Instruct:", "Output:", "\n", plain_markers=("Instruct:", "Output:")),
    "llama2": Layout(
        "[INST]",
        "",
        "",
        user_close=" [/INST]",
        bos_before_user=True,
        system_block="<<SYS>>\n{}\n<</SYS>>",
        plain_markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
}


def layout(chat: Chat, markers: RoleMarkers) -> Layout:
    """How this recipe writes a turn. Not for `format: text`, which has no turns, nor for those that a Jinja template writes."""
    assert chat.format not in ("text", "chatml", "model")
    if chat.format == "oasst":
        return _OASST_TEXT if markers.kind == "text" else _OASST_CONTROL
    return _PLAIN[chat.format]


def add_role_markers(tokenizer: PreTrainedTokenizerBase, num_embedding_rows: int, chat: Chat) -> RoleMarkers:
    """Decide what the role markers are and add them to the tokenizer if they are new. The embedding is never resized.

    Give it the base's own tokenizer: one that this function has already extended looks like a base with control tokens.
    Raises ValueError where the recipe's wish cannot be fulfilled.
    """
    if chat.format == "text":
        return _as_text("role markers: none, a text has no roles")
    if chat.format in ("chatml", "model"):
        _make_special(tokenizer, ordinary_turn_tokens(tokenizer, chat))
        if not is_chatml(tokenizer, chat):
            return RoleMarkers("control", (), "role markers: those of the base's own chat template", "adapter", "no token row is trained")
        why = "" if chat.format == "chatml" else ", for the base has no chat template of its own: it is ChatML"
        return _of_chatml(tokenizer, num_embedding_rows, why)
    if chat.format != "oasst":
        return _as_text("role markers: plain text, " + " and ".join(_PLAIN[chat.format].plain_markers[:2]))

    vocabulary = tokenizer.get_vocab()
    known = [marker for marker in (PROMPTER, ASSISTANT) if marker in vocabulary]
    missing = [marker for marker in (PROMPTER, ASSISTANT) if marker not in vocabulary]
    if known and chat.role_markers == "text":
        raise ValueError(
            f"chat.role_markers: text is impossible with this base, whose vocabulary holds {' and '.join(known)}; "
            "use role_markers: auto, or format: human_assistant"
        )
    if not missing:
        _make_special(tokenizer, _tokens(PROMPTER, ASSISTANT))
        reason = "the role markers are the base's own control tokens, no token row is trained"
        return RoleMarkers("control", (), f"role markers: the base's own control tokens {PROMPTER} and {ASSISTANT}", "adapter", reason)

    spare = num_embedding_rows - _first_free(tokenizer)
    if chat.role_markers == "text" or (len(missing) > spare and chat.role_markers == "auto" and not known):
        too_few = f"for the embedding has {num_embedding_rows:,} rows and {max(spare, 0)} to spare"
        why = "by choice" if chat.role_markers == "text" else too_few
        return _as_text(f"role markers: plain text {PROMPTER} and {ASSISTANT}, {why}")
    instead = "chat.format: human_assistant" if known else "chat.role_markers: text"
    return _in_spare_rows(tokenizer, num_embedding_rows, (PROMPTER, ASSISTANT), instead)


def _of_chatml(tokenizer: PreTrainedTokenizerBase, num_embedding_rows: int, why: str) -> RoleMarkers:
    vocabulary = tokenizer.get_vocab()
    if IM_START in vocabulary and IM_END in vocabulary:
        _make_special(tokenizer, _tokens(IM_START, IM_END))
        note = f"role markers: the base's own control tokens {IM_START} and {IM_END}{why}"
        return RoleMarkers("control", (), note, "adapter", "the role markers are the base's own control tokens, no token row is trained")
    markers = _in_spare_rows(tokenizer, num_embedding_rows, (IM_START, IM_END), "chat.format: human_assistant")
    return replace(markers, note=markers.note + why, predicted=IM_END not in vocabulary)


def _first_free(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))  # ids may have holes


def _in_spare_rows(tokenizer: PreTrainedTokenizerBase, num_embedding_rows: int, both: tuple[str, str], instead: str) -> RoleMarkers:
    """Adds what is missing of the two. Raises ValueError if there is no room for it; `instead` says what would do."""
    vocabulary, first_free = tokenizer.get_vocab(), _first_free(tokenizer)
    missing = [marker for marker in both if marker not in vocabulary]
    spare = num_embedding_rows - first_free
    if len(missing) > spare:
        raise ValueError(
            f"{' and '.join(missing)} need {len(missing)} spare rows of the embedding, which has {num_embedding_rows:,} rows "
            f"for {first_free:,} tokens, and is never resized; use {instead}"
        )
    _make_special(tokenizer, _tokens(*both))
    ids = tuple(tokenizer.convert_tokens_to_ids(marker) for marker in missing)
    if not set(ids).isdisjoint(vocabulary.values()):
        raise ValueError(
            f"the tokenizer's ids have holes, and it gives {' and '.join(missing)} the ids {ids}, which other tokens have; use {instead}"
        )
    assert max(ids) < num_embedding_rows, f"new tokens got the ids {ids}, outside the {num_embedding_rows} rows"
    rows = ", ".join(map(str, ids))
    note = f"role markers: {' and '.join(missing)} are control tokens in spare embedding rows ({rows}), which are trained"
    return RoleMarkers(
        "special", ids, note, "merged", "token rows are trained, and vLLM and llama.cpp reject adapters with trained token rows"
    )


def _as_text(note: str) -> RoleMarkers:
    return RoleMarkers("text", (), note, "adapter", "the role markers are plain text, no token row is trained")


def _tokens(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _make_special(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[AddedToken]) -> None:
    """Adds what is missing and makes special what was there as an ordinary added token, which any message could contain."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = [
        AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, special=True, normalized=False)
        for token in tokens
        if token.content not in special
    ]
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
