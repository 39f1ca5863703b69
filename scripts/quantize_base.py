#!/usr/bin/env python
"""Quantise a recipe's base once, so that every later start loads a third of the bytes (Phi-2) instead of quantising them again.

    python scripts/quantize_base.py recipes/phi2_oasst1.yaml bases/phi2-nf4
    python scripts/quantize_base.py recipes/phi2_oasst1.yaml bases/phi2-nf4-bf16 --storage bfloat16

Then `model.base=bases/phi2-nf4` in place of the hub id; prepare the data again, for it is noted which base its tokenizer was of. The
folder holds weights, config, tokenizer and generation config, in the layout of transformers, and quantized_base.json: what it was made
from, and how. model.quantization and model.double_quantization say how to quantise.

--storage is the type that the packed 4-bit weights are held in. It changes no value: FSDP2 needs the type that it computes in, all
else takes any. --precision is the type that weights are rounded to before they are quantised (without it: the storage's, or with
uint8 that of the published weights). What is quantised at every start is rounded to the type that the run computes in: the same
--precision gives the same bits. Runs on one process, on the GPU if there is one.
"""

from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, read_recipe, with_clear_errors

STORAGES = ("uint8", "bfloat16", "float16", "float32")

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("recipe", help="a recipe's YAML file; its `model` section is what counts")
    parser.add_argument("folder", type=Path, help="where the quantised base goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.quantization=int8")
    parser.add_argument("--storage", choices=STORAGES, help="type that packed 4-bit weights are held in (uint8)")
    parser.add_argument("--precision", choices=STORAGES[1:], help="type of the weights when they are quantised")
    args = read_arguments(parser, read_recipe)

import torch
from transformers import PreTrainedConfig

from qlora_suite.base_config import load_config, load_tokenizer
from qlora_suite.files import file_table, folder_made_aside, write_json
from qlora_suite.model import base_fingerprint, commit_of, load_base, versions
from qlora_suite.prequantized import FORMAT_VERSION, RECORD, quantization_of
from qlora_suite.recipe import Model
from qlora_suite.tracking import say

MAX_SHARD = "4GB"


def run(model: Model, folder: Path, storage: str | None, precision: str | None) -> None:
    """Write the quantised base. Raises ValueError if there is nothing to quantise or something is in the folder's place."""
    if model.quantization == "none":
        raise ValueError("model.quantization is none, so there is nothing to quantise; add model.quantization=nf4 or int8")
    if storage is not None and model.quantization == "int8":
        raise ValueError("--storage is for 4-bit weights, which are packed; 8-bit ones are int8: leave it out")
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it or give another folder")
    config = load_config(model)
    if found := quantization_of(config):
        raise ValueError(f"{model.base} is quantised already ({found}); add model.base= with the base as it was published")
    storage = storage or "uint8"
    dtype = getattr(torch, precision or (storage if storage != "uint8" else published_type(config)))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record = {
        "format_version": FORMAT_VERSION,
        "source": {
            "base": model.base,
            "revision": commit_of(model),
            "fingerprint": base_fingerprint(model),
        },
        "quantization": model.quantization,
        "double_quantization": model.quantization == "nf4" and model.double_quantization is not False,
        "storage": storage if model.quantization == "nf4" else "int8",
        "precision": str(dtype).removeprefix("torch."),
        "device": device.type,
        "versions": versions(),
    }
    tokenizer = load_tokenizer(model)
    base = load_base(model, dtype, device, getattr(torch, storage))
    with folder_made_aside(folder) as aside:
        base.save_pretrained(aside, max_shard_size=MAX_SHARD)
        # as it was published: what load_base sets for training it sets again
        config.architectures, config.dtype, config.quantization_config = [type(base).__name__], dtype, base.config.quantization_config
        config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_json(aside / RECORD, {**record, "files": file_table(aside, but=RECORD)})
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    how = f"{model.quantization}, {record['storage']}, from weights in {record['precision']}"
    say(f"wrote {folder}: {model.base} as {how}, {size:.2f} GiB; use it with model.base={folder}")


def published_type(config: PreTrainedConfig) -> str:
    """The floating-point type of the published weights, as their config names it; float32 if it does not."""
    return str(getattr(config.get_text_config(), "dtype", None) or torch.float32).removeprefix("torch.")


if __name__ == "__main__":
    with_clear_errors(lambda: run(args.recipe.model, args.folder, args.storage, args.precision), debug=args.debug)
