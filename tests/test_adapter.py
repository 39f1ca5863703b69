"""The adapter goes where it was asked to go, everywhere or with a word, and is what PEFT reads."""

from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe
from peft import PeftModel
from tiny_models import CONFIGS, VOCABULARY, tiny
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from qlora_suite.adapter import add_adapter, check_coverage, coverage, linear_names, load_adapter, neftune, size
from qlora_suite.loss import collate, summed_loss
from qlora_suite.model import load_base
from qlora_suite.recipe import Adapter, Model, Recipe
from qlora_suite.recipe_file import load
from qlora_suite.trainable import build_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
SIX = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
MARKERS = (120, 121)


def adapted(adapter: Adapter, base: PreTrainedModel | None = None, tokens: tuple[int, ...] = (), head: bool = False) -> PeftModel:
    torch.manual_seed(0)
    return add_adapter(base if base is not None else tiny(), adapter, tokens, head)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def step(model: nn.Module, ids: torch.Tensor = IDS, learning_rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    whole = {"supervised": [False] * ids.shape[1], "lengths": [ids.shape[1]]}
    summed_loss(model.train(), collate([{"input_ids": row, **whole} for row in ids], pad_id=0, all_supervised=True)).backward()
    optimizer.step()
    model.eval()


def trained(adapter: Adapter, **kwargs) -> PeftModel:
    """With lora_B away from zero."""
    model = adapted(adapter, **kwargs)
    step(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phi")
    tiny().save_pretrained(path)
    return path


def base_of(folder: Path, quantization: str = "none", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(Model(base=str(folder), quantization=quantization), dtype, CPU)


# --- coverage


def test_a_name_that_matches_nothing_is_refused_with_the_table() -> None:
    """`Wqkv` was Phi's attention in another version of its code: fc1 and fc2 alone would have been trained."""
    with pytest.raises(ValueError, match=r"\['Wqkv'\] match nothing") as caught:
        adapted(Adapter(targets=("Wqkv", "fc1", "fc2")))
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["mlp.fc1", "2", "fc1"] in lines
    assert ["self_attn.q_proj", "2", "-"] in lines
    with pytest.raises(ValueError, match="match no linear module of this model"):
        adapted(Adapter(targets=("Wqkv",), allow_partial=True))


def test_a_partial_adapter_is_accepted_if_it_is_meant() -> None:
    model = adapted(Adapter(targets=("Wqkv", "fc1"), allow_partial=True))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"fc1"}


def uneven() -> PreTrainedModel:
    """Its second layer has no attention projections, as in models that mix kinds of layers."""
    model = tiny()
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "dense"):
        delattr(attention, name)
    return model


def test_a_layer_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers \[1\] would get no adapter"):
        adapted(Adapter(targets=("q_proj", "v_proj")), uneven())


def test_a_module_is_expected_only_where_the_layer_has_it() -> None:
    found = coverage(linear_names(uneven()), ("q_proj", "fc1"))
    check_coverage(found, allow_partial=False)
    assert found.modules["self_attn.q_proj"] == [0]
    assert found.modules["mlp.fc1"] == [0, 1]
    assert adapted(Adapter(targets=("q_proj", "fc1")), uneven()) is not None


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", "head's name"])
def test_the_output_head_is_never_adapted(architecture: str, targets: str) -> None:
    base = tiny(architecture)
    inner = len(linear_names(base))
    names = "all-linear" if targets == "all-linear" else ("lm_head", *{name.rpartition(".")[2] for name in linear_names(base)})
    model = adapted(Adapter(rank=2, targets=names, allow_partial=True), base)
    adapters = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == inner
    assert not any("lm_head" in name for name in adapters)


def test_the_output_head_is_left_alone_even_if_a_module_of_the_layers_has_its_name() -> None:
    base = tiny()
    for layer in base.model.layers:
        layer.mlp.lm_head = nn.Linear(64, 64)
    model = adapted(Adapter(rank=2, targets=("lm_head",)), base)
    adapters = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert adapters == {f"base_model.model.model.layers.{i}.mlp.lm_head" for i in (0, 1)}


# --- sizes


def test_phi_2_has_the_known_numbers_of_parameters() -> None:
    config = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
    )
    with torch.device("meta"):
        base = PhiForCausalLM(config)
        found = size(adapted(Adapter(rank=32, targets=SIX), base))
        half = size(adapted(Adapter(rank=32, targets=("fc1", "fc2")), PhiForCausalLM(config)))
    assert (found.trainable, found.base) == (47_185_920, 2_779_683_840)
    assert str(found) == "47,185,920 trainable beside 2,779,683,840 loaded from the base (1.67 %)"
    assert half.trainable == 26_214_400


