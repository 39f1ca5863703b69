"""What every arm of benchmarks/throughput.py is given: one base, one adapter, the same conversations in the same steps.

    folder/base        a random Phi of the asked shape, N(0, 0.02), saved once; the embedded tokenizer, cut to its vocabulary
    folder/prepared    the embedded OASST1 conversations as prepare_data.py packs them, those rows that the steps take
    folder/unpacked    the same conversations, one a row
    folder/recipe.yaml what scripts/train.py is given

A byte-level BPE that is cut after its first merges is the tokenizer that would have been learnt with so few: ids and lengths are
those of real text. All steps hold the same number of packed rows and of conversations, so that one step is one set of conversations
in every arm, padded or packed, whatever its micro-batch.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from transformers import AutoModelForCausalLM, PhiConfig

from qlora_suite import dataset
from qlora_suite.batches import Order
from qlora_suite.files import file_table, read_json, write_json
from qlora_suite.launched_runs import ROOT
from qlora_suite.preparation import prepare
from qlora_suite.recipe import Recipe
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected

TOKENIZER, TREES = ROOT / "assets" / "tiny_phi", ROOT / "assets" / "oasst1_en_validation.jsonl.gz"
PADDED_BATCH = 8
"""The peers' default number of rows: a step's conversations divide by it."""
IGNORED = -100
"""Label of a token that the loss does not count, as transformers has it."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    row: int
    """Tokens of a packed row at most, and of a conversation."""
    rows_per_step: int
    rotary: float = 0.5
    conversations: int | None = None
    """So many of the embedded ones; None: all."""


SHAPES = {
    "tiny": Shape(64, 2, 2, 256, 1024, 512, 4, conversations=120),
    # The head is 7 % of the needed FLOPs (Phi-2: 3 %). A vocabulary of 1,024 would come nearer, and cut one conversation in six at the
    # row's end. Attention is 23 % (Phi-2: 5 %): its share grows as the width falls.
    "small": Shape(256, 4, 4, 1024, 2048, 1024, 8),
    "phi2": Shape(2560, 32, 32, 10240, 51200, 2048, 4, rotary=0.4),
}
PRECISIONS = ("fp32", "bf16", "fp16", "nf4")


def compute_type(precision: str, device: str) -> str:
    """The accelerate name of the type to compute in; nf4 follows the device."""
    return precision if precision != "nf4" else ("bf16" if device == "cuda" else "fp32")


def overrides_of(precision: str) -> list[str]:
    """Of the recipe: bf16 and fp32 have an unquantised base."""
    return ["model.quantization=nf4", "model.double_quantization=true"] if precision == "nf4" else ["model.quantization=none"]


