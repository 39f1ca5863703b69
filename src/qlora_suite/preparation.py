"""Raw rows -> splits of conversations -> packed rows on disk, with every message, conversation and token accounted for."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_suite import dataset, oasst1, sources
from qlora_suite.chat import Renderer
from qlora_suite.chat_templates import jinja
from qlora_suite.conversations import Conversation
from qlora_suite.files import file_table, hash_of, write_json
from qlora_suite.model import load_config, load_tokenizer
from qlora_suite.packing import pack
from qlora_suite.recipe import Data, Filters, Recipe
from qlora_suite.rendered import Rendered, shorten
from qlora_suite.role_markers import add_role_markers

SPLITS = ("train", "dev", "validation")
TEMPLATE_SAMPLE = 200
"""Conversations on which the Jinja template is compared with our own ids."""


@dataclass
class Selection:
    """Conversations by split, and what was left out on the way."""

    splits: dict[str, list[Conversation]]
    """train, dev and validation; they still may end on a user turn."""
    num_rows: int
    """Messages (OASST) or rows read."""
    unit: str
    dropped: Counter[str] = field(default_factory=Counter)
    capped: int = 0
    """Train conversations beyond data.max_examples."""


def select(data: Data) -> Selection:
    """Read the recipe's sources and take its conversations, split by tree.

    Raises ValueError if the data cannot be read, the policy does not fit it, or a tree stands in two splits.
    """
    loaded = sources.load(data)
    kinds = {sources.kind(rows) for rows in loaded.values()}
    if len(kinds) > 1:
        raise ValueError(f"the train split has rows of another kind than the validation split ({' and '.join(sorted(kinds))}); convert one")
    kind = kinds.pop()
    if kind == "oasst" and data.policy is None:
        raise ValueError("OASST messages are trees: data.policy must say which conversations to take (all_paths is a good one)")
    if kind != "oasst" and data.policy is not None:
        raise ValueError(f"data.policy: {data.policy} has no effect on {kind} rows, which are no trees; set data.policy: null")
    if kind != "oasst" and data.filters not in (None, Filters()):
        raise ValueError(f"data.filters have no effect on {kind} rows, which carry no language, review or deletion; remove them")
    selection = Selection({split: [] for split in SPLITS}, sum(map(len, loaded.values())), "messages" if kind == "oasst" else "rows")
    for name, rows in loaded.items():
        if kind == "oasst":
            found, dropped = oasst1.conversations(rows, data.policy, data.filters)
        else:
            found, dropped = (sources.messages_conversations if kind == "messages" else sources.text_conversations)(rows)
        selection.dropped += dropped
        for conversation in found:
            selection.splits[_split_of(conversation.group, name, data)].append(conversation)
    if kind != "oasst":
        _drop_repeats(selection)
    _check_disjoint(selection.splits)
    if data.max_examples is not None:
        kept = _first_by_hash(selection.splits["train"], data.max_examples)
        selection.capped = len(selection.splits["train"]) - len(kept)
        selection.splits["train"] = kept
    return selection


def _split_of(group: str, loaded_as: str, data: Data) -> str:
    """Which split a tree belongs to: a function of its id alone."""
    if loaded_as == "validation":
        return "validation"
    share = 0.2 if data.validation_share is None else data.validation_share
    if data.split == "by_hash" and oasst1.split_of(group, share, salt="validation"):
        return "validation"
    return "dev" if oasst1.split_of(group, data.dev_share, salt="dev") else "train"


def _drop_repeats(selection: Selection) -> None:
    """Plain rows are grouped by their text: one that stands in the validation file too is not for training."""
    held_out = {c.group for c in selection.splits["validation"]}
    for split in ("train", "dev"):
        kept = [c for c in selection.splits[split] if c.group not in held_out]
        if len(kept) < len(selection.splits[split]):
            selection.dropped["stands in validation too"] += len(selection.splits[split]) - len(kept)
        selection.splits[split] = kept


def _check_disjoint(splits: dict[str, list[Conversation]]) -> None:
    trained = {c.group for split in ("train", "dev") for c in splits[split]}
    shared = trained & {c.group for c in splits["validation"]}
    if shared:
        raise ValueError(
            f"{len(shared)} trees stand in both train and validation, e.g. {min(shared)}; a validation score would be worthless: "
            "remove them from one, or let data.split: by_hash cut the split"
        )


def _first_by_hash(conversations: list[Conversation], count: int) -> list[Conversation]:
    """The first `count` in the order of their trees' hashes: whole trees, chosen at random once and for all; file order is kept."""
    order = sorted(range(len(conversations)), key=lambda i: (hashlib.sha256(conversations[i].group.encode()).digest(), i))
    chosen = set(order[:count])
    return [c for i, c in enumerate(conversations) if i in chosen]


