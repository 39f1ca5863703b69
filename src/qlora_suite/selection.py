"""Raw rows -> the conversations of each split, on disk, with every row and every conversation accounted for.

    rows of each data set     read, recognised, made into conversations; bad rows are left out by reason and named
      -> replies              those of an unwanted length are not learnt
      -> train, dev, validation   by a hash of the conversation's group (tree or first question), whatever the order of the rows
      -> duplicates           a conversation that is held out is not trained on
      -> max_examples, weight per data set, chosen by hashes

Conversations, and before them the messages of trees (trees.py), lie in files while this goes on; in memory there are some bytes for each.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_suite import chats, dataset, oasst1, sources
from qlora_suite.conversations import Conversation
from qlora_suite.files import folder_aside, remove_folder
from qlora_suite.recipe import PAIR_POLICIES, Filters, Form, Recipe, Replies, Source
from qlora_suite.sources import BadRow, Row
from qlora_suite.trees import Trees

SPLITS = ("train", "dev", "validation")
BAD_ROWS_KEPT = 1000
"""So many are named one by one; all are counted."""
_SELECTED = pa.schema(
    [
        *dataset.CONVERSATIONS,
        ("set", pa.int32()),
        ("is_tree", pa.bool_()),
        ("group_hash", pa.uint64()),
        ("question_hash", pa.uint64()),
        ("content_hash", pa.uint64()),
        ("weight", pa.float64()),
    ]
)
Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""progress(items, description, total) shows how far a loop over the items is."""


