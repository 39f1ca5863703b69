"""Conversations -> token ids -> packed rows on disk, with every conversation and token accounted for."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_suite import dataset, sources
from qlora_suite.base_config import load_config, load_tokenizer
from qlora_suite.chat import Renderer
from qlora_suite.chat_templates import jinja
from qlora_suite.conversations import Conversation
from qlora_suite.files import file_table, folder_aside, hash_of, write_json
from qlora_suite.model_template import WAYS_TO_FAIL
from qlora_suite.packing import packed
from qlora_suite.parallel import in_order
from qlora_suite.pieces import Pieces
from qlora_suite.recipe import Data, Recipe
from qlora_suite.rendered import Rendered, Shortened, shorten
from qlora_suite.role_markers import add_role_markers
from qlora_suite.run_place import check_path
from qlora_suite.selection import BAD_ROWS_KEPT, Counts, Progress, Selection, quiet
from qlora_suite.sources import BadRow

TEMPLATE_SAMPLE = 200
"""Conversations on which the Jinja template is compared with our own ids."""
ROWS_AT_ONCE = 1000
"""Rows of a record batch."""
PREPARED = {*dataset.FILES, "bad_rows.jsonl", "tokenizer", dataset.MANIFEST, ".DS_Store"}
"""What a folder may hold that is replaced. A checkpoint has a manifest too."""


def trimmed(conversations: Iterable[Conversation], counts: Counts, is_text: bool = False) -> Iterator[Conversation]:
    """Conversations that end on an answer and have something to learn, and pairs of different answers. A plain text is left whole: its end
    is the text's end.
    """
    for conversation in conversations:
        if conversation.rejected is not None and conversation.rejected.strip() == conversation.turns[-1].content.strip():
            counts.same_answers += 1
            continue
        kept = conversation if is_text else conversation.without_open_end()
        if kept is None:
            counts.unanswered += 1
            continue
        counts.open_ends += len(kept.turns) < len(conversation.turns)
        if any(t.learn for t in kept.turns if t.role == "assistant"):
            yield kept
        else:
            counts.nothing_new += 1


@dataclass(frozen=True)
class Tokenised:
    """What becomes of one conversation."""

    conversation: Conversation
    pieces: list[Rendered]
    """Of a pair two, chosen and rejected, or none."""
    nothing_learnt: bool = False
    """Its answers are context, all of them."""
    same_answers: bool = False
    """A pair of whose answers the same tokens are left."""
    cut: bool = False
    cut_tokens: int = 0
    cut_bytes: int = 0
    system_moved: int = 0
    rewritten: int = 0
    marker_texts: int = 0
    control_texts: int = 0
    refused: str = ""
    """Why the chat format cannot write it."""


class Tokeniser:
    """Conversation -> what fits of its tokens. Can be sent to another process."""

    def __init__(self, renderer: Renderer, data: Data) -> None:
        self.renderer, self.max_length, self.too_long = renderer, data.max_length, data.too_long
        self.each_turn = renderer.rewrites_history and renderer.chat.rewritten_history == "each_turn"

    def __call__(self, conversation: Conversation) -> Tokenised:
        is_pair = conversation.rejected is not None
        if is_pair:
            examples = conversation.chosen_and_rejected()
        else:
            examples = conversation.ending_at_each_answer() if self.each_turn else [conversation]
        try:
            rendered = [self.renderer.render(one) for one in examples]
        except ValueError as why:
            return Tokenised(conversation, [], refused=str(why))
        short, same_answers = [shorten(one, self.max_length, self.too_long) for one in rendered], False
        if is_pair:
            halves = [piece.ids for one in short for piece in one.pieces]
            same_answers = len(halves) == 2 and halves[0] == halves[1]
            if same_answers or len(halves) < 2:  # one half teaches nothing
                short = [Shortened([], one.num_supervised, one.num_bytes) for one in rendered]
        pieces = [replace(piece, turns=[]) for one in short for piece in one.pieces]  # training needs no places of turns
        return Tokenised(
            conversation,
            pieces,
            nothing_learnt=not any(one.num_supervised for one in rendered),
            same_answers=same_answers,
            cut=bool(pieces) and any(one.num_tokens_cut or len(one.pieces) > 1 for one in short),
            cut_tokens=sum(one.num_tokens_cut for one in short),
            cut_bytes=sum(one.num_bytes_cut for one in short),
            system_moved=sum(one.num_system_moved for one in rendered),
            rewritten=sum(one.num_rewritten for one in rendered),
            marker_texts=sum(one.num_marker_texts for one in rendered[0 if is_pair else -1 :]),
            control_texts=sum(one.num_control_texts for one in rendered[0 if is_pair else -1 :]),
        )


def written(results: Iterable[Tokenised], counts: Counts, bad_rows: list[BadRow], strict: bool) -> Iterator[Tokenised]:
    """Those that the chat format can write. Raises ValueError for the first that it cannot, with `strict`."""
    for one in results:
        if not one.refused:
            counts.system_moved += one.system_moved
            counts.rewritten += one.rewritten
            counts.marker_texts += one.marker_texts
            counts.control_texts += one.control_texts
            yield one
            continue
        if strict:
            raise ValueError(f"{one.refused} (without --strict such conversations are left out and counted)")
        counts.refused += 1
        if len(bad_rows) < BAD_ROWS_KEPT:
            bad_rows.append(BadRow(one.conversation.key, "the chat format cannot write it", "", one.refused))


def counted(results: Iterable[Tokenised], counts: Counts, bad_rows: list[BadRow], strict: bool) -> Iterator[Tokenised]:
    """Those that are kept; every token that is cut, or dropped with its conversation, is counted."""
    for one in written(results, counts, bad_rows, strict):
        if one.pieces:
            counts.cut_tokens += one.cut_tokens
            counts.cut_bytes += one.cut_bytes
        else:
            counts.dropped_tokens += one.cut_tokens
        counts.cut_conversations += one.cut
        counts.nothing_new += one.nothing_learnt
        counts.same_answers += one.same_answers
        counts.dropped_too_long += not (one.pieces or one.nothing_learnt or one.same_answers)
        if not one.pieces:
            continue
        counts.kept += 1
        counts.prompts += one.conversation.is_prompt
        counts.tokens += sum(len(piece.ids) for piece in one.pieces)
        counts.supervised += sum(piece.num_supervised for piece in one.pieces)
        if one.conversation.rejected is not None:
            chosen, rejected = one.pieces
            count_pair(one.conversation, counts)
            counts.chosen += chosen.num_supervised
            counts.rejected += rejected.num_supervised
        yield one


def count_pair(pair: Conversation, counts: Counts) -> None:
    assert pair.rejected is not None, "no pair"
    counts.pairs += 1
    counts.chosen_longer += len(pair.turns[-1].content.split()) > len(pair.rejected.split())
    counts.rejected_outranks += pair.rejected_outranks


def write_rows(path: Path, pieces: Pieces, data: Data, counts: Counts, pairs: bool = False) -> None:
    """Pieces as rows for training: packed, or one each; of pairs, which are never packed, two each."""
    lengths = pieces.lengths
    if data.packing:
        members, ends = packed(lengths, data.max_length)
    else:
        in_a_row = 2 if pairs else 1
        members, ends = np.arange(len(lengths)), np.arange(in_a_row, len(lengths) + 1, in_a_row)
    counts.rows = len(ends)
    if counts.rows and data.packing:
        counts.padding_share = 1 - int(lengths.sum(dtype=np.int64)) / (counts.rows * data.max_length)
    dataset.write_row_batches(path, pieces.batches(members, ends, ROWS_AT_ONCE))


def template_agreement(conversations: Iterable[Conversation], renderer: Renderer) -> dict[str, int]:
    """On how many conversations plain `apply_chat_template` gives our ids.

    It cannot where a message has white space at its edges (templates strip it or not, as their authors pleased) or contains the
    text of a control token; the others must agree.
    """
    tokenizer, agreed, checked = renderer.tokenizer, 0, 0
    control = tokenizer.convert_ids_to_tokens(sorted(renderer.encode.control_ids))
    for conversation in conversations:
        texts = [t.content for t in conversation.turns]
        if any(t != t.strip() or any(c in t for c in control) for t in texts):
            continue
        try:
            ids = renderer.render(conversation).ids
        except ValueError:  # it is counted as refused
            continue
        messages = [{"role": t.role, "content": t.content} for t in conversation.turns]
        checked += 1
        with contextlib.suppress(*WAYS_TO_FAIL):  # the base's template may refuse what we wrote with an empty question in front
            agreed += tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == ids
    return {"checked": checked, "agreed": agreed}


def prepare(
    recipe: Recipe, selection: Selection, progress: Progress = quiet, num_workers: int = 1, strict: bool = False
) -> tuple[dict[str, Any], tuple[Renderer, list[Rendered]]]:
    """Write the recipe's prepared folder; it takes the place of an older one only when it is complete.

    The result does not depend on `num_workers`, the number of processes that tokenise. Returns the manifest, and an example to show: of a
    pair its two halves.
    Raises ValueError if nothing is left to train on, and with `strict` if the chat format cannot write a conversation.
    """
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model).get_text_config()
    markers = add_role_markers(tokenizer, config.vocab_size, recipe.chat)
    renderer = Renderer(tokenizer, recipe.chat, markers)
    if recipe.chat.format != "text":
        tokenizer.chat_template = jinja(tokenizer, recipe.chat, markers)

    tokeniser = Tokeniser(renderer, recipe.data)
    check_replaceable(recipe)
    folder = Path(recipe.data.prepared).resolve()  # a link to another disk stays one
    aside, old = folder_aside(folder, "tmp"), folder_aside(folder, "old")
    counts, bad_rows, pairs = selection.counts, selection.bad_rows, recipe.dpo is not None
    example: list[Rendered] = []
    try:
        for split in ("train", "dev"):
            kept = trimmed(selection.splits[split], counts[split], renderer.is_plain_text)
            kept = progress(kept, f"tokenising {split}", len(selection.splits[split]))
            workers = contextlib.closing(in_order(tokeniser, kept, len(selection.splits[split]), num_workers))
            with Pieces(aside) as pieces:
                with workers as results:
                    for one in counted(results, counts[split], bad_rows, strict):
                        for piece in one.pieces:
                            if (largest := max(piece.ids)) >= config.vocab_size:
                                raise ValueError(
                                    f"the tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest:,}, but the "
                                    f"embedding of {recipe.model.base} has {config.vocab_size:,} rows: they are not of one model; fetch "
                                    "both again"
                                )
                            pieces.add(one.conversation.key, piece.ids, piece.supervised)
                        if split == "train":
                            shown = [one.pieces] if pairs else [[piece] for piece in one.pieces]
                            example = min([example, *shown] if example else shown, key=_distance)
                if split == "train" and not example:
                    raise ValueError(f"no {'pair' if pairs else 'conversation'} is left to train on: {_where(selection)}")
                write_rows(aside / f"{split}.arrow", pieces, recipe.data, counts[split], pairs)
        agreement = None
        if recipe.chat.format != "text":
            sample = itertools.islice(trimmed(selection.splits["train"], Counts()), TEMPLATE_SAMPLE)
            agreement = template_agreement(sample, renderer)
        held_out = trimmed(selection.splits["validation"], counts["validation"], renderer.is_plain_text)
        held_out = progress(held_out, "checking validation", len(selection.splits["validation"]))
        workers = contextlib.closing(in_order(tokeniser, held_out, len(selection.splits["validation"]), num_workers))
        with workers as results, dataset.TableWriter(aside / "validation.arrow", dataset.CONVERSATIONS) as table:
            for one in written(results, counts["validation"], bad_rows, strict):
                counts["validation"].kept += 1
                counts["validation"].prompts += one.conversation.is_prompt
                if pairs:
                    count_pair(one.conversation, counts["validation"])
                table.add(dataset.conversation_record(one.conversation))
        write_bad_rows(aside / "bad_rows.jsonl", bad_rows)
        tokenizer.save_pretrained(aside / "tokenizer")
        for _ in progress(dataset.check_rows(aside), "checking rows", None):
            pass
        stats = dataset.source_stats(recipe)  # before the hashes: what changes in between is seen at the next start
        manifest = {
            "format_version": dataset.FORMAT_VERSION,
            "pairs": pairs,
            "grpo": recipe.grpo is not None,
            "recipe": dataset.recipe_part(recipe),
            "sources": {**dataset.source_hashes(recipe), **{k: v for one in recipe.data.each for k, v in sources.hub_commits(one).items()}},
            "source_stats": stats,
            "tokenizer": tokenizer_hash(tokenizer),
            "role_markers": asdict(markers),
            "chat_template": agreement,
            "counts": {
                "read": selection.num_read,
                "unit": selection.unit,
                "dropped": dict(sorted(selection.dropped.items())),
                "sets": [{**vars(one), "dropped": dict(sorted(one.dropped.items()))} for one in selection.sets],
                **{split: asdict(c) for split, c in counts.items()},
            },
            "files": file_table(aside, but=dataset.MANIFEST),
        }
        manifest = dataset.sealed(json.loads(json.dumps(manifest)))  # as it will be read: a tuple is a list then
        write_json(aside / dataset.MANIFEST, manifest)
        if folder.exists():  # in one step: half of it, left by a kill and without its manifest, would be taken for somebody else's
            folder.rename(old)
        aside.rename(folder)
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
    return manifest, (renderer, example)


def check_replaceable(recipe: Recipe) -> None:
    """Raises ValueError if data.prepared is no folder's path, holds something else than prepared data, or lies among the raw data."""
    check_path("data.prepared", recipe.data.prepared)
    folder = Path(recipe.data.prepared)
    for name in dataset.source_names(recipe):
        if Path(name).is_dir() and folder.resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(
                f"data.prepared: {folder} lies in {name}, so its files would be read as data the next time; name a folder outside"
            )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (names and dataset.MANIFEST not in names) or names - PREPARED:
        raise ValueError(f"data.prepared: {folder} holds something else, which would be overwritten; remove it or name a folder of its own")


