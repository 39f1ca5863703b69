"""The base: any causal LM by the same code, in the precision of the hardware, whole or not at all."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, VOCABULARY, tiny
from transformers import PreTrainedModel

from qlora_suite import model as models
from qlora_suite.adapter import add_adapter
from qlora_suite.base_config import load_tokenizer
from qlora_suite.loss import Batch, collate, summed_loss
from qlora_suite.model import base_fingerprint, compute_dtype, load_base, logical_size
from qlora_suite.recipe import Adapter, Model

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
NF4 = ("nf4", True), ("nf4", False)


def random_batch(rows: int = 2, places: int = 16) -> Batch:
    ids = torch.randint(0, VOCABULARY, (rows, places), generator=torch.Generator().manual_seed(0))
    whole = {"supervised": [False] * places, "lengths": [places]}
    return collate([{"input_ids": row, **whole} for row in ids], pad_id=0, all_supervised=True)


def load(folder: Path, quantization: str = "none", double: bool | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(Model(base=str(folder), quantization=quantization, double_quantization=double), dtype, CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture on disk."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        tiny(name).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


# --- precision


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ((7, 5), "no", torch.float16),
        ((7, 5), "fp16", torch.float16),
        ((8, 0), "no", torch.bfloat16),
        ((8, 0), "fp16", torch.float16),
        ((8, 9), "bf16", torch.bfloat16),
        ((9, 0), "no", torch.bfloat16),
    ],
)
def test_the_precision_follows_the_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], asked: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # torch says so of a T4, which emulates it
    assert compute_dtype(CUDA, asked) == expected


def test_bf16_on_a_t4_is_refused_with_the_config_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 \(compute capability 7\.5\) .*accelerate_configs/single_t4\.yaml"):
        compute_dtype(CUDA, "bf16")


@pytest.mark.parametrize(("asked", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cpu_computes_in_fp32_unless_asked(asked: str, expected: torch.dtype) -> None:
    assert compute_dtype(CPU, asked) == expected


# --- loading


@pytest.mark.parametrize(("quantization", "double"), [*NF4, ("int8", None), ("none", None)])
def test_every_storage_loads_and_gives_nearly_the_same_loss(folders: dict[str, Path], quantization: str, double: bool | None) -> None:
    model = load(folders["phi"], quantization, double)
    batch = random_batch()
    losses = summed_loss(model, batch)
    exact = summed_loss(tiny("phi"), batch)
    assert losses.item() == pytest.approx(exact.item(), rel={"nf4": 0.2, "int8": 0.05, "none": 1e-5}[quantization])
    kind = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt, "none": torch.nn.Linear}[quantization]
    assert type(model.model.layers[0].self_attn.q_proj) is kind
    assert type(model.lm_head) is torch.nn.Linear
    if quantization == "nf4":
        assert model.model.layers[0].self_attn.q_proj.weight.quant_state.nested is double
    if quantization == "none":
        losses.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_trains_by_the_same_code(folders: dict[str, Path], architecture: str, quantization: str) -> None:
    net = add_adapter(load(folders[architecture], quantization), Adapter(rank=4, alpha=8), (), train_head_rows=False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = random_batch(), []
    for _ in range(4):
        loss = summed_loss(net, batch) / len(batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def with_weights(folder: Path, target: Path, change) -> Path:
    """A copy of a base with other weights."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_left_over_and_misshapen_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.fc1.weight"
    missing = with_weights(folders["phi"], tmp_path / "missing", lambda w: w.pop(name))
    with pytest.raises(ValueError, match=rf"do not fit PhiForCausalLM: missing keys: {name}"):
        load(missing)
    left_over = with_weights(folders["phi"], tmp_path / "left_over", lambda w: w.update(stray=torch.zeros(2)))
    with pytest.raises(ValueError, match="unexpected keys: stray"):
        load(left_over)
    misshapen = with_weights(folders["phi"], tmp_path / "misshapen", lambda w: w.update({name: torch.zeros(3, 64)}))
    with pytest.raises(ValueError, match=r"mismatched keys: .*layers\.1\.mlp\.fc1\.weight.*\[3, 64\].*\[128, 64\]"):
        load(misshapen)


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    for base in (str(tmp_path), str(tmp_path / "nothing"), "nobody/nothing-here"):
        with pytest.raises(ValueError, match=r"^cannot load the base model from ") as caught:
            load(Path(base))
        assert base in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["phi"] / "config.json").read_bytes())
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the base model"):
        load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(Model(base=str(tmp_path)))


def test_random_init_takes_the_config_and_not_the_weights(folders: dict[str, Path]) -> None:
    recipe = Model(base=str(folders["phi"]), quantization="none", random_init=True)
    torch.manual_seed(1)
    first = load_base(recipe, torch.float16, CPU)
    torch.manual_seed(1)
    second = load_base(recipe, torch.float16, CPU)
    weights = [m.model.layers[0].mlp.fc1.weight for m in (first, second, tiny())]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32


# --- 4-bit weights stay as they are


def previewed(model: PreTrainedModel) -> PreTrainedModel:
    """After a forward pass in eval mode, as a preview or an evaluation makes it."""
    model.eval()
    with torch.no_grad():
        summed_loss(model, random_batch())
    return model.train()


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_evaluation_leaves_4bit_weights_as_they_are_and_trainable(folders: dict[str, Path]) -> None:
    model = load(folders["phi"], "nf4")
    before, loss = stored(model), summed_loss(model.train(), random_batch()).item()
    previewed(model)
    after = stored(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    net = add_adapter(model, Adapter(rank=4), (), train_head_rows=False)
    again = summed_loss(net.train(), random_batch())
    again.backward()
    assert again.item() == pytest.approx(loss, rel=1e-6)
    assert any(p.grad is not None and p.grad.any() for p in net.parameters())


def test_the_repacking_that_is_prevented_is_real(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks 4-bit weights only on CPUs with AVX512-BF16")
    monkeypatch.setattr(models, "_keep_4bit_layout", lambda model: None)
    model = load(folders["phi"], "nf4")
    before = stored(model)
    after = stored(previewed(model))
    assert any(before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in before)


# --- small print


def test_a_4bit_parameter_counts_its_weights_not_its_bytes(folders: dict[str, Path]) -> None:
    weight = load(folders["phi"], "nf4").model.layers[0].mlp.fc1.weight
    assert (logical_size(weight), weight.numel()) == (64 * 128, 64 * 128 // 2)


def test_the_fingerprint_changes_with_one_weight(folders: dict[str, Path], tmp_path: Path) -> None:
    same = with_weights(folders["phi"], tmp_path / "same", lambda w: None)
    other = with_weights(folders["phi"], tmp_path / "other", lambda w: w["lm_head.bias"].view(torch.int32).__setitem__(0, 1))
    prints = [base_fingerprint(Model(base=str(f))) for f in (folders["phi"], same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_the_fused_gelu_is_the_same_function(folders: dict[str, Path]) -> None:
    model = load(folders["phi"])
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    plain = tiny("phi")
    assert plain.config.hidden_act == "gelu_new"
    ids = random_batch().input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_bases_own_dropouts_are_off(tmp_path: Path) -> None:
    model = tiny("phi")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).train()
    batch = random_batch()
    with torch.no_grad():
        assert summed_loss(loaded, batch) == summed_loss(loaded, batch)