def quiet(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    """No progress to be seen."""
    return items


@dataclass
class Counts:
    """What became of one split's conversations."""

    conversations: int = 0
    """Taken from the rows."""
    trees: int = 0
    """OASST trees, or first questions."""
    replies_outside: int = 0
    """Replies whose length data.replies does not want: context, not learnt."""
    no_reply: int = 0
    """Conversations in which no reply of a wanted length is left, and pairs with an answer of another length, dropped."""
    duplicates: int = 0
    """Dropped because the same conversation is held out."""
    same_question: int = 0
    """Dropped because a held-out conversation begins with the same question (not for trees)."""
    beyond_max: int = 0
    """Beyond data.max_examples."""
    weighted_out: int = 0
    """Not taken, by a weight below 1."""
    copies: int = 0
    """Taken once more, by a weight above 1."""
    open_ends: int = 0
    """Last user turns that nobody answered, left off."""
    unanswered: int = 0
    """Conversations without an assistant turn, dropped."""
    nothing_new: int = 0
    """Conversations whose every answer is learnt through another one, or is context, dropped."""
    refused: int = 0
    """Conversations that the chat format cannot write, dropped."""
    dropped_too_long: int = 0
    """Conversations, and pairs of which one half, of whose learnt part nothing fits, or not enough for `data.too_long`."""
    same_answers: int = 0
    """Pairs whose two answers are the same, as they are or in what fits of them, dropped."""
    dropped_tokens: int = 0
    """Supervised tokens of what is dropped because it does not fit: of the last two."""
    kept: int = 0
    prompts: int = 0
    """Of them, without an answer to the last question: GRPO asks them."""
    pairs: int = 0
    """Of them, a chosen and a rejected answer each."""
    chosen_longer: int = 0
    """Pairs whose chosen answer has more words than the rejected one: a model may learn length from them."""
    rejected_outranks: int = 0
    """Pairs whose rejected answer people ranked higher."""
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    """Tokens that the loss counts."""
    chosen: int = 0
    rejected: int = 0
    """Of them, those of the pairs' chosen answers and of the rejected ones."""
    cut_conversations: int = 0
    cut_tokens: int = 0
    """Supervised tokens of what is kept, beyond max_length."""
    cut_bytes: int = 0
    system_moved: int = 0
    rewritten: int = 0
    """Answers that were to be learnt and are context, because the base's chat template rewrites earlier ones."""
    marker_texts: int = 0
    """Texts in messages that look like a plain-text role marker. A pair's rows hold its prompt twice, and so it counts twice."""
    control_texts: int = 0
    """Texts in messages that look like a control token, learnt and read as the text that they are. Of a pair as above."""
    padding_share: float = 0.0
    """Places of the packed rows that hold nothing."""


@dataclass
class SetCounts:
    """What became of one data set's rows."""

    name: str
    form: Form
    unit: str
    """`messages` (OASST) or `rows`."""
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    taken: int = 0
    """Conversations for training, copies included."""


class Conversations:
    """Some of the conversations in a file, read as they are asked for; one may stand there several times."""

    def __init__(self, path: Path, rows: np.ndarray, copies: np.ndarray) -> None:
        self._table = dataset.read_table(path)
        self._rows, self._copies = rows, copies

    def __len__(self) -> int:
        return int(self._copies.sum())

    def __iter__(self) -> Iterator[Conversation]:
        """In file order. The key of a second copy ends in #2."""
        start = 0
        for batch in self._table.to_batches():
            first, last = np.searchsorted(self._rows, [start, start + len(batch)])
            if first < last:
                records = batch.take(pa.array(self._rows[first:last] - start)).to_pylist()
                for record, copies in zip(records, self._copies[first:last], strict=True):
                    conversation = dataset.conversation_from(record)
                    yield conversation
                    for number in range(2, copies + 1):
                        yield replace(conversation, key=f"{conversation.key}#{number}")
            start += len(batch)


@dataclass
class Selection:
    """Conversations by split, and what was left out on the way."""

    splits: dict[str, Conversations]
    """train, dev and validation; they still may end on a user turn."""
    counts: dict[str, Counts]
    sets: list[SetCounts]
    bad_rows: list[BadRow]
    """The first of them."""

    @property
    def num_read(self) -> int:
        return sum(one.read for one in self.sets)

    @property
    def unit(self) -> str:
        return " and ".join(dict.fromkeys(one.unit for one in self.sets))

    @property
    def dropped(self) -> Counter[str]:
        return sum((one.dropped for one in self.sets), Counter())


@contextlib.contextmanager
def selected(recipe: Recipe, progress: Progress = quiet, strict: bool = False) -> Iterator[Selection]:
    """The recipe's data sets read, and their conversations taken and split by tree or first question. They lie in a folder beside
    data.prepared until the block ends.

    Raises ValueError if the data cannot be read, the policy does not fit it, or a tree stands in two splits; with `strict` also for
    the first bad row.
    """
    folder = folder_aside(Path(recipe.data.prepared), "selected.tmp")
    try:
        yield _select(recipe, folder, progress, strict)
    finally:
        remove_folder(folder)


def _select(recipe: Recipe, folder: Path, progress: Progress, strict: bool) -> Selection:
    data = recipe.data
    selection = Selection({}, {split: Counts() for split in SPLITS}, [], [])
    paths = {split: folder / f"selected-{split}.arrow" for split in SPLITS}
    tables = {split: dataset.TableWriter(path, _SELECTED) for split, path in paths.items()}
    try:
        for number, source in enumerate(data.each):
            for loaded_as, conversations in _conversations(recipe, source, selection, folder, progress, strict):
                for conversation in conversations:
                    split = _split_of(conversation.group, loaded_as, source, data.dev_share)
                    selection.counts[split].conversations += 1
                    wanted = _of_wanted_length(conversation, source.replies, selection.counts[split])
                    if wanted is not None:
                        _write(wanted, number, source, tables[split], selection)
    finally:
        for table in tables.values():
            table.close()
    _choose(recipe, paths, selection)
    return selection


# --- rows -> conversations


def _conversations(
    recipe: Recipe, source: Source, selection: Selection, folder: Path, progress: Progress, strict: bool
) -> Iterator[tuple[str, Iterator[Conversation]]]:
    """(how it was loaded: train, validation or all; its conversations), for each part of a data set."""
    name = source.source if isinstance(source.source, str) else ", ".join(source.source or ())
    found: SetCounts | None = None
    prefix = f"{len(selection.sets) + 1}/" if len(recipe.data.each) > 1 else ""
    for loaded_as, rows in sources.load(source, prefix).items():
        head = list(itertools.islice(rows, chats.LOOK_AT))
        form = _form(recipe, head, source)
        if found is None:
            found = SetCounts(name, form, "messages" if form == "oasst" else "rows")
            selection.sets.append(found)
        elif found.form != form:
            raise ValueError(
                f"the train split of {name} has rows of form {found.form}, the validation split of form {form}; "
                "set data.form, or convert one"
            )
        everything = progress(itertools.chain(head, rows), f"reading {name}" + (f" ({loaded_as})" if loaded_as != "all" else ""), None)
        prompts = recipe.grpo is not None
        good = _good(everything, found, source, selection, strict, prompts)
        if form == "oasst":
            leave_out = functools.partial(_leave_out, found=found, selection=selection, strict=strict)
            with Trees(good, folder, leave_out) as trees:
                conversations = trees.conversations(source.policy, source.filters, found.dropped, source.pairs)
                yield loaded_as, iter(progress(conversations, f"trees of {name}", None))
        else:
            yield loaded_as, _chats(good, form, source, found, selection, strict, prompts)


def _form(recipe: Recipe, head: list[Row | BadRow], source: Source) -> Form:
    """Raises ValueError if the rows are none that the recipe can use."""
    if source.policy is not None:
        seen = {chats.form_of(row.values, {}) for row in head if isinstance(row, Row)} - {None}
        if seen and "oasst" not in seen:
            raise ValueError(f"data.policy: {source.policy} has no effect on {min(seen)} rows, which are no trees; set data.policy: null")
    form = chats.recognise(head, source, prompts=recipe.grpo is not None)
    if form == "oasst" and source.policy is None:
        raise ValueError("OASST messages are trees: data.policy must say which conversations to take (all_paths is a good one)")
    if form != "oasst" and source.filters not in (None, Filters()):
        raise ValueError(f"data.filters have no effect on {form} rows, which carry no language, review or deletion; remove them")
    pairs = form == "pairs" or source.policy in PAIR_POLICIES
    if pairs and recipe.dpo is None and recipe.grpo is None:
        raise ValueError(
            f"the rows of {source.source} are pairs of a chosen and a rejected answer, on which dpo trains: add dpo: {{}} to the recipe "
            "(and data.packing: false), or set data.form to another form that the rows have too"
        )
    if recipe.dpo is not None and not pairs:
        raise ValueError(
            f"dpo trains on pairs, and the rows of {source.source} are of form {form}; give rows with chosen and rejected, or OASST trees "
            "with data.policy: preference_pairs or conciseness_pairs, or remove dpo"
        )
    if (form == "text") != (recipe.chat.format == "text") and form != "oasst":
        remedy = "set chat.format: text" if form == "text" else "choose another chat.format"
        raise ValueError(f"the rows of {source.source} are of form {form}, and chat.format is {recipe.chat.format}; {remedy}")
    if source.learn_after and form != "text":
        raise ValueError(f"data.learn_after has no effect on rows of form {form}; remove it")
    return form


def _good(
    rows: Iterable[Row | BadRow], found: SetCounts, source: Source, selection: Selection, strict: bool, prompts: bool
) -> Iterator[Row]:
    """Raises ValueError if a file's first row is of another form than the first file's: it would be left out as a whole."""
    files: set[str] = set()
    for row in rows:
        found.read += 1
        if isinstance(row, BadRow):
            _leave_out(row, found, selection, strict)
            continue
        if row.place.file not in files:
            files.add(row.place.file)
            form = chats.form_of(row.values, dict(source.fields), prompts)
            if source.form is None and source.policy is None and form not in (None, found.form):
                raise ValueError(
                    f"{row.place.file} is of form {form}, the rows before it of form {found.form}; give each a place in data.sets"
                )
        yield row


def _chats(
    rows: Iterable[Row], form: Form, source: Source, found: SetCounts, selection: Selection, strict: bool, prompts: bool
) -> Iterator[Conversation]:
    for row in rows:
        conversation = chats.conversation_of(row, form, source, prompts)
        if isinstance(conversation, BadRow):
            _leave_out(conversation, found, selection, strict)
        else:
            yield conversation


def _leave_out(row: BadRow, found: SetCounts, selection: Selection, strict: bool) -> None:
    if strict:
        raise ValueError(f"{row} (without --strict such rows are left out and counted)")
    found.dropped[row.reason] += 1
    if len(selection.bad_rows) < BAD_ROWS_KEPT:
        selection.bad_rows.append(row)


# --- conversations -> splits


def _split_of(group: str, loaded_as: str, source: Source, dev_share: float) -> str:
    """Which split a group belongs to: a function of its id alone."""
    if loaded_as == "validation":
        return "validation"
    share = 0.2 if source.validation_share is None else source.validation_share
    if source.split == "by_hash" and oasst1.split_of(group, share, salt="validation"):
        return "validation"
    return "dev" if oasst1.split_of(group, dev_share, salt="dev") else "train"


def _write(conversation: Conversation, number: int, source: Source, table: dataset.TableWriter, selection: Selection) -> None:
    table.add(
        {
            **dataset.conversation_record(conversation),
            "set": number,
            "is_tree": selection.sets[-1].form == "oasst",
            "group_hash": _hash(conversation.group),
            "question_hash": _hash(_question(conversation, selection.sets[-1].form)),
            "content_hash": _hash(_content(conversation)),
            "weight": source.weight * _weight(conversation, source.replies),
        }
    )


def _content(conversation: Conversation) -> str:
    """All that is said, and by whom."""
    said = [(turn.role, turn.content) for turn in conversation.turns]
    if conversation.rejected is not None:
        said.append(("rejected", conversation.rejected))
    return "\0".join(f"{role}\0{content}" for role, content in said)


def _question(conversation: Conversation, form: Form) -> str:
    """What the conversation begins with; of a plain text that is what its group was made of."""
    if form == "text":
        return conversation.group
    return next((turn.content for turn in conversation.turns if turn.role == "user"), conversation.group)


def _hash(text: str) -> int:
    """64 bits: among 100 million texts two share it with a probability of 0.03 %."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _weight(conversation: Conversation, replies: Replies) -> float:
    """By the mean number of words of what is learnt; of a pair, of its two answers. 1 for a prompt, whose answer is still to come."""
    if conversation.is_prompt:
        return 1.0
    words = [len(turn.content.split()) for turn in conversation.turns if turn.role == "assistant" and turn.learn]
    if conversation.rejected is not None:
        words.append(len(conversation.rejected.split()))
    if not words:
        return 1.0
    mean = sum(words) / len(words)
    return next((entry.weight for entry in replies.weights if mean <= (entry.up_to_words or math.inf)), 1.0)


def _of_wanted_length(conversation: Conversation, replies: Replies, counts: Counts) -> Conversation | None:
    """Replies of another length become context. None if there were replies to learn, and none is left; of a pair, if one of its answers
    has another length.
    """
    if replies.min_words == 1 and replies.max_words is None:
        return conversation

    def outside(reply: str) -> bool:
        return not replies.min_words <= len(reply.split()) <= (replies.max_words or math.inf)

    if conversation.rejected is not None:
        unwanted_pair = outside(conversation.turns[-1].content) or outside(conversation.rejected)
        counts.no_reply += unwanted_pair
        return None if unwanted_pair else conversation
    unwanted = [turn.role == "assistant" and turn.learn and turn.content != "" and outside(turn.content) for turn in conversation.turns]
    counts.replies_outside += sum(unwanted)
    turns = tuple(replace(turn, learn=turn.learn and not no) for turn, no in zip(conversation.turns, unwanted, strict=True))
    if any(unwanted) and not any(turn.role == "assistant" and turn.learn for turn in turns):
        counts.no_reply += 1
        return None
    return replace(conversation, turns=turns)


# --- which of them are taken


def _choose(recipe: Recipe, paths: dict[str, Path], selection: Selection) -> None:
    """Fill in the splits: without what is held out, then data.max_examples, then the weights."""
    columns = {split: _Columns(path) for split, path in paths.items()}
    held_out = columns["validation"]
    for split, column in columns.items():
        counts = selection.counts[split]
        counts.trees = len(np.unique(column.group_hash))
        keep = np.ones(len(column.set), dtype=bool)
        if split != "validation":
            shared_trees = column.is_tree & np.isin(column.group_hash, held_out.group_hash[held_out.is_tree])
            if shared_trees.any():
                _refuse_shared_trees(column, shared_trees)
            # Different trees may well begin with the same words: people wrote them apart from each other.
            of_chats = np.isin(column.question_hash, held_out.question_hash[~held_out.is_tree])
            of_trees = np.isin(column.question_hash, held_out.question_hash[held_out.is_tree]) & ~column.is_tree
            shared = of_chats | of_trees
            later = [held_out, columns["dev"]] if split == "train" else [held_out]
            same = np.isin(column.content_hash, np.concatenate([other.content_hash for other in later]))
            keep = ~same & ~shared
            counts.duplicates, counts.same_question = int(same.sum()), int((shared & ~same).sum())
        copies = keep.astype(np.int64)
        if split == "train":
            for number, source in enumerate(recipe.data.each):
                if source.max_examples is not None:
                    mine = np.flatnonzero(keep & (column.set == number))
                    # whole groups, chosen at random once and for all; file order is kept
                    beyond = mine[np.lexsort((mine, column.group_hash[mine]))][source.max_examples :]
                    copies[beyond] = 0
                    counts.beyond_max += len(beyond)
            taken = copies > 0
            copies = np.where(taken, _times(column), 0)
            counts.weighted_out = int((taken & (copies == 0)).sum())
            counts.copies = int(np.maximum(copies - 1, 0).sum())
            for number, one in enumerate(selection.sets):
                one.taken = int(copies[column.set == number].sum())
        rows = np.flatnonzero(copies)
        selection.splits[split] = Conversations(paths[split], rows, copies[rows])


class _Columns:
    """What decides over a split's conversations, in memory. [conversations] each"""

    def __init__(self, path: Path) -> None:
        self.table = dataset.read_table(path)
        self.set, self.is_tree, self.group_hash, self.question_hash, self.content_hash, self.weight = (
            self.table[name].to_numpy() for name in ("set", "is_tree", "group_hash", "question_hash", "content_hash", "weight")
        )


def _times(column: _Columns) -> np.ndarray:
    """How often each is taken: a weight of 1.3 is once, and for three in ten, by a hash of what they say, twice. [conversations]"""
    whole = np.floor(column.weight)
    chance = (column.content_hash * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64) / 2**64  # another order than the hash's own
    return (whole + (chance < column.weight - whole)).astype(np.int64)


def _refuse_shared_trees(column: _Columns, shared: np.ndarray) -> None:
    groups = column.table.filter(pa.array(shared))["group"].unique().to_pylist()
    raise ValueError(
        f"{len(groups)} trees stand in both train and validation, e.g. {min(groups)}; a validation score would be worthless: "
        "remove them from one, or let data.split: by_hash cut the split"
    )


# --- for people


def write_ids(path: Path, splits: dict[str, Conversations]) -> int:
    """One line per conversation: key, tab, message ids separated by spaces. Before a last user turn is dropped. Returns their number."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for split in SPLITS:
            for conversation in splits[split]:
                file.write(oasst1.ids_line(conversation) + "\n")
                number += 1
    return number


def write_messages(path: Path, splits: dict[str, Conversations]) -> None:
    """Readable conversations, one JSON object a line, in a form that can be read again."""
    with path.open("w", encoding="utf-8") as file:
        for split in SPLITS:
            for c in splits[split]:
                # an answer that is learnt elsewhere must not be learnt again when this file is read
                turns = c.turns[:-1] if c.is_prompt else c.turns
                messages = [{"role": t.role, "content": t.content} | ({} if t.learn else {"train": False}) for t in turns]
                line = {"split": split, "key": c.key, "tree": c.group, "language": c.language}
                if c.rejected is None:
                    line |= {"messages": messages}
                else:
                    line |= {"prompt": messages[:-1], "chosen": c.turns[-1].content, "rejected": c.rejected}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
