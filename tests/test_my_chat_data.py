"""A newcomer's way: recipes/my_chat_data.yaml, five lines edited, on a ShareGPT and on an Alpaca file with a small Llama; and after it
recipes/my_preference_pairs.yaml on a file of pairs.
"""

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
from in_process import evaluate, metrics, train
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected

RECIPE, PAIRS = ROOT / "recipes" / "my_chat_data.yaml", ROOT / "recipes" / "my_preference_pairs.yaml"
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


def edited(folder: Path, recipe: Path = RECIPE, **values: str) -> Path:
    """The recipe with its five marked lines rewritten, and nothing else."""
    lines, done = [], []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        match = EDITED.match(line)
        if match:
            key = match["key"].strip().rstrip(":")
            name = {"base": "base", "source": "source", "prepared": "prepared", "dir": "run", "-": "prompt", "start_from": "start"}[key]
            done.append(name)
        lines.append(f"{match['key']} {json.dumps(values[name])}" if match else line)
    assert sorted(done) == sorted(values), "the recipe marks the lines to be edited"
    assert len(done) == 5
    path = folder / f"mine_{recipe.name}"
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


def test_five_edited_lines_train_on_ones_own_pairs_after_that_run(llama: Path, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    said, answers, start = tmp_path / "chats.json", tmp_path / "pairs.jsonl", tmp_path / "first"
    said.write_text(json.dumps(sharegpt(pairs)), encoding="utf-8")
    others = [answer for _, answer in reversed(pairs)]
    rows = [{"prompt": q, "chosen": a, "rejected": other} for (q, a), other in zip(pairs, others, strict=True) if a != other]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"base": str(llama), "prompt": "What is the answer?"}
    values = load(edited(tmp_path, source=str(said), prepared=str(tmp_path / "prepared"), run=str(start), **asked))
    with selected(values) as selection:
        prepare(values, selection)
    train(tmp_path / "mine_my_chat_data.yaml", "train.max_steps=2", "previews.max_new_tokens=8")

    run, place = tmp_path / "second", f"data.prepared={tmp_path / 'prepared_pairs'}"
    recipe = edited(tmp_path, PAIRS, source=str(answers), start=str(start), run=str(run), **asked)
    looked = run_script("prepare_data.py", recipe, "--inspect", answers)
    assert looked.returncode == 0, looked.stderr
    assert f"pairs           {len(rows)}; turns" in looked.stdout
    made = run_script("prepare_data.py", recipe, place)
    assert made.returncode == 0, made.stderr
    train(recipe, place, "optim.learning_rate=1e-3", "train.epochs=4", "previews.max_new_tokens=8")
    steps = metrics(run)
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4), "it begins as its reference"
    assert steps[-1]["loss"] < 0.69
    assert (run / "final" / "adapter_model.safetensors").is_file()
    report = evaluate(run)
    assert report["preferences"]["pairs"] > 0
    assert report["preferences"]["rewards"] is not None, "of the run and of where it began"


def test_the_two_recipes_are_of_one_adapter_and_format() -> None:
    """So that the second goes on from the first as they stand."""
    chats, of_pairs = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (RECIPE, PAIRS))
    assert of_pairs["adapter"].pop("start_from") == chats["output"]["dir"]
    for section in ("model", "chat", "adapter"):
        assert of_pairs[section] == chats[section]
