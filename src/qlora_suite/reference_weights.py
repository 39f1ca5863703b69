"""The model as it was when training began, for a KL divergence: of the weights that are trained, a second copy in their place for a while.

    reference = kept(net)                          # before a checkpoint is loaded
    with reference():                              # no gradients in there
        log_probs = ...

The base is there once. Of an adapter the copy is small (Phi-2, rank 32: 0.2 GB), and it is where it is needed when it is needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn


def kept(net: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context manager within which the trained weights of `net` are what they are now. Nothing may need a gradient meanwhile."""
    others = {p: p.detach().clone() for p in net.parameters() if p.requires_grad}

    def exchange() -> None:
        for parameter, other in others.items():
            parameter.data, others[parameter] = other, parameter.data

    @contextlib.contextmanager
    def in_place() -> Iterator[None]:
        exchange()
        try:
            with torch.no_grad():
                yield
        finally:
            exchange()

    return in_place
