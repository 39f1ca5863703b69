"""A base's config and tokenizer: what there is to know of it without what computes, whose imports take seconds."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_suite.leaks import redacted
from qlora_suite.recipe import Model

MOST_LAYERS, LARGEST_SIZE = 1000, 10_000_000
"""Sizes of a config beyond which no causal LM is: the vocabulary is the largest of them, and has some 300,000 entries."""


def load_config(model: Model) -> PreTrainedConfig:
    """The base's config. Raises ValueError if there is no such model, or its code would have to be run."""
    try:
        config = AutoConfig.from_pretrained(model.base, revision=model.revision, trust_remote_code=False)
        _check_sizes(config)
    except Exception as error:  # whatever transformers makes of a file that may say anything
        raise ValueError(cannot_load(model, error)) from error
    return config


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, as published. Raises ValueError if it is missing, damaged or has no end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.base, revision=model.revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged tokenizer.json
        raise ValueError(cannot_load(model, error, "tokenizer" if Path(model.base).is_dir() else "base model")) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model.base} has no end token, so a model could not learn to stop; give it an eos_token")
    return tokenizer


def cannot_load(model: Model, error: Exception, what: str = "base model") -> str:
    """The sentence about a base, or its tokenizer, that an error has kept from being read."""
    where = f"folder {model.base}" if Path(model.base).exists() else f"{model.base} (neither a folder here nor reachable on the hub)"
    why = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    if "trust_remote_code" in str(error):
        why = "it brings code of its own, which is never run here; take a base that transformers knows by itself"
    return f"cannot load the {what} from {where}: {redacted(why)}"


def _check_sizes(config: PreTrainedConfig) -> None:
    """Raises ValueError for a config that no causal LM has, before a model is built from it."""
    text = config.get_text_config()
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        value, most = getattr(text, key, 1), MOST_LAYERS if key == "num_hidden_layers" else LARGEST_SIZE
        if isinstance(value, int) and not 1 <= value <= most:
            raise ValueError(f"its config.json has {key}: {value:,}, which is no causal LM's (1 to {most:,})")