def make(folder: Path, shape: Shape, steps: int, device: str, seed: int = 0, stored: torch.dtype = torch.float32) -> Path:
    """Write everything that the page's head names, for so many steps. Returns the recipe's path.

    Raises ValueError if the embedded conversations do not fill the steps.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_base(folder / "base", shape, device, seed, stored)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe(folder, shape, seed)))
    whole = load(path, [f"data.prepared={folder / 'all'}"])
    with selected(whole) as selection:
        prepare(whole, selection, num_workers=os.cpu_count() or 1)
    rows = dataset.Rows(folder / "all" / "train.arrow")
    steps_rows = equal_steps(rows, steps, shape.rows_per_step, seed)
    packed = [{**rows[r], "examples": rows.examples(r)} for step in steps_rows for r in step]
    _write_rows(folder / "all", load(path), packed, seed)
    alone = [one for row in packed for one in _unpacked(row)]
    _write_rows(folder / "all", load(path, unpacked(folder, len(alone) // steps)), alone, None)
    shutil.rmtree(folder / "all")
    return path


def unpacked(folder: Path, documents_per_step: int) -> list[str]:
    """Overrides: one conversation a row, grouped by length. The steps then hold other conversations, all of them together the same."""
    return ["data.packing=false", f"data.prepared={folder / 'unpacked'}", f"train.rows_per_step={documents_per_step}"]


def equal_steps(rows: dataset.Rows, steps: int, rows_per_step: int, seed: int) -> list[list[int]]:
    """Row numbers of each step: so many rows with, all steps alike, a multiple of PADDED_BATCH conversations.

    Drawn by trial, which leaves the lengths as they are. Raises ValueError if there are too few rows.
    """
    counts = np.array([len(rows[r]["lengths"]) for r in range(len(rows))])
    wanted = max(1, round(counts.mean() * rows_per_step / PADDED_BATCH)) * PADDED_BATCH
    drawn, left, found = np.random.default_rng(seed), np.arange(len(rows)), []
    for _ in range(steps):
        for _ in range(20_000):
            if len(left) < rows_per_step:
                break
            step = drawn.choice(left, rows_per_step, replace=False)
            if counts[step].sum() == wanted:
                left = np.setdiff1d(left, step)
                found.append([int(r) for r in step])
                break
        else:
            break
    if len(found) < steps:
        raise ValueError(
            f"the embedded conversations fill {len(found)} steps of {rows_per_step} rows with {wanted} conversations, and {steps} are "
            "asked for; lower --steps or --rows"
        )
    return found


def steps_of(recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """The rows of each step in the order in which scripts/train.py takes them."""
    rows = dataset.Rows(Path(recipe.data.prepared) / "train.arrow")
    order = Order(
        recipe.seed, rows.lengths, recipe.train.rows_per_step, recipe.train.epochs, recipe.train.max_steps, not recipe.data.packing
    )
    for step in range(order.num_steps):
        yield [rows[r] for r in order.rows_for_step(step)]


def documents(row: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each conversation of a row; a token that is not supervised has the label IGNORED. [tokens] int64"""
    labels = np.where(row["supervised"], row["input_ids"], IGNORED)
    ends = np.cumsum(row["lengths"])
    for end, length in zip(ends, row["lengths"], strict=True):
        yield row["input_ids"][end - length : end], labels[end - length : end]


def needed_flops(shape: Shape, rank: int, steps: Sequence[Sequence[dict[str, Any]]]) -> float:
    """FLOPs a real token that no implementation can do without: forward, and backward to the adapter; causal attention within each
    conversation; the head on supervised tokens alone; nothing twice.

    2 N forward and 2 N backward for N frozen weights, 6 P for P LoRA weights, 4 k d a layer forward and 2.5 times that backward for a
    query with k keys, 4 V d a supervised token. Nothing before the first layer is trained, so its q, k, v and fc1 have no gradient to
    hand on.
    """
    d, ffn = shape.hidden, shape.intermediate
    frozen = shape.layers * (4 * d * d + 2 * d * ffn)
    lora = shape.layers * rank * (4 * 2 * d + 2 * (d + ffn))
    lengths = np.array([n for step in steps for row in step for n in row["lengths"]], dtype=np.float64)
    supervised = sum(int(row["supervised"].sum()) for step in steps for row in step)
    attention = 4 * d * shape.layers * 3.5 * (lengths * (lengths + 1) / 2).sum()
    handed_to_nobody = 2 * (3 * d * d + d * ffn) + 2 * rank * 4 * d
    return float(4 * frozen + 6 * lora - handed_to_nobody + (attention + 4 * shape.vocabulary * d * supervised) / lengths.sum())


