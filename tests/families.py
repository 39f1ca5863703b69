"""Tiny tokenizers cut like those of real model families: their control tokens and flags, and the text of their own chat template.

    tokenizer = tokenizer_of("qwen3")      # a fresh one each time, for markers are added in place

The vocabularies are learnt from a few sentences, so that a tiny model can have them; the rest is what each family's tokenizer.json
and tokenizer_config.json say. templates/README.md tells where the templates are from.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "system\nYou are a helpful assistant.\nuser\nHello you, how are you?\n\nassistant\nI am well, thank you. Hello, hello!\nmodel\n",
    "[INST] say hi to the world. [/INST] hi, world!\n\n\n  It's a fine day,   isn't it? <|im_end|></s>|>>)",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<think>\n\n</think>\n\nWhat is the answer? The answer is 42.",
] * 4


def special(text: str, rstrip: bool = False) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, rstrip=rstrip)


def ordinary(text: str, rstrip: bool = False) -> AddedToken:
    return AddedToken(text, special=False, normalized=False, rstrip=rstrip)


def byte_level(added: list[AddedToken], words: str | None = WORDS, bos: str | None = None, nfc: bool = False) -> Tokenizer:
    """Phi-2 (GPT-2's words), Llama 3 and Qwen. `bos`: put in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_tokens(added)
    return _with_bos(tokenizer, bos)


def sentencepiece(added: list[AddedToken], space: str, bos: str) -> Tokenizer:
    """`space` in front of a text: of every piece between control tokens (`pieces`), of the first one (`first`) or of none (Gemma)."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    lines = pre_tokenizers.Split(Regex(r"\n"), "isolated")  # no real vocabulary of this kind joins a newline with a letter
    learnt.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="always")])
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>"], show_progress=False))
    merges = [tuple(merge) for merge in json.loads(learnt.to_str())["model"]["merges"]]
    vocabulary = learnt.get_vocab(with_added_tokens=True)
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = [decoders.Strip(" ", 1, 0)] if space != "none" else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if space == "pieces" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens([special("<unk>"), *added])
    return _with_bos(tokenizer, bos)


def _with_bos(tokenizer: Tokenizer, bos: str | None) -> Tokenizer:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
QWEN_TOOLS = [ordinary("<tool_call>"), ordinary("</tool_call>")]
THINKING = [ordinary("<tool_response>"), ordinary("</tool_response>"), ordinary("<think>"), ordinary("</think>")]
GEMMA = ["<pad>", "<eos>", "<bos>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
PHI3 = ["<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]


@cache
def _backend(family: str) -> tuple[str, dict[str, str]]:
    """(the tokenizer's JSON, the named tokens of its config)"""
    if family.startswith("llama3"):
        added = [special(text) for text in [*LLAMA3, "<|python_tag|>", "<|eom_id|>"]]
        tokenizer = byte_level(added, bos="<|begin_of_text|>")
        named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    elif family.startswith("qwen"):
        added = [*map(special, QWEN), *QWEN_TOOLS, *(THINKING if family == "qwen3" else [])]
        tokenizer = byte_level(added, nfc=True)
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    elif family.startswith("mistral"):
        marks = ["[INST]", "[/INST]", "[TOOL_CALLS]"] if family == "mistral_v3" else []
        added = [special(text) for text in ["<s>", "</s>", *marks]]
        tokenizer = sentencepiece(added, "first" if marks else "pieces", "<s>")
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif family == "gemma2":
        spaces = [ordinary("\n" * 2), ordinary("\n" * 3), ordinary("▁" * 2), ordinary("<table>"), ordinary("</table>")]
        tokenizer = sentencepiece([*map(special, GEMMA), *spaces], "none", "<bos>")
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    elif family == "phi3":
        added = [special("<s>"), ordinary("</s>", rstrip=True), special("<|endoftext|>"), *(special(t, rstrip=True) for t in PHI3)]
        tokenizer = sentencepiece(added, "pieces", "<s>")
        named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    else:
        assert family == "phi2"
        tokenizer = byte_level([special("<|endoftext|>"), ordinary("  "), ordinary("    ")], words=None)
        named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return tokenizer.to_str(), named


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    text, named = _backend(family)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **named)
    if family != "phi2":
        tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


FAMILIES = ("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "mistral_v1", "mistral_v3", "gemma2", "phi3", "phi2")
