"""The longest step, really made: the base loaded, the trial of micro_batch.py, and what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora_suite import compatibility, fast_paths, memory_estimate
from qlora_suite.batches import Limit
from qlora_suite.dataset import Rows
from qlora_suite.engine import autocast
from qlora_suite.loss import Batch, collate
from qlora_suite.memory_estimate import Component, Estimate
from qlora_suite.micro_batch import choose, longest_batch, set_checkpointing, try_step
from qlora_suite.optimizer import state_bytes
from qlora_suite.recipe import Recipe
from qlora_suite.samples import blank_row
from qlora_suite.trainable import build_model


def measure(
    recipe: Recipe,
    manifest: Mapping[str, Any],
    rows: Rows,
    dtype: torch.dtype,
    device: torch.device,
    rows_per_rank: int,
    longest: int,
    stored: Sequence[Component],
    guess: Estimate,
) -> Estimate:
    """Load the base and make the step that the trial of train.py, or of train_grpo.py, chooses. `longest`: tokens of its longest row.
    What is stored from step to step keeps its names; what the step needs is what it took, by the allocator on a GPU, by counting
    storages on a CPU.

    Raises ValueError if nothing fits, as train.py would.
    """
    net, base = build_model(recipe, manifest, dtype, device)
    fast_paths.take(net, base, recipe.speed, dtype, recipe.longest_row, recipe.several_in_a_row, compatibility.ONE)
    net.train()
    loss_of = memory_estimate.loss_of(recipe)

    def batch_of(num_rows: int) -> Batch:
        if recipe.grpo is None:
            return longest_batch(rows, num_rows, recipe.dpo).to(device)
        return collate([blank_row(longest)] * num_rows, pad_id=0, all_supervised=True).to(device)

    def trial(num_rows: int, share: float) -> None:
        try_step(net, base, share, lambda: loss_of(net, batch_of(num_rows)), dtype, device)

    limit, checkpointing = choose(recipe.train, rows_per_rank, longest, device, trial, lambda n: n, state_bytes(net))
    num_rows = min(limit.rows, max(1, limit.tokens // longest))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before: they stay until the step
    set_checkpointing(base, checkpointing)
    batch = batch_of(num_rows)

    def loss() -> torch.Tensor:
        with autocast(device, dtype):
            return loss_of(net, batch)

    if device.type == "cpu":
        step = memory_estimate.measured(net, base.get_output_embeddings(), loss)
        return memory_estimate.estimate(
            base.config.get_text_config().vocab_size, stored, step, Limit(limit.rows, num_rows * longest), checkpointing
        )
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss().backward()
    passing = torch.cuda.max_memory_allocated(device) - before
    parts = (*stored, Component("activations, logits and loss", passing, f"measured: {num_rows} rows of {longest:,} tokens"))
    return replace(guess, components=parts, limit=limit, checkpointing=checkpointing)
