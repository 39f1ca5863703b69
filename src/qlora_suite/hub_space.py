"""A Gradio Space beside the model: space/app.py as it stands, what it loads (space.json), its pins and its README.

cpu        32 or 16 bits on a processor: the smallest Space
gpu        quantised as it was trained, with bitsandbytes; a merged model in 16 bits
zerogpu    16 bits on a GPU that the hub lends while an answer is written
"""

import shutil
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_save

from qlora_suite.base_config import load_config
from qlora_suite.files import folder_aside, write_json, write_text
from qlora_suite.hub_folder import CARD, MARK, Result, check_place, roots_of
from qlora_suite.leaks import complaint_about_leaks
from qlora_suite.model_card import inline, quantization_arguments
from qlora_suite.recipe import Model

GB = 10**9
MACHINES = {
    "cpu": (("cpu-basic", 16 * GB), ("cpu-upgrade", 32 * GB)),
    "gpu": (("t4-small", 16 * GB), ("l4x1", 24 * GB), ("l40sx1", 48 * GB), ("a100-large", 80 * GB)),
    "zerogpu": (("zero-a10g", 40 * GB),),
}
"""Of the hub, smallest first, with their memory. ZeroGPU's cards have changed over time, so it is counted low."""
AROUND = 2 * GB
"""Python, torch, a CUDA context, the activations of one chat."""
PYTHON = "3.12"
MAX_NEW_TOKENS, NUM_EXAMPLES = 512, 4


@dataclass(frozen=True)
class Plan:
    """How the Space loads the model, and what that takes."""

    dtype: str
    """`float32`, `bfloat16`, or `half`: bf16 or fp16 as the card has it."""
    quantization: dict[str, Any] | None
    machine: str
    memory: int
    lines: tuple[str, ...]
    """The arithmetic."""


def build_space(result: Result, model_folder: Path, folder: Path, hardware: str | None) -> Plan:
    """Write the Space's files to `folder`. Raises ValueError if the model is no chat or too large for the hardware."""
    hardware = hardware or "cpu"
    if result.subject.format == "text":
        raise ValueError("the model continues texts and knows no chat, so there is no chat page for it; leave --space out")
    check_place(folder, result.subject.folder)
    plan = plan_for(result, model_folder, hardware)
    aside = folder_aside(folder, "tmp")
    try:
        app = (resources.files("qlora_suite") / "space" / "app.py").read_text(encoding="utf-8")
        write_text(aside / "app.py", app)
        write_json(aside / "space.json", settings(result, hardware, plan))
        write_text(aside / "requirements.txt", requirements(hardware, plan))
        write_text(aside / CARD, space_readme(result, hardware, plan))
        metadata_save(aside / CARD, front_matter(result, plan))
        if complaint := complaint_about_leaks(aside, roots_of(result.subject)):
            raise ValueError(f"nothing was published: {complaint}")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return plan


