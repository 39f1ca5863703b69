"""Faults 24 and 25: recipe, base and machine that do not fit together are told at the start, with what was found; nothing is trained.

The rules themselves are tested in test_adapter.py, test_model.py and test_engine.py; here they are met through the scripts.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import END, write_recipe
from planted import on_a_t4, without_bitsandbytes
from processes import Started, run
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

from qlora_suite.dataset import Rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("misfits")


@pytest.fixture(scope="module")
def few(work: Path, oasst_file: Path) -> Path:
    few = work / "few.jsonl"
    few.write_text("".join(oasst_file.read_text().splitlines(keepends=True)[:100]))
    return few


@pytest.fixture(scope="module")
def recipe(work: Path, tiny_base: Path, few: Path) -> Path:
    """Prepared."""
    recipe = write_recipe(work, tiny_base, few, "train.max_steps=1")
    assert run("prepare_data.py", recipe, log=work / "prepare.log").process.exitcode == 0
    return recipe


def refused(script: str, *args: str | Path, log: Path, **how: object) -> str:
    done: Started = run(script, *args, log=log, **how)
    assert done.process.exitcode == 2, done.output
    assert "Traceback" not in done.output
    return done.output[done.output.index("error: ") :]


def nothing_was_trained(folder: Path) -> bool:
    return not (folder / "metrics.jsonl").exists() and not list(folder.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("targets", "problem", "listed"),
    [
        ("[Wqkv]", r"adapter.targets ['Wqkv'] match no linear module", "self_attn.q_proj       2  -"),
        ("[Wqkv, fc1, fc2]", "adapter.targets ['Wqkv'] match nothing", "mlp.fc1                2  fc1"),
        ("['.*']", "adapter.targets ['.*'] match no linear module", "self_attn.q_proj       2  -"),
        ("[lm_head]", "adapter.targets ['lm_head'] match no linear module", "mlp.fc1                2  -"),
    ],
)
def test_targets_that_match_nothing_or_only_some_stop_the_run(
    targets: str, problem: str, listed: str, recipe: Path, tmp_path: Path
) -> None:
    """Fault 24: `Wqkv` is the name of an older Phi, which PEFT passes over as long as another name matches."""
    said = refused("train.py", recipe, f"adapter.targets={targets}", f"output.dir={tmp_path}/run", log=tmp_path / "log")
    assert problem in said
    assert [line for line in said.splitlines() if line.split() == listed.split()], said
    assert nothing_was_trained(tmp_path / "run")


def test_end_tokens_are_learnt_where_the_pad_token_is_the_end_token(work: Path, tiny_base: Path, few: Path, tmp_path: Path) -> None:
    """Fault 24: what masks every pad token masks every end token with it, and the model never learns to stop."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = END
    tokenizer.save_pretrained(base)
    learnt = []
    for name, one in (("own", tiny_base), ("same", base)):
        recipe = write_recipe(
            tmp_path, one, few, f"data.prepared={tmp_path}/{name}", f"output.dir={tmp_path}/run-{name}", "train.max_steps=2"
        )
        assert run("prepare_data.py", recipe, log=tmp_path / f"{name}.log").process.exitcode == 0
        rows = Rows(tmp_path / name / "train.arrow")
        ends = ((rows[r]["supervised"] & (rows[r]["input_ids"] == tokenizer.eos_token_id)) for r in range(len(rows)))
        learnt.append([int(of_row.sum()) for of_row in ends])
        done = run("train.py", recipe, log=tmp_path / f"{name}.log")
        assert done.process.exitcode == 0, done.output
    assert learnt[0] == learnt[1]
    assert sum(learnt[0]) > 5
    journals = [(tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines() for name in ("own", "same")]
    losses = [[json.loads(line)["loss"] for line in journal if '"loss"' in line] for journal in journals]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", ["human_assistant", "oasst", "chatml"])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused_when_data_is_prepared(
    form: str, tiny_base: Path, few: Path, tmp_path: Path
) -> None:
    """Fault 24: on a GPU it is an assertion in a kernel, thousands of steps later."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=700, **sizes)).save_pretrained(base)
    recipe = write_recipe(tmp_path, base, few, f"chat.format={form}", "chat.role_markers=" + ("text" if form == "oasst" else "auto"))
    said = refused("prepare_data.py", recipe, log=tmp_path / "log")
    assert "700 rows" in said
    assert not (tmp_path / "prepared").exists()


def test_bf16_on_a_card_without_it_is_refused_before_anything_is_loaded(recipe: Path, tmp_path: Path) -> None:
    """Fault 25: torch says yes, and emulates it."""
    said = refused(
        "train.py", recipe, f"output.dir={tmp_path}/run", log=tmp_path / "log", prelude=(on_a_t4,), ACCELERATE_MIXED_PRECISION="bf16"
    )
    assert "Tesla T4 (compute capability 7.5) has no bf16 units" in said
    assert "accelerate_configs/single_t4.yaml" in said
    assert nothing_was_trained(tmp_path / "run")


@pytest.mark.parametrize("key", ["model.attn_implementation=flash_attention_2", "train.flash_attention=true"])
def test_an_attention_kernel_cannot_be_asked_for(key: str, recipe: Path, tmp_path: Path) -> None:
    """Fault 25: FlashAttention-2 does not exist for a T4; nobody can ask for what the card lacks."""
    said = refused("train.py", recipe, key, log=tmp_path / "log")
    assert f"{key.partition('=')[0]}: unknown key; attention is torch's own, whose kernel follows the card" in said


def test_a_config_for_a_gpu_without_a_gpu_is_refused(recipe: Path, tmp_path: Path) -> None:
    """Fault 25: as `accelerate launch --config_file accelerate_configs/single_gpu.yaml` sets it."""
    said = refused("train.py", recipe, f"output.dir={tmp_path}/run", log=tmp_path / "log", ACCELERATE_USE_CPU="false")
    assert "this is meant for a GPU, but torch sees none and would quietly use the CPU" in said
    assert nothing_was_trained(tmp_path / "run")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_without_bitsandbytes_is_refused(quantization: str, recipe: Path, tmp_path: Path) -> None:
    """Fault 25: not installed, or built for another CUDA."""
    more = (f"model.quantization={quantization}", f"output.dir={tmp_path}/run")
    said = refused("train.py", recipe, *more, log=tmp_path / "log", prelude=(without_bitsandbytes,))
    assert f"model.quantization: {quantization} needs bitsandbytes, which cannot be imported" in said
    assert nothing_was_trained(tmp_path / "run")
