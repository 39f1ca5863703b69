"""The faster ways of computing a step give the plain way's loss and gradients, on every kind of model, and keep and ask for less."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedModel

from qlora_suite import compatibility, fast_paths, packed_attention, tiled_head
from qlora_suite.adapter import add_adapter
from qlora_suite.engine import autocast
from qlora_suite.fast_paths import FastPaths
from qlora_suite.loss import Batch, collate, summed_loss, token_losses
from qlora_suite.model import load_base
from qlora_suite.recipe import Adapter, Model, Speed

CPU = torch.device("cpu")
PLAIN = Speed(attention="plain", head="plain", lora="plain", gelu="plain", dequantize_once=False)
LEVERS = {"attention": "auto", "head": "auto", "lora": "auto", "dequantize_once": True}
ALONE, TILED, DIFFERS = "each conversation by itself", "tiled", "off, for its results differ"
EXPECTED = {
    "phi": (ALONE, TILED, "12 layers in 6 operations"),  # q, k, v and fc1; dense; fc2: in two layers
    **dict.fromkeys(["llama", "qwen2", "mistral", "gemma", "qwen3"], (ALONE, TILED, "14 layers in 8 operations")),
    "gemma2": ("off", DIFFERS, "14 layers in 8 operations"),  # a window of 8 tokens and a cap on attention; a cap on logits
    "phi3": (ALONE, TILED, "8 layers in 8 operations"),  # one layer is q, k and v already, another gate and up
}
"""Of attention, head and LoRA: what each architecture can take."""
LENGTHS = [[7, 1, 12, 5], [20], [3, 3, 3]]


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for lengths in LENGTHS:
        first = torch.cat([torch.arange(n) for n in lengths]) == 0
        ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator)
        learnt = torch.rand(sum(lengths), generator=generator) < 0.6
        rows.append({"input_ids": ids, "supervised": learnt & ~first, "lengths": lengths})
    return collate([*rows, None], pad_id=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for architecture in CONFIGS:
        found[architecture] = tmp_path_factory.mktemp(architecture)
        tiny(architecture).save_pretrained(found[architecture])
    return found


def adapted(
    folder: Path, quantization: str, dtype: torch.dtype, fused_gelu: bool = True, **adapter: Any
) -> tuple[nn.Module, PreTrainedModel]:
    """With lora_B away from zero, so that lora_A has a gradient."""
    base = load_base(Model(base=str(folder), quantization=quantization), dtype, CPU, fused_gelu=fused_gelu)
    torch.manual_seed(0)
    net = add_adapter(base, Adapter(rank=4, **adapter), (3, 9), train_head_rows=True)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return net.train(), base


def gradients(net: nn.Module, dtype: torch.dtype = torch.float32, given: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    with autocast(CPU, dtype):
        loss = summed_loss(net, given or batch())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


def take(
    net: nn.Module, base: PreTrainedModel, dtype: torch.dtype = torch.float32, engine: str = compatibility.ONE, **speed: Any
) -> FastPaths:
    values = Speed(**{**PLAIN.model_dump(), **speed})
    return fast_paths.take(net, base, values, dtype, 64, packed=True, engine=engine)


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], plain: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=tolerance)
    assert ours[1].keys() == plain[1].keys()
    for name, gradient in ours[1].items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        assert (gradient - plain[1][name]).norm() <= tolerance * plain[1][name].norm(), name


# --- equality


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_all_together_give_the_plain_loss_and_gradients(folders: dict[str, Path], architecture: str, quantization: str) -> None:
    plain = gradients(adapted(folders[architecture], quantization, torch.float32)[0])
    net, base = adapted(folders[architecture], quantization, torch.float32)
    paths = take(net, base, **LEVERS | {"dequantize_once": "auto"})
    assert_same(gradients(net), plain, 2e-5)
    assert (paths.attention, paths.head, paths.lora) == EXPECTED[architecture]
    assert paths.copies == ("0.00 GiB" if quantization == "nf4" else "off")


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_by_itself_gives_the_plain_loss_and_gradients_in_every_precision(
    folders: dict[str, Path], lever: str, dtype: torch.dtype
) -> None:
    plain = gradients(adapted(folders["phi"], "nf4", dtype)[0], dtype)
    net, base = adapted(folders["phi"], "nf4", dtype)
    paths = take(net, base, dtype, **{lever: LEVERS[lever]})
    assert [name for name, what in vars(paths).items() if not what.startswith(fast_paths.OFF)] == [
        {"dequantize_once": "copies"}.get(lever, lever)
    ]
    assert_same(gradients(net, dtype), plain, {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype])


def test_the_mask_of_an_older_card_is_made_once_and_is_the_same(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4, which has no kernel for boundaries."""
    plain = gradients(adapted(folders["llama"], "none", torch.float32)[0])
    net, base = adapted(folders["llama"], "none", torch.float32)
    take(net, base, attention="auto")
    packed_attention.AttentionInterface.register(packed_attention.MASKED, packed_attention.sdpa_attention_forward)
    packed_attention.AttentionMaskInterface.register(packed_attention.MASKED, packed_attention.sdpa_mask)
    base.set_attn_implementation(packed_attention.MASKED)
    given = batch()
    with Asked() as asked:
        found = gradients(net, given=given)
    assert_same(found, plain, 2e-5)
    assert not asked.found


