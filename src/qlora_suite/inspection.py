"""What is in a file of data, before anything is prepared: its form, what would be left out, how long things are, what to write."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache

from qlora_suite import chats, oasst1, sources
from qlora_suite.base_config import load_config, load_tokenizer
from qlora_suite.chat import Renderer
from qlora_suite.conversations import Conversation
from qlora_suite.recipe import FIELDS, PAIR_POLICIES, Chat, Data, Dpo, Form, Model, Recipe, Source
from qlora_suite.recipe_file import from_dict
from qlora_suite.rendered import Rendered
from qlora_suite.role_markers import add_role_markers
from qlora_suite.selection import Progress
from qlora_suite.sources import BadRow, Row

MAX_ROWS = 10_000
"""Of a file of chats or texts; OASST trees are read whole."""
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
HOW_ROWS_ARE_READ = ("form", "fields", "roles", "same_role", "tool_turns", "learn_after", "learn_until", "filters", "pairs")
OF_CHATS = ("roles", "same_role", "tool_turns")
OF_TEXTS = ("learn_after", "learn_until")
OF_TREES = ("filters", "pairs")
HUB_SECONDS = 3.0
ENOUGH = 0.05
"""The suggested max_length cuts at most this share of the conversations."""


@dataclass
class Inspection:
    file: str
    form: Form
    chat: Chat
    """How the example and the tokens were written."""
    context: int | None
    """The base's longest input, in tokens."""
    policy: str | None = None
    keys: Counter[str] = field(default_factory=Counter)
    """Key of the rows -> rows that have it."""
    read: int = 0
    more: bool = False
    """There are rows behind those that were looked at."""
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    refused: str = ""
    """Why the chat format cannot write the first of those that it cannot."""
    roles: Counter[str] = field(default_factory=Counter)
    """Role -> turns."""
    turns: list[int] = field(default_factory=list)
    """Turns of each conversation."""
    reply_words: list[int] = field(default_factory=list)
    """Words of each reply that is learnt."""
    rejected_words: list[int] = field(default_factory=list)
    """Of pairs: words of each rejected answer."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of each conversation; of a pair, of each of its two."""
    supervised: int = 0
    open_ends: int = 0
    unanswered: int = 0
    example: list[Rendered] = field(default_factory=list)
    """One, of a pair two."""
    renderer: Renderer | None = None

    def share_cut(self, max_length: int) -> float:
        """Share of the conversations that are longer."""
        return float(np.mean(np.array(self.tokens) > max_length)) if self.tokens else 0.0

    @property
    def of_pairs(self) -> bool:
        return self.form == "pairs" or self.policy in PAIR_POLICIES

    @property
    def max_length(self) -> int:
        """The smallest that cuts few conversations and that the base can take."""
        possible = [n for n in LENGTHS if self.context is None or n <= self.context] or [LENGTHS[0]]
        return next((n for n in possible if self.share_cut(n) <= ENOUGH), possible[-1])

    def sections(self, recipe: Recipe) -> dict[str, dict[str, Any] | None]:
        """What takes the place of a recipe's sections, so that it reads the file; None for a section that has to go."""
        data, chat = recipe.data, self.chat.model_dump(mode="json", exclude_defaults=True)
        if self.of_pairs:
            chat.pop("loss_on", None)  # the answers alone are compared
        ways = {"source": self.file, "split": "by_hash"} | ({"policy": self.policy} if self.policy else {"form": self.form})
        ways |= _of_form(data.model_dump(mode="json", include=set(HOW_ROWS_ARE_READ) - {"form"}, exclude_defaults=True), self.form)
        if ways.get("pairs") == {}:  # as without it
            del ways["pairs"]
        if data.dev_share != Data.model_fields["dev_share"].default:
            ways["dev_share"] = data.dev_share
        ways |= {"prepared": f"prepared/{_name_of(self.file)}", "max_length": self.max_length}
        if data.too_long != "truncate" and (data.too_long != "split" or self.form == "text"):
            ways["too_long"] = data.too_long
        sections: dict[str, dict[str, Any] | None] = {"data": ways, "chat": {"format": self.chat.format, **chat}}
        prompts = recipe.grpo is not None and not self.of_pairs and self.form != "text"
        if self.of_pairs or prompts or not data.packing:
            ways["packing"] = False
        if prompts:  # prompt and answer share it
            room = recipe.grpo.max_new_tokens
            ways["max_length"] = next((n for n in LENGTHS if n >= max(room + 1, self.max_length)), data.max_length)
        if self.of_pairs:
            dpo = recipe.dpo or Dpo()
            sections["dpo"] = {"beta": dpo.beta, **dpo.model_dump(mode="json", exclude_defaults=True)}
        elif recipe.dpo is not None:
            sections["dpo"] = None
        if recipe.grpo is not None and not prompts:
            sections["grpo"] = None
        return sections


def is_at_hand(model: Model) -> bool:
    """Can its tokenizer be had, without the half a minute in which the hub's client tries a network that is not there again and again?"""
    if Path(model.base).is_dir() or isinstance(try_to_load_from_cache(model.base, "config.json", revision=model.revision), str):
        return True
    try:
        HfApi().model_info(model.base, revision=model.revision, timeout=HUB_SECONDS)
    except Exception:  # of whatever library it goes through: the file is shown all the same
        return False
    return True


def lines_of(sections: dict[str, dict[str, Any] | None]) -> str:
    """As they are pasted into a recipe."""
    lines = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=1000)
    return lines.replace("split: by_hash\n", "split: by_hash        # a fifth is held out for scripts/evaluate.py\n").rstrip()


