"""Perplexity and bits per byte of a corpus, as a module of the `evaluate` library that loads by path, without the hub.

    metric = evaluate.load("src/qlora_suite/metrics/corpus_perplexity")
    metric.compute(nats=[12.5, 3.1], tokens=[7, 2], bytes=[30, 9])

The arithmetic is qlora_suite.evaluation.perplexity: sums first, one division at the end.
"""

# One import a line: the library's reader takes `import a, b` for a package named "a,".
import math

import datasets
import evaluate

from qlora_suite.evaluation import perplexity

_DESCRIPTION = "Token-weighted perplexity and bits per byte of a corpus, from sums per text."
_INPUTS = """
Args:
    nats (list of float): summed negative log-likelihood of each text, in natural logarithms.
    tokens (list of int): number of scored tokens of each text.
    bytes (list of int): number of UTF-8 bytes of each text.
Returns:
    nll_per_token, perplexity, bits_per_byte, num_tokens, num_bytes.
"""


class CorpusPerplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"nats": datasets.Value("float64"), "tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")}
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features))

    def _compute(self, nats: list[float], tokens: list[int], bytes: list[int]) -> dict[str, float]:
        return perplexity(math.fsum(nats), sum(tokens), sum(bytes))
