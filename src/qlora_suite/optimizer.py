"""AdamW, from torch or bitsandbytes, and its state as named tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_suite.recipe import Optim
from qlora_suite.sharding import sharded_like, whole


def build(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimiser over the model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    import bitsandbytes.optim

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kinds[optim.name](parameters, **settings)


def state_bytes(model: nn.Module) -> int:
    """An upper bound of the state's size: two fp32 moments a trained parameter."""
    return 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state by parameter name: tensors as `name:key`, whole and on the CPU, and plain numbers.

    Where parameters are sharded (DTensors), all ranks must call it; those that do not `keep` get nothing.
    """
    tensors, numbers = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                gathered = whole(value)
                if not keep:
                    continue
                tensor = gathered.detach().cpu().contiguous()
                # bitsandbytes shares its tables between parameters, which safetensors refuses.
                tensors[f"{name}:{key}"] = tensor.clone() if key.startswith("qmap") else tensor
            else:
                numbers[f"{name}:{key}"] = value
    return tensors, numbers


def restore_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put back what `state_tensors` gave. The groups (rates, betas) come from the recipe and stay."""
    check_names([*tensors, *numbers], parameters)
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for full, value in {**tensors, **numbers}.items():
        name, _, key = full.rpartition(":")
        state.setdefault(order.index(name), {})[key] = sharded_like(parameters[name], value) if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):  # load_state_dict put the moments into ordinary memory
        for parameter, values in optimizer.state.items():
            for key in values.keys() & {"state1", "state2"}:
                values[key] = optimizer.get_state_buffer(parameter, dtype=values[key].dtype).copy_(values[key])


def check_names(keys: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError if a state (`name:key`) belongs to a parameter that is not trained."""
    for name in (key.rpartition(":")[0] for key in keys):
        if name not in parameters:
            raise ValueError(f"the checkpoint has optimiser state for {name}, which this run does not train")
