"""Rows -> tensors -> the summed loss over their supervised tokens. The only caller of the model in training and evaluation.

Two rows, the first packed with two conversations, made into a batch of 8 places ('+' supervised, '.' padding):

    input_ids     a b c d e f g h     position_ids  0 1 2 3 4 0 1 2
                  k l m n o . . .                   0 1 2 3 4 0 1 2      padding is a conversation of its own
    supervised    - - + + + - - +     the model at place t predicts place t + 1,
                  - - - + + - - -     so the logits at a place before a '+' are the ones that count

Conversations in a row stay apart only if the positions start again, NO attention mask is given and the cache is off: then
transformers builds the block-diagonal causal mask from the positions. An all-ones mask, or the cache, would let them read
each other without a word.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_suite import packed_attention, tiled_head
from qlora_suite.dpo import Pairs, pairs_of, sums_of_pairs
from qlora_suite.recipe import Dpo


@dataclass(frozen=True)
class Batch:
    """All that a forward pass needs to know, so that none of it has to be asked of a GPU."""

    input_ids: Tensor
    """[rows, places] int64"""
    position_ids: Tensor
    """[rows, places] int64, from 0 in each conversation"""
    boundaries: Tensor
    """[1, 1, 1, conversations + 1] int32: where each conversation begins, rows end to end (packed_attention.py)"""
    columns: Tensor
    """[columns] int64, rising, at least one: places where some row has to predict, the only ones whose hidden states the head gets"""
    predicting: Tensor
    """[supervised] int64: which of these hidden states, [rows x columns] end to end, predict a supervised token; row by row"""
    targets: Tensor
    """[supervised] int64: the tokens that they should predict"""
    pairs: Pairs | None = None
    """Of rows that are pairs, what DPO has to know of them"""

    @property
    def size(self) -> int:
        """What a sum of its losses is divided by: supervised tokens, or pairs."""
        return len(self.targets) if self.pairs is None else len(self.pairs.reference)

    def to(self, device: torch.device) -> "Batch":
        parts = {name: value for name, value in vars(self).items() if name != "pairs"}
        if device.type != "cpu":  # there the loop over boundaries is the host's, and nothing moves
            parts = {name: value.pin_memory().to(device, non_blocking=True) for name, value in parts.items()}
        return Batch(**parts, pairs=None if self.pairs is None else self.pairs.to(device))


def collate(rows: Sequence[Mapping[str, Any] | None], pad_id: int, all_supervised: bool = False, dpo: Dpo | None = None) -> Batch:
    """Rows with `input_ids`, `supervised` and `lengths` (of the conversations in them), padded to the longest.

    None stands for an empty row, all padding. There are two places at least, for one predicts nothing.
    `all_supervised`: as if every token were that something predicts; no batch of these rows needs more memory.
    `dpo`: the rows are pairs.
    """
    places = max([2, *(len(row["input_ids"]) for row in rows if row)])
    input_ids = torch.full((len(rows), places), pad_id)
    position_ids = torch.empty((len(rows), places), dtype=torch.int64)
    supervised = torch.zeros((len(rows), places), dtype=torch.bool)
    lengths = [list(row["lengths"]) if row else [] for row in rows]
    for i, row in enumerate(rows):
        used = sum(lengths[i])
        if row:
            input_ids[i, :used] = torch.as_tensor(row["input_ids"])
            supervised[i, :used] = torch.as_tensor(row["supervised"])
        position_ids[i] = torch.cat([torch.arange(n) for n in [*lengths[i], places - used]])
    assert not (supervised & (position_ids == 0)).any(), "the first token of a conversation cannot be supervised"
    if all_supervised:
        supervised = position_ids > 0
    targets = supervised[:, 1:]  # [rows, places - 1]: True where the place before it has to predict
    columns = targets.any(dim=0).nonzero().squeeze(1)
    if columns.numel() == 0:
        # An all-empty micro-batch still goes through the model once, for engines that exchange gradients wait for every rank.
        columns = torch.zeros(1, dtype=torch.int64)
    wanted = targets[:, columns]
    return Batch(
        input_ids,
        position_ids,
        packed_attention.boundaries_of(lengths, places),
        columns,
        wanted.flatten().nonzero().squeeze(1),
        input_ids[:, 1:][:, columns][wanted],
        dpo and pairs_of(rows, dpo, all_supervised),
    )


def token_losses(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The loss of each supervised token, in nats, in row-major order, where logits are divided by the temperature. [supervised] float32,
    with a graph where gradients are on
    """
    with tiled_head.asked(batch.predicting, batch.targets, summed=False, temperature=temperature) as question:
        answer = forward(model, batch, batch.columns)
    return answer.flatten() if question.answered else _plain_losses(answer, batch, temperature)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the losses of the batch's supervised tokens, in nats; 0 (with a graph) if there are none. [1] float32

    Of pairs: DPO's loss, and behind it what dpo.MEASURES are. [1 + measures] float32
    """
    if batch.pairs is not None:
        return sums_of_pairs(token_losses(model, batch), batch.pairs)
    with tiled_head.asked(batch.predicting, batch.targets, summed=True) as question:
        answer = forward(model, batch, batch.columns)
    return (answer if question.answered else _plain_losses(answer, batch)).sum()[None]


def _plain_losses(logits: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    wanted = logits.flatten(0, 1).index_select(0, batch.predicting)
    return nn.functional.cross_entropy(wanted.float() / temperature, batch.targets, reduction="none")


def forward(model: nn.Module, batch: Batch, columns: Tensor) -> Tensor:
    """Logits at the given places. [rows, len(columns), vocabulary]"""
    mask = packed_attention.mask_for(model, batch.boundaries, batch.position_ids)
    return model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False, logits_to_keep=columns
    ).logits


def check_separates_packed_rows(model: nn.Module) -> None:
    """Raises ValueError if packed conversations would leak into each other, or the head cannot be asked for some places.

    Told by trial: the logits of a conversation must not depend on its neighbour in the row.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} does not take logits_to_keep; use a model from a current transformers release")
    device = next(model.parameters()).device
    lengths, ids = [5, 4], torch.arange(1, 10)
    columns = torch.arange(4, device=device) + 5
    was_training = model.training
    model.eval()
    with torch.no_grad():
        seconds = []
        for first in (ids[:5], ids[:5].flip(0)):
            row = {"input_ids": torch.cat([first, ids[5:]]), "supervised": torch.zeros(9, dtype=torch.bool), "lengths": lengths}
            seconds.append(forward(model, collate([row], pad_id=0).to(device), columns).float())
    model.train(was_training)
    difference = (seconds[0] - seconds[1]).abs().max().item()
    if not difference <= 1e-3 * max(1.0, seconds[0].abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} lets packed conversations read each other (logits differ by {difference:.2g}); set "
            "data.packing: false, or with dpo, whose pairs share a row, take another base"
        )
