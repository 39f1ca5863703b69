"""The LoRA adapter: where it goes, whether it went everywhere it should, and how large it is. The one place that knows PEFT."""

import re
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from qlora_suite import adapter_config
from qlora_suite import recipe as recipes
from qlora_suite.base_origin import CACHED
from qlora_suite.leaks import redacted
from qlora_suite.model import logical_size

IN_A_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Coverage:
    """Which linear modules of which layers the target names match."""

    modules: dict[str, list[int]]
    """Linear module within a layer (`self_attn.q_proj`) -> layers that have it."""
    matched: dict[str, list[str]]
    """Target name -> modules that it matches."""
    num_layers: int

    def table(self) -> str:
        targets = {module: target for target, modules in self.matched.items() for module in modules}
        width = max(map(len, self.modules), default=6)
        lines = [f"  {'module':<{width}}  layers  adapted by"]
        for module, layers in self.modules.items():
            lines.append(f"  {module:<{width}}  {len(layers):>6}  {targets.get(module, '-')}")
        return "\n".join(lines)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear modules (4-bit and 8-bit ones are subclasses), without the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def coverage(names: Iterable[str], targets: tuple[str, ...] | str) -> Coverage:
    """Match target names against the linear modules; `all-linear` targets each module by its own last name."""
    layers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := IN_A_LAYER.match(name):
            layers[match["rest"]].add(int(match["layer"]))
    modules = {module: sorted(found) for module, found in layers.items()}
    if targets == "all-linear":
        targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    matched = {target: [m for m in modules if m == target or m.endswith(f".{target}")] for target in targets}
    return Coverage(modules, matched, num_layers=len(set().union(*layers.values())))


def check_coverage(found: Coverage, allow_partial: bool) -> None:
    """Raises ValueError, with the table, if a target name matches nothing or a layer is left without an adapter.

    PEFT adapts every module whose name fits, so a name that matches in one layer matches in each layer that has the module; it
    says nothing of names that match nowhere, as long as one matches somewhere.
    """
    unmatched = [target for target, modules in found.matched.items() if not modules]
    adapted = {layer for modules in found.matched.values() for m in modules for layer in found.modules[m]}
    bare = sorted({layer for layers in found.modules.values() for layer in layers} - adapted)
    if not adapted:
        raise ValueError(f"adapter.targets {unmatched} match no linear module of this model:\n{found.table()}")
    if allow_partial or not (unmatched or bare):
        return
    problem = f"adapter.targets {unmatched} match nothing" if unmatched else f"layers {bare} would get no adapter"
    raise ValueError(
        f"{problem}, so part of the model would silently not be trained; it has these linear modules:\n{found.table()}\n"
        "correct adapter.targets, use all-linear, or set adapter.allow_partial: true if this is meant"
    )


def add_adapter(model: PreTrainedModel, adapter: recipes.Adapter, token_ids: tuple[int, ...], train_head_rows: bool) -> PeftModel:
    """Freeze the base and put LoRA on the targets; `token_ids` are the embedding rows trained beside (role markers).

    `train_head_rows` trains the same rows of the output head, for losses that predict the markers. LoRA weights are fp32.
    Raises ValueError if the targets do not cover the model.
    """
    found = coverage(linear_names(model), adapter.targets)
    check_coverage(found, adapter.allow_partial)
    rows = {_name_of(model, model.get_input_embeddings()): list(token_ids)} if token_ids else None
    if rows and train_head_rows and not model.config.tie_word_embeddings:
        rows[_name_of(model, model.get_output_embeddings())] = list(token_ids)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=sorted(target for target, modules in found.matched.items() if modules),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
        trainable_token_indices=rows,
        # PEFT matches targets by suffix; the head is not in a layer and must stay untouched even if its name fits one.
        exclude_modules=re.escape(_path_of(model, model.get_output_embeddings())),
    )
    peft_model = get_peft_model(model, config)
    if token_ids:
        _start_from_the_mean(peft_model)
        _keep_token_ids_on_device(peft_model)
    for name, parameter in peft_model.named_parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; the fp16 scaler needs fp32"
    return peft_model


def split_revision(adapter: str) -> tuple[str, str | None]:
    """`someone/adapter@v2` -> its id and its revision (branch, tag or commit); a folder may have an @ in its name."""
    name, sign, revision = adapter.rpartition("@")
    return (name, revision) if sign and not Path(adapter).exists() else (adapter, None)


