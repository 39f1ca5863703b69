"""Linear layers and their LoRA as one operation, for all the layers that get the same input.

    PEFT, for each layer             here, for the layers 1..n that share x (Phi: q, k, v and fc1)

    base(x)          y               low   = x [A1 .. An]'      one product, x read and cast once
    A(x)             low             y_i   = base_i(x)
    B(low)           up              y_i  += s_i low_i B_i'     added within the product
    up * s           scaled
    y + scaled                       kept for the backward pass: x and low; a 4-bit weight is unpacked again there, once

In 16 bits PEFT's way keeps a copy of x for each layer; the backward pass here adds up the gradient of x in place, too. The idea is
that of Unsloth's and axolotl's LoRA kernels, which know the layers of certain models; here those that share an input are found by
watching a forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qlora_suite.dequantized import is_4bit, weight_of


def use(net: nn.Module, groups: Sequence[Sequence[LoraLayer]]) -> Callable[[], None]:
    """Compute each group at the call of its first layer. `Watched` finds them. Returns what takes it back."""
    waiting: dict[LoraLayer, tuple[Tensor, Tensor]] = {}  # computed at the first one's call, for the others
    for group in groups:
        for layer in group:
            _fuse(layer, tuple(group), waiting)
    # a pass that ends between two layers of a group, out of memory, must not leave its graph behind
    handles = [
        net.register_forward_pre_hook(lambda *_: waiting.clear()),
        net.register_forward_hook(lambda *_: waiting.clear(), always_call=True),
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()
        for layer in (layer for group in groups for layer in group):
            del layer.forward

    return stop


def can_be_fused(module: nn.Module) -> bool:
    """Plain LoRA, without dropout, on a 4-bit or an unquantised linear layer."""
    if not isinstance(module, LoraLayer) or list(module.lora_A) != module.active_adapters or len(module.active_adapters) != 1:
        return False
    base, name = module.get_base_layer(), module.active_adapters[0]
    known = is_4bit(base) or (type(base) is nn.Linear and isinstance(module, PeftLinear) and not module.fan_in_fan_out)
    plain = not module.lora_variant and not module.lora_bias[name] and isinstance(module.lora_dropout[name], nn.Identity)
    return known and plain and not base.weight.requires_grad


class Watched:
    """Which of the layers that can be fused get one and the same input, in the order of their calls. A context manager."""

    def __init__(self, net: nn.Module) -> None:
        self._layers = [module for module in net.modules() if can_be_fused(module)]
        self._calls: list[tuple[LoraLayer, Tensor]] = []

    def __enter__(self) -> "Watched":
        def note(layer: LoraLayer, args: tuple) -> None:
            if args:  # a layer that is called otherwise is left as it is
                self._calls.append((layer, args[0]))

        self._handles = [layer.register_forward_pre_hook(note) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def groups(self) -> list[list[LoraLayer]]:
        found: list[tuple[Tensor, list[LoraLayer]]] = []
        for layer, given in self._calls:
            same = [group for tensor, group in found[-4:] if tensor is given]
            if same:
                same[0].append(layer)
            else:
                found.append((given, [layer]))
        self._calls.clear()
        seen = [layer for _, group in found for layer in group]
        repeated = {layer for layer in seen if seen.count(layer) > 1}  # a layer that runs twice is left as it is
        return [kept for _, group in found if (kept := [layer for layer in group if layer not in repeated])]


def _fuse(layer: LoraLayer, group: tuple[LoraLayer, ...], waiting: dict[LoraLayer, tuple[Tensor, Tensor]]) -> None:
    of_peft = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else torch.float32
        usual = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if not usual or (dtype == torch.float32 and x.dtype != dtype):
            return of_peft(x, *args, **kwargs)
        if layer is not group[0]:
            given, out = waiting.pop(layer, (None, None))
            return out if given is x else _outputs(x, (layer,), dtype)[0]
        first, *others = _outputs(x, group, dtype)
        waiting.update((other, (x, out)) for other, out in zip(group[1:], others, strict=True))
        return first

    assert "forward" not in vars(layer), "somebody else has changed this layer's forward pass"
    layer.forward = forward


def _outputs(x: Tensor, layers: tuple[LoraLayer, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    names = [layer.active_adapters[0] for layer in layers]
    downs = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
    ups = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
    scales = [layer.scaling[name] for layer, name in zip(layers, names, strict=True)]
    return _LoraLinears.apply(x, dtype, [layer.get_base_layer() for layer in layers], scales, *downs, *ups)


def _frozen(base: nn.Linear, x: Tensor) -> Tensor:
    if is_4bit(base):
        return base.forward(x)  # bitsandbytes', or that of the copy
    return nn.functional.linear(x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


class _LoraLinears(torch.autograd.Function):
    """x [..., width] -> y_i [..., out_i], for base layers (weight [out_i, width]), A_i [rank_i, width] and B_i [out_i, rank_i]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, bases: list[nn.Module], scales: list[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        downs, ups = factors[: len(bases)], factors[len(bases) :]
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).flatten(0, -2)  # [tokens, width]
            low = flat @ torch.cat(downs).to(dtype).T  # [tokens, sum of ranks]
            lows = low.split([len(down) for down in downs], dim=1)
            out = [_frozen(base, flat) for base in bases]
            for y, part, up, scale in zip(out, lows, ups, scales, strict=True):
                y.addmm_(part, up.to(dtype).T, alpha=scale)
        ctx.save_for_backward(flat, low, *factors)
        ctx.bases, ctx.scales, ctx.input = bases, scales, (x.shape, x.dtype)
        return tuple(y.unflatten(0, x.shape[:-1]) for y in out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, *factors = ctx.saved_tensors
        downs, ups = factors[: len(ctx.bases)], factors[len(ctx.bases) :]
        ranks, dtype = [len(down) for down in downs], flat.dtype
        with torch.autocast(flat.device.type, enabled=False):
            of_y = [gradient.to(dtype).flatten(0, -2) for gradient in gradients]
            of_low = torch.cat([(g @ up.to(dtype)).mul_(scale) for g, up, scale in zip(of_y, ups, ctx.scales, strict=True)], dim=1)
            of_ups = [(g.T @ part).mul_(scale) for g, part, scale in zip(of_y, low.split(ranks, dim=1), ctx.scales, strict=True)]
            of_downs = (of_low.T @ flat).split(ranks)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = of_low @ torch.cat(downs).to(dtype)
                for g, base in zip(of_y, ctx.bases, strict=True):
                    of_x.addmm_(g, weight_of(base, dtype))
                of_x = of_x.view(ctx.input[0]).to(ctx.input[1])
        of_factors = [g.to(factor.dtype) for g, factor in zip([*of_downs, *of_ups], factors, strict=True)]
        return of_x, None, None, None, *of_factors
