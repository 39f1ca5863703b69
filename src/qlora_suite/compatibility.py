"""What does not work with what, said before a model is loaded. Everything else was seen to work: scripts/compatibility.py walks
quantisation x engine x precision x checkpointing x packing x DoRA and writes benchmarks/compatibility.md.

The rules are facts about torch 2.13, deepspeed 0.19, peft 0.21 and bitsandbytes 0.50: the tests walk the refused combinations, too.
"""

from qlora_suite.recipe import Recipe

ONE, DDP, ZERO2, ZERO3, FSDP2 = "one process", "DDP", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "FSDP2"


def check(recipe: Recipe, engine: str) -> None:
    """Raises ValueError, naming the alternative, if the recipe asks for what an engine cannot do."""
    complaints = refusals(recipe, engine)
    if complaints:
        raise ValueError("\n".join(complaints))


def refusals(recipe: Recipe, engine: str) -> list[str]:
    """One sentence for everything that does not work."""
    found = []
    dora = recipe.adapter != "none" and recipe.adapter.dora
    quantization = recipe.model.quantization
    if recipe.optim.name != "adamw" and engine in (ZERO2, ZERO3, FSDP2):
        found.append(
            f"optim.name: {recipe.optim.name} does not work under {engine}, which cannot shard bitsandbytes' states; use adamw, whose "
            "states are spread over the GPUs there, or accelerate_configs/ddp.yaml"
        )
    if quantization == "int8" and engine == FSDP2:
        found.append(
            "model.quantization: int8 does not work under FSDP2, which shards numbers and would break the 8-bit weights; use nf4, or "
            "accelerate_configs/ddp.yaml or deepspeed_zero2.yaml"
        )
    if dora and quantization == "nf4" and engine == ZERO3:
        found.append(
            "adapter.dora does not work on a 4-bit base under DeepSpeed ZeRO-3, for it needs whole weights where they are sharded; use "
            "accelerate_configs/deepspeed_zero2.yaml or fsdp.yaml, or adapter.dora: false"
        )
    if recipe.grpo is not None and engine in (ZERO2, ZERO3, FSDP2):
        found.append(
            f"grpo does not work under {engine}, for each process samples answers by itself, with whole weights of its own; use "
            "accelerate_configs/ddp.yaml"
        )
    if recipe.speed.dequantize_once is True and engine in (ZERO3, FSDP2):
        found.append(
            f"speed.dequantize_once: true does not work under {engine}, which keeps a part of each weight on each GPU; use auto, or "
            "accelerate_configs/ddp.yaml"
        )
    return found