def complaint_about(sections: dict[str, dict[str, Any] | None], recipe: Recipe) -> str:
    """What the rest of the recipe does not go with; empty where all of it does."""
    try:
        from_dict({**recipe.model_dump(mode="json"), **sections}, "with these lines the recipe")
    except ValueError as why:
        return str(why)
    return ""


def _of_form(values: dict[str, Any], form: Form) -> dict[str, Any]:
    """Without what has no effect on such rows: a recipe says how its own data is read, and the file may be another."""
    useless = {
        "oasst": (*OF_CHATS, *OF_TEXTS),
        "text": (*OF_CHATS, *OF_TREES),
    }.get(form, (*OF_TEXTS, *OF_TREES))
    kept = {key: value for key, value in values.items() if key not in useless}
    fields = {name: key for name, key in kept.pop("fields", {}).items() if name in FIELDS[form]}
    return {**kept, **({"fields": fields} if fields else {})}


def _name_of(file: str) -> str:
    """`data/my pairs.jsonl.gz` -> my_pairs: names a folder."""
    return re.sub(r"\W+", "_", Path(file).name.partition(".")[0]).strip("_") or "data"


def inspect(recipe: Recipe, file: str, progress: Progress) -> Inspection:
    """Look at a file (folder, hub id) with the recipe's base, chat format, names of fields and roles.

    Where the recipe's chat format cannot be meant for such rows (plain text, or chats for `format: text`), another one is used.
    Raises ValueError if the file cannot be read or its rows are of no form that is known.
    """
    source = Source(source=file, split="all").model_copy(update={key: getattr(recipe.data, key) for key in HOW_ROWS_ARE_READ})
    rows = sources.read(file)
    head = list(itertools.islice(rows, chats.LOOK_AT))
    prompts = recipe.grpo is not None  # rows without an answer are some then
    form = chats.recognise(head, source, prompts)
    chat = recipe.chat
    if (form == "text") != (chat.format == "text"):
        chat = Chat(format="text" if form == "text" else "model")
    try:
        config = load_config(recipe.model).get_text_config()
    except ValueError as why:
        raise ValueError(f"{why}; tokens need a tokenizer: model.base=assets/tiny_phi shows the rest without yours") from None
    policy = (recipe.data.policy if recipe.data.policy in PAIR_POLICIES else "all_paths") if form == "oasst" else None
    found = Inspection(file, form, chat, getattr(config, "max_position_embeddings", None), policy)
    tokenizer = load_tokenizer(recipe.model)
    renderer = Renderer(tokenizer, chat, add_role_markers(tokenizer, config.vocab_size, chat))
    found.renderer = renderer

    good: list[Row] = []
    limit = None if form == "oasst" else MAX_ROWS
    for row in progress(itertools.islice(itertools.chain(head, rows), limit), f"reading {file}", limit):
        found.read += 1
        if isinstance(row, BadRow):
            _leave_out(row, found)
        else:
            found.keys.update(row.values.keys())
            good.append(row)
    found.more = limit is not None and next(rows, None) is not None
    for conversation in progress(_conversations(good, source, found, prompts), "tokenising", None):
        _look_at(conversation, renderer, found)
    return found


def _conversations(rows: Sequence[Row], source: Source, found: Inspection, prompts: bool) -> Iterable[Conversation]:
    if found.form == "oasst":
        forest = oasst1.forest(rows)
        for bad in forest.bad_rows:
            _leave_out(bad, found)
        conversations, dropped = oasst1.conversations(forest.messages, found.policy, source.filters, forest.left_out, source.pairs)
        found.dropped += dropped
        yield from conversations
        return
    for row in rows:
        conversation = chats.conversation_of(row, found.form, source, prompts)
        if isinstance(conversation, BadRow):
            _leave_out(conversation, found)
        else:
            yield conversation


def _leave_out(row: BadRow, found: Inspection) -> None:
    found.dropped[row.reason] += 1
    if found.dropped[row.reason] <= 3:
        found.bad_rows.append(row)


def _look_at(conversation: Conversation, renderer: Renderer, found: Inspection) -> None:
    found.roles.update(turn.role for turn in conversation.turns)
    found.turns.append(len(conversation.turns))
    kept = conversation.without_open_end()
    if kept is None:
        found.unanswered += 1
        return
    found.open_ends += len(kept.turns) < len(conversation.turns)
    found.reply_words += [len(t.content.split()) for t in kept.turns if t.role == "assistant" and t.learn]
    if kept.rejected is not None:
        found.rejected_words.append(len(kept.rejected.split()))
    try:
        rendered = [renderer.render(one) for one in (kept.chosen_and_rejected() if kept.rejected is not None else [kept])]
    except ValueError as why:
        found.dropped["the chat format cannot write it"] += 1
        found.refused = found.refused or str(why)
        return
    found.tokens += [len(one.ids) for one in rendered]
    found.supervised += sum(one.num_supervised for one in rendered)
    if rendered[0].num_supervised and (not found.example or _distance(rendered) < _distance(found.example)):
        found.example = rendered


def _distance(example: list[Rendered]) -> int:
    return abs(max(len(one.ids) for one in example) - 150)


def quantiles(values: Sequence[int]) -> dict[str, Any]:
    """Half, nine in ten and 99 in 100 are at most so long; and the longest."""
    if not values:
        return {}
    return {"half": np.quantile(values, 0.5), "90 %": np.quantile(values, 0.9), "99 %": np.quantile(values, 0.99), "longest": max(values)}
