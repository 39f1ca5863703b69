"""OASST messages -> trees -> conversations.

OASST is a forest. Each message names its parent; replies to one message compete, and people ranked them (0 is best):

    P1 ─┬─ A1 (rank 1) ─── P2 ─── A3
        └─ A2 (rank 0) ─── P3                 P: prompter, A: assistant; written top to bottom in the file

A *policy* says which conversations are taken from it. From the tree above:

    policy           conversations                                key   ids
    best_path        P1 A2 P3                                     P1    P1 A2 P3
    joined_replies   "P1" -> "A1 A2"      "P1 P2" -> "A3"         P1    A1 A2
    best_replies     P1 A2                                        P1    A2
    all_replies      P1 A1    P1 A2    P2 A3                      P1    A1
    all_paths        P1 A1 P2 A3    P1 A2 P3                      A3    P1 A1 P2 A3
    each_message     P1    A1    P2    A3    A2    P3             P1    P1

(`key` and `ids` of the first conversation; best_path's key is the tree's id, which is also its root's.) Trees and the
replies to one message are taken in file order, and a tree is walked depth first, so the same data gives the same list.
A conversation may end on a prompter (`best_path` above): `Conversation.without_open_end` takes that turn off later.

Two policies give pairs, for DPO: of two replies to one prompt the better is learnt, with the whole path from the root
down to the prompt as context, and the other one is `rejected`:

    preference_pairs     P1 A2, not A1     the better rank                       key A2>A1   ids P1 A2 A1
    conciseness_pairs    P1 A1, not A2     the shorter of two with like ranks    key A1>A2   ids P1 A1 A2      (A1 is short)

A reply that nobody ranked is in no pair. The English validation file (assets/) has 1,026 pairs of siblings with unequal
ranks, under 418 prompts: what `preference_pairs` gives with `filters: null`. The default filters drop three deleted
replies that carry a rank, which leaves 1,022 pairs under 416 prompts. That a path has to reach its root costs none.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

from qlora_suite.conversations import LONGEST, Conversation, Turn
from qlora_suite.recipe import PAIR_POLICIES, Filters, Pairs, Policy
from qlora_suite.sources import BadRow, Row, shown

Message = dict[str, Any]
ROLES = {"prompter": "user", "assistant": "assistant"}
_FROM_THE_ROOT = ("best_path", "joined_replies", "all_paths", *PAIR_POLICIES)
_WITH_PROMPT = ("best_replies", "all_replies")


@dataclass(frozen=True)
class Forest:
    """Messages of trees: each id once, each parent in its child's tree, no message its own ancestor."""

    messages: list[Message]
    """In file order. Parents may be missing."""
    bad_rows: list[BadRow]
    """All other rows, each for one reason."""
    left_out: frozenset[str]
    """Ids that stand in bad rows alone."""


def forest(rows: Iterable[Row]) -> Forest:
    """The sound messages of some rows, in memory (trees.py: of any number). Of two with one id the first is kept."""
    kept: dict[str, Row] = {}
    bad: list[tuple[Row, str, str]] = []
    for row in rows:
        reason, key = complaint(row.values) or ("", "")
        if not reason and row.values["message_id"] in kept:
            reason, key = "message_id stands twice", "message_id"
        if reason:
            bad.append((row, reason, key))
        else:
            kept[row.values["message_id"]] = row
    strays = [name for name, row in kept.items() if _is_stray(row.values, kept)]
    bad += [(kept.pop(name), "in another tree than its parent", "parent_id") for name in strays]
    reached = _depth_first({name: row.values for name, row in kept.items()})
    circling = [name for name in kept if name not in reached]  # a circle has no top, so the walk never came to it
    bad += [(kept.pop(name), "its own ancestor, or below one that is", "parent_id") for name in circling]
    ids = (row.values.get("message_id") for row, *_ in bad)
    return Forest(
        [row.values for row in kept.values()],
        [BadRow(row.place, reason, key, shown(row.values.get(key))) for row, reason, key in bad],
        frozenset(name for name in ids if isinstance(name, str) and name not in kept),
    )


