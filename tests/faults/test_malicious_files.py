"""Fault 21: files that run code, that lie about what they hold, or that never end, wherever the scripts read what others made.

Every test goes through the real scripts, but those of adapters' configs, which are many: they call what the scripts call.
"""

import ast
import importlib.util
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_recipe
from planted import PICKLES, plant_modules, plant_pickles, without_memory_to_spare
from processes import Started, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_suite import template_trial
from qlora_suite.adapter import load_adapter


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malicious")


@pytest.fixture(scope="module")
def marker(work: Path) -> Path:
    """What no script may make. The payloads do make it, where they are opened."""
    marker = work / "marker"
    plant_pickles(work, marker, "of_torch.bin", "plain.bin")
    with (work / "plain.bin").open("rb") as file:
        pickle.load(file)
    assert marker.exists()
    marker.unlink()
    torch.load(work / "of_torch.bin", weights_only=False)
    assert marker.exists()
    marker.unlink()
    return marker


@pytest.fixture(scope="module")
def poisoned_base(work: Path, tiny_base: Path, marker: Path) -> Path:
    """The tiny base with pickles and Python files beside its own, and a config that asks for them."""
    folder = Path(shutil.copytree(tiny_base, work / "base"))
    plant_pickles(folder, marker, *PICKLES, "tokenizer.pkl", "vocab.pkl")
    plant_modules(folder, marker, "modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "__init__.py", "conftest.py")
    own = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    change_json(folder / "config.json", auto_map=own)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]})
    return folder


@pytest.fixture(scope="module")
def recipe(work: Path, poisoned_base: Path, messages: list[dict[str, Any]]) -> Path:
    few = work / "few.jsonl"
    few.write_text("".join(json.dumps(message) + "\n" for message in messages[:150]))
    return write_recipe(work, poisoned_base, few, "train.max_steps=2", "checkpoints.every_steps=1")


@pytest.fixture(scope="module")
def trained(work: Path, recipe: Path) -> Path:
    """A run of two steps, prepared and trained by the scripts on the poisoned base, with pickles in each of its folders."""
    passed("prepare_data.py", recipe, work=work)
    passed("train.py", recipe, work=work)
    run, data = work / "run", work / "prepared"
    for folder in (run, *(run / "checkpoints").iterdir(), run / "final", data, data / "tokenizer"):
        if folder.is_dir():
            plant_pickles(folder, work / "marker")
            plant_modules(folder, work / "marker", "modeling_evil.py", "tokenization_evil.py")
    return work / "run"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ended(script: str, *args: str | Path, work: Path, **how: Any) -> Started:
    log = work / f"{script}-{len(list(work.glob('*.log')))}.log"
    return run(script, *args, log=log, **how)


def passed(script: str, *args: str | Path, work: Path, **how: Any) -> str:
    done = ended(script, *args, work=work, **how)
    assert done.process.exitcode == 0, done.output
    return done.output


def refused(script: str, *args: str | Path, work: Path, **how: Any) -> str:
    """The one sentence that a person sees."""
    done = ended(script, *args, work=work, **how)
    assert done.process.exitcode == 2, done.output
    assert "Traceback" not in done.output
    return next(line for line in done.output.splitlines() if line.startswith("error: "))


# ---- beside the real files: not opened


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("prepare_data.py", ["{recipe}", "data.max_length=192", "data.prepared={work}/again"]),
        ("train.py", ["{recipe}", "train.max_steps=2"]),
        ("train.py", ["{recipe}", "output.dir={work}/other"]),
        ("evaluate.py", ["{run}", "--answers", "1", "--answer-tokens", "2"]),
        ("generate.py", ["{run}", "--max-new-tokens", "2", "Who?"]),
        ("generate.py", ["{recipe}", "--adapter", "{run}/final", "--format", "human_assistant", "--max-new-tokens", "2", "Who?"]),
        ("merge.py", ["{run}", "--into", "dequantised", "--tokens", "64"]),
        ("publish.py", ["{run}", "--repo", "someone/tiny", "--dry-run", "--base-id", "someone/base"]),
        ("preflight.py", ["{recipe}", "--config", "accelerate_configs/cpu.yaml"]),
        ("quantize_base.py", ["{recipe}", "{work}/quantized"]),
    ],
)
def test_pickles_and_modules_beside_the_real_files_are_not_opened(
    script: str, arguments: list[str], trained: Path, recipe: Path, work: Path, marker: Path
) -> None:
    """Fault 21: in the base, the prepared data, each checkpoint and the result."""
    passed(script, *(one.format(recipe=recipe, work=work, run=trained) for one in arguments), work=work)
    assert not marker.exists()


