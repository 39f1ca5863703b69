"""The data funnel: where every message and every conversation went, as a table for the console and for the report."""

from typing import Any

from qlora_suite.selection import SPLITS

LABELS = {
    "trees": "groups: trees, or first questions",
    "conversations": "conversations taken",
    "duplicates": "  dropped: held out word for word",
    "same_question": "  dropped: begin as a held-out one does",
    "no_reply": "  dropped: no reply of a wanted length",
    "beyond_max": "  dropped: beyond max_examples",
    "weighted_out": "  dropped: by their weight",
    "copies": "  taken once more, by their weight",
    "unanswered": "  dropped: no assistant turn",
    "nothing_new": "  dropped: nothing that is learnt here",
    "refused": "  dropped: the chat format cannot write them",
    "dropped_too_long": "  dropped: too long",
    "same_answers": "  dropped: both answers are the same",
    "dropped_tokens": "  supervised tokens dropped as too long",
    "kept": "conversations kept",
    "prompts": "  of them, prompts without an answer",
    "chosen_longer": "  of them, the chosen answer has more words",
    "rejected_outranks": "  of them, people ranked the rejected one higher",
    "open_ends": "  of them, cut before a last unanswered prompt",
    "cut_conversations": "  of them, cut at max_length",
    "cut_tokens": "  supervised tokens cut",
    "replies_outside": "replies of an unwanted length, as context",
    "system_moved": "system turns moved into a user turn",
    "rewritten": "answers as context: the template rewrites them",
    "marker_texts": "texts in messages that look like a role marker",
    "control_texts": "texts in messages that look like a control token",
    "rows": "rows",
    "tokens": "tokens",
    "supervised": "supervised tokens",
    "chosen": "  of them, of chosen answers",
    "rejected": "  of them, of rejected answers",
}
OF_PAIRS = LABELS | {
    "conversations": "pairs taken",
    "no_reply": "  dropped: an answer of an unwanted length",
    "kept": "pairs kept",
}
ALWAYS = ("trees", "conversations", "kept", "rows", "tokens", "supervised")
AS_MESSAGES = (
    *("rows", "tokens", "supervised", "chosen", "rejected"),
    *("dropped_too_long", "dropped_tokens", "cut_conversations", "cut_tokens"),
)
"""What the validation split does not have: it is kept as messages, whole, and evaluate.py renders it in each format that it compares and
says what does not fit.
"""
OF_ANSWERS = ("dropped_tokens", "cut_tokens", "supervised")
"""Of no meaning where prompts alone are read."""


def reading_rows(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """What was read, and what was left out by which reason."""
    dropped = counts["dropped"]
    lines = [(f"{counts['unit']} read", counts["read"]), *((f"  dropped: {reason}", count) for reason, count in dropped.items())]
    return [*lines, (f"{counts['unit']} kept", counts["read"] - sum(dropped.values()))]


def split_rows(counts: dict[str, Any], packing: bool, prompts: bool = False) -> list[tuple[str, list[str]]]:
    """A label and its values in the order of SPLITS; lines that are zero throughout are left out. `prompts`: no answer there is learnt."""
    lines = []
    pairs = any(counts[split].get("pairs", 0) for split in SPLITS)
    for key, label in (OF_PAIRS if pairs else LABELS).items():
        values = [counts[split].get(key, 0) for split in SPLITS]  # data of an earlier version has fewer
        if (any(values) or key in ALWAYS) and not (prompts and key in OF_ANSWERS):
            lines.append((label, [*(f"{v:,}" for v in values[:2]), "-" if key in AS_MESSAGES else f"{values[2]:,}"]))
    if packing:
        lines.append(("padding in packed rows", [*(f"{counts[split].get('padding_share', 0.0):.1%}" for split in ("train", "dev")), "-"]))
    return lines
