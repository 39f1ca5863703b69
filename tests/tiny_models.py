"""Random causal LMs of two layers, one of each architecture that has to work by the same code."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "phi": PhiConfig(**_SIZES),
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "mistral": MistralConfig(**_GROUPED),
    "gemma": GemmaConfig(**{**_GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "phi3": Phi3Config(**_GROUPED),
}


def tiny(architecture: str = "phi", seed: int = 0) -> PreTrainedModel:
    """A fp32 model in eval mode; larger weights than usual, so that a leak or a wrong mask shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture]), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model