def adapter_folder(adapter: str) -> Path:
    """Where a PEFT adapter is: a folder here, or the local copy of one on the hub. Raises ValueError if it has no safetensors."""
    folder = Path(adapter)
    if not folder.is_dir():
        name, revision = split_revision(adapter)
        try:
            # The pickle is not fetched: it would run code of whoever wrote it. Nor are checkpoints in subfolders.
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*/*"]))
        except (OSError, ValueError) as error:
            where = f"the adapter {adapter} (neither a folder here nor reachable on the hub)"
            raise ValueError(f"cannot find {where}: {redacted(str(error).splitlines()[0])}") from error
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            hint = "; an adapter_model.bin is a pickle, which is not read here: convert it to safetensors"
            raise ValueError(f"{adapter} is no adapter that can be read: it has no {name}{hint if name != CONFIG_NAME else ''}")
    return folder


def adapter_commit(adapter: str) -> str | None:
    """The hub's commit that an adapter was read from; None for a folder of this machine that is no copy of one."""
    return cached[3] if (cached := CACHED.search(str(adapter_folder(adapter).resolve()))) else None


def load_adapter(base: PreTrainedModel, adapter: str) -> PeftModel:
    """A saved adapter (folder or hub id) on its base. Raises ValueError if it is not there, is not whole or does not fit."""
    folder = str(adapter_folder(adapter))
    place = f"the adapter {adapter} on {base.config.name_or_path}"
    try:
        adapter_config.check(Path(folder), base)
    except ValueError as error:
        raise ValueError(f"cannot put {place}: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are missing: that is an error below
        try:
            model = PeftModel.from_pretrained(base, folder)
            tensors = load_peft_weights(folder, device="cpu")
        except KeyError as error:
            raise ValueError(f"cannot put {place}: its weights lack {error}") from error
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"cannot put {place}: {str(error).splitlines()[0]}") from error
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        known = get_peft_model_state_dict(model, save_embedding_layers=True)  # whole embeddings may be saved beside an adapter
    wrong = {
        "it lacks": expected.keys() - tensors.keys(),
        "it has what the base has no place for": tensors.keys() - known.keys(),
        "it has another shape in": {k for k in known.keys() & tensors.keys() if known[k].shape != tensors[k].shape},
    }
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"cannot put {place}: it holds values that are no numbers in {', '.join(broken[:3])} ({len(broken)} in all)")
    if any(wrong.values()):
        found = "; ".join(f"{what} {', '.join(sorted(names)[:3])} ({len(names)} in all)" for what, names in wrong.items() if names)
        raise ValueError(f"cannot put {place}: {found}")
    return model


def drops_bias(layer: nn.Module) -> bool:
    """Does PEFT compute this layer without its bias? It does (0.21) where rows of an output head are trained that has one, as Phi's."""
    return isinstance(layer, TrainableTokensLayer) and getattr(layer.get_base_layer(), "bias", None) is not None


def neftune(model: PreTrainedModel, alpha: float) -> None:
    """Add uniform noise in +-alpha / sqrt(length x width) to the input embeddings while training (Jain et al., 2023).

    After `add_adapter`: PEFT computes the embedding itself where rows of it are trained, and would pass by a hook set before.
    """

    def add_noise(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        size = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(add_noise)


@dataclass(frozen=True)
class Size:
    trainable: int
    base: int
    packed: int
    """What counting the storage gives: two 4-bit weights in a byte count as one."""

    def __str__(self) -> str:
        share = 100 * self.trainable / (self.base + self.trainable)
        text = f"{self.trainable:,} trainable beside {self.base:,} loaded from the base ({share:.2f} %)"
        return text if self.packed == self.base else f"{text}; counted as stored, the base has {self.packed:,}"


def size(model: nn.Module) -> Size:
    """Logical parameter counts. Trained token rows count as trainable; the base rows they stand for count in the base."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return Size(trainable, sum(map(logical_size, frozen)), sum(p.numel() for p in frozen))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Last part of a module's name, the form in which PEFT wants it."""
    return _path_of(model, wanted).rpartition(".")[2]


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _keep_token_ids_on_device(peft_model: PeftModel) -> None:
    """PEFT sends the numbers of the trained rows to the device in every forward pass, and the host waits for it each time."""
    for layer in peft_model.modules():
        if isinstance(layer, TrainableTokensLayer):
            device = layer.get_base_layer().weight.device
            layer.rows_on_device = {name: torch.tensor(ids, device=device) for name, ids in layer.token_indices.items()}
            layer.get_merged_weights = types.MethodType(_with_trained_rows, layer)


def _with_trained_rows(layer: TrainableTokensLayer, active_adapters: list[str]) -> torch.Tensor:
    """The base's rows with the trained ones in their places, as PEFT's own. [rows, width]"""
    weight = layer.get_base_layer().weight
    for name in active_adapters:
        rows = layer.rows_on_device[name]
        if rows.device != weight.device:  # the model has moved
            rows = layer.rows_on_device[name] = rows.to(weight.device)
        weight = weight.index_copy(0, rows, layer.trainable_tokens_delta[name].to(weight))
    return weight


def _start_from_the_mean(peft_model: PeftModel) -> None:
    """Spare rows hold whatever pretraining left there: start the trained copies from the mean of all rows instead."""
    for name, parameter in peft_model.named_parameters():
        if "trainable_tokens_delta" in name:
            layer = peft_model.get_submodule(name.split(".trainable_tokens_delta")[0])
            mean = layer.get_base_layer().weight.detach().float().mean(dim=0)
            parameter.data.copy_(mean.expand_as(parameter))
