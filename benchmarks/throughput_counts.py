"""What of a training step is the same at every run of it: FLOPs, waits of the host for the device, bytes kept for the backward pass.

    counts = Counts(net, torch.device("cpu"))
    counts.begin(); ...a step of any training loop...; counts.end()
    counts.flops, counts.syncs, counts.saved_bytes, counts.live_peak

Waits are counted on a CPU, too, where nothing waits: a tensor counts as on the device if it is a weight, was sent to a device by name
(`.to(device)`, `device=...`), or was computed from one that is. What a loader does with its own tensors costs a GPU nothing.
"""

import contextlib
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from qlora_suite.memory_estimate import LiveBytes, _tensors_of

aten = torch.ops.aten
WAITS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim),
    *(aten.unique_consecutive, aten.bincount),
}
"""Operations whose result, or its size, the host has to know before it can go on."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
"""With a mask among the indices, a nonzero."""
KNOWN_NAMESPACES = ("aten", "prims", "prim", "profiler")
ON_HOST = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
"""That the dispatcher does not see on a CPU."""


class Counts:
    """Of the steps between `begin` and `end`."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.flops = 0
        self.syncs = 0
        self.sync_places: Counter[str] = Counter()
        self.saved_bytes = 0
        """Of distinct storages that are no weights, summed over the graphs of the micro-batches."""
        self.live_peak = 0
        """Bytes of all storages that came into being in a step, at their most: activations, gradients, scratch, first moments."""
        self.uncounted: set[str] = set()
        """Operations of other libraries, whose FLOPs nobody knows here (dequantising has none)."""
        self._net, self._device = net, device
        self._held = contextlib.ExitStack()

    def begin(self) -> None:
        weights = [*self._net.parameters(), *self._net.buffers()]
        weights += [t for p in weights if (state := getattr(p, "quant_state", None)) is not None for t in _tensors_of(state)]
        known = [*weights, *(p.grad for p in weights if p.grad is not None)]
        self._flop_counter = FlopCounterMode(display=False, custom_mapping=_attention_on_cpu())
        self._live = LiveBytes(known)
        waits = self._waits = _Waits(self, weights)
        self._held = contextlib.ExitStack()
        for mode in (self._flop_counter, self._live, waits, _DeviceNamed(waits), _Saved(self, weights).hooks()):
            self._held.enter_context(mode)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """What is made and asked here belongs to the host, whatever device it names: on a CPU, that of its own tensors."""
        self._waits.paused = True
        try:
            yield
        finally:
            self._waits.paused = False

    def abandon(self) -> None:
        """End without taking anything into account."""
        self._held.close()

    def end(self) -> None:
        self._held.close()
        self.flops += self._flop_counter.get_total_flops()
        self.live_peak = max(self.live_peak, self._live.peak)


class _Waits(TorchDispatchMode):
    def __init__(self, counts: Counts, weights: list[Tensor]) -> None:
        super().__init__()
        self.counts, self.paused = counts, False
        self._on_device: dict[int, weakref.ref] = {}
        for tensor in weights:
            self.mark(tensor)

    def mark(self, tensor: Any) -> None:
        """From now on this tensor's storage counts as the device's."""
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not self.paused:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._on_device:
                self._on_device[key] = weakref.ref(storage, lambda _: self._on_device.pop(key, None))

    def is_on_device(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        return tensor.device.type == "cuda" or tensor.untyped_storage()._cdata in self._on_device

    def count(self) -> None:
        if self.paused:
            return
        self.counts.syncs += 1
        self.counts.sync_places[_place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in KNOWN_NAMESPACES:
            self.counts.uncounted.add(str(func.overloadpacket))
        touched = [t for t in tree_leaves((args, kwargs)) if self.is_on_device(t)]
        if touched and self._waits(func, args, kwargs):
            self.count()
        out = func(*args, **kwargs)
        if touched:
            for tensor in tree_leaves(out):
                self.mark(tensor)
        elif func.overloadpacket in (aten._to_copy, aten.copy_) and kwargs.get("device") is not None:
            self.mark(out)
        return out

    def _waits(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        packet = func.overloadpacket
        if packet in WAITS:
            return True
        if packet in INDEXING:
            return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        leaves_cuda = args and isinstance(args[0], Tensor) and args[0].device.type == "cuda"
        if packet is aten._to_copy and leaves_cuda:
            return torch.device(kwargs.get("device") or "cuda").type == "cpu" and not kwargs.get("non_blocking")
        if packet is aten.copy_ and isinstance(args[1], Tensor):
            return args[0].device.type == "cpu" and args[1].device.type == "cuda" and not (len(args) > 2 and args[2])
        return False


class _DeviceNamed(TorchFunctionMode):
    """Sees what the dispatcher does not: that a device was named, and reads of a CPU's memory."""

    def __init__(self, waits: _Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ON_HOST and args[0].device.type == "cpu" and self.waits.is_on_device(args[0]):
            self.waits.count()
        out = func(*args, **kwargs)
        named = kwargs.get("device") is not None or (
            func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device | str) and not isinstance(args[1], torch.dtype)
        )
        if named:
            self.waits.mark(out)
        return out


class _Saved:
    """Bytes that autograd keeps, by torch.autograd.graph.saved_tensors_hooks."""

    def __init__(self, counts: Counts, weights: list[Tensor]) -> None:
        self.counts = counts
        self._weights = {t.untyped_storage()._cdata for t in weights}
        self._live: dict[int, weakref.ref] = {}

    def hooks(self) -> contextlib.AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._weights and key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._live.pop(key, None))
            self.counts.saved_bytes += storage.nbytes()
        return tensor.detach()  # not the tensor itself: an output that keeps itself would never be freed


def _attention_on_cpu() -> dict[Any, Any]:
    """torch's counter knows the GPU's fused attention; the CPU's is the same arithmetic."""

    def forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad_out: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad_out, query, key, value)

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _place() -> str:
    """`file.py:function` of the nearest caller outside of torch."""
    frame, torch_folder = sys._getframe(2), str(Path(torch.__file__).parent)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((torch_folder, "<")):
            return f"{Path(name).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward pass"


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of a large square product: the rate that a share is a share of. Random numbers: a product of zeros runs faster."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    wait_for(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        wait_for(device)
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - began)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
