"""What the peers are given: the model as PEFT makes it, and the conversations of each step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from throughput_meter import DTYPES, Job
from throughput_workload import documents, steps_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_suite.adapter import coverage, linear_names
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load


def peer_model(job: Job, device: torch.device) -> tuple[Recipe, PeftModel]:
    """The recipe's base and adapter by transformers and PEFT alone, from the same seed: the same first weights."""
    recipe, dtype = load(job.recipe, job.overrides), DTYPES[job.dtype]
    quantization = None
    if recipe.model.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(
        recipe.model.base, dtype=dtype, quantization_config=quantization, device_map={"": 0 if device.type == "cuda" else device}
    )
    adapter = recipe.adapter
    targets = sorted(coverage(linear_names(base), adapter.targets).matched)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=targets
    )
    return recipe, get_peft_model(base, config)


def peer_steps(recipe: Recipe, packed: bool) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """(ids, labels) of each conversation of a step; packed: (ids, labels, lengths) of each row. int64"""
    for rows in steps_of(recipe):
        if packed:
            pieces = [(row, list(documents(row))) for row in rows]
            yield [
                (
                    torch.as_tensor(row["input_ids"]),
                    torch.cat([torch.as_tensor(labels) for _, labels in found]),
                    torch.tensor(row["lengths"]),
                )
                for row, found in pieces
            ]
        else:
            yield [(torch.as_tensor(ids), torch.as_tensor(labels)) for row in rows for ids, labels in documents(row)]


def split(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, places: torch.Tensor | None) -> Iterator[tuple[Any, Any]]:
    """(ids, labels) of each conversation of a peer's batch [rows, places]: by the mask, or where the positions start again."""
    for row in range(len(ids)):
        if mask is not None:
            real = mask[row].bool()
            yield ids[row][real].cpu().numpy(), labels[row][real].cpu().numpy()
        else:
            starts = np.flatnonzero(places[row].cpu().numpy() == 0)[1:]
            yield from zip(np.split(ids[row].cpu().numpy(), starts), np.split(labels[row].cpu().numpy(), starts), strict=True)