def test_weights_are_counted_logically_beside_the_packed_count(folder: Path) -> None:
    exact = sum(p.numel() for p in tiny().parameters())
    found = size(adapted(Adapter(rank=4), base_of(folder, "nf4")))
    linear = sum(tiny().get_submodule(name).weight.numel() for name in linear_names(tiny()))
    assert found.base == exact
    assert found.packed == exact - linear // 2
    assert f"counted as stored, the base has {found.packed:,}" in str(found)
    assert found.trainable == size(adapted(Adapter(rank=4))).trainable


def test_no_adapter_trains_every_parameter(make_recipe: MakeRecipe) -> None:
    recipe = load(make_recipe(), ["adapter=none", "model.quantization=none"])
    net, base = build_model(recipe, manifest(), torch.float16, CPU)
    assert net is base
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())
    assert size(net).base == 0


# --- the kinds of LoRA


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_trained_weights_are_fp32_on_any_base(folder: Path, quantization: str, dtype: torch.dtype) -> None:
    base = base_of(folder, quantization, dtype)
    model = adapted(Adapter(rank=4), base, MARKERS, head=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert base.get_output_embeddings().weight.dtype == dtype, "the head is stored as it was loaded, not blown up"


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora", "orthogonal"])
def test_every_initialisation_starts_from_the_base_and_is_read_back_by_peft(folder: Path, tmp_path: Path, init: str) -> None:
    plain = logits(base_of(folder))
    model = adapted(Adapter(rank=4, init=init), base_of(folder)).eval()
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
    step(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(folder), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert (logits(again) - plain).abs().max() > 1e-3


def test_gaussian_and_default_are_other_starts() -> None:
    def start(init: str) -> torch.Tensor:
        return next(p.detach() for n, p in adapted(Adapter(rank=4, init=init)).named_parameters() if "lora_A" in n)

    assert not torch.equal(start("default"), start("gaussian"))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_the_update_is_scaled_by_alpha_over_rank_or_its_root(rslora: bool, scaling: float) -> None:
    model = trained(Adapter(rank=4, alpha=8, rslora=rslora, targets=("fc1", "fc2")))
    layer = model.get_base_model().model.layers[0].mlp.fc1
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scaling * update)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_dora_trains_magnitudes(folder: Path, tmp_path: Path, quantization: str) -> None:
    model = adapted(Adapter(rank=4, dora=True), base_of(folder, quantization))
    step(model)
    moved = [n for n, p in model.named_parameters() if "magnitude" in n and p.grad is not None and p.grad.any()]
    assert len(moved) == 12
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(folder, quantization), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    model = trained(Adapter(rank=4, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def manifest(*token_ids: int) -> dict:
    return {"role_markers": {"token_ids": list(token_ids), "predicted": False}}


@pytest.mark.parametrize("token_ids", [(), (1024, 1025)])
def test_neftune_adds_bounded_noise_in_training_alone(make_recipe: MakeRecipe, token_ids: tuple[int, ...]) -> None:
    """Also where rows of the embedding are trained, which PEFT then computes itself."""
    recipe = load(make_recipe(), ["adapter.neftune_noise_alpha=5"])
    net, base = build_model(recipe, manifest(*token_ids), torch.float32, CPU)
    embed = base.get_input_embeddings()
    ids = IDS[:, :9]
    clean = embed.eval()(ids).detach()
    assert torch.equal(embed(ids), clean)
    noise = (embed.train()(ids) - clean).detach()
    bound = 5 / (9 * 64) ** 0.5
    assert 0.9 * bound < noise.abs().max() <= bound * 1.0001
    net.train()
    assert not torch.equal(logits(net, ids), logits(net, ids))
    net.eval()
    assert torch.equal(logits(net, ids), logits(net, ids))


def test_neftune_off_adds_nothing(make_recipe: MakeRecipe) -> None:
    net, _ = build_model(load(make_recipe()), manifest(), torch.float32, CPU)
    net.train()
    assert torch.equal(logits(net), logits(net))


def test_neftune_leaves_a_bases_weights_alone() -> None:
    base = tiny()
    before = base.get_input_embeddings().weight.clone()
    neftune(base, 5.0)
    logits(base.train())
    assert torch.equal(before, base.get_input_embeddings().weight)


# --- trained token rows


@pytest.fixture(params=["none", "nf4"])
def marked(request: pytest.FixtureRequest, folder: Path) -> tuple[PreTrainedModel, PeftModel]:
    base = base_of(folder, request.param)
    return base, adapted(Adapter(rank=4), base, MARKERS, head=True)


def rows_of(module: nn.Module) -> torch.Tensor:
    return module(torch.arange(VOCABULARY)[None]).detach()[0]


def test_trained_rows_start_from_the_mean_and_only_they_change(marked: tuple[PreTrainedModel, PeftModel]) -> None:
    base, model = marked
    stored = tiny().get_input_embeddings().weight
    embed = base.get_input_embeddings()
    others = [i for i in range(VOCABULARY) if i not in MARKERS]
    before = rows_of(embed)
    torch.testing.assert_close(before[list(MARKERS)], stored.mean(dim=0).expand(2, -1))
    torch.testing.assert_close(before[others], stored[others])
    ids = IDS.clone()
    ids[:, 3], ids[:, 8] = MARKERS
    step(model, ids)
    after = rows_of(embed)
    assert torch.equal(before[others], after[others])
    assert all(not torch.equal(before[i], after[i]) for i in MARKERS)
    assert not torch.equal(after[MARKERS[0]], after[MARKERS[1]])


def test_head_rows_are_trained_only_where_the_loss_predicts_them() -> None:
    for head in (True, False):
        names = [n for n, p in adapted(Adapter(rank=2), tokens=MARKERS, head=head).named_parameters() if p.requires_grad and "token" in n]
        assert any("lm_head" in n for n in names) is head
        assert any("embed_tokens" in n for n in names)


def test_trained_rows_of_a_tied_model_are_one(tmp_path: Path) -> None:
    model = trained(Adapter(rank=2), base=tiny("gemma"), tokens=MARKERS, head=True)
    assert sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "tokens_delta" in n) == 2 * 64
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("gemma"), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


# --- saved adapters


@pytest.mark.parametrize("tokens", [(), MARKERS])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_saved_adapter_is_read_by_plain_peft(folder: Path, tmp_path: Path, quantization: str, tokens: tuple[int, ...]) -> None:
    ids = IDS.clone()
    ids[:, 3], ids[:, 8] = MARKERS
    model = adapted(Adapter(rank=4), base_of(folder, quantization), tokens, head=True)
    step(model, ids)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000, "no copies of the embedding"
    for read in (PeftModel.from_pretrained, lambda base, path: load_adapter(base, str(path))):
        again = read(base_of(folder, quantization), tmp_path).eval()
        torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_not_there_or_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cannot find the adapter .*nothing "):
        load_adapter(base_of(folder), str(tmp_path / "nothing"))
    adapted(Adapter(rank=4), tiny("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^cannot put the adapter "):
        load_adapter(base_of(folder), str(tmp_path))


def test_the_same_seed_gives_the_same_adapter(make_recipe: MakeRecipe) -> None:
    def start(*overrides: str) -> torch.Tensor:
        recipe: Recipe = load(make_recipe(), overrides)
        torch.rand(7)
        net, _ = build_model(recipe, manifest(), torch.float32, CPU)
        return torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])

    assert torch.equal(start(), start())
    assert not torch.equal(start(), start("seed=1"))