def test_a_base_in_fp32_computes_in_bf16_under_autocast() -> None:
    found = []
    for lora in ("plain", "auto"):
        torch.manual_seed(0)
        base = tiny("llama")
        net = add_adapter(base, Adapter(rank=4), (), train_head_rows=False).train()
        take(net, base, torch.bfloat16, lora=lora)
        found.append(gradients(net, torch.bfloat16)[0])
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-2)


@pytest.mark.parametrize("tile", [1, 7, 10**6])
def test_the_tile_is_no_part_of_the_loss(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    plain = gradients(adapted(folders["phi"], "none", torch.float32)[0])
    monkeypatch.setattr(tiled_head, "LOGITS_PER_TILE", tile * VOCABULARY)
    net, base = adapted(folders["phi"], "none", torch.float32)
    assert take(net, base, head="auto").head == TILED
    assert_same(gradients(net), plain, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_trained_as_a_whole_is_in_the_loss_too(tied: bool, dtype: torch.dtype) -> None:
    """adapter: none, with the bias; tied, the embedding's gradient adds to the head's."""

    def whole() -> PreTrainedModel:
        config = PhiConfig(**{**CONFIGS["phi"].to_dict(), "tie_word_embeddings": tied})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()

    plain, net = gradients(whole(), dtype), whole()
    assert take(net, net, dtype, head="auto").head == TILED
    assert_same(gradients(net, dtype), plain, 2e-5 if dtype == torch.float32 else 3e-2)


def test_a_head_alone_that_is_trained_gets_its_gradient() -> None:
    found = []
    for head in ("plain", "auto"):
        net = tiny("phi").requires_grad_(False)
        net.lm_head.requires_grad_(True)
        take(net, net, head=head)
        found.append(gradients(net))
    assert_same(found[1], found[0], 2e-5)


def test_token_losses_are_the_same_one_by_one(folders: dict[str, Path]) -> None:
    net, base = adapted(folders["phi"], "nf4", torch.float32)
    with torch.no_grad():
        plain = token_losses(net, batch())
    take(net, base, **LEVERS)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(net, batch()), plain, atol=2e-6, rtol=1e-5)


def test_an_empty_micro_batch_gives_zero_with_a_graph_to_every_trained_tensor(folders: dict[str, Path]) -> None:
    """Engines wait for a gradient from every rank."""
    net, base = adapted(folders["phi"], "nf4", torch.float32)
    take(net, base, **LEVERS)
    loss, found = gradients(net, given=collate([None], pad_id=0))
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_generation_and_logits_are_as_they_were(folders: dict[str, Path]) -> None:
    """With a padded batch and a cache, neither of which training has."""
    ids, mask = torch.arange(12).reshape(2, 6) + 1, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = []
    for speed in (PLAIN.model_dump(), LEVERS):
        net, base = adapted(folders["llama"], "none", torch.float32)
        take(net, base, **{**speed, "dequantize_once": False})
        net.eval()
        answers = net.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            found.append((answers.tolist(), net(input_ids=ids).logits))
            with net.disable_adapter():
                found[-1] += (net(input_ids=ids).logits,)
    assert found[0][0] == found[1][0]
    for plain, ours in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert (found[1][1] - found[1][2]).abs().max() > 1e-3, "the adapter is off where it is asked to be"


# --- what cannot take one keeps the plain way


def test_a_model_that_computes_otherwise_is_told_by_trial(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is broken by hand: nobody but the trial could know."""
    real_attention, real_outputs, real_loss = packed_attention._one_by_one, fast_paths.fused_lora._outputs, tiled_head._Losses.apply
    breaks = {
        "attention": (
            packed_attention,
            "_one_by_one",
            lambda q, k, v, ends, scale: real_attention(q, k, v, torch.cat([ends[..., :1], ends[..., 2:]], -1), scale),
        ),
        "lora": (fast_paths.fused_lora, "_outputs", lambda x, layers, dtype: [1.1 * y for y in real_outputs(x, layers, dtype)]),
        "head": (tiled_head._Losses, "apply", lambda *args: 1.1 * real_loss(*args)),
    }
    for lever, (module, name, broken) in breaks.items():
        plain = gradients(adapted(folders["phi"], "none", torch.float32)[0])
        net, base = adapted(folders["phi"], "none", torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            told = vars(take(net, base, **{lever: "auto"}))[lever]
        assert told == ("a mask made once a batch" if lever == "attention" else DIFFERS), lever  # the second choice
        assert_same(gradients(net), plain, 1e-7)


def test_the_trial_sees_a_wrong_gradient_where_lora_b_is_zero_still(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is when a run begins: then nothing of lora_A's gradient is there."""
    real = fast_paths.fused_lora._LoraLinears.backward

    def wrong(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        of_x, *nothing, first, second = (found := real(ctx, *given))[:6]
        return of_x, *nothing, 5 * first, second, *found[6:]

    monkeypatch.setattr(fast_paths.fused_lora._LoraLinears, "backward", staticmethod(wrong))
    base = load_base(Model(base=str(folders["phi"]), quantization="none"), torch.float32, CPU)
    net = add_adapter(base, Adapter(rank=4), (), train_head_rows=False)
    assert take(net, base, lora="auto").lora == DIFFERS
    assert not any(p.any() for name, p in net.named_parameters() if "lora_B" in name), "it leaves lora_B as it was"


def test_a_pass_that_ends_within_a_layer_leaves_no_graph_behind(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the attention, between q, k, v and fc1: what is tried next must find the memory free."""
    net, base = adapted(folders["phi"], "none", torch.float32)
    take(net, base, lora="auto")
    alive: list[weakref.ref] = []
    base.model.layers[0].register_forward_hook(lambda _m, _a, out: alive.append(weakref.ref(out)))

    def short(*_: Any, **__: Any) -> None:
        if alive:  # in the second layer
            raise torch.OutOfMemoryError("no room")
        return real(*_, **__)

    real = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", short)
    with pytest.raises(torch.OutOfMemoryError):
        summed_loss(net, batch())
    gc.collect()
    assert alive[0]() is None


@pytest.mark.parametrize("whole", [False, True], ids=["frozen head", "trained head"])
def test_fp16_neither_overflows_nor_vanishes_in_the_head(folders: dict[str, Path], whole: bool) -> None:
    """Thousands of tokens, half of them one and the same: sums over them stay within 65,504, and small gradients are there."""
    length = 2048
    ids = torch.where(torch.arange(length) % 2 == 0, 5, torch.arange(length) * 7919 % VOCABULARY)
    given = collate(
        [{"input_ids": ids[i : i + 128], "supervised": [False] * 128, "lengths": [128]} for i in range(0, length, 128)], 0, True
    )
    found = []
    for head in ("plain", "auto"):
        if whole:
            net = base = load_base(Model(base=str(folders["phi"]), quantization="none"), torch.float32, CPU).requires_grad_(True)
        else:
            net, base = adapted(folders["phi"], "none", torch.float16)
        take(net, base, torch.float16, head=head)
        net.zero_grad()
        with autocast(CPU, torch.float16):
            loss = summed_loss(net, given)
        (loss * 0.25).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad and p.grad is not None})
    assert all(gradient.isfinite().all() for gradient in found[1].values())
    for name, gradient in found[1].items():
        if found[0][name].isfinite().all():
            assert (gradient - found[0][name]).norm() <= 2e-2 * max(found[0][name].norm(), 1e-3), name


@pytest.mark.parametrize("adapter", [{"dropout": 0.5}, {"dora": True}])
def test_dropout_and_dora_stay_with_peft(folders: dict[str, Path], adapter: dict[str, Any]) -> None:
    net, base = adapted(folders["phi"], "nf4", torch.float32, **adapter)
    assert take(net, base, **LEVERS).lora == fast_paths.OFF


def test_sharded_weights_have_no_copies_and_zero3_no_shared_inputs(folders: dict[str, Path]) -> None:
    net, base = adapted(folders["phi"], "nf4", torch.float32)
    paths = take(net, base, engine=compatibility.ZERO3, **LEVERS | {"dequantize_once": "auto"})
    assert (paths.head, paths.lora, paths.copies) == (TILED, fast_paths.OFF, fast_paths.OFF)
    net, base = adapted(folders["phi"], "nf4", torch.float32)
    assert take(net, base, engine=compatibility.FSDP2, **LEVERS | {"dequantize_once": "auto"}).copies == fast_paths.OFF


def test_copies_are_no_part_of_what_is_saved(folders: dict[str, Path]) -> None:
    net, base = adapted(folders["phi"], "nf4", torch.float32)
    before = {key: value.shape for key, value in net.state_dict().items()}
    assert take(net, base, **LEVERS).copies == "0.00 GiB"
    assert {key: value.shape for key, value in net.state_dict().items()} == before


# --- what it is for: less is kept, and nothing asked of the device


def saved_bytes(net: nn.Module, dtype: torch.dtype, given: Batch) -> int:
    """Of the distinct storages that a forward pass keeps for the backward pass, without parameters and batch."""
    known = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers(), *(v for v in vars(given).values() if v is not None)]}
    known |= {m.unpacked.untyped_storage()._cdata for m in net.modules() if "unpacked" in vars(m)}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # a storage that is gone gives its place to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(CPU, dtype):
        summed_loss(net, given)
    return sum(kept.values())


@pytest.fixture(scope="module")
def layers_of_phi2(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One layer of Phi-2's sizes, and two."""
    found = []
    for num_layers in (1, 2):
        sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "vocab_size": 64}
        torch.manual_seed(0)
        config = PhiConfig(**sizes, num_hidden_layers=num_layers, resid_pdrop=0.1)
        found.append(tmp_path_factory.mktemp(f"phi2-{num_layers}"))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(found[-1])
    return found


def kept_by_a_layer(folders: list[Path], fast: bool, tokens: int = 128) -> float:
    """KiB a token that the second layer keeps for the backward pass, in bf16 on a 4-bit base."""
    found = []
    for folder in folders:
        net, base = adapted(folder, "nf4", torch.bfloat16, fused_gelu=fast)
        take(net, base, torch.bfloat16, **(LEVERS if fast else {}))
        row = {"input_ids": torch.arange(tokens) % 64, "supervised": [False] * tokens, "lengths": [tokens]}
        found.append(saved_bytes(net, torch.bfloat16, collate([row], 0, all_supervised=True)) / tokens / 1024)
    return found[1] - found[0]


def test_a_layer_of_phi2_keeps_at_most_96_kib_a_token(layers_of_phi2: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Backward passes in bf16 are what a CPU without instructions for it takes minutes for, and none is needed to count.
    monkeypatch.setattr(fast_paths, "_trial", lambda *_: [torch.zeros(())])
    ours, plain = (kept_by_a_layer(layers_of_phi2, fast) for fast in (True, False))
    print(f"kept for the backward pass: {ours:.1f} KiB a token and layer, plainly {plain:.1f}")
    assert ours <= 96 < plain


class Asked(TorchDispatchMode):
    """Operations whose result the host has to wait for, on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name.startswith("index") and any(
            getattr(i, "dtype", None) == torch.bool for a in args if isinstance(a, list | tuple) for i in a
        )
        if masked or any(name.strip("_").startswith(word.strip("_")) for word in self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_asks_nothing_of_the_device(folders: dict[str, Path]) -> None:
    given = batch()
    for speed, expected in ((LEVERS, 0), ({}, 1)):
        net, base = adapted(folders["phi"], "nf4", torch.bfloat16)
        take(net, base, torch.bfloat16, **speed)
        with Asked() as asked, autocast(CPU, torch.bfloat16):
            summed_loss(net, given).backward()
        assert len(asked.found) == expected, asked.found  # plainly, transformers asks whether positions start again
