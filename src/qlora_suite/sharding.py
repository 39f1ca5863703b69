"""Tensors that FSDP2 has spread over the ranks (DTensors): put together, and taken apart. Any other tensor passes unchanged."""

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """All of it. For a sharded one every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a tensor of the parameter's shape; a number stays whole."""
    if not hasattr(parameter, "device_mesh") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
