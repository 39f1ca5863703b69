#!/usr/bin/env python
"""Make the untrained beginning of the embedded model: a byte-level BPE tokenizer and a small Phi's config.

    python scripts/make_tiny_phi.py recipes/tiny_phi_pretrain.yaml build/tiny_phi_init
    python scripts/prepare_data.py recipes/tiny_phi_pretrain.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml --mixed_precision bf16 scripts/train.py recipes/tiny_phi_pretrain.yaml

The vocabulary is learnt from the recipe's train split. The model has Phi-2's architecture (parallel attention and MLP, partial
rotary positions, biases, an output layer of its own) at a size that a laptop's CPU can train.
"""

from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, read_recipe, with_clear_errors

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = read_arguments(parser, read_recipe)

from tokenizers import ByteLevelBPETokenizer
from transformers import PhiConfig, PreTrainedTokenizerFast

from qlora_suite.recipe import Recipe
from qlora_suite.selection import selected
from qlora_suite.tracking import say

VOCABULARY, SPARE_ROWS = 4096, 32
END = "<|endoftext|>"


def run(recipe: Recipe, folder: Path) -> None:
    with selected(recipe) as selection:
        texts = [turn.content for c in selection.splits["train"] for turn in c.turns]
    say(f"learning {VOCABULARY:,} tokens from {len(texts):,} texts, {sum(map(len, texts)):,} characters")
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, bos_token=END, eos_token=END, unk_token=END)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    config = PhiConfig(
        architectures=["PhiForCausalLM"],
        vocab_size=VOCABULARY + SPARE_ROWS,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        partial_rotary_factor=0.5,
        max_position_embeddings=2048,
        hidden_act="gelu_new",
        resid_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder)
    say(f"wrote {folder}")


if __name__ == "__main__":
    with_clear_errors(lambda: run(args.recipe, args.folder), debug=args.debug)
