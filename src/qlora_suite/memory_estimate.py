"""Peak memory of a training step by component, before there are weights or a card.

What is stored (base, adapter, gradients, optimiser) is arithmetic. What a step keeps and needs in passing is found by running it:
the real model, on tensors that have shapes and no memory (torch's FakeTensorMode), while every storage that comes and goes is
counted. So each architecture that transformers knows is estimated by the same code.

    base + adapter + gradients + optimiser + activations + the larger of (logits and loss, backward pass of a layer)  <=  0.92 x card
    base + adapter             + optimiser + keys and values of what is sampled at once + one more token             <=  0.92 x card

the second with GRPO alone, which holds a copy of the trained weights in both. The last 8 % are for the CUDA context and fragmentation:
the headroom that the trial at the start of training leaves, too.
"""

import contextlib
import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qlora_suite import compatibility, fused_lora, grpo, packed_attention, tiled_head
from qlora_suite.adapter import IN_A_LAYER
from qlora_suite.batches import Limit
from qlora_suite.dequantized import ROOM
from qlora_suite.engine import autocast
from qlora_suite.loss import Batch, collate, summed_loss
from qlora_suite.micro_batch import CPU_TOKENS, HEADROOM, by_speed, in_words, set_checkpointing
from qlora_suite.module_table import Skeleton, Stored
from qlora_suite.recipe import Recipe, Train
from qlora_suite.sampling import Sampling, probabilities

SMALL_STATE, STATE_BLOCK, STATE_TABLES = 4096, 256, 2 * 256 * 4
"""Of bitsandbytes' 8-bit optimisers: smaller parameters keep fp32 moments; moments that share a scale; the two tables' bytes."""
LIVE_PARAMETERS = 100_000_000
"""That ZeRO-3 holds gathered at a time, as engine.py sets it."""
BUCKET = 500_000_000
"""Elements of a ZeRO bucket at most, as engine.py sets it."""


@dataclass(frozen=True)
class Component:
    name: str
    bytes: int
    how: str
    """The arithmetic, in words and numbers."""


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass needs beside weights, gradients and optimiser. Bytes."""

    activations: int
    """Kept from the layers' forward pass when the head is reached."""
    loss: int
    """At most on top of them, from the head to its gradient: logits, their softmax, the gradient."""
    backward: int
    """At most on top of them, while the gradient goes through the layers: where they recompute, a layer's activations again."""

    @property
    def total(self) -> int:
        return self.activations + max(self.loss, self.backward)


@dataclass(frozen=True)
class Sampled:
    """What it takes to sample answers, while no gradient is there. Bytes."""

    answers: int
    """At once."""
    cache: int
    """Their keys and values, when the last token comes."""
    total: int
    """With all that is stored, and what passes."""


@dataclass(frozen=True)
class Estimate:
    components: tuple[Component, ...]
    step: Step
    limit: Limit
    """What goes through at once."""
    checkpointing: float
    """Share of the layers that recompute their activations."""

    @property
    def total(self) -> int:
        return sum(component.bytes for component in self.components)


# ---- what is stored: arithmetic ---------------------------------------------------------------------------------------------------


