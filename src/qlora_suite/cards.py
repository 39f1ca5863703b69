"""GPUs that people fine-tune on: what torch says of them, and what a QLoRA run was seen to do on one.

Memory is what torch reports as a card's total, which is less than what is printed on the box, and a little less again with ECC or
with a newer driver. T4, RTX 3090, 4090, 5090 and L40S: at most the smallest value in public error messages. The others were not looked
up anew: `python -c "import torch; print(torch.cuda.get_device_properties(0).total_memory)"` gives yours.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts/preflight.py --help names the cards, and torch takes seconds to import
    import torch

GIB = 2**30


@dataclass(frozen=True)
class Card:
    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]
    teraflops: float | None = None
    """Sustained in training with a 4-bit base, over a whole published run; None: no such run is known."""
    source: str = ""
    """Of that."""

    @property
    def dtype(self) -> "torch.dtype":
        """What is computed in where nothing else is asked for."""
        import torch

        from qlora_suite.model import BF16_CAPABILITY

        return torch.bfloat16 if self.capability >= BF16_CAPABILITY else torch.float16


T4_RUN = "a published Phi-2 QLoRA notebook on a T4: 20.15 M places and as many evaluations in 13.97 h"
A100_RUN = "LLaMA-Factory's wiki: Llama 2 7B QLoRA, 2,048 tokens, FlashAttention-2, 2,741 tokens/s on an A100 40 GB"
RTX4090_RUN = "torchtune's README: Llama 3 8B QLoRA, 2,413 tokens/s on an RTX 4090"
_TABLE = {
    "t4": Card("Tesla T4", int(14.56 * GIB), (7, 5), 10.6, T4_RUN),
    "p100": Card("Tesla P100 16 GB", int(15.89 * GIB), (6, 0)),
    "v100-16gb": Card("Tesla V100 16 GB", int(15.77 * GIB), (7, 0)),
    "v100-32gb": Card("Tesla V100 32 GB", int(31.73 * GIB), (7, 0)),
    "rtx2080ti": Card("GeForce RTX 2080 Ti", int(10.75 * GIB), (7, 5)),
    "rtx3060-12gb": Card("GeForce RTX 3060 12 GB", int(11.75 * GIB), (8, 6)),
    "rtx3090": Card("GeForce RTX 3090", int(23.69 * GIB), (8, 6)),
    "rtx4090": Card("GeForce RTX 4090", int(23.53 * GIB), (8, 9), 116.0, RTX4090_RUN),
    "rtx5090": Card("GeForce RTX 5090", int(31.36 * GIB), (12, 0)),
    "a10g": Card("A10G", int(21.98 * GIB), (8, 6)),
    "a6000": Card("RTX A6000", int(47.40 * GIB), (8, 6)),
    "l4": Card("L4", int(21.95 * GIB), (8, 9)),
    "l40s": Card("L40S", int(44.39 * GIB), (8, 9)),
    "a100-40gb": Card("A100 40 GB", int(39.38 * GIB), (8, 0), 111.0, A100_RUN),
    "a100-80gb": Card("A100 80 GB", int(79.14 * GIB), (8, 0), 111.0, A100_RUN),
    "h100": Card("H100 80 GB", int(79.10 * GIB), (9, 0)),
    "h200": Card("H200", int(139.71 * GIB), (9, 0)),
}
OTHER_NAMES = {"a100": "a100-80gb", "v100": "v100-16gb", "2080ti": "rtx2080ti", "3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090"}
KNOWN = tuple(_TABLE)


def named(name: str) -> Card:
    """The card that a person means: `t4`, `A100-40GB`, or `24GiB` for any card of Ampere or later with so much memory.

    Raises ValueError, with the known ones, for another name.
    """
    key = re.sub(r"[\s_]+", "", name.lower()).replace("nvidia", "").replace("tesla", "").replace("geforce", "").strip("-")
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(?:gib|gb)", key):
        from qlora_suite.model import BF16_CAPABILITY

        return Card(f"card of {size[1]} GiB", int(float(size[1]) * GIB), BF16_CAPABILITY)
    key = OTHER_NAMES.get(key, key)
    if key not in _TABLE:
        raise ValueError(f"--card {name} is not in the table; known: {', '.join(KNOWN)}; or its memory, e.g. --card 24GiB")
    return _TABLE[key]


def here() -> Card | None:
    """The card of this machine (the smallest, if there are several); None without one. A rate is taken from the table."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    mine = min(found, key=lambda p: p.total_memory)
    like = [c for c in _TABLE.values() if c.name.lower() in mine.name.lower() or mine.name.lower().endswith(c.name.lower().split()[0])]
    rate = (like[0].teraflops, like[0].source) if like else (None, "")
    return Card(mine.name, mine.total_memory, min((p.major, p.minor) for p in found), *rate)