def test_a_run_goes_on_from_a_checkpoint_with_pickles_in_it(trained: Path, recipe: Path, work: Path, marker: Path) -> None:
    """Fault 21: optimizer.bin and the like beside the state that is read."""
    copy = Path(shutil.copytree(trained, work / "resumed"))
    shutil.rmtree(copy / "final")
    output = passed("train.py", recipe, f"output.dir={copy}", work=work)
    assert "checkpoint" in output
    assert (copy / "final" / "adapter_model.safetensors").is_file()
    assert not marker.exists()


# ---- instead of the real files: refused


@pytest.mark.parametrize("script", ["train.py", "quantize_base.py", "evaluate.py", "generate.py", "preflight.py"])
def test_a_base_of_pickles_alone_is_refused(
    script: str, trained: Path, recipe: Path, poisoned_base: Path, work: Path, marker: Path
) -> None:
    base = work / "pickled_base"
    if not base.exists():
        shutil.copytree(poisoned_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    more = {"quantize_base.py": [work / "never"], "generate.py": ["Who?"], "preflight.py": ["--config", "accelerate_configs/cpu.yaml"]}
    done = ended(script, recipe, *more.get(script, []), f"model.base={base}", f"output.dir={work}/never_run", work=work)
    assert done.process.exitcode not in (0, None), done.output
    assert "Traceback" not in done.output
    assert not marker.exists()
    assert not (work / "never").exists()


def test_an_index_that_names_a_pickle_is_refused(poisoned_base: Path, trained: Path, recipe: Path, work: Path, marker: Path) -> None:
    """transformers opens whatever the index of the safetensors names, by its ending."""
    for name in ("pytorch_model.bin", "../base/model.safetensors"):
        base = Path(shutil.copytree(poisoned_base, work / f"indexed-{len(name)}", ignore=shutil.ignore_patterns("model.safetensors")))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        said = refused("generate.py", recipe, f"model.base={base}", "Who?", work=work)
        assert f"model.safetensors.index.json names {name!r}" in said
    assert not marker.exists()


def test_an_adapter_of_pickles_alone_is_refused(trained: Path, recipe: Path, work: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(trained / "final", work / "pickled_adapter", ignore=shutil.ignore_patterns("*.safetensors")))
    assert "adapter_model.bin is a pickle" in refused("evaluate.py", recipe, "--adapter", folder, work=work)
    assert "adapter_model.bin is a pickle" in refused("generate.py", recipe, "--adapter", folder, "Who?", work=work)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.bin", "loader.py", "dataset.arrow"])
def test_data_that_is_no_data_is_refused(name: str, work: Path, recipe: Path, oasst_file: Path, marker: Path) -> None:
    folder = work / f"data-{name}"
    folder.mkdir()
    shutil.copy(oasst_file, folder / "rows.jsonl")
    plant = plant_modules if name.endswith(".py") else plant_pickles
    plant(folder, marker, name)
    said = refused("prepare_data.py", recipe, f"data.source={folder}", f"data.prepared={work}/not_prepared", work=work)
    assert f"{name} is not read: data must be" in said
    assert not marker.exists()
    assert not (work / "not_prepared").exists()


# ---- code of its own


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("prepare_data.py", ["data.prepared={work}/not_prepared"]),
        ("quantize_base.py", ["{work}/never"]),
        ("generate.py", ["Who?"]),
        ("evaluate.py", []),
        ("train.py", ["output.dir={work}/never_run"]),
    ],
)
def test_a_base_that_brings_its_own_code_is_refused(
    script: str, more: list[str], trained: Path, poisoned_base: Path, recipe: Path, work: Path, marker: Path
) -> None:
    """A model_type that transformers does not know: it would ask on the terminal whether to run the code, and must not."""
    base = work / "own_code"
    if not base.exists():
        shutil.copytree(poisoned_base, base)
        change_json(base / "config.json", model_type="evil", architectures=["EvilModel"])
    said = refused(script, recipe, *(one.format(work=work) for one in more), f"model.base={base}", work=work)
    if script not in ("train.py", "evaluate.py"):  # which see first that the data was prepared for another base
        assert "it brings code of its own, which is never run here" in said
    assert not marker.exists()


