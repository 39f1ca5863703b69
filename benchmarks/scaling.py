#!/usr/bin/env python
"""Step time against GPUs, on paper: FLOPs from Phi-2's shapes, bytes from what each engine sends, link speeds from data sheets.

    python benchmarks/scaling.py                writes benchmarks/scaling.md and scaling.svg from benchmarks/scaling.json, in seconds
    python benchmarks/scaling.py --count        first counts again what two processes send on this CPU (some minutes), into scaling.json

Nothing here was measured on a GPU: every time is a prediction, to be read as "at this rate and this link". What is measured is the
bytes: the same formulas give what the embedded model's processes really send, to the byte (tests/test_scaling.py).
"""

import math
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from collectives import Counted, count
from matplotlib.figure import Figure
from transformers import AutoConfig, PhiConfig, PreTrainedConfig

from qlora_suite.command_line import parser_for, with_clear_errors
from qlora_suite.files import read_json, write_json, write_text
from qlora_suite.launched_runs import CONFIGS, ROOT
from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected
from qlora_suite.tracking import say

PAGE, PLOT, COUNTS = (ROOT / "benchmarks" / f"scaling.{kind}" for kind in ("md", "svg", "json"))
RECIPE = ROOT / "recipes" / "phi2_oasst1.yaml"
PHI2 = PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=51200)
"""The sizes of microsoft/phi-2's config.json."""
TOKEN_ROWS = 2
"""Of the embedding: the role markers, which are trained (only prompts hold them, so those of the head are not)."""

# ---- FLOPs ----------------------------------------------------------------------------------------------------------------------