def write_bad_rows(path: Path, bad_rows: Iterable[BadRow]) -> None:
    """One JSON object a line: where, why, and what stood there."""
    with path.open("w", encoding="utf-8") as file:
        for row in bad_rows:
            line = {"place": str(row.place), "reason": row.reason, "key": row.key, "value": row.value}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _distance(example: list[Rendered]) -> int:
    """An example of some 150 tokens is one to look at."""
    return abs(max(len(piece.ids) for piece in example) - 150)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the vocabulary, the merges, the control tokens and the template."""
    return hash_of([json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template, tokenizer.special_tokens_map])


def _where(selection: Selection) -> str:
    counts = selection.counts["train"]
    reasons = {
        **selection.dropped,
        "without an answer": counts.unanswered,
        "without one to learn": counts.nothing_new,
        "without a reply of the wanted length": counts.no_reply,
        "with two equal answers": counts.same_answers,
        "held out too": counts.duplicates + counts.same_question,
        "by their weight": counts.weighted_out,
        "refused by the chat format": counts.refused,
        "too long": counts.dropped_too_long,
    }
    lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    first = f" (the first: {selection.bad_rows[0]})" if selection.bad_rows else ""
    return f"of {selection.num_read:,} {selection.unit} read, these were left out: {lost or 'none'}{first}"
