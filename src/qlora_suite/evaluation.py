"""Negative log-likelihoods -> perplexity, bits per byte, slices and a paired interval.

Sums travel and means are made once, at the end: (nats, tokens, bytes) of every supervised turn, each token exactly once.
"""

import torch

from qlora_suite.batches import Limit
from qlora_suite.dataset import Rows
from qlora_suite.engine import Engine
from qlora_suite.loss import collate, summed_loss


@torch.no_grad()
def dev_loss(engine: Engine, rows: Rows, pad_id: int, limit: Limit, budget_tokens: int | None) -> float:
    """Nats per supervised token of the development rows, the first ones up to the budget, shared among the ranks.

    Raises ValueError if there are no development rows.
    """
    if len(rows) == 0:
        raise ValueError("evaluation.every_steps needs a development split, but data.dev_share left it without a conversation")
    used = rows.lengths.cumsum() <= (budget_tokens or float("inf"))
    chosen = list(range(max(1, int(used.sum()))))
    mine = chosen[engine.accelerator.process_index :: engine.accelerator.num_processes]
    engine.model.eval()
    nats, tokens = 0.0, 0
    for piece in limit.cut(sorted(mine, key=lambda r: -rows.lengths[r]), rows.lengths):
        batch = collate([rows[r] for r in piece], pad_id).to(engine.accelerator.device)
        nats += summed_loss(engine.model, batch).double().item()
        tokens += int(batch.supervised.sum())
    engine.model.train()
    nats, tokens = engine.sum_over_ranks(nats, tokens)
    return nats / tokens
