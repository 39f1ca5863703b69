"""What the job scripts in slurm/ decide before and after a job; no SLURM is needed for these."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, MakeRecipe
from in_process import prepared

from qlora_suite.preemption import REQUEST
from qlora_suite.recipe_file import load, to_yaml


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """slurm/job.py as a module."""
    spec = importlib.util.spec_from_file_location("slurm_job", ROOT / "slurm" / "job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- sweeps --------------------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_each_in_a_folder_named_for_it(job: ModuleType, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("output.dir=runs/x")
    found = job.tasks(recipe, None, ["optim.learning_rate=1e-4,2e-4", "seed=0,1"], ["train.max_steps=3"])
    assert [task[1:3] for task in found] == [
        [f"optim.learning_rate={rate}", f"seed={seed}"] for rate in ("1e-4", "2e-4") for seed in (0, 1)
    ]
    assert [task[0] for task in found] == ["train.max_steps=3"] * 4
    assert found[1][-1] == "output.dir=runs/x-sweep/learning_rate=1e-4,seed=1"


def test_a_comma_inside_brackets_or_quotes_belongs_to_the_value(job: ModuleType) -> None:
    assert job.grid_axis("adapter.targets=[q_proj,v_proj],all-linear") == ["adapter.targets=[q_proj,v_proj]", "adapter.targets=all-linear"]
    assert job.grid_axis('chat.system_prompt="Hello, you",null') == ['chat.system_prompt="Hello, you"', "chat.system_prompt=null"]


def test_two_tasks_never_share_a_folder(job: ModuleType, make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="two tasks of the sweep would write to"):
        job.tasks(make_recipe(), None, ["seed=1,1"], [])
    with pytest.raises(ValueError, match="two tasks of the sweep would write to here"):
        job.tasks(make_recipe(), None, ["seed=1,2"], []) and job.tasks(make_recipe(), None, ["output.dir=here,here"], [])


# ---- starts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "override", "sentence"),
    [
        ("fsdp", "model.quantization=int8", "int8 does not work under FSDP2"),
        ("deepspeed_zero2", "optim.name=adamw_8bit", "adamw_8bit does not work under DeepSpeed ZeRO-2"),
        ("deepspeed_zero3", "adapter.dora=true", "adapter.dora does not work"),
        ("ddp", "seed=1", "was started with other values of seed"),
        ("ddp", "optim.name=adamw_8bit", None),
    ],
)
def test_what_a_job_would_refuse_is_refused_before_it_is_queued(
    job: ModuleType, make_recipe: MakeRecipe, config: str, override: str, sentence: str | None
) -> None:
    recipe = prepared(make_recipe())
    values = load(recipe, [override])
    run = Path(values.output.dir)
    run.mkdir()
    started = load(recipe, ["seed=0", *([] if "seed" in override else [override])])
    (run / "recipe.yaml").write_text(to_yaml(started))
    if sentence is None:
        job.check(values, ROOT / "accelerate_configs" / f"{config}.yaml", 1, 2)
        return
    with pytest.raises(ValueError, match=sentence):
        job.check(values, ROOT / "accelerate_configs" / f"{config}.yaml", 1, 2)


def test_fsdp1_is_refused_before_it_is_queued(job: ModuleType) -> None:
    with pytest.raises(ValueError, match="FSDP1"):
        job.engine_of({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}})


def test_three_starts_from_one_checkpoint_are_the_last(job: ModuleType, make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe())
    run = Path(recipe.output.dir)
    assert [job.begin(recipe) for _ in range(2)] == ["train", "train"]
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    assert [job.begin(recipe) for _ in range(3)] == ["train"] * 3
    with pytest.raises(ValueError, match="was started 3 times from step-000010 and made no new checkpoint"):
        job.begin(recipe)
    (run / "checkpoints" / "step-000020").mkdir()
    assert job.begin(recipe) == "train"


def test_a_request_that_nobody_honoured_does_not_stop_the_next_start(job: ModuleType, make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe())
    run = Path(recipe.output.dir)
    run.mkdir()
    (run / REQUEST).touch()
    assert job.begin(recipe) == "train"
    assert not (run / REQUEST).exists()


def test_only_the_same_recipe_finds_the_run_finished(job: ModuleType, make_recipe: MakeRecipe) -> None:
    path = make_recipe()
    recipe = load(path)
    run = Path(recipe.output.dir)
    run.mkdir()
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    (run / "status.json").write_text(json.dumps({"state": "finished"}))
    assert job.begin(load(path, ["previews.every_steps=7"])) == "finished"  # it has no part in what is learnt
    assert job.begin(load(path, ["seed=5"])) == "train"  # train.py then says what differs


def test_a_recipe_of_grpo_is_trained_by_its_own_script(job: ModuleType, make_recipe: MakeRecipe) -> None:
    rewards = "grpo={rewards: [{name: within_words, words: 30}], max_new_tokens: 16}"
    assert job.begin(load(make_recipe("data.packing=false", rewards))) == "train_grpo"


# ---- ends ----------------------------------------------------------------------------------------------------------------------


def test_a_status_from_before_the_start_says_nothing_about_it(job: ModuleType, tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    assert job.end(tmp_path, job.stamp(tmp_path))[0] == "silent"
    status.write_text(json.dumps({"state": "stopped", "step": 3, "num_steps": 9, "reason": "on a request"}))
    before = job.stamp(tmp_path)
    assert job.end(tmp_path, before)[0] == "silent"
    aside = tmp_path / "aside"
    aside.write_text(status.read_text())
    aside.replace(status)
    assert job.end(tmp_path, before) == ("stopped", "stopped at step 3 of 9 (on a request)")


# ---- a packed environment ------------------------------------------------------------------------------------------------------


def test_a_packed_environment_is_unpacked_once_onto_the_nodes_own_disk(tmp_path: Path) -> None:
    packed, disk = tmp_path / "environment.tar", tmp_path / "disk"
    disk.mkdir()
    made = tmp_path / "made"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    with tarfile.open(packed, "w") as tar:
        tar.add(made, ".")

    def prefix(**environment: str) -> str:
        script = 'source slurm/common.sh && use_environment && exec "${PYTHON_COMMAND[@]}" -c "import sys; print(sys.prefix)"'
        env = {"PATH": os.environ["PATH"], "PACKED_ENVIRONMENT": str(packed), "PYTHON_ENVIRONMENT": str(made), **environment}
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip()

    first = prefix(SLURM_TMPDIR=str(disk))
    assert first.startswith(str(disk))
    marker = Path(first) / "marker"
    marker.touch()
    assert prefix(TMPDIR=str(disk)) == first
    assert marker.exists()
    assert prefix() == str(made)  # no disk of its own: the folder
    assert "PACKED_ENVIRONMENT=missing.tar is not there" in prefix(SLURM_TMPDIR=str(disk), PACKED_ENVIRONMENT="missing.tar")
