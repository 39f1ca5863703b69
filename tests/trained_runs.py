"""Finished runs of tiny bases that have learnt to answer and to stop: for what is made of a run afterwards.

run = trained_run(folder, "phi2", "chat.format=chatml", tied=False)
"""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import write_recipe
from families import tokenizer_of
from in_process import prepared, train
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

ARCHITECTURES = {"phi2": "phi", "llama3": "llama", "qwen2_5": "qwen2", "mistral_v1": "mistral", "gemma2": "gemma2"}
QUESTIONS = ("Hello you, how are you?", "say hi")
ANSWERS = ("I am well, thank you.", "hi, world!")
OURS = (
    "data.policy=null",
    "data.filters=null",
    "data.split=by_hash",
    "data.validation_share=0.2",
    "data.dev_share=0",
    "adapter.rank=8",
    "optim.learning_rate=0.02",
    "train.max_steps=30",
    "train.rows_per_step=4",
    "train.epochs=200",
    f"previews.prompts={json.dumps(list(QUESTIONS))}",
    "previews.every_steps=30",
    "previews.max_new_tokens=24",
)


def base_of(folder: Path, family: str, **keys: Any) -> Path:
    """Random weights and a few spare rows."""
    tokenizer = tokenizer_of(family)
    kind = CONFIGS[ARCHITECTURES[family]]
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    sizes = {"vocab_size": len(tokenizer) + 6, "max_position_embeddings": 512}
    config = type(kind).from_dict({**kind.to_dict(), **sizes, **tokens})
    for key, value in keys.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias, std=0.2)  # as pretraining leaves it: not zero
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(folder: Path, base: Path, *overrides: str) -> Path:
    path = folder / "chats.jsonl"
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    lines = []
    for i in range(30):
        number = f" {i}" if i >= 3 else ""  # or all but three would be left out as duplicates
        turns = [turn for q, a in ([pairs[0]], [pairs[1]], pairs)[i % 3] for turn in (("user", q + number), ("assistant", a))]
        lines.append(json.dumps({"id": str(i), "messages": [{"role": role, "content": text} for role, text in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return write_recipe(folder, base, path, *OURS, *overrides)


def trained_run(folder: Path, family: str, *overrides: str, **keys: Any) -> Path:
    """The finished run's folder. `keys` belong to the base's config."""
    folder.mkdir(parents=True, exist_ok=True)
    return train(prepared(recipe_for(folder, base_of(folder / "base", family, **keys), *overrides)))
