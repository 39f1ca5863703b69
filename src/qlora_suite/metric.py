"""The corpus_perplexity module of metrics/, loaded by the `evaluate` library from its path: nothing is fetched from the hub."""

import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MODULE = Path(__file__).parent / "metrics" / "corpus_perplexity"


def corpus_perplexity(nats: Sequence[float], tokens: Sequence[int], num_bytes: Sequence[int]) -> dict[str, float]:
    """nll_per_token, perplexity, bits_per_byte, num_tokens and num_bytes of a corpus, from sums per text."""
    with tempfile.TemporaryDirectory() as cache:
        metric = _library().load(str(MODULE), cache_dir=cache, keep_in_memory=True)
        return metric.compute(nats=nats, tokens=tokens, bytes=num_bytes)


def _library() -> object:
    """The `evaluate` library. A script that runs has its folder first in the path, and ours holds an evaluate.py of its own."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if not (Path(folder) / "evaluate.py").is_file()]
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path[:] = path