def conversations(
    messages: list[Message], policy: Policy, filters: Filters | None, left_out: Collection[str] = (), pairs: Pairs | None = None
) -> tuple[list[Conversation], Counter[str]]:
    """The policy's conversations of a `forest`'s messages, and the number of messages dropped by each reason.

    Every message is kept or dropped by exactly one reason: kept = len(messages) - dropped.total(). A kept message need not
    stand in a conversation (`best_path` passes most of them by). `left_out`: parents that are known to be lost. `pairs`: which
    ones a policy of pairs gives.
    """
    by_id = {message["message_id"]: message for message in messages}
    order = _depth_first(by_id)
    reasons = _dropped(order, by_id, policy, filters, left_out)
    kept = {i: m for i, m in order.items() if i not in reasons}
    dropped = Counter(reasons.values())
    assert len(messages) == len(kept) + dropped.total(), "the messages are no forest"
    if policy in PAIR_POLICIES:
        return list(_PAIRS[policy](kept, pairs or Pairs())), dropped
    return list(_POLICIES[policy](kept)), dropped


def ids_line(conversation: Conversation) -> str:
    """`key<TAB>id id id`, without a newline: one line of an `--ids` file."""
    return f"{conversation.key}\t{' '.join(conversation.ids)}"


def split_of(group: str, share: float, salt: str) -> bool:
    """Is this tree held out? True for about `share` (0 to 1) of all groups.

    The first 8 bytes of sha256(salt, a zero byte, group), read as a fraction of 2**64, are below the share. So a tree's side
    depends on nothing but its id and the salt: not on the order, nor on which other trees there are; and what is held out
    at a small share is still held out at a larger one. Another salt gives an independent cut.
    """
    digest = hashlib.sha256(f"{salt}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --- messages -> forest


def complaint(message: Message) -> tuple[str, str] | None:
    """(why a message can stand in no tree, the key at which it is seen)"""
    for key in ("message_id", "message_tree_id", "text"):
        if not isinstance(message.get(key), str):
            return f"no {key}", key
    if len(message["text"]) > LONGEST:
        return f"more than {LONGEST:,} characters", "text"
    if message.get("role") not in tuple(ROLES):
        return "unknown role", "role"
    if not isinstance(message.get("parent_id"), str | None):
        return "parent_id is neither a text nor null", "parent_id"
    if not isinstance(message.get("lang"), str | None):
        return "lang is neither a text nor null", "lang"
    if not isinstance(message.get("rank"), int | float | None):
        return "rank is neither a number nor null", "rank"
    return None


def _is_stray(message: Message, kept: Mapping[str, Row]) -> bool:
    parent = kept.get(message.get("parent_id") or "")
    return parent is not None and parent.values["message_tree_id"] != message["message_tree_id"]


def _depth_first(by_id: dict[str, Message]) -> dict[str, Message]:
    """The messages, parents before children, each tree in one piece; tops and siblings in file order. Circles are not reached."""
    children: dict[str, list[Message]] = defaultdict(list)
    tops = []
    for message in by_id.values():
        parent = by_id.get(message.get("parent_id") or "")
        (tops if parent is None else children[parent["message_id"]]).append(message)
    order = {}
    stack = tops[::-1]
    while stack:
        message = stack.pop()
        order[message["message_id"]] = message
        stack += reversed(children[message["message_id"]])
    return order


# --- what is left out, and why


def _dropped(
    order: dict[str, Message], by_id: dict[str, Message], policy: Policy, filters: Filters | None, left_out: Collection[str]
) -> dict[str, str]:
    """{message id: the reason why it is dropped}. Its own reason comes before its parent's."""
    reasons: dict[str, str] = {}
    for i, message in order.items():
        parent = message.get("parent_id")
        reason = filters and _filtered(message, filters)
        if not reason and policy in _FROM_THE_ROOT and parent and parent not in by_id and parent not in left_out:
            reason = "parent missing"
        if not reason and (parent in reasons or parent in left_out):
            reason = "parent dropped"
        if reason:
            reasons[i] = reason
    if policy in _WITH_PROMPT:
        reasons |= _without_prompt({i: m for i, m in order.items() if i not in reasons}, by_id, policy)
    return reasons


def _without_prompt(forest: dict[str, Message], by_id: dict[str, Message], policy: Policy) -> dict[str, str]:
    """They look no further than one reply and its prompt, so what is dropped here leaves the rest of its branch alone.

    `all_replies` has conditions of its own, whatever the filters: both messages English, not deleted, not failed in review.
    """
    english = Filters(languages=("en",), drop_synthetic=False)
    reasons = {}
    for i, message in forest.items():
        reason = _filtered(message, english) if policy == "all_replies" else None
        parent = message.get("parent_id")
        if not reason and message["role"] == "assistant" and parent not in forest:
            reason = "parent missing" if parent not in by_id else "parent dropped"
        if not reason and message["role"] == "assistant" and parent in reasons:
            reason = "parent dropped"
        if reason:
            reasons[i] = reason
    return reasons


def _filtered(message: Message, filters: Filters) -> str | None:
    """The first filter that the message does not pass. Lengths are in characters, without white space at the edges."""
    chars = len(message["text"].strip())
    if filters.languages is not None and message.get("lang") not in filters.languages:
        return "language"
    if filters.drop_deleted and message.get("deleted"):
        return "deleted"
    if filters.drop_synthetic and message.get("synthetic"):
        return "synthetic"
    if filters.drop_failed_review and message.get("review_result") is False:
        return "failed review"
    if chars < filters.min_chars:
        return "too short"
    if filters.max_chars is not None and chars > filters.max_chars:
        return "too long"
    return None


# --- forest -> conversations: every function takes the kept messages by id, in depth-first order


def _best_path(forest: dict[str, Message]) -> Iterator[Conversation]:
    """One path from each root: at every branch the lowest rank, no rank last, then the earliest, then file order."""
    replies = _replies(forest)
    for root in forest.values():
        if root.get("parent_id"):
            continue
        path = [root]
        while replies[path[-1]["message_id"]]:
            path.append(min(replies[path[-1]["message_id"]], key=_preference))
        yield _conversation(root["message_tree_id"], path, path, [_turn(m) for m in path])


def _joined_replies(forest: dict[str, Message]) -> Iterator[Conversation]:
    """Each prompt that has replies, with all of them joined by a space in file order.

    A later prompt stands behind its tree's first prompt, also joined by a space; what was said between is left out.
    """
    replies = _replies(forest)
    for prompt in forest.values():
        answers = [m for m in replies[prompt["message_id"]] if m["role"] == "assistant"]
        if prompt["role"] != "prompter" or not answers:
            continue
        root = _path(prompt, forest)[0]
        prompts = [prompt] if root is prompt else [root, prompt]
        turns = [Turn("user", " ".join(m["text"] for m in prompts)), Turn("assistant", " ".join(m["text"] for m in answers))]
        yield _conversation(prompt["message_id"], answers, [*prompts, *answers], turns)


def _best_replies(forest: dict[str, Message]) -> Iterator[Conversation]:
    """Each reply of rank 0 with its prompt. A reply that nobody ranked is left out."""
    return (found for reply, found in _with_prompt(forest) if reply.get("rank") == 0)


def _all_replies(forest: dict[str, Message]) -> Iterator[Conversation]:
    """Each reply with its prompt (see `_without_prompt` for the conditions on both)."""
    return (found for _, found in _with_prompt(forest))


def _all_paths(forest: dict[str, Message]) -> Iterator[Conversation]:
    """Every path from a root to a leaf. An assistant message is learnt on the first path that holds it, context on others."""
    replies = _replies(forest)
    learnt: set[str] = set()
    for leaf in forest.values():
        if replies[leaf["message_id"]]:
            continue
        path = _path(leaf, forest)
        turns = [_turn(m, learn=m["message_id"] not in learnt) for m in path]
        learnt |= {m["message_id"] for m in path if m["role"] == "assistant"}
        yield _conversation(leaf["message_id"], path, path, turns)


def _each_message(forest: dict[str, Message]) -> Iterator[Conversation]:
    """Every message's text alone, prompts too, for `chat.format: text`, which has no roles and learns everything."""
    for message in forest.values():
        yield _conversation(message["message_id"], [message], [message], [Turn("assistant", message["text"])])


_POLICIES: dict[Policy, Callable[[dict[str, Message]], Iterator[Conversation]]] = {
    "best_path": _best_path,
    "joined_replies": _joined_replies,
    "best_replies": _best_replies,
    "all_replies": _all_replies,
    "all_paths": _all_paths,
    "each_message": _each_message,
}


def _with_prompt(forest: dict[str, Message]) -> Iterator[tuple[Message, Conversation]]:
    for reply in forest.values():
        prompt = forest.get(reply.get("parent_id") or "")
        if reply["role"] == "assistant" and prompt is not None and prompt["role"] == "prompter":
            yield reply, _conversation(prompt["message_id"], [reply], [prompt, reply], [_turn(prompt), _turn(reply)])


# --- forest -> pairs


def preference_pairs(forest: dict[str, Message], pairs: Pairs) -> Iterator[Conversation]:
    """Of two replies to one prompt whose ranks differ by `margin` or more, the better one is chosen."""

    def apart(better: Message, worse: Message) -> float:
        ranks = worse["rank"] - better["rank"]
        return ranks if ranks >= pairs.margin else 0

    return _pairs(forest, lambda reply: reply["rank"], apart, pairs.choose)


def conciseness_pairs(forest: dict[str, Message], pairs: Pairs) -> Iterator[Conversation]:
    """Of two replies to one prompt whose ranks differ by `within` or less, the shorter one is chosen, whichever rank is the better;
    but only where it has at most the share `shorter` of the other one's words.
    """

    def apart(shorter: Message, longer: Message) -> float:
        few, many = _num_words(shorter), _num_words(longer)
        like_ranks = abs(longer["rank"] - shorter["rank"]) <= pairs.within
        return many - few if like_ranks and few and few / many <= pairs.shorter else 0

    return _pairs(forest, _num_words, apart, pairs.choose)


_PAIRS: dict[Policy, Callable[[dict[str, Message], Pairs], Iterator[Conversation]]] = {
    "preference_pairs": preference_pairs,
    "conciseness_pairs": conciseness_pairs,
}


def _pairs(
    forest: dict[str, Message], order: Callable[[Message], float], apart: Callable[[Message, Message], float], choose: str
) -> Iterator[Conversation]:
    """Pairs of replies to each prompt, chosen first. `order` puts the better reply first, of equals the earlier one; `apart` says how far
    the second lies behind the first, 0 if the two make no pair.
    """
    replies = _replies(forest)
    for prompt in forest.values():
        ranked = [m for m in replies[prompt["message_id"]] if m["role"] == "assistant" and _is_ranked(m)]
        if prompt["role"] != "prompter" or len(ranked) < 2:
            continue
        ranked.sort(key=lambda m: (order(m), str(m.get("created_date")), m["message_id"]))  # whatever the order in the file
        together = pairwise(ranked) if choose == "adjacent" else combinations(ranked, 2)
        pairs = [(better, worse) for better, worse in together if apart(better, worse)]
        if choose == "best_worst" and pairs:
            pairs = [max(pairs, key=lambda pair: apart(*pair))]
        path = _path(prompt, forest)
        context = [_turn(m, learn=m["role"] != "assistant") for m in path]
        for chosen, rejected in pairs:
            key = f"{chosen['message_id']}>{rejected['message_id']}"
            found = _conversation(key, [prompt, chosen, rejected], [*path, chosen, rejected], [*context, _turn(chosen)])
            yield replace(found, rejected=rejected["text"], rejected_outranks=rejected["rank"] < chosen["rank"])


def _is_ranked(message: Message) -> bool:
    """By a number to count with: not by null, NaN or infinity."""
    rank = message.get("rank")
    return rank is not None and abs(rank) <= 2**53


def _num_words(message: Message) -> int:
    return len(message["text"].split())


# --- along the branches


def _replies(forest: dict[str, Message]) -> defaultdict[str, list[Message]]:
    """{message id: the messages that answer it}, in file order."""
    replies = defaultdict(list)
    for message in forest.values():
        replies[message.get("parent_id")].append(message)
    return replies


def _path(message: Message, forest: dict[str, Message]) -> list[Message]:
    """The messages from the root down to this one."""
    path = [message]
    while path[-1].get("parent_id"):
        path.append(forest[path[-1]["parent_id"]])
    return path[::-1]


def _preference(message: Message) -> tuple[bool, int, str]:
    rank = message.get("rank")
    return rank is None, rank or 0, str(message.get("created_date"))


def _turn(message: Message, learn: bool = True) -> Turn:
    return Turn(ROLES[message["role"]], message["text"], learn)


def _conversation(key: str, named: list[Message], held: list[Message], turns: list[Turn]) -> Conversation:
    """`named`: the messages whose ids stand in its line; `held`: all that its text was made of. Its language is theirs, if they agree."""
    languages = {m.get("lang") for m in held}
    return Conversation(
        key=key,
        ids=tuple(m["message_id"] for m in named),
        group=held[0]["message_tree_id"],
        turns=tuple(turns),
        language=languages.pop() if len(languages) == 1 else None,
    )