# ---- chat templates


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the base's chat template refuses"),
        ("{{ messages.__init__.__globals__['os'].system('touch MARKER') }}", "the base's chat template refuses"),
        ("{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}", "the base's chat template refuses"),
        ("{% for i in range(10**9) %}x{% endfor %}", "the base's chat template refuses"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 s"),
        ("{{ 'a' * 10**10 }}", "takes more than 1 GiB"),
        ("{% for i in range(99999) %}{{ messages }}{% endfor %}", "writes more than 100,000 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the base's chat template refuses"),
        ("{% for", "the base's chat template refuses"),
    ],
)
def test_a_hostile_chat_template_is_refused(template: str, complaint: str, tiny_base: Path, recipe: Path, work: Path, marker: Path) -> None:
    base = Path(shutil.copytree(tiny_base, work / f"template-{abs(hash(template))}"))
    (base / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    said = refused("prepare_data.py", recipe, f"model.base={base}", "chat.format=model", f"data.prepared={work}/not_prepared", work=work)
    assert complaint in said
    assert not marker.exists()
    assert not (work / "not_prepared").exists()


# ---- adapters


def pattern_that_never_ends() -> str:
    return r"(([a-z_.0-9]+)+)+!"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"r": 10**9}, "has rank 1,000,000,000, but its weights are of rank 4"),
        ({"r": 0}, "adapter_config.json has r: '0'"),
        ({"r": "4"}, "adapter_config.json has r: '4'"),
        ({"r": True}, "adapter_config.json has r: 'True'"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has rank 1,000,000,000"),
        ({"target_modules": ".*"}, "it lacks what its adapter_config.json names"),
        ({"target_modules": pattern_that_never_ends()}, "could take for ever"),
        ({"target_modules": "a" * 3000}, "could take for ever"),
        ({"target_modules": "("}, "which is none"),
        ({"target_modules": [1]}, "adapter_config.json has target_modules"),
        ({"target_modules": "all-linear", "exclude_modules": "("}, "which is none"),
        ({"alpha_pattern": {pattern_that_never_ends(): 1}}, "could take for ever"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "it lacks what its adapter_config.json names"),
        ({"modules_to_save": "model"}, "adapter_config.json has modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [10**9]}}, "token 1,000,000,000; the base has 1,040 rows"),
        ({"peft_type": "EVIL"}, "peft_type: EVIL; what is read here is LORA"),
        ({"peft_type": ["LORA"]}, "what is read here is LORA"),
        ({"lora_alpha": float("nan")}, "adapter_config.json has lora_alpha"),
        ({"lora_dropout": 7}, "adapter_config.json has lora_dropout"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "optimizer.bin"}}, "sets corda_config"),
        ({"init_lora_weights": "eva"}, "adapter_config.json has init_lora_weights"),
        ({"megatron_config": {"x": 1}, "megatron_core": "modeling_evil"}, "sets megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "sets layer_replication"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_an_adapter_s_config_is_looked_at_before_anything_is_built(
    changes: dict[str, Any], complaint: str, trained: Path, tiny_base: Path, tmp_path: Path, marker: Path
) -> None:
    folder = Path(shutil.copytree(trained / "final", tmp_path / "adapter"))
    change_json(folder / "adapter_config.json", **changes)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match=r"^cannot put the adapter ") as caught:
        load_adapter(base, str(folder))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(base, "peft_config")
    assert not any("lora" in name for name, _ in base.named_modules())
    assert not marker.exists()


