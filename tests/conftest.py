"""What many tests need: a tiny random Phi with a tokenizer of its own, real OASST1 messages, recipes and processes to run them."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch and the hub's clients are imported: nothing in a test may reach the network, and two threads are all there are.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# pytest-xdist's workers ignore Ctrl-C, and what they start would inherit that: programs that Ctrl-C shall end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The properties are proved in fp32 on the CPU, on a machine with a GPU too; `pytest -m gpu` runs what needs the card.
if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import yaml
from browser import chromium, page  # noqa: F401 - fixtures
from tokenizers import ByteLevelBPETokenizer
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
OASST1 = ROOT / "assets" / "oasst1_en_validation.jsonl.gz"
END = "<|endoftext|>"


@pytest.fixture(scope="session")
def messages() -> list[dict[str, Any]]:
    """The first 400 OASST1 messages: 35 whole trees and a part of one."""
    with gzip.open(OASST1, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(400), strict=False)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]]) -> Path:
    """A random Phi of 2 layers with 1,024 tokens and 16 spare embedding rows, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("tiny_base")
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator((m["text"] for m in messages), vocab_size=1024, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, bos_token=END, eos_token=END, unk_token=END)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=1040,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    PhiForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oasst_file(tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]]) -> Path:
    """The messages as a JSONL file."""
    path = tmp_path_factory.mktemp("oasst") / "messages.jsonl"
    path.write_text("".join(json.dumps(m) + "\n" for m in messages))
    return path


MakeRecipe = Callable[..., Path]


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_base: Path, oasst_file: Path) -> MakeRecipe:
    """make_recipe("optim.learning_rate=1e-4", ...) -> a recipe's file: QLoRA of the tiny base on the messages, some 20 steps.

    Each call gives another file; data.prepared and output.dir are below the test's own folder unless overridden.
    """

    return functools.partial(write_recipe, tmp_path, tiny_base, oasst_file)


def write_recipe(folder: Path, base: Path, source: Path, *overrides: str) -> Path:
    """A recipe's file in `folder`; what it makes is written there too."""
    tree: dict[str, Any] = {
        "model": {"base": str(base)},
        "data": {
            "source": str(source),
            "split": "by_hash",
            "policy": "all_paths",
            "dev_share": 0.1,
            "prepared": str(folder / "prepared"),
            "max_length": 256,
        },
        "adapter": {"rank": 4, "alpha": 8},
        "optim": {"learning_rate": 2e-3, "schedule": "constant"},
        "train": {"rows_per_step": 8, "max_steps": 20},
        "checkpoints": {"every_minutes": None},
        "output": {"dir": str(folder / "run")},
    }
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    path = folder / f"recipe{len(list(folder.glob('recipe*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_script(name: str, *args: str | Path, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run scripts/NAME in a process of its own, as a person would; one thread, for tests share the machine."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)
