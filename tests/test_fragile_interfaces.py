"""What is leaned on in other projects without being promised there, where no other test would notice that it has changed.

docs/maintaining.md has all of it, and which test goes red.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_recipe
from published import COMMIT, into_cache
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PhiForCausalLM

from qlora_suite import module_table
from qlora_suite import optimizer as optimizers
from qlora_suite.adapter import add_adapter
from qlora_suite.engine import _check_environment
from qlora_suite.merging import merged
from qlora_suite.model import _times_memory_was_short, base_fingerprint, load_base
from qlora_suite.preemption import StopRequest
from qlora_suite.recipe import Adapter, Model, Optim
from qlora_suite.recipe_file import load
from qlora_suite.result import model_class

CPU = torch.device("cpu")
LAUNCHES = {
    "fsdp": ("fsdp.yaml", "--fsdp_offload_params", "true", "--fsdp_activation_checkpointing", "true"),
    "deepspeed": ("deepspeed_zero2.yaml", "--gradient_accumulation_steps", "3"),
    "cpu": ("cpu.yaml",),
    "two on a cpu": ("cpu.yaml", "--num_processes", "2"),
    "ddp by --cpu": ("ddp.yaml", "--num_processes", "2", "--cpu"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The environments in which `accelerate launch` starts a script, by the names of LAUNCHES."""
    folder = tmp_path_factory.mktemp("launched")
    script = folder / "environment.py"
    script.write_text("import json, os, sys\njson.dump(dict(os.environ), open(sys.argv[1], 'w'))\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
    running = [
        subprocess.Popen([*launch, "--config_file", f"accelerate_configs/{config}", *options, script, folder / name], cwd=ROOT)
        for name, (config, *options) in LAUNCHES.items()
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * len(LAUNCHES)
    return {name: json.loads((folder / name).read_text()) for name in LAUNCHES}


@pytest.mark.parametrize(
    ("name", "words"),
    [("fsdp", ["fsdp_offload_params", "fsdp_activation_checkpointing"]), ("deepspeed", ["gradient_accumulation_steps to 3"]), ("cpu", [])],
)
def test_what_the_engines_refuse_is_seen_in_the_environment_that_accelerate_sets(
    launched: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    for key, value in launched[name].items():
        monkeypatch.setenv(key, value)
    for refused in words:
        with pytest.raises(ValueError, match=refused):
            _check_environment()
        monkeypatch.setenv(refused.partition(" ")[0].upper(), "false")  # so that the next is seen
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    _check_environment()


@pytest.mark.parametrize("name", ["two on a cpu", "ddp by --cpu"])
def test_several_processes_of_which_accelerate_starts_one_are_refused(
    launched: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in launched[name].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="asked for several processes, and under a config with use_cpu"):
        _check_environment()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    _check_environment()  # mpirun started them


def test_a_launched_run_is_known_by_its_environment(launched: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """preemption.py watches the launcher only where there is one; engine.py knows by these what was asked for."""
    fsdp = launched["fsdp"]
    assert (fsdp["ACCELERATE_USE_FSDP"], fsdp["FSDP_VERSION"]) == ("true", "2")
    assert fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true", "engine.py need not turn it off any more"
    assert [fsdp[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["0", "1", "1"]
    assert launched["deepspeed"]["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert launched["cpu"]["ACCELERATE_USE_CPU"].lower() == "true"
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert StopRequest(Path("nowhere"))._launcher is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", fsdp["ACCELERATE_MIXED_PRECISION"])
    assert StopRequest(Path("nowhere"))._launcher == os.getppid()


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_a_model_wants_in_fp32_is_loaded_counted_and_merged_so(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    """The names of the attributes and of `_get_dtype_plan`, which joins them."""
    monkeypatch.setattr(PhiForCausalLM, attribute, {"fc2"})
    recipe = load(write_recipe(tmp_path, tiny_base, Path("unused.jsonl")))
    loaded = load_base(recipe.model, torch.float16, CPU)
    kinds = {name: "nf4" if hasattr(p, "quant_state") else str(p.dtype).removeprefix("torch.") for name, p in loaded.named_parameters()}
    assert kinds["model.layers.0.mlp.fc2.bias"] == "float32"
    assert kinds["model.layers.0.mlp.fc1.bias"] == "float16"
    assert {one.name: one.how for one in module_table.build(recipe, None, torch.float16).weights} == kinds
    weights, _ = merged(add_adapter(loaded, Adapter(rank=2), (), False), loaded, torch.float16)
    assert {name for name, weight in weights.items() if weight.dtype == torch.float32} == {name for name in kinds if ".fc2." in name}


def test_the_scales_of_8_bit_weights_are_found_before_and_after_a_forward_pass(tmp_path: Path, tiny_base: Path) -> None:
    """bitsandbytes moves them from the weight (`SCB`) into the layer's `state` when it computes for the first time."""
    recipe = load(write_recipe(tmp_path, tiny_base, Path("unused.jsonl"), "model.quantization=int8"))
    base = load_base(recipe.model, torch.float32, CPU)
    net = add_adapter(base, Adapter(rank=2), (), False)
    before, _ = merged(net, base, torch.float32)
    net.eval()(input_ids=torch.arange(8)[None], use_cache=False)
    after, _ = merged(net, base, torch.float32)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_the_moments_of_a_paged_optimiser_go_back_into_paged_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is no such memory: seen is that bitsandbytes is asked for it, for both moments."""
    layer = torch.nn.Linear(128, 64, bias=False)  # from 4,096 weights on the moments are paged, or in 8 bits
    optimizer = optimizers.build(layer, Optim(name=name, learning_rate=1e-3))
    layer(torch.ones(128)).sum().backward()
    optimizer.step()
    tensors, numbers = optimizers.state_tensors(optimizer, dict(layer.named_parameters()))
    asked, known = [], optimizer.get_state_buffer
    monkeypatch.setattr(optimizer, "get_state_buffer", lambda p, dtype: asked.append(dtype) or known(p, dtype=dtype))
    optimizers.restore_state(optimizer, dict(layer.named_parameters()), tensors, numbers)
    assert asked == [torch.uint8 if "8bit" in name else torch.float32] * 2
    again, _ = optimizers.state_tensors(optimizer, dict(layer.named_parameters()))
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_a_sharded_model_is_known_by_the_class_that_it_had(tiny_base: Path) -> None:
    """FSDP2 puts a subclass of its own in its place, whose name must not go into config.json."""
    net = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        assert type(net) is not PhiForCausalLM
        assert model_class(net) is PhiForCausalLM
    finally:
        torch.distributed.destroy_process_group()


def test_a_base_of_the_hub_is_known_by_its_commit(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config has it in `_commit_hash`; without it the fingerprint would be that of any commit."""
    into_cache(tmp_path, "someone/tiny", COMMIT, tiny_base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_fingerprint(Model(base="someone/tiny")) == f"someone/tiny@{COMMIT}"


def test_an_empty_cache_is_seen_by_the_preflight_although_the_hub_could_be_asked() -> None:
    """The hub's client reads HF_HUB_OFFLINE once, when it is imported: scripts/preflight.py sets it before that."""
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import preflight; from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["True"], done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_allocation_that_fails_is_counted() -> None:
    """transformers swallows the error of a weight that does not fit while it is quantised; the allocator's count is what is left of it."""
    device = torch.device("cuda", 0)
    before = _times_memory_was_short(device)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device=device)
    assert _times_memory_was_short(device) == before + 1
