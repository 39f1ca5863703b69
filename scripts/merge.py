#!/usr/bin/env python
"""Put a run's adapter into the weights of its base: a folder that plain transformers, vLLM and llama.cpp load.

    python scripts/merge.py runs/quickstart                        both ways, measured; the nearer one goes to runs/quickstart/merged
    python scripts/merge.py runs/quickstart --into 16bit --output exports/mine

There are two weights that the adapter can be added to. `16bit` is the base as it was published; `dequantised` is the 4-bit base with
each weight written out, which is what the adapter was trained on. Either is computed in fp32, one weight at a time, rounded once, and
then measured against the live model (4-bit base and adapter) on the same held-out words: logits, KL divergence, perplexity. Which of
them is nearer depends on the model, so that both are made unless --into names one.

The folder is complete: weights, config, tokenizer with the chat template, generation_config.json with the trained stop tokens,
Modelfile, and merge.json, which says what was made from what and how far it is from the live model. Runs on the CPU.
"""

from pathlib import Path

from qlora_suite.command_line import parser_for, read_arguments, with_clear_errors

WAYS = ("16bit", "dequantised")

if __name__ == "__main__":  # before the imports that take seconds
    parser = parser_for(__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the merged model goes (the run's folder/merged)")
    parser.add_argument("--into", choices=WAYS, help="merge in this way alone")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the merged weights (the run's, if it has 16 bits)")
    parser.add_argument("--tokens", type=int, default=4096, help="measure on so many tokens (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    args = read_arguments(parser)

import shutil
import signal
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from rich import box
from rich.progress import track
from rich.table import Table

from qlora_suite.assistant import Assistant, load
from qlora_suite.base_config import load_config
from qlora_suite.evaluation import release_memory
from qlora_suite.files import file_table, folder_made_aside, read_json, sha256, write_json, write_text
from qlora_suite.hub_folder import MERGED, MERGED_VERSION
from qlora_suite.merge_quality import RULE, Rows, compare, measured_rows, recommended
from qlora_suite.merging import merged, published_base, published_type, target_type, write_model
from qlora_suite.model import base_fingerprint, commit_of, load_base, logical_size, versions
from qlora_suite.modelfile import modelfile, reads_safetensors, stop_texts
from qlora_suite.recipe import Model
from qlora_suite.run_facts import hardware
from qlora_suite.serving import QUANTIZED, Served, check_commands, commands, why_merged_only
from qlora_suite.subject import subject_of, unquantised_base
from qlora_suite.tracking import console, say


def run(target: Path, output: Path | None, into: str | None, dtype: str | None, tokens: int, device: str) -> None:
    output = output or target / "merged"
    if output.exists():
        raise ValueError(f"{output} is there already; remove it, or give another folder with --output")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch can use here; leave it out, and the CPU computes")
    subject = subject_of(target, [])
    if not target.is_dir():
        raise ValueError(f"{target} is no run's folder; give the folder that scripts/train.py wrote, runs/NAME")
    if not subject.adapter:
        raise ValueError(f"{target} has no adapter to merge: every weight was trained, and {target / 'final'} is a whole model already")
    computed_in = getattr(torch, read_json(target / "run.json")["precision"])
    ways, left_out = ways_for(subject.recipe.model, into)
    assistant = load(subject, torch.device(device), computed_in)
    kept_as = target_type(dtype, computed_in, published_type(load_config(unquantised_base(subject.recipe.model)[0])))
    rows = measured_rows(assistant, tokens)
    check_room(output, assistant, kept_as, len(ways))
    say(f"merging    {target}, {subject.chosen_by}, into {' and '.join(ways)}; rounded once, to {name_of(kept_as)}")
    say(f"measuring  on {sum(len(part.ids) for part in rows.parts):,} tokens: {rows.kind}")
    for why in left_out:
        say(f"left out   {why}")

    with folder_made_aside(output) as aside:
        measured = {way: one_way(way, aside / way, assistant, kept_as, rows) for way in ways}
        chosen = recommended(measured)
        for path in (aside / chosen).iterdir():
            path.rename(aside / path.name)
        for way in ways:
            shutil.rmtree(aside / way)
        write_text(aside / "Modelfile", modelfile(assistant.renderer, modelfile_source(assistant, target), assistant.window))
        write_json(aside / MERGED, record(assistant, chosen, kept_as, measured, rows, left_out, aside))
    show(measured, chosen, output)
    show_serving(assistant, target, output, kept_as)


def ways_for(model: Model, into: str | None) -> tuple[list[str], list[str]]:
    """(how to merge, why not in another way). Raises ValueError if it is not possible as asked."""
    if model.quantization == "none":
        if into == "dequantised":
            raise ValueError("--into dequantised: the run's base is not quantised; leave it out")
        return ["16bit"], ["dequantised: the run's base is not quantised"]
    _, missing = unquantised_base(model)
    if into:
        if into == "16bit" and missing:
            raise ValueError(f"--into 16bit wants the base as it was published: {missing}")
        return [into], [f"{way}: --into {into}" for way in WAYS if way != into]
    return (["dequantised"], [f"16bit: {missing}"]) if missing else (list(WAYS), [])


def one_way(way: str, folder: Path, assistant: Assistant, dtype: torch.dtype, rows: Rows) -> dict[str, Any]:
    """Write the merged model, load it as anybody would, and measure it against the live one."""
    own = assistant.net.get_base_model()
    keeps_own = way == "dequantised" or assistant.recipe.model.quantization == "none"  # PiSSA and its like have changed their base
    source = own if keeps_own else published_base(assistant.recipe.model, assistant.device)
    weights, notes = merged(assistant.net, source, dtype, lambda items: bar(items, f"merging into {way}"))
    untied = write_model(folder, weights, assistant, dtype)
    del weights, source
    release_memory()
    net = load_base(Model(base=str(folder), quantization="none"), assistant.dtype, assistant.device).eval()
    difference = compare(
        assistant.net, net, rows, assistant.renderer, assistant.device, assistant.dtype, lambda items: bar(items, f"measuring {way}")
    )
    del net
    release_memory()
    return {**difference, "notes": [*notes, *([untied] if untied else [])]}


def check_room(output: Path, assistant: Assistant, dtype: torch.dtype, num_ways: int) -> None:
    """Raises ValueError if the disk cannot hold all of them at once."""
    needed = int(1.02 * num_ways * dtype.itemsize * sum(logical_size(p) for p in assistant.net.get_base_model().parameters()))
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        less = "; --into 16bit or --into dequantised needs half" if num_ways > 1 else ""
        raise ValueError(f"{parent} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed{less}")


def modelfile_source(assistant: Assistant, target: Path) -> str:
    return "." if ollama_reads(assistant) else f"./{target.resolve().name}-{QUANTIZED}.gguf"


def ollama_reads(assistant: Assistant) -> bool:
    return reads_safetensors(type(assistant.net.get_base_model()).__name__)


def record(
    assistant: Assistant, chosen: str, dtype: torch.dtype, measured: dict[str, Any], rows: Rows, left_out: list[str], folder: Path
) -> dict[str, Any]:
    """merge.json: what was made from what, how it was chosen, and how far it is from the live model."""
    model, subject = assistant.recipe.model, assistant.subject
    plain = unquantised_base(model)[0]
    final = subject.folder / "final"
    return {
        "format_version": MERGED_VERSION,
        "run": subject.folder.resolve().name,
        "step": read_json(final / "chosen.json")["step"],
        "chosen_by": subject.chosen_by,
        "into": chosen,
        "dtype": name_of(dtype),
        "recommended_by": RULE if len(measured) > 1 else "the only way that was made",
        "left_out": left_out,
        "base": {"id": plain.base, "revision": revision_of(plain), "fingerprint": base_fingerprint(model)},
        "quantization": {"kind": model.quantization, "double": model.quantization == "nf4" and model.double_quantization is not False},
        "adapter": {name: sha256(final / name) for name in ("adapter_model.safetensors", "adapter_config.json")},
        "stops_at": stop_texts(assistant.renderer),
        "measured_on": {"rows": rows.kind, "num_rows": len(rows.parts), "tokens": sum(len(part.ids) for part in rows.parts)},
        "measured": measured,
        "computed_in": name_of(assistant.dtype),
        **hardware(assistant.device),
        "versions": versions(),
        "files": file_table(folder, but=MERGED),
    }


def revision_of(model: Model) -> str | None:
    """The commit of a hub id, even if the recipe named a branch or nothing."""
    try:
        return commit_of(model)
    except ValueError:
        return model.revision


def show(measured: dict[str, Any], chosen: str, output: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("live model", justify="right")
    for way in measured:
        table.add_column(f"merged, {way}", justify="right", style="bold" if way == chosen and len(measured) > 1 else None)
    found = list(measured.values())
    live = found[0]["live"]
    table.add_row("perplexity", f"{live['perplexity']:.4f}", *(f"{one['merged']['perplexity']:.4f}" for one in found))
    table.add_row("bits per byte", f"{live['bits_per_byte']:.4f}", *(f"{one['merged']['bits_per_byte']:.4f}" for one in found))
    table.add_row("KL(live || merged), nats a token", "", *(f"{one['kl_divergence']:.2e}" for one in found))
    table.add_row("same most likely token", "", *(f"{one['same_top_token']:.2%}" for one in found))
    table.add_row("largest logit difference", "", *(f"{one['largest_logit_difference']:.4f}" for one in found))
    table.add_row("mean logit difference", "", *(f"{one['mean_logit_difference']:.5f}" for one in found))
    console.print(table)
    for note in dict.fromkeys(note for found in measured.values() for note in found["notes"]):
        say(f"note       {note}")
    if len(measured) > 1:
        say(f"chosen     {chosen}: {RULE}")
    say(f"wrote      {output}: a whole model, with its template, stop tokens, Modelfile and {MERGED}")


def show_serving(assistant: Assistant, target: Path, output: Path, dtype: torch.dtype) -> None:
    """The commands, and how to see that what is served is what was trained."""
    recipe, described = assistant.recipe, read_json(target / "run.json")
    plain = unquantised_base(recipe.model)[0]
    served = Served(
        name=target.resolve().name,
        window=assistant.window,
        merged=str(output),
        dtype=name_of(dtype),
        base=plain.base,
        revision=plain.revision,
        adapter=str(target / "final"),
        rank=recipe.adapter.rank,
        dora=recipe.adapter.dora,
        servable_as=described["servable_as"],
        ollama_reads=ollama_reads(assistant),
    )
    say("")
    for program, lines in commands(served).items():
        for i, line in enumerate(lines):
            say(f"{program if i == 0 else '':<13}{line}")
    if why := why_merged_only(served):
        say(f"{'adapter':<13}is not served beside its base: {why}")
    say("\nis what is served what was trained?")
    for program, line in check_commands(str(target), served).items():
        say(f"{program:<13}{line}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bar(items: Sequence[Any], label: str) -> Iterable[Any]:
    if not console.is_terminal:
        say(f"{label}: {len(items)} {'weights' if label.startswith('merging') else 'rows'}")
    return track(items, description=label, console=console, transient=True, disable=not console.is_terminal)


def end_at_once(number: int, _: object) -> None:
    """As SIGTERM and Ctrl-C do by themselves, but clearing away what was being written."""
    say("stopped; nothing was written")
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_at_once)
    signal.signal(signal.SIGINT, end_at_once)
    work = partial(run, args.run, args.output, args.into, args.dtype, args.tokens, args.device)
    with_clear_errors(work, debug=args.debug)
