"""A newcomer's way: recipes/my_chat_data.yaml, five lines edited, on a ShareGPT and on an Alpaca file with a small Llama."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, run_script
from families import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = ROOT / "recipes" / "my_chat_data.yaml"
EDITED = re.compile(r"^(?P<key>\s*(?:\w+:|-)) .*# <- \d.*$")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with Llama 3's tokens and chat template, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = tokenizer_of("llama3")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=448, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Real short questions with their best answers."""
    with gzip.open(ROOT / "assets" / "oasst1_en_validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        by_id = {m["message_id"]: m for m in map(json.loads, lines)}
    best = [m for m in by_id.values() if m["role"] == "assistant" and m["rank"] == 0 and m["parent_id"] in by_id]
    return [(by_id[m["parent_id"]]["text"], m["text"]) for m in best if len(m["text"]) < 400][:60]


def sharegpt(pairs: list[tuple[str, str]]) -> list[Any]:
    said = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "id": i} for i, (q, a) in enumerate(pairs)]
    return [*said, {"conversations": [{"from": "narrator", "value": "once"}]}]


def alpaca(pairs: list[tuple[str, str]]) -> list[Any]:
    return [{"instruction": q, "input": "", "output": a} for q, a in pairs]


def edited(folder: Path, **values: str) -> Path:
    """The recipe with its five marked lines rewritten, and nothing else."""
    lines, done = [], []
    for line in RECIPE.read_text(encoding="utf-8").splitlines():
        match = EDITED.match(line)
        if match:
            key = match["key"].strip().rstrip(":")
            name = {"base": "base", "source": "source", "prepared": "prepared", "dir": "run", "-": "prompt"}[key]
            done.append(name)
        lines.append(f"{match['key']} {json.dumps(values[name])}" if match else line)
    assert sorted(done) == sorted(values), "the recipe marks the lines to be edited"
    assert len(done) == 5
    path = folder / "mine.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("form", "write"), [("sharegpt", sharegpt), ("alpaca", alpaca)])
def test_five_edited_lines_train_on_ones_own_file(form: str, write: Any, llama: Path, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(write(pairs), indent=1), encoding="utf-8")
    run = tmp_path / "run"
    recipe = edited(
        tmp_path, base=str(llama), source=str(file), prepared=str(tmp_path / "prepared"), run=str(run), prompt="What is the answer?"
    )

    looked = run_script("prepare_data.py", recipe, "--inspect", file)
    assert looked.returncode == 0, looked.stderr
    assert f"of form {form}" in looked.stdout
    pasted = yaml.safe_load(looked.stdout.split("of a recipe:")[1])
    assert (pasted["data"]["form"], pasted["data"]["split"], pasted["chat"]["format"]) == (form, "by_hash", "model")

    made = run_script("prepare_data.py", recipe)
    assert made.returncode == 0, made.stderr
    assert ("narrator" in made.stdout) is (form == "sharegpt")
    assert "same ids in" in made.stdout
    # the random model learns something in a few steps of an eager rate
    trained = run_script("train.py", recipe, "optim.learning_rate=1e-2", "train.epochs=8", "previews.max_new_tokens=8")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)]
    assert losses[-1] < losses[0] - 0.1
    judged = run_script("evaluate.py", run)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["adapter"]["format"] == "model"
    assert report["adapter"]["bits_per_byte"] < report["base"]["bits_per_byte"]
    template = json.loads((run / "final" / "tokenizer_config.json").read_text()).get("chat_template")
    saved = template or (run / "final" / "chat_template.jinja").read_text()
    assert saved == (ROOT / "tests" / "templates" / "llama3.jinja").read_text()