def write_ids(path: Path, splits: dict[str, list[Conversation]]) -> None:
    """One line per conversation: key, tab, message ids separated by spaces. Before a last user turn is dropped."""
    lines = [oasst1.ids_line(c) for split in SPLITS for c in splits[split]]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_messages(path: Path, splits: dict[str, list[Conversation]]) -> None:
    """Readable conversations, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for split in SPLITS:
            for c in splits[split]:
                messages = [{"role": t.role, "content": t.content} for t in c.turns]
                line = {"split": split, "key": c.key, "tree": c.group, "language": c.language, "messages": messages}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass
class Counts:
    """What became of one split's conversations."""

    conversations: int = 0
    """Taken by the policy."""
    trees: int = 0
    open_ends: int = 0
    """Last user turns that nobody answered, left off."""
    unanswered: int = 0
    """Conversations without an assistant turn, dropped."""
    nothing_new: int = 0
    """Conversations whose every answer is learnt through another one, dropped."""
    dropped_too_long: int = 0
    kept: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    """Tokens that the loss counts."""
    cut_conversations: int = 0
    cut_tokens: int = 0
    """Supervised tokens beyond max_length."""
    cut_bytes: int = 0
    system_moved: int = 0
    marker_texts: int = 0
    """Texts in messages that look like a plain-text role marker."""
    padding_share: float = 0.0
    """Places of the packed rows that hold nothing."""


def trimmed(conversations: Sequence[Conversation], counts: Counts) -> Iterator[Conversation]:
    """Conversations that end on an answer and have something to learn."""
    counts.conversations, counts.trees = len(conversations), len({c.group for c in conversations})
    for conversation in conversations:
        kept = conversation.without_open_end()
        if kept is None:
            counts.unanswered += 1
            continue
        counts.open_ends += len(kept.turns) < len(conversation.turns)
        if any(t.learn for t in kept.turns if t.role == "assistant"):
            yield kept
        else:
            counts.nothing_new += 1


def tokenised(conversations: Iterable[Conversation], renderer: Renderer, data: Data, counts: Counts) -> Iterator[tuple[str, Rendered]]:
    """(key, what fits of it); every token that is cut is counted."""
    for conversation in conversations:
        rendered = renderer.render(conversation)
        short = shorten(rendered, data.max_length, data.too_long)
        counts.cut_tokens += short.num_tokens_cut
        counts.cut_bytes += short.num_bytes_cut
        counts.cut_conversations += bool(short.pieces) and (len(short.pieces) > 1 or short.num_tokens_cut > 0)
        counts.system_moved += rendered.num_system_moved
        counts.marker_texts += rendered.num_marker_texts
        counts.dropped_too_long += not short.pieces
        counts.kept += bool(short.pieces)
        for piece in short.pieces:
            counts.tokens += len(piece.ids)
            counts.supervised += piece.num_supervised
            yield conversation.key, piece


def rows_of(examples: Sequence[tuple[str, Rendered]], data: Data, counts: Counts) -> Iterator[dict[str, Any]]:
    """Examples as rows for training: packed, or one each."""
    lengths = [len(rendered.ids) for _, rendered in examples]
    rows = pack(lengths, data.max_length) if data.packing else [[i] for i in range(len(examples))]
    counts.rows = len(rows)
    if rows:
        counts.padding_share = 1 - sum(lengths) / (len(rows) * data.max_length) if data.packing else 0.0
    for row in rows:
        pieces = [examples[i][1] for i in row]
        yield {
            "input_ids": [token for piece in pieces for token in piece.ids],
            "supervised": [flag for piece in pieces for flag in piece.supervised],
            "lengths": [len(piece.ids) for piece in pieces],
            "examples": [examples[i][0] for i in row],
        }


