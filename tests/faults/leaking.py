"""Preludes that make a script's model leak: what an update of transformers, or a model with code of its own, could do."""

from typing import Any

from transformers.models.phi.modeling_phi import PhiForCausalLM


def leak(by: str) -> None:
    """Every call of a Phi gets an all-ones attention mask, or the cache."""
    forward = PhiForCausalLM.forward

    def leaking(self: PhiForCausalLM, input_ids: Any = None, *, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        kwargs[by] = input_ids.new_ones(input_ids.shape) if by == "attention_mask" else True
        return forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    PhiForCausalLM.forward = leaking