def optimizer_bytes(shapes: Sequence[tuple[int, ...]], name: str) -> int:
    """State of `optim.name` over parameters of these shapes, after its first step."""
    total, tables = 0, 0
    for n in (torch.Size(shape).numel() for shape in shapes):
        if name == "adamw":
            total += 8 * n + 4  # two fp32 moments, and the step
        elif name == "paged_adamw" or n < SMALL_STATE:
            total += 8 * n
        else:
            total, tables = total + 2 * n + 2 * 4 * -(-n // STATE_BLOCK), STATE_TABLES
    return total + tables


def stored(skeleton: Skeleton, optimizer: str, engine: str, processes: int) -> list[Component]:
    """What one process holds from step to step: base, adapter, gradients, optimiser."""
    shards = processes if engine in (compatibility.ZERO3, compatibility.FSDP2) else 1
    trains_all = not any(".lora_" in name for name in skeleton.trained)
    found = [] if trains_all else _base(skeleton, shards)
    rows = {name: shape for name, shape in skeleton.trained.items() if "trainable_tokens" in name}
    num_rows, num = sum(map(math.prod, rows.values())), skeleton.num_trained
    what = "all weights" if trains_all else "LoRA weights"
    found.append(Component(what, _share(4 * (num - num_rows), shards), f"{num - num_rows:,} x 4 B (fp32){_over(shards)}"))
    if num_rows:
        found.append(Component("trained token rows", _share(4 * num_rows, shards), f"{num_rows:,} x 4 B (fp32){_over(shards)}"))
    if trains_all and skeleton.buffers:
        found.append(Component("buffers", skeleton.buffers, "rotary frequencies and the like"))
    how, size = f"{num:,} x 4 B", 4 * num
    if engine == compatibility.DDP:
        how = f"{how}, in DDP's buckets"
    elif engine == compatibility.ZERO2:
        bucket = 4 * min(num, BUCKET)
        how, size = f"{how}, ZeRO's bucket and this GPU's part", size + bucket + _share(4 * num, processes)
    elif shards > 1:
        how, size = f"{how}{_over(shards)}, and a bucket", _share(4 * num, shards) + 4 * min(num, BUCKET)
    found.append(Component("gradients", size, how))
    states = optimizer_bytes(list(skeleton.trained.values()), optimizer)
    parts = processes if engine in (compatibility.ZERO2, compatibility.ZERO3, compatibility.FSDP2) else 1
    each = {"adamw": "8 B", "paged_adamw": "8 B (may move to the CPU's memory)", "adamw_8bit": "2 B and scales"}
    how = f"{num:,} x {each.get(optimizer, '2 B and scales (may move to the CPU)')}{_over(parts)}"
    if engine in (compatibility.ZERO2, compatibility.ZERO3):
        states, how = states + 4 * num, f"{num:,} x (8 B + 4 B of ZeRO's own copy){_over(parts)}"
    found.append(Component(f"optimiser ({optimizer})", _share(states, parts), how))
    if gathered := _gathered(skeleton, engine, processes):
        found.append(gathered)
    return found


def copies(skeleton: Skeleton, engine: str, memory: int | None) -> list[Component]:
    """Of the 4-bit weights in the type that is computed in, where they would be kept; `memory`: of the card, if it is known."""
    num = sum(one.parameters for one in skeleton.weights if one.how == "nf4")
    size, wanted = num * skeleton.dtype.itemsize, skeleton.speed.dequantize_once
    sharded = engine in (compatibility.ZERO3, compatibility.FSDP2)
    if not num or sharded or wanted is False or (wanted == "auto" and (memory is None or size > ROOM * memory)):
        return []
    return [Component("copies of 4-bit weights", size, f"{num:,} x {skeleton.dtype.itemsize} B (speed.dequantize_once)")]


def reference(skeleton: Skeleton) -> Component:
    """GRPO's, for a KL divergence: the trained weights as they were at the start (reference_weights.py)."""
    num = skeleton.num_trained
    return Component("reference", 4 * num, f"{num:,} x 4 B: a copy of the trained weights (grpo.beta)")


def _base(skeleton: Skeleton, shards: int) -> list[Component]:
    by_kind: dict[str, list[Stored]] = {}
    for one in skeleton.weights:
        by_kind.setdefault(one.how, []).append(one)
    found, buffers = [], skeleton.buffers
    for how, members in sorted(by_kind.items(), key=lambda pair: -sum(s.bytes for s in pair[1])):
        count, size = sum(s.parameters for s in members), sum(s.bytes for s in members)
        if how in ("nf4", "int8"):
            name, words = f"base, {4 if how == 'nf4' else 8}-bit", f"{count:,} x {8 * size / count:.3f} bit, with scales"
        else:
            name, words = f"base, {how}", f"{count:,} x {size // count} B"
            size, buffers = size + buffers, 0  # rotary frequencies and the like: some hundred bytes
        found.append(Component(name, _share(size, shards), words + _over(shards)))
    return found


def _gathered(skeleton: Skeleton, engine: str, processes: int) -> Component | None:
    """What a sharding engine puts together for a moment."""
    if processes == 1 or engine not in (compatibility.ZERO3, compatibility.FSDP2):
        return None
    layers: dict[str, int] = {}
    for one in skeleton.weights:
        match = IN_A_LAYER.match(one.name)
        place = match["layer"] if match else "outside"
        layers[place] = layers.get(place, 0) + one.bytes
    outside, largest = layers.pop("outside", 0), max(layers.values(), default=0)
    if engine == compatibility.FSDP2:
        return Component("gathered weights", 2 * largest + outside, "two layers, and what is outside of the layers")
    whole = sum(one.bytes for one in skeleton.weights)
    size = min(whole, LIVE_PARAMETERS * 2 + outside)
    return Component("gathered weights", size, f"up to {LIVE_PARAMETERS:,} elements, and the embedding and head")


def _share(size: int, parts: int) -> int:
    return -(-size // parts)


def _over(parts: int) -> str:
    return f" / {parts} GPUs" if parts > 1 else ""


# ---- what a step needs: the real model on tensors without memory --------------------------------------------------------------------


CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Of a config: the model does something to its logits after the head (Gemma 2, Cohere, Granite, Falcon-H1)."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that come into being while it is on, and of those that are still there. The rest of the world
    (`known`) does not count. For real and for fake tensors alike.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._live:
            size = storage.nbytes()
            self._live[key] = (size, weakref.ref(storage, lambda _: self._gone(key)))
            self.now += size
            self.peak = max(self.peak, self.now)
        return tensor

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)[0]


def measured(net: nn.Module, head: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Run `loss` and its backward pass, and say what they needed beside weights and gradients, which must be there already."""
    marks: dict[str, int] = {}

    def at_the_head(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        marks["activations"] = live.peak = live.now

        def gradient_is_there(_: Tensor) -> None:
            marks["loss"], live.peak = live.peak, live.now

        if hidden.requires_grad:
            hidden.register_hook(gradient_is_there)

    known = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    known += [t for p in net.parameters() if (state := getattr(p, "quant_state", None)) is not None for t in _tensors_of(state)]
    known += [module.unpacked for module in net.modules() if "unpacked" in vars(module)]
    handle = head.register_forward_pre_hook(at_the_head, with_kwargs=True)
    try:
        with LiveBytes(known) as live:
            loss().backward()
    finally:
        handle.remove()
        torch.clear_autocast_cache()
    kept = marks["activations"]
    return Step(kept, max(0, marks.get("loss", live.peak) - kept), max(0, live.peak - kept))


def _tensors_of(state: Any) -> list[Tensor]:
    """Of a 4-bit weight's quantisation state."""
    found = [value for value in vars(state).values() if isinstance(value, Tensor)]
    return found + (_tensors_of(state.state2) if getattr(state, "state2", None) is not None else [])


Loss = Callable[[nn.Module, Batch], Tensor]


def loss_of(recipe: Recipe) -> Loss:
    """What the trial of the recipe's script goes through, forward and backward."""
    if recipe.grpo is None:
        return lambda net, batch: summed_loss(net, batch)[0]
    return lambda net, batch: grpo.log_probabilities(net, batch, recipe.grpo.temperature).sum()


def traced(skeleton: Skeleton, rows: int, length: int, checkpointing: float, cuda: bool = True, loss: Loss = summed_loss) -> Step:
    """A step on `rows` rows of `length` tokens, all of them supervised, as train.py's trial makes it. `cuda`: with the rules that
    CUDA's autocast has; else with the CPU's.
    """
    net, base, dtype = skeleton.net, skeleton.base, skeleton.dtype
    net.train()
    set_checkpointing(base, checkpointing)
    row = {"input_ids": [0] * length, "supervised": [False] * length, "lengths": [length]}
    batch = collate([row] * rows, pad_id=0, all_supervised=True)
    without_memory = (FakeTensorMode(allow_non_fake_inputs=True), _fake_weights(net), _stand_ins(net, dtype, cuda))
    with contextlib.ExitStack() as stack:
        for context in (*without_memory, _computing_in(dtype, cuda), _faster(skeleton, batch, cuda)):
            stack.enter_context(context)
        return measured(net, base.get_output_embeddings(), lambda: loss(net, batch))


def traced_sampling(skeleton: Skeleton, answers: int, prompt: int, longest: int, cuda: bool = True) -> tuple[int, int]:
    """(keys and values at the last token, the most that there is at any time): bytes that generation.decode takes for so many prompts of
    `prompt` tokens, answered until there are `longest`.
    """
    net, base = skeleton.net, skeleton.base
    batch = collate([{"input_ids": [0] * longest, "supervised": [False] * longest, "lengths": [longest]}], pad_id=0, all_supervised=True)

    def tokens(count: int, before: Any = None) -> Any:
        """Their forward pass, behind the keys and values of those before; a token is drawn, and all keys and values are given back."""
        ids = torch.zeros((answers, count), dtype=torch.int64)
        found = base(input_ids=ids, attention_mask=None, past_key_values=before, use_cache=True, logits_to_keep=1)
        probabilities(found.logits[:, -1].float(), Sampling(1.0)).cumsum(dim=-1)
        return found.past_key_values

    net.eval()
    without_memory = (FakeTensorMode(allow_non_fake_inputs=True), _fake_weights(net), _stand_ins(net, skeleton.dtype, cuda))
    with contextlib.ExitStack() as stack:
        for context in (*without_memory, _computing_in(skeleton.dtype, cuda), _faster(skeleton, batch, cuda), torch.no_grad()):
            stack.enter_context(context)
        torch.clear_autocast_cache()
        known = [*net.parameters(), *net.buffers()]
        with LiveBytes(known) as live:
            tokens(prompt)
            of_prompt = live.peak
        with LiveBytes(known) as live:
            cache = tokens(longest - 1)
            held = live.peak = live.now
            tokens(1, cache)
            return held, max(of_prompt, live.peak)


@contextlib.contextmanager
def _faster(skeleton: Skeleton, batch: Batch, cuda: bool) -> Iterator[None]:
    """As fast_paths.take, without its trial. Cards that compute in bf16 have the kernel for attention, the others keep a mask."""
    net, head = skeleton.net, skeleton.base.get_output_embeddings()
    config = skeleton.base.config.get_text_config()
    with contextlib.ExitStack() as stack:
        by_itself = not cuda or skeleton.dtype == torch.bfloat16
        if skeleton.speed.attention == "auto" and packed_attention.use(skeleton.base, batch.input_ids.shape[1], by_itself):
            stack.callback(packed_attention.stop_using, skeleton.base)
        if skeleton.speed.lora == "auto":
            with fused_lora.Watched(net) as watched, torch.no_grad():
                summed_loss(net, batch)
            stack.callback(fused_lora.use(net, watched.groups()))
        if skeleton.speed.head == "auto" and not any(getattr(config, key, None) for key in CHANGED_LOGITS):
            tiled_head.use(head, config.vocab_size)
            stack.callback(tiled_head.stop_using, head)
        yield


@contextlib.contextmanager
def _fake_weights(net: nn.Module) -> Iterator[None]:
    """Tensors without memory in the places of the meta device's, which are too little for a backward pass. Gradients are there."""
    before: list[tuple[dict, str, Tensor]] = []
    made: dict[int, Tensor] = {}  # a weight that stands in two places (a tied head) is one
    for module in net.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                if old is None:
                    continue
                before.append((place, name, old))
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
                    if old.requires_grad:
                        made[id(old)].grad = torch.empty_like(new)
                place[name] = made[id(old)]
    try:
        yield
    finally:
        for place, name, old in before:
            place[name] = old


class _Dequantized(torch.autograd.Function):
    """What bitsandbytes' products with quantised weights take and keep: the weight at full size for a moment; the input, in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], keeps_input: bool) -> Tensor:
        ctx.shape, ctx.input_shape, ctx.kept = shape, x.shape, x if keeps_input else None
        weight = x.new_empty(shape)
        out = x.new_empty((*x.shape[:-1], shape[0]))
        del weight
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = gradient.new_empty(ctx.shape)
        out = gradient.new_empty(ctx.input_shape)
        del weight
        return out, None, None


@contextlib.contextmanager
def _stand_ins(net: nn.Module, dtype: torch.dtype, cuda: bool) -> Iterator[None]:
    """bitsandbytes' modules compute nothing, and take the memory that they would. CUDA's autocast has layer norms in fp32, the CPU's
    has not (RMS norms say themselves that they want fp32).
    """
    import bitsandbytes.nn

    def four_bits(module: nn.Module, x: Tensor) -> Tensor:
        return _Dequantized.apply(x.to(dtype), (module.out_features, module.in_features), False).to(x.dtype)

    def eight_bits(module: nn.Module, x: Tensor) -> Tensor:
        return _Dequantized.apply(x, (module.out_features, module.in_features), True)

    def in_fp32(module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = (p.float() if p is not None else None for p in (module.weight, module.bias))
        return nn.functional.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)

    kinds = [(bitsandbytes.nn.Linear4bit, four_bits), (bitsandbytes.nn.Linear8bitLt, eight_bits)]
    if cuda and dtype != torch.float32:
        kinds.append((nn.LayerNorm, in_fp32))
    changed = []
    for module in net.modules():
        for kind, stand_in in kinds:
            if isinstance(module, kind):
                module.forward = types.MethodType(stand_in, module)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@contextlib.contextmanager
def _computing_in(dtype: torch.dtype, cuda: bool) -> Iterator[None]:
    """The engine's autocast."""
    if dtype == torch.float32 or not cuda:
        with autocast(torch.device("cpu"), dtype):
            yield
        return
    before = torch.is_autocast_enabled("cuda")  # PEFT asks for this one
    torch.set_autocast_enabled("cuda", True)
    try:
        with autocast(torch.device("cpu"), dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


# ---- both together ------------------------------------------------------------------------------------------------------------------


def estimate(vocabulary: int, stored_parts: Sequence[Component], step: Step, limit: Limit, checkpointing: float) -> Estimate:
    """The peak of a step with this much at once, over a vocabulary of this size."""
    what = f"checkpointing {in_words(checkpointing)}" if checkpointing else "kept for backward"
    top = "logits and loss" if step.loss >= step.backward else ("recomputing a layer" if checkpointing else "backward pass of a layer")
    how = (
        f"{limit.tokens:,} tokens x {vocabulary:,} x {step.loss / limit.tokens / vocabulary:.1f} B"
        if top == "logits and loss"
        else "traced"
    )
    passing = (
        Component("activations", step.activations, f"{limit.tokens:,} tokens x {step.activations / limit.tokens / 1024:,.0f} KiB ({what})"),
        Component(top, max(step.loss, step.backward), how),
    )
    return Estimate((*stored_parts, *passing), step, limit, checkpointing)


def fits(estimate: Estimate | Sampled, memory: int) -> bool:
    """As micro_batch's trial would say on a card with this much memory."""
    return estimate.total <= HEADROOM * memory


def suggested(
    skeleton: Skeleton,
    stored_parts: Sequence[Component],
    train: Train,
    rows_per_rank: int,
    longest: int,
    memory: int | None,
    cpu: bool,
    loss: Loss = summed_loss,
) -> Estimate:
    """The estimate of what train.py would choose on such a card, in the order in which it tries; of its smallest choice if nothing
    fits or the card is not known. On a CPU it tries nothing, and nor does this.

    Two steps are traced for each share of recomputing layers: what they need grows by the same amount with each row.
    """
    vocabulary = skeleton.base.config.get_text_config().vocab_size
    auto, ways = train.micro_batch == "auto", by_speed(train, rows_per_rank, longest)
    if cpu:
        rows = min(rows_per_rank, max(1, CPU_TOKENS // longest)) if auto else train.micro_batch
        ways = [(rows, min(share for _, share in ways))]
    least = min(ways, key=lambda way: (way[0], -way[1]))
    step = functools.cache(lambda rows, share: traced(skeleton, rows, longest, share, not cpu, loss))

    def step_of(rows: int, share: float) -> Step:
        return step(1, share) if rows == 1 else _with_rows(step(1, share), step(2, share), rows)

    def estimate_of(rows: int, share: float) -> Estimate:
        return estimate(vocabulary, stored_parts, step_of(rows, share), Limit(rows_per_rank if auto else rows, rows * longest), share)

    if cpu or memory is None:
        return estimate_of(*least)
    fitting = (way for way in ways if fits(estimate_of(least[0], way[1]), memory) and fits(estimate_of(*way), memory))
    return estimate_of(*next(fitting, least))


def sampled(
    skeleton: Skeleton,
    stored_parts: Sequence[Component],
    engine: str,
    answers: int,
    prompt: int,
    longest: int,
    memory: int | None,
    cpu: bool,
) -> Sampled:
    """What samples.Sampler comes to on such a card: as many of a process's answers at once as fit, halved as it halves them; one, if
    nothing fits; all, if the card is not known. Gradients are gone meanwhile, but for DDP's buckets.
    """
    one, of_all = (traced_sampling(skeleton, count, prompt, longest, not cpu) for count in (1, answers))
    beside = sum(part.bytes for part in stored_parts if part.name != "gradients" or engine == compatibility.DDP)

    def of(count: int) -> Sampled:  # each takes the same
        share = (count - 1) / max(1, answers - 1)
        cache, peak = (round(a + share * (b - a)) for a, b in zip(one, of_all, strict=True))
        return Sampled(count, cache, beside + peak)

    found = of(answers)
    while found.answers > 1 and memory is not None and not fits(found, memory):
        found = of(found.answers // 2)
    return found


def _with_rows(one: Step, two: Step, rows: int) -> Step:
    grown = {key: getattr(one, key) + (rows - 1) * (getattr(two, key) - getattr(one, key)) for key in vars(one)}
    return replace(one, **grown)
