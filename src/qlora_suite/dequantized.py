"""The 4-bit weights of the base, unpacked: for a moment in each pass, or once for the whole run where there is room for a copy.

    NF4 with double quantisation   4.13 bits a weight    Phi-2's 2.52 B weights   1.3 GB, and 3 x 6.3 GB of traffic a micro-batch
    a copy in 16 bits             16    bits a weight                              5.0 GB, read where it is

The copy holds the values that NF4 stands for, so nothing changes in what is learnt. It is no part of what is saved.
"""

import os
import types

import torch
from torch import Tensor, nn

from qlora_suite.model import logical_size

ROOM = 0.25
"""Share of the memory that copies may take where `auto` decides: Phi-2's 5 GB are kept on a card of 24 GB and not on one of 16."""


def is_4bit(module: nn.Module) -> bool:
    """Is it bitsandbytes' Linear4bit? Told by its name, for to import bitsandbytes takes seconds."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def weight_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight, unpacked if it has 4 bits. [out, in]"""
    copy = vars(module).get("unpacked")
    if copy is not None:
        return copy
    if not is_4bit(module):
        return module.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    # FSDP2 takes the state from the weight, and the module still knows it; the skeleton of an estimate has none
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        return module.weight.to(dtype)
    return dequantize_4bit(module.weight.view(-1, 1), state).to(dtype)


def keep_copies(net: nn.Module, dtype: torch.dtype) -> int:
    """Unpack every 4-bit weight once, in the type that is computed in. Returns the bytes that this takes."""
    taken = 0
    for module in net.modules():
        if not is_4bit(module):
            continue
        with torch.no_grad():
            module.unpacked = weight_of(module, dtype)
        taken += module.unpacked.nbytes
        module.forward = types.MethodType(_forward, module)
    return taken


def drop_copies(net: nn.Module) -> bool:
    """Undo `keep_copies`, however far it has come. Were there any?"""
    with_copies = [module for module in net.modules() if vars(module).pop("unpacked", None) is not None]
    for module in with_copies:
        vars(module).pop("forward", None)
    return bool(with_copies)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """As bitsandbytes', which returns what it computes in the type of the input."""
    copy = module.unpacked
    return nn.functional.linear(x.to(copy.dtype), copy, None if module.bias is None else module.bias.to(copy.dtype)).to(x.dtype)


def bytes_of_copies(net: nn.Module, dtype: torch.dtype) -> int:
    """What `keep_copies` would take."""
    weights = [m.weight for m in net.modules() if is_4bit(m)]
    return sum(map(logical_size, weights)) * dtype.itemsize


def have_room(needed: int, device: torch.device) -> bool:
    """`auto`: do the copies take less than a quarter of the card's memory, or of this process's part of the machine's?"""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return needed <= ROOM * memory