def settings(result: Result, hardware: str, plan: Plan) -> dict[str, Any]:
    """space.json"""
    window = result.subject.asked_within
    where = f"[{result.repo}](https://huggingface.co/{result.repo})"
    on = f", on {result.origin.id}" if result.form == "adapter" else ""
    return {
        "model": result.repo,
        "adapter": result.form == "adapter",
        "hardware": hardware,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "window": window,
        "max_new_tokens": min(MAX_NEW_TOKENS, window // 4),
        "title": result.name,
        "description": f"{where}{on}. What it says may be wrong.",
        "examples": list(result.subject.recipe.previews.prompts[:NUM_EXAMPLES]),
    }


def plan_for(result: Result, model_folder: Path, hardware: str) -> Plan:
    """The most exact form that fits the hub's smallest machine, else the next. Raises ValueError if none does."""
    quantization = quantization_arguments(result.subject.recipe.model) if result.form == "adapter" and hardware == "gpu" else None
    dtypes = {"cpu": ("float32", "bfloat16"), "gpu": ("half",), "zerogpu": ("bfloat16",)}[hardware]
    for machine, memory in MACHINES[hardware]:
        for dtype in dtypes:
            lines = arithmetic(result, model_folder, dtype, quantization)
            need = sum(size for size, _ in lines)
            if need <= memory:
                told = tuple(f"{size / GB:.3g} GB: {what}" for size, what in lines)
                return Plan(dtype, quantization, machine, memory, (*told, f"{need / GB:.3g} GB together, of {memory / GB:.0f} GB"))
    raise ValueError(
        f"a Space with {need / GB:.1f} GB of memory is needed, and the largest of --space-hardware {hardware} has "
        f"{MACHINES[hardware][-1][1] / GB:.0f}; take another, or leave --space out"
    )


def arithmetic(result: Result, model_folder: Path, dtype: str, quantization: dict[str, Any] | None) -> list[tuple[int, str]]:
    """Bytes and what they are: weights, adapter, the cache of one full window, and what is around them."""
    parameters, width = result.run["parameters"], 4 if dtype == "float32" else 2
    base, trained = parameters["base"], parameters["trainable"] if result.form == "adapter" else 0
    if result.form == "model":
        base = base or parameters["trainable"]
    if quantization is None:
        lines = [(base * width, f"{base:,} weights of {width} bytes")]
    elif "load_in_4bit" in quantization:
        packed = 2 * (base - parameters["packed"])  # two in a byte count as one
        bits = 4.127 if quantization["bnb_4bit_use_double_quant"] else 4.5
        lines = [
            (round(packed * bits / 8), f"{packed:,} weights of {bits} bits (NF4 with its scales)"),
            ((base - packed) * width, f"{base - packed:,} weights of {width} bytes (embeddings, output, norms)"),
        ]
    else:
        lines = [(base * width, f"{base:,} weights of {width} bytes at most; most of them are held in 8 bits")]
    if trained:
        lines.append((trained * 4, f"{trained:,} weights of the adapter of 4 bytes"))
    config = load_config(Model(base=str(model_folder)) if result.form != "adapter" else result.subject.recipe.model).get_text_config()
    window = result.subject.asked_within
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head * width * window
    lines.append((cache, f"keys and values of {window:,} tokens ({config.num_hidden_layers} layers, {heads} heads of {head})"))
    return [*lines, (AROUND, "Python, torch and the activations of one chat, as a round number")]


def requirements(hardware: str, plan: Plan) -> str:
    """Exact pins: the versions that the app is tested with here. Gradio's is in the README's sdk_version, where the hub wants it."""
    names = ["torch", "transformers", "peft", "accelerate", *(["bitsandbytes"] if plan.quantization else [])]
    index = ["--extra-index-url https://download.pytorch.org/whl/cpu"] if hardware == "cpu" else []
    pins = [f"{name}=={pin(name)}" + ("+cpu" if name == "torch" and hardware == "cpu" else "") for name in names]
    return "\n".join([*index, *pins]) + "\n"


def pin(package: str) -> str:
    """Its version here, without a local part like +cpu."""
    return version(package).partition("+")[0]


def front_matter(result: Result, plan: Plan) -> dict[str, Any]:
    """What the hub builds the Space from."""
    return {
        "title": result.name,
        "emoji": "💬",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": pin("gradio"),
        "python_version": PYTHON,
        "app_file": "app.py",
        "suggested_hardware": plan.machine,
        "models": [result.repo, *([result.origin.id] if result.origin else [])],
        **({"license": result.licence} if result.licence else {}),
        "tags": [MARK],
        "pinned": False,
    }


def space_readme(result: Result, hardware: str, plan: Plan) -> str:
    """The text under the front matter."""
    forms = {"float32": "32 bits", "bfloat16": "16 bits (bf16)", "half": "16 bits (bf16 from Ampere on, fp16 before)"}
    loaded = "quantised as in training, computing in " if plan.quantization else "in "
    lines = [
        f"# {inline(result.name)}",
        "",
        f"A chat page for [{result.repo}](https://huggingface.co/{result.repo}), loaded {loaded}{forms[plan.dtype]}.",
        "",
        "## Hardware and memory",
        "",
        f"Made for `{plan.machine}`" + (" (ZeroGPU: choose it in the Space's settings)." if hardware == "zerogpu" else "."),
        "By arithmetic:",
        "",
        *(f"- {line}" for line in plan.lines),
        "",
        "## Elsewhere",
        "",
        f"`pip install gradio=={pin('gradio')} -r requirements.txt && python app.py` serves it on this machine alone, at",
        "http://127.0.0.1:7860. `MODEL_ID` names another model of the same kind: a hub id or a folder.",
        "A private model needs a secret `HF_TOKEN` with read access to it.",
    ]
    return "\n".join(lines) + "\n"