def describe(shape: Shape, rank: int, steps: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Sizes of the work, and how its FLOPs are shared out."""
    rows = [row for step in steps for row in step]
    tokens, supervised = sum(len(row["input_ids"]) for row in rows), sum(int(row["supervised"].sum()) for row in rows)
    lengths = np.array([n for row in rows for n in row["lengths"]])
    needed = needed_flops(shape, rank, steps)
    keys = float((lengths * (lengths + 1) / 2).sum() / tokens)
    return {
        "shape": asdict(shape),
        "steps": len(steps),
        "rows_per_step": len(steps[0]),
        "conversations_per_step": sum(len(row["lengths"]) for row in steps[0]),
        "tokens": [sum(len(row["input_ids"]) for row in step) for step in steps],
        "supervised_tokens": [sum(int(row["supervised"].sum()) for row in step) for step in steps],
        "conversation_tokens": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "largest": int(lengths.max())},
        "mean_keys_a_query": keys,
        "needed_flops_per_token": needed,
        "share_of_attention": 4 * keys * shape.hidden * shape.layers * 3.5 / needed,
        "share_of_head": 4 * shape.vocabulary * shape.hidden * supervised / tokens / needed,
    }


def _write_base(folder: Path, shape: Shape, device: str, seed: int, stored: torch.dtype) -> None:
    folder.mkdir()
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < shape.vocabulary}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    config = PhiConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        partial_rotary_factor=shape.rotary,
        max_position_embeddings=2048,
        hidden_act="gelu_new",
        resid_pdrop=0.0,  # Phi-2 has 0.1, which would be drawn otherwise in each arm
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=stored)
    base.save_pretrained(folder)
    del base
    if device == "cuda":
        torch.cuda.empty_cache()  # the arms are other processes, and need it


def _recipe(folder: Path, shape: Shape, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {"base": str(folder / "base")},
        "data": {
            "source": str(TREES),
            "split": "all",
            "policy": "all_paths",
            "dev_share": 0.0,
            "max_examples": shape.conversations,
            "max_length": shape.row,
            "prepared": str(folder / "prepared"),
        },
        "chat": {"role_markers": "text"},  # no token rows are trained, which the peers would have to be taught
        "adapter": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"},
        # eps: at 1e-8 AdamW moves a weight whose gradient is nothing but rounding by the whole rate, in each arm another way
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "eps": 1e-6, "max_grad_norm": 1.0},
        "train": {"rows_per_step": shape.rows_per_step, "gradient_checkpointing": False},
        "checkpoints": {"every_minutes": None},
        "output": {"dir": str(folder / "run")},
    }


def _unpacked(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for (ids, labels), example in zip(documents(row), row["examples"], strict=True):
        yield {"input_ids": ids, "supervised": labels != IGNORED, "lengths": [len(ids)], "examples": [example]}


def _write_rows(source: Path, recipe: Recipe, rows: list[dict[str, Any]], seed: int | None) -> None:
    """The rows as the recipe's prepared data, beside everything else that `source` holds. With a seed: where Order's first epoch finds
    them in this order.
    """
    folder = Path(recipe.data.prepared)
    shutil.copytree(source, folder)
    places = range(len(rows))
    if seed is not None:
        places = np.argsort(_first_epoch(seed, len(rows)))
    drawn = [{**rows[i], "input_ids": rows[i]["input_ids"].tolist()} for i in places]
    dataset.write_row_batches(folder / "train.arrow", [pa.RecordBatch.from_pylist(drawn, schema=dataset.ROWS)])
    manifest = read_json(folder / dataset.MANIFEST)
    (folder / dataset.MANIFEST).unlink()
    tokens, supervised = sum(len(row["input_ids"]) for row in rows), sum(int(row["supervised"].sum()) for row in rows)
    manifest["counts"]["train"].update(rows=len(rows), tokens=tokens, supervised=supervised)
    manifest.update(recipe=dataset.recipe_part(recipe), files=file_table(folder, but=dataset.MANIFEST))
    write_json(folder / dataset.MANIFEST, dataset.sealed(manifest))


def _first_epoch(seed: int, num_rows: int) -> list[int]:
    """Row number at each position."""
    order = Order(seed, [1] * num_rows, 1, 1.0)
    return [order.rows_for_step(i)[0] for i in range(num_rows)]