def template_agreement(conversations: Sequence[Conversation], renderer: Renderer) -> dict[str, int]:
    """On how many conversations plain `apply_chat_template` gives our ids.

    It cannot where a message has white space at its edges (templates strip it or not, as their authors pleased) or contains the
    text of a control token; the others must agree.
    """
    tokenizer, agreed, checked = renderer.tokenizer, 0, 0
    control = tokenizer.all_special_tokens
    for conversation in conversations[:TEMPLATE_SAMPLE]:
        texts = [t.content for t in conversation.turns]
        if any(t != t.strip() or any(c in t for c in control) for t in texts):
            continue
        messages = [{"role": t.role, "content": t.content} for t in conversation.turns]
        checked += 1
        agreed += tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == renderer.render(conversation).ids
    return {"checked": checked, "agreed": agreed}


def prepare(recipe: Recipe, selection: Selection, progress: Any) -> tuple[dict[str, Any], tuple[Renderer, Rendered | None]]:
    """Write the recipe's prepared folder; it takes the place of an older one only when it is complete.

    `progress(iterable, description, total)` shows how far it is. Returns the manifest, and an example to show.
    Raises ValueError if nothing is left to train on.
    """
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model).get_text_config()
    markers = add_role_markers(tokenizer, config.vocab_size, recipe.chat)
    renderer = Renderer(tokenizer, recipe.chat, markers)
    if recipe.chat.format != "text":
        tokenizer.chat_template = jinja(tokenizer, recipe.chat, markers)

    folder = Path(recipe.data.prepared)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / dataset.MANIFEST).is_file()):
        raise ValueError(f"data.prepared: {folder} holds something else, which would be overwritten; remove it or name a folder of its own")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    counts = {split: Counts() for split in SPLITS}
    example = None
    try:
        for split in ("train", "dev"):
            kept = list(trimmed(selection.splits[split], counts[split]))
            stream = tokenised(progress(kept, f"tokenising {split}", len(kept)), renderer, recipe.data, counts[split])
            examples = list(stream)
            if split == "train":
                if not examples:
                    raise ValueError(f"no conversation is left to train on: {_where(selection, counts[split])}")
                agreement = template_agreement(kept, renderer) if recipe.chat.format != "text" else None
                example = min((r for _, r in examples), key=lambda r: abs(len(r.ids) - 150))
            dataset.write_table(aside / f"{split}.arrow", rows_of(examples, recipe.data, counts[split]), dataset.ROWS)
        held_out = list(trimmed(selection.splits["validation"], counts["validation"]))
        counts["validation"].kept = len(held_out)
        dataset.write_table(aside / "validation.arrow", map(dataset.conversation_record, held_out), dataset.CONVERSATIONS)
        tokenizer.save_pretrained(aside / "tokenizer")
        manifest = {
            "format_version": dataset.FORMAT_VERSION,
            "recipe": dataset.recipe_part(recipe),
            "sources": {**dataset.source_hashes(recipe), **sources.hub_commits(recipe.data)},
            "tokenizer": tokenizer_hash(tokenizer),
            "role_markers": asdict(markers),
            "chat_template": agreement,
            "counts": {
                "read": selection.num_rows,
                "unit": selection.unit,
                "dropped": dict(sorted(selection.dropped.items())),
                "capped": selection.capped,
                **{split: asdict(c) for split, c in counts.items()},
            },
            "files": file_table(aside, but=dataset.MANIFEST),
        }
        write_json(aside / dataset.MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest, (renderer, example)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the vocabulary, the merges, the control tokens and the template."""
    return hash_of([json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template, tokenizer.special_tokens_map])


def _where(selection: Selection, counts: Counts) -> str:
    reasons = {**selection.dropped, "without an answer": counts.unanswered, "too long": counts.dropped_too_long}
    lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"of {selection.num_rows:,} {selection.unit} read, these were left out: {lost or 'none'}"