def without_numbers(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def lying_header(path: Path) -> None:
    """A header that promises a terabyte."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def changed_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def of_a_terabyte(path: Path) -> None:
    """A config of a huge rank, and weights that have it, but of no width."""
    change_json(path.with_name("adapter_config.json"), r=10**8)
    save_file({name: torch.zeros(10**8 if "lora_A" in name else 1, 0) for name in load_file(path)}, path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lying_header, "adapter_model.safetensors is damaged"),
        (endless_header, "adapter_model.safetensors is damaged"),
        (lambda path: path.write_bytes(b""), "adapter_model.safetensors is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "adapter_model.safetensors is damaged"),
        (changed_weights(without_numbers), "it holds values that are no numbers in base_model"),
        (of_a_terabyte, "it has another shape in"),
        (lambda path: path.with_name("adapter_config.json").write_text("{"), "is not JSON"),
        (lambda path: path.with_name("adapter_config.json").write_text("[]"), "does not hold keys and values"),
        (lambda path: path.with_name("adapter_config.json").write_bytes(b"\xff\xfe{"), "is not JSON"),
    ],
    ids=["lying header", "endless header", "empty", "cut off", "NaN", "a terabyte", "no JSON", "a list", "no UTF-8"],
)
def test_an_adapter_s_files_that_lie_are_refused_without_taking_memory(
    damage: Callable[[Path], None], complaint: str, trained: Path, recipe: Path, work: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained / "final", tmp_path / "adapter"))
    damage(folder / "adapter_model.safetensors")
    said = refused("generate.py", recipe, "--adapter", folder, "Who?", work=work, prelude=(without_memory_to_spare, 1.0))
    assert complaint in said


def test_an_adapter_that_points_to_another_base_goes_on_the_one_that_was_named(
    trained: Path, recipe: Path, work: Path, tmp_path: Path
) -> None:
    """Nothing is fetched, and the answers are those of the recipe's base."""
    folder = Path(shutil.copytree(trained / "final", tmp_path / "adapter"))
    mapping = {"base_model_class": "Popen", "parent_library": "subprocess"}
    change_json(folder / "adapter_config.json", base_model_name_or_path="someone/evil", revision="main", auto_mapping=mapping)
    asked = ("--format", "human_assistant", "--max-new-tokens", "8", "Who?")
    told = []
    for adapter in (trained / "final", folder):
        passed("generate.py", recipe, "--adapter", adapter, *asked, "--jsonl", tmp_path / f"{adapter.name}.jsonl", work=work)
        told.append(json.loads((tmp_path / f"{adapter.name}.jsonl").read_text().splitlines()[0]))
    assert told[0]["answer"] == told[1]["answer"]


def test_a_base_that_is_an_adapter_does_not_lead_to_another_base(tiny_base: Path, recipe: Path, work: Path, tmp_path: Path) -> None:
    """transformers reads base_model_name_or_path of an adapter_config.json in the folder, and loads that instead."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}))
    assert "names a base of its own" in refused("generate.py", recipe, f"model.base={base}", "Who?", work=work)


# ---- bases that lie


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1,000,000,000"),
        ({"hidden_size": 10**9}, "hidden_size: 1,000,000,000"),
        ({"intermediate_size": 10**7}, "its config.json describes 2,5"),
        ({"hidden_size": -1}, "hidden_size: -1"),
        ({"hidden_size": "64"}, "cannot load the base model"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"quantization_config": "nf4"}, "cannot load the base model"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}"[:30] for k, v in value.items()),
)
def test_a_config_that_lies_is_refused_without_taking_memory(
    changes: dict[str, Any], complaint: str, tiny_base: Path, recipe: Path, work: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    change_json(base / "config.json", **changes)
    said = refused("quantize_base.py", recipe, tmp_path / "never", f"model.base={base}", work=work, prelude=(without_memory_to_spare, 1.0))
    assert complaint in said
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("storage", ["_C", "load", [], "float99"])
def test_a_base_that_is_quantised_in_no_way_is_refused(storage: Any, tiny_base: Path, recipe: Path, work: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": storage}
    change_json(base / "config.json", quantization_config=how)
    assert "bnb_4bit_quant_storage" in refused("generate.py", recipe, f"model.base={base}", "Who?", work=work)


@pytest.mark.parametrize("damage", [lying_header, endless_header, lambda path: path.write_bytes(b"")], ids=["lying", "endless", "empty"])
def test_a_base_whose_weights_are_damaged_is_refused(
    damage: Callable[[Path], None], tiny_base: Path, recipe: Path, work: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    damage(base / "model.safetensors")
    said = refused("generate.py", recipe, f"model.base={base}", "Who?", work=work, prelude=(without_memory_to_spare, 1.0))
    assert "model.safetensors is damaged" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0"'),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\x80\x04\x95"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": []}'),
    ],
)
def test_a_base_whose_texts_are_damaged_is_one_sentence(
    name: str, content: bytes, tiny_base: Path, recipe: Path, work: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / name).write_bytes(content)
    said = refused("prepare_data.py", recipe, f"model.base={base}", f"data.prepared={tmp_path}/never", work=work)
    assert f"cannot load the tokenizer from folder {base}" in said  # which is of the config's kind


# ---- the source


DANGEROUS_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "_Loader"}
"""recipe_file._Loader is a SafeLoader with one number format more."""


def dangers(tree: ast.AST) -> list[str]:
    """What a source file must not do, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in DANGEROUS_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
            found.append(f"{node.lineno}: calls {called}")
        if called.endswith(("torch.load", "np.load", "numpy.load", "pd.read_pickle", "evaluate.load", "torch.hub.load")):
            found.append(f"{node.lineno}: calls {called}")
        if called in ("yaml.load", "yaml.load_all"):
            loader = next(
                (ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"), ast.unparse(node.args[1]) if node.args[1:] else ""
            )
            if loader.rpartition(".")[2] not in SAFE_LOADERS:
                found.append(f"{node.lineno}: {called} with the loader {loader or 'unnamed'}")
        if called.startswith("yaml.") and called.endswith(("unsafe_load", "full_load")):
            found.append(f"{node.lineno}: calls {called}")
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                found.append(f"{node.lineno}: trust_remote_code={ast.unparse(keyword.value)}")
            if keyword.arg in ("weights_only", "use_safetensors") and ast.unparse(keyword.value) != "True":
                found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                found.append(f"{node.lineno}: allow_pickle={ast.unparse(keyword.value)}")
            if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                found.append(f"{node.lineno}: shell={ast.unparse(keyword.value)}")
    return found


def test_no_source_file_opens_what_can_run_code() -> None:
    files = [path for folder in ("src", "scripts", "slurm", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 80
    found = {str(path.relative_to(ROOT)): dangers(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(x)",
        "a.torch.load(x, weights_only=True)",
        "np.load(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "f(trust_remote_code=args.trust)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert len(dangers(ast.parse(source))) == 1


def test_a_template_is_tried_with_the_packages_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 21: where Jinja is found only by PYTHONPATH, as on a cluster, and where the trial itself fails, no template is blamed."""
    for package in ("jinja2", "markupsafe"):
        folder = Path(importlib.util.find_spec(package).origin).parent
        (tmp_path / package).symlink_to(folder)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    assert template_trial.trial("{{ messages[0].content }} of this test") is None
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    monkeypatch.setattr(template_trial, "__file__", str(tmp_path / "gone.py"))
    with pytest.raises(RuntimeError, match="the process that tries chat templates failed"):
        template_trial.trial("{{ messages[0].content }} of this test, again")