def linears(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the six linears of a Phi layer: 4 d^2 of attention and 2 x 4 d^2 of the MLP, 12 d^2 in all."""
    d, ffn = config.hidden_size, config.intermediate_size
    return {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "dense"), (d, d)), "fc1": (d, ffn), "fc2": (ffn, d)}


def block_weights(config: PreTrainedConfig) -> int:
    """N, the weights that a token passes in the layers. Phi-2: 12 x 2,560^2 x 32 = 2,516,582,400."""
    return config.num_hidden_layers * sum(i * o for i, o in linears(config).values())


def lora_weights(config: PreTrainedConfig, rank: int, targets: tuple[str, ...] | str) -> int:
    """P = rank x (in + out), over targets and layers. Phi-2 at rank 32, all six: 32 x 32 x (4 x 5,120 + 2 x 12,800) = 47,185,920."""
    chosen = linears(config) if isinstance(targets, str) else [name for name in targets if name in linears(config)]
    return config.num_hidden_layers * rank * sum(sum(linears(config)[name]) for name in chosen)


def attention_flops(config: PreTrainedConfig, keys: float) -> float:
    """Of one token's forward pass: 2 d for a score and 2 d for its value, over the keys that it sees, in every layer."""
    return 4 * keys * config.hidden_size * config.num_hidden_layers


def forward_flops(config: PreTrainedConfig, lora: int, keys: float, head_share: float) -> float:
    """A token's forward pass: 2 (N + P), attention, and 2 V d for the share of tokens whose logits are made."""
    head = 2 * config.vocab_size * config.hidden_size * head_share
    return 2 * (block_weights(config) + lora) + attention_flops(config, keys) + head


def training_flops(config: PreTrainedConfig, lora: int, keys: float, head_share: float, tiled: bool = True) -> float:
    """Forward and backward: a frozen weight costs 2 + 2 (no gradient of its own), a trained one 2 + 4, attention 1 + 2.5 times its
    forward pass, the head 2 + 2, and 2 more where its tiles are computed again.
    """
    head = (6 if tiled else 4) * config.vocab_size * config.hidden_size * head_share
    return 4 * block_weights(config) + 6 * lora + 3.5 * attention_flops(config, keys) + head


def recompute_flops(config: PreTrainedConfig, lora: int, keys: float) -> float:
    """What checkpointing adds: every layer's forward pass once more."""
    return forward_flops(config, lora, keys, head_share=0)


# ---- bytes ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Tensors of one shape."""

    unit: str
    """Where FSDP2 gathers it: `layer`, `embedding`, or `around` (last norm and head)."""
    elements: int
    """Of one of them, as it is stored: two 4-bit weights are one."""
    bytes: int
    """Of one of them."""
    number: int = 1
    trained: bool = False

    @property
    def all_bytes(self) -> int:
        return self.bytes * self.number


def parts_of(config: PreTrainedConfig, rank: int, targets: tuple[str, ...] | str, plain: int) -> list[Part]:
    """Every tensor of a 4-bit Phi with its adapter. `plain`: bytes of a number that is not packed (2 in 16 bits, 4 on a CPU)."""
    d, ffn, layers, vocabulary = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    found = [Part("layer", i * o // 2, i * o // 2, layers) for i, o in linears(config).values()]
    found += [Part("layer", size, plain * size, layers) for size in (d, d, d, d, d, d, d, ffn)]  # a norm's two, and six biases
    for name, (i, o) in linears(config).items():
        if isinstance(targets, str) or name in targets:
            found += [Part("layer", rank * size, 4 * rank * size, layers, trained=True) for size in (i, o)]
    found += [Part("embedding", vocabulary * d, plain * vocabulary * d), Part("embedding", TOKEN_ROWS * d, 4 * TOKEN_ROWS * d, 1, True)]
    found += [Part("around", size, plain * size) for size in (d, d, vocabulary * d, vocabulary)]
    return found


PERSISTENT, LIVE = 100_000, 100_000_000
"""ZeRO-3, in elements: smaller tensors stay gathered during a step, and so much more may stay from the forward to the backward pass."""
NOT_LIVE = "zero3, nothing kept"
"""The small model under ZeRO-3 as if it were large."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""DDP's, in bytes."""


def sent(engine: str, parts: list[Part], micro_batches: int, live: int = LIVE) -> dict[str, int]:
    """Bytes of the whole tensors that one rank's collectives of a step are about, by kind. The few numbers of 8 bytes that the loop
    adds up over the ranks (loss, norm, requests to stop) are left out.
    """
    trained = sum(p.all_bytes for p in parts if p.trained)
    whole = sum(p.all_bytes for p in parts)
    if engine == "ddp":  # gradients once a step
        return {"all_reduce": trained}
    if engine == "zero2":  # gradients at every micro-batch, the new weights once
        return {"all_reduce": micro_batches * trained, "all_gather": trained}
    if engine == "fsdp":  # all in the forward pass; layers and embedding again in the backward pass; gradients once a step
        again = sum(p.all_bytes for p in parts if p.unit != "around")
        return {"all_gather": micro_batches * (whole + again), "reduce_scatter": trained}
    if engine == "zero3":  # what is small once a step, the rest in every pass; gradients at every micro-batch
        large = [p for p in parts if p.elements > PERSISTENT]
        passes = 1 if sum(p.elements * p.number for p in large) <= live else 2
        of_large = sum(p.all_bytes for p in large)
        return {"all_gather": whole - of_large + micro_batches * passes * of_large, "reduce_scatter": micro_batches * trained}
    return {}  # one process


def collectives_of(engine: str, parts: list[Part], micro_batches: int, layers: int) -> int:
    """How many of them there are; of ZeRO-3, which joins what it gathers, one a layer and pass."""
    trained = sum(p.all_bytes for p in parts if p.trained)
    return {
        "ddp": 1 + math.ceil(max(0, trained - FIRST_BUCKET) / BUCKET),
        "zero2": micro_batches + 1,
        "zero3": micro_batches * (2 * (layers + 2) + 1) + 1,
        "fsdp": micro_batches * (2 * layers + 4) + layers + 1,
    }[engine]


CROSSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Times (n-1)/n of the bytes that pass each link of a ring of n: an all-reduce is a reduce-scatter and an all-gather."""


def seconds_on_links(engine: str, parts: list[Part], micro_batches: int, layers: int, ranks: int, bandwidth: float) -> float:
    """Of a step's collectives, in a ring whose slowest link has `bandwidth` (bytes a second)."""
    if ranks == 1:
        return 0.0
    crossing = sum(CROSSES[kind] * number * (ranks - 1) / ranks for kind, number in sent(engine, parts, micro_batches).items())
    hops = collectives_of(engine, parts, micro_batches, layers) * (ranks - 1)
    return crossing / (bandwidth * LINK_SHARE) + hops * HOP_SECONDS


# ---- cards and links ------------------------------------------------------------------------------------------------------------

LINK_SHARE, HOP_SECONDS = 0.8, 5e-6
"""Assumed: the share of a link's rate that collectives get, and what each hop of a ring costs beside its bytes."""
LINKS = {
    "NVLink 4": (450e9, "H100 and H200 data sheets: 900 GB/s, both ways together"),
    "PCIe 3.0 x16": (15.75e9, "PCI-SIG: 8 GT/s x 16 lanes, 128 of 130 bits; a T4's slot"),
    "InfiniBand NDR": (50e9, "InfiniBand Trade Association's roadmap: 400 Gb/s a port of 4 lanes"),
    "InfiniBand HDR": (25e9, "the same: 200 Gb/s"),
    "100 Gb Ethernet": (12.5e9, "by its name (IEEE 802.3)"),
    "25 Gb Ethernet": (3.125e9, "by its name"),
    "10 Gb Ethernet": (1.25e9, "by its name"),
}
"""Bytes a second and direction. Between nodes: one port a node, which its eight cards share."""
CARDS = {
    "H200": (989e12, 0.5, "data sheet: 989 TFLOP/s bf16, dense; half of it is this project's target, not reached by any run yet"),
    "T4": (65e12, 0.385, "data sheet: 65 TFLOP/s fp16; 25 TFLOP/s are assumed, for a T4 is held down by its 70 W"),
}
"""FLOP/s, the assumed share of it, where both are from."""
NODES, GPUS = (1, 2, 4, 8, 16), 8
BETWEEN = ("InfiniBand NDR", "InfiniBand HDR", "100 Gb Ethernet", "25 Gb Ethernet", "10 Gb Ethernet")
ENGINES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}
MICRO_TOKENS = 8192
KEYS, SUPERVISED = 450.0, 0.6
"""Of OASST1 with Phi-2's tokenizer, packed: keys that a token sees on average, and the share that is learnt. Estimates."""


@dataclass(frozen=True)
class Step:
    compute: float
    """Seconds, without any exchange."""
    links: float
    """Seconds of the collectives by themselves. Hidden behind computing, a step takes the larger of both; exposed, the sum."""

    @property
    def hidden(self) -> float:
        return max(self.compute, self.links)

    @property
    def exposed(self) -> float:
        return self.compute + self.links


def step_of(engine: str, card: str, link: str, ranks: int, micro_tokens: int = MICRO_TOKENS, micro_batches: int = 1) -> Step:
    """A step of recipes/phi2_oasst1.yaml in which each GPU has `micro_batches` of `micro_tokens`."""
    adapter = load(RECIPE).adapter
    lora = lora_weights(PHI2, adapter.rank, adapter.targets)
    rate, share, _ = CARDS[card]
    flops = micro_batches * micro_tokens * training_flops(PHI2, lora, KEYS, SUPERVISED)
    parts = parts_of(PHI2, adapter.rank, adapter.targets, plain=2)
    links = seconds_on_links(engine, parts, micro_batches, PHI2.num_hidden_layers, ranks, LINKS[link][0])
    return Step(flops / (rate * share), links)


# ---- hours on a T4 --------------------------------------------------------------------------------------------------------------

SEEDS = read_json(ROOT / "benchmarks" / "seeds.json")["arithmetic"]
"""Per recipe: parameters, and conversations, tokens and cut of 144 embedded trees, at the recipe's own length."""
TREES, PUBLISHED_TREES = 144, 9846
"""000 trains one path of each tree, and its notebook counts 9,846."""
LOGGED_HOURS = 13.97
"""Of 000 on a T4, by its notebook."""


@dataclass(frozen=True)
class Job:
    """A seed's run, in tokens (or places, where padding was computed too)."""

    name: str
    trained: float
    """Places forward and backward."""
    evaluated: float
    """Places forward alone."""
    keys: float
    lora: int
    head_share: float
    tiled: bool
    how: str
    """The arithmetic of the tokens."""

    @property
    def flops(self) -> float:
        train = self.trained * training_flops(PHI2, self.lora, self.keys, self.head_share, self.tiled)
        return train + self.evaluated * forward_flops(PHI2, self.lora, self.keys, self.head_share)

    def hours(self, flops_per_second: float) -> float:
        return self.flops / flops_per_second / 3600


def jobs() -> list[Job]:
    """Each seed as published and as corrected. Where no notebook says it, tokens follow from the embedded trees."""

    def job(name: str, trained: float, evaluated: float, length: float, how: str) -> Job:
        known, padded = SEEDS[name], name.endswith("published")
        share = 1.0 if padded else known["data"]["learnt"] / known["data"]["tokens"]
        return Job(name, trained, evaluated, (length + 1) / 2, known["parameters"], share, tiled=not padded, how=how)

    def mean(name: str) -> float:  # tokens of a conversation, cut at the recipe's length
        return SEEDS[name]["data"]["tokens"] / SEEDS[name]["data"]["conversations"]

    of_tree = {name: SEEDS[name]["data"]["conversations"] / TREES for name in SEEDS}
    n000, n004 = (SEEDS[f"{seed}_published"]["published_conversations"] for seed in ("000", "004"))
    t000, t004 = n000 * 0.98 * mean("000_corrected"), n004 * 0.98 * mean("004_corrected")
    p001, c001 = (PUBLISHED_TREES * of_tree[name] for name in ("001_published", "001_corrected"))
    t001 = c001 * 0.98 * mean("001_corrected")
    return [
        job("000_published", 9840 * 2048, 49 * 518 * 2048, 2048, "9,840 rows x 2,048; 49 evaluations x 518 rows x 2,048"),
        job(
            *("000_corrected", t000, t000 / (8 * 2048) / 50 * 50_000, mean("000_corrected")),
            f"{n000:,} x 0.98 x {mean('000_corrected'):.0f} tokens; 50,000 every 50 steps of 8 x 2,048",
        ),
        job(
            *("001_published", p001 * 512 * (1 - 0.2 / 2), 0, 512 * 0.9),
            f"*by trees:* {p001:,.0f} x 512, half of the 20 % padding filled up",
        ),
        job(
            *("001_corrected", t001, t001 / (4 * 512) / 500 * 50_000, mean("001_corrected")),
            f"*by trees:* {c001:,.0f} x 0.98 x {mean('001_corrected'):.0f}; 50,000 every 500 steps of 4 x 512",
        ),
        job("003_published", 700 * 16 * 458, 0, 458, "700 steps x 16 rows x 458, by its own FLOPs"),
        job(
            *("003_corrected", 700 * 16 * 512, 7 * 50_000, mean("003_corrected")),
            "700 steps x 16 rows x 512, packed; 50,000 every 100 steps",
        ),
        job(
            *("004_published", n004 * (mean("004_published") + 256) / 2, 0, mean("004_published")),
            f"{n004:,} x {(mean('004_published') + 256) / 2:.0f}: between its mean and 256",
        ),
        job(
            *("004_corrected", t004, t004 / (16 * 1024) / 100 * 50_000, mean("004_corrected")),
            f"{n004:,} x 0.98 x {mean('004_corrected'):.0f}; 50,000 every 100 steps of 16 x 1,024",
        ),
    ]


# ---- the page -------------------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """Markdown; the first `left` columns are texts."""
    return ["| " + " | ".join(row) + " |" for row in (head, [*["---"] * left, *["---:"] * (len(head) - left)], *rows)] + [""]


def paragraph(*lines: str) -> list[str]:
    return textwrap.wrap(" ".join(lines), 140, break_on_hyphens=False)


def ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}"


def between(step: Step) -> str:
    return ms(step.hidden) if ms(step.hidden) == ms(step.exposed) else f"{ms(step.hidden)} to {ms(step.exposed)}"


def flops_section(lora: int) -> list[str]:
    giga = {
        "layers, forward: 2 N": 2 * block_weights(PHI2),
        "layers, backward: 2 N, for frozen weights have no gradient": 2 * block_weights(PHI2),
        f"attention: 3.5 x 4 x {KEYS:.0f} keys x 2,560 x 32 layers": 3.5 * attention_flops(PHI2, KEYS),
        f"adapter: 6 P, P = {lora:,}": 6 * lora,
        f"head: 6 x 51,200 x 2,560 x {SUPERVISED:g} of the tokens": 6 * 51200 * 2560 * SUPERVISED,
    }
    rows = [[name, f"{value / 1e9:.2f}"] for name, value in giga.items()]
    rows += [["**together**", f"**{training_flops(PHI2, lora, KEYS, SUPERVISED) / 1e9:.2f}**"]]
    rows += [["checkpointing every layer adds", f"{recompute_flops(PHI2, lora, KEYS) / 1e9:.2f}"]]
    return [
        "## FLOPs of a token",
        "",
        *paragraph(
            f"N = 12 x 2,560 x 2,560 x 32 = {block_weights(PHI2):,} weights of the layers. {KEYS:.0f} keys and {SUPERVISED:.0%} learnt are",
            "estimates for packed OASST1 conversations.",
        ),
        "",
        *table(["term", "GFLOP"], rows),
    ]


def bytes_section(counts: dict[str, dict[str, Counted]]) -> list[str]:
    parts, tiny = parts_of(PHI2, load(RECIPE).adapter.rank, load(RECIPE).adapter.targets, plain=2), tiny_parts()
    trained = sum(p.all_bytes for p in parts if p.trained)
    rows = []
    for engine, title in {**ENGINES, NOT_LIVE: "ZeRO-3, nothing kept"}.items():
        for n in (1, 2):
            live = 0 if engine == NOT_LIVE else LIVE
            found, paper = plain_counts(counts[engine][str(n)]), sent(engine.partition(",")[0], tiny, n, live)
            formula = ", ".join(f"{kind} {number:,}" for kind, number in paper.items())
            real = ", ".join(f"{kind} {number:,}" for kind, number in found.items())
            phi2 = ", ".join(f"{kind} {number / 1e6:,.0f} MB" for kind, number in sent(engine.partition(",")[0], parts, n, live).items())
            calls = sum(calls for calls, _ in counts[engine][str(n)].values())
            rows.append([title, str(n), formula, real, str(calls), phi2])
    return [
        "## Bytes of a step",
        "",
        *paragraph(
            "Of the whole tensors that a rank's collectives are about; of an all-reduce 2 (n-1)/n of them cross each link of a ring of n,",
            "of an all-gather or a reduce-scatter (n-1)/n. **Counted:** two processes, CPU and gloo, `assets/tiny_phi` (NF4, rank 16),",
            "by a mode of torch's dispatcher that sees every collective, in the third step of a run. What the formula does not have: a",
            "flag of 4 bytes of ZeRO-2's. Numbers of 8 bytes that the loop adds up over the ranks (loss, norm, requests to stop; at most 2",
            "calls, 64 bytes a step) are in the calls, not in the bytes. One process sends nothing.",
        ),
        "",
        *table(
            ["engine", "micro-batches a rank", "small model, by formula", "small model, counted", "calls", "Phi-2, by formula"],
            rows,
            left=4,
        ),
        *paragraph(
            f"On Phi-2 the adapter's gradients are {trained:,} bytes: 4 x ({(trained // 4) - TOKEN_ROWS * 2560:,} of LoRA, {TOKEN_ROWS} x",
            "2,560 of token rows). ZeRO-2 and ZeRO-3 send them at every micro-batch, DDP and FSDP2 once a step. FSDP2 gathers the whole",
            "base in the forward pass, and layers and embedding again in the backward pass, at every micro-batch. ZeRO-3 keeps tensors",
            f"of up to {PERSISTENT:,} elements gathered during a step, and gathers the rest once a micro-batch if it has at most {LIVE:,}",
            'elements and twice if it has more, as Phi-2 has: "nothing kept" is the small model with that number set to 0.',
        ),
        "",
    ]


def plain_counts(counted: Counted) -> dict[str, int]:
    """By kind, without the numbers in float64 that the loop adds up."""
    found: dict[str, int] = {}
    for key, (_, number) in counted.items():
        kind, dtype = key.split()
        if dtype != "float64" and number:
            found[kind] = found.get(kind, 0) + number
    return found


def tiny_parts() -> list[Part]:
    recipe = load(ROOT / "recipes" / "quickstart.yaml")
    return parts_of(AutoConfig.from_pretrained(ROOT / recipe.model.base), recipe.adapter.rank, recipe.adapter.targets, plain=4)


def nodes_section() -> list[str]:
    lines = [
        "## Predicted: Phi-2 on 1 to 16 nodes of 8 H200",
        "",
        f"Milliseconds of a step in which each GPU has one micro-batch of {MICRO_TOKENS:,} tokens, without checkpointing. A ring's",
        "slowest link: NVLink within a node, one port a node between nodes, each at 80 % of its rate; 5 microseconds a hop (both assumed).",
        "The first number is a step whose exchange is hidden behind computing as far as it can be, the second one that hides nothing.",
        "`recipes/phi2_oasst1.yaml` itself has 16 rows a step, which 16 GPUs can share; more GPUs want more rows a step.",
        "",
    ]
    alone = ms(step_of("ddp", "H200", "NVLink 4", 1).compute)
    rows = [["one GPU", "1", *[alone] * len(ENGINES)]]
    rows += [["one node, NVLink 4", "8", *(between(step_of(engine, "H200", "NVLink 4", GPUS)) for engine in ENGINES)]]
    for link in BETWEEN:
        for nodes in NODES[1:]:
            steps = [between(step_of(engine, "H200", link, GPUS * nodes)) for engine in ENGINES]
            rows.append([f"{nodes} nodes, {link}", str(GPUS * nodes), *steps])
    lines += table(["", "GPUs", *ENGINES.values()], rows)
    lines += ["![Step time against nodes](scaling.svg)", "", "## Predicted: Phi-2 on two T4 over PCIe", ""]
    lines += ["Milliseconds of a step of 16 rows of 2,048 tokens, 8 micro-batches of one row on each card, at 25 TFLOP/s (assumed).", ""]
    pair = [between(step_of(engine, "T4", "PCIe 3.0 x16", 2, 2048, 8)) for engine in ENGINES]
    return lines + table(["", "GPUs", *ENGINES.values()], [["PCIe 3.0 x16", "2", *pair]])


def hours_section() -> list[str]:
    logged = jobs()[0].flops / (LOGGED_HOURS * 3600)
    rates = {f"at {logged / 1e12:.1f} TFLOP/s, what 000 had": logged, "at 25 TFLOP/s (assumed)": 25e12, "at 32.5 TFLOP/s (50 %)": 32.5e12}
    petaflop = {job.name: job.flops / 1e15 for job in jobs()}
    rows = []
    for job in jobs():
        tokens, hours = f"{job.trained / 1e6:.2f} M + {job.evaluated / 1e6:.2f} M", [job.hours(rate) for rate in rates.values()]
        rows.append([f"`{job.name}`", job.how, tokens, f"{petaflop[job.name]:,.0f}", *(f"{each:.1f}" for each in hours)])
    return [
        "## Predicted: hours of each seed's job on a T4",
        "",
        *paragraph(
            "FLOPs of forward and backward as above (no checkpointing; published: logits of every place; corrected: of what is learnt),",
            f"divided by a rate. 000 logged {LOGGED_HOURS} h on a T4: its {petaflop['000_published']:,.0f} PFLOP in that time are",
            f"{logged / 1e12:.1f} TFLOP/s, {logged / CARDS['T4'][0]:.0%} of the data sheet's. 004 logged 2.07 h on a T4, which is",
            f"{petaflop['004_published'] / 2.07 / 3.6:.1f} TFLOP/s, and 003 0.67 h on an A100,",
            f"{petaflop['003_published'] / 0.67 / 3.6:.0f} TFLOP/s. Tokens of a conversation are of the embedded trees and tokenizer,",
            "whose 4,096 tokens make texts longer than Phi-2's do: upper bounds, but for the rows of 000 and 003 as published. 001 gives",
            "no number, so its conversations are scaled by trees (9,846 / 144): the least certain. 001 and 004 train more tokens as",
            "corrected than as published, for every reply is there, whole; 003 has the same steps, of fuller rows.",
        ),
        "",
        *table(["recipe", "arithmetic", "trained + evaluated", "PFLOP", *rates], rows, left=2),
    ]


def plot() -> Figure:
    """Step time against nodes: a band from all hidden to nothing hidden, for each engine, one panel a link."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, link in zip(panels, ("InfiniBand NDR", "100 Gb Ethernet", "10 Gb Ethernet"), strict=True):
        for i, (engine, title) in enumerate(ENGINES.items()):
            steps = [step_of(engine, "H200", "NVLink 4" if n == 1 else link, GPUS * n) for n in NODES]
            axes.fill_between(NODES, [s.hidden for s in steps], [s.exposed for s in steps], alpha=0.2, color=f"C{i}", linewidth=0)
            axes.plot(NODES, [s.exposed for s in steps], marker="osD^"[i], markersize=4, color=f"C{i}", label=title)
        axes.set(title=link, xlabel="nodes of 8 H200", xscale="log", yscale="log")
        axes.set_xticks(NODES, [str(n) for n in NODES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"predicted seconds of a step\n({MICRO_TOKENS:,} tokens a GPU)")
    panels[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    panels[0].legend(frameon=False, title="line: nothing hidden", title_fontsize=8, fontsize=8)
    return figure


def page(counts: dict[str, dict[str, Counted]]) -> str:
    adapter = load(RECIPE).adapter
    sources = [[name, f"{rate / 1e9:g} GB/s", why] for name, (rate, why) in LINKS.items()]
    sources += [[name, f"{rate / 1e12:g} TFLOP/s, {share:.1%} of it", why] for name, (rate, share, why) in CARDS.items()]
    lines = [
        "# Step time against GPUs, on paper",
        "",
        "<!-- made by benchmarks/scaling.py -->",
        "```bash",
        "python benchmarks/scaling.py             # makes this page and its plot",
        "python benchmarks/scaling.py --count     # counts the bytes again first",
        "```",
        "",
        "**Every time on this page is a prediction:** FLOPs and bytes by formula, divided by rates from data sheets and assumed shares of",
        "them. What was measured is the bytes. Phi-2 (2.78 B parameters) with the adapter of `recipes/phi2_oasst1.yaml`.",
        "",
        *flops_section(lora_weights(PHI2, adapter.rank, adapter.targets)),
        *bytes_section(counts),
        *nodes_section(),
        *hours_section(),
        "## Rates, and where they are from",
        "",
        *table(["", "rate", "source"], sources, left=3),
    ]
    return "\n".join(lines).rstrip() + "\n"


# ---- counting -------------------------------------------------------------------------------------------------------------------


def overrides_of(folder: Path) -> list[str]:
    """Of recipes/quickstart.yaml: three short steps of four rows."""
    short = ["data.max_length=128", "data.max_examples=60", "previews.prompts=[]", "train.max_steps=3", "train.rows_per_step=4"]
    return [
        f"model.base={ROOT / 'assets' / 'tiny_phi'}",
        f"data.prepared={folder / 'prepared'}",
        *short,
        "evaluation.every_steps=null",
        "checkpoints.every_minutes=null",
    ]


def counted(folder: Path) -> dict[str, dict[str, Counted]]:
    """Of each engine on two processes, and of one process: what a step with one and with two micro-batches a rank sends."""
    overrides = overrides_of(folder)
    recipe = load(ROOT / "recipes" / "quickstart.yaml", overrides)
    with selected(recipe) as selection:
        prepare(recipe, selection)
    found: dict[str, dict[str, Counted]] = {}
    for engine in CONFIGS:
        for n in (1, 2):
            size, processes = (4 if engine == "one" else 2) // n, 1 if engine == "one" else 2
            where = folder / f"{engine}-{n}"
            run = count(engine, ROOT / "recipes" / "quickstart.yaml", [*overrides, f"train.micro_batch={size}"], where, processes)
            found.setdefault(engine, {})[str(n)] = {key: value for key, value in run.items() if value[0]}
            say(f"{engine}, {n} micro-batch{'es'[: 2 * (n > 1)]}: {found[engine][str(n)] or 'nothing'}")
    for n in (1, 2):
        where = folder / f"zero3-live-{n}"
        run = count("zero3", ROOT / "recipes" / "quickstart.yaml", [*overrides, f"train.micro_batch={2 // n}"], where, live=0)
        found.setdefault(NOT_LIVE, {})[str(n)] = {key: value for key, value in run.items() if value[0]}
        say(f"{NOT_LIVE}: {found[NOT_LIVE][str(n)]}")
    return found


def main(counting: bool) -> None:
    if counting:
        with tempfile.TemporaryDirectory() as folder:
            write_json(COUNTS, counted(Path(folder)))
    plot().savefig(PLOT, metadata={"Date": None})
    write_text(PAGE, page(read_json(COUNTS)))
    say(f"wrote {PAGE} and {PLOT}")


if __name__ == "__main__":
    parser = parser_for(__doc__)
    parser.add_argument("--count", action="store_true", help="count the bytes again, in real processes")
    args = parser.parse_args()
    with_clear_errors(lambda: main(args.count), debug=args.debug)
