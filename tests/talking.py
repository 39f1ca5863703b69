"""A run that learnt a few answers by heart, so that a test knows what the real programs have to show.

`run` and `assistant` are fixtures to be imported; however many modules import them, there is one run in a session.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from in_process import prepared, train

from qlora_suite.assistant import Assistant, load
from qlora_suite.subject import subject_of

HOSTILE = "<img src=x onerror=\"document.title='own'\"> <script>document.title='owned'</script> ![p](https://example.com/x.png) **bold**"
EMOJI = "Grüße 😀 and 日本語!"
LONG = "Counting: " + " ".join(str(number) for number in range(1, 40)) + "."
ANSWERS = {"show html": HOSTILE, "emoji": EMOJI, "count": LONG, "hello": "Hello, friend.\n\nHow are you?"}


@pytest.fixture(scope="session")
def run(tiny_base: Path) -> Path:
    """The run's folder: an adapter on the tiny base that says ANSWERS."""
    return _talking(tiny_base)


@pytest.fixture(scope="session")
def assistant(run: Path) -> Assistant:
    return _loaded(run)


@cache
def _loaded(run: Path) -> Assistant:
    return load(subject_of(run, []), torch.device("cpu"), torch.float32)


@cache
def _talking(base: Path) -> Path:
    folder = base.with_name("talking")
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ANSWERS.items()]
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    settings = ["data.split=all", "data.policy=null", "data.dev_share=0", "data.packing=false", "data.max_length=256"]
    settings += ["adapter.rank=16", "adapter.alpha=32", "optim.learning_rate=0.01", "optim.schedule=cosine"]
    settings += ["train.rows_per_step=8", "train.epochs=150", "train.max_steps=null", 'previews.prompts=["hello", "emoji"]']
    return train(prepared(write_recipe(folder, base, source, *settings)))
