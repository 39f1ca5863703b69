"""The exact commands that serve what a run made: vLLM, llama.cpp and Ollama.

    for program, lines in commands(Served(...)).items(): ...

Listening on the loopback interface is said each time: vLLM's own default is every interface of the machine.
"""

import shlex
from dataclasses import dataclass

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes (MaxLoRARanks in vllm/config/lora.py); 16 without it."""
QUANTIZED = "Q4_K_M"
"""The GGUF that the commands make."""


@dataclass(frozen=True)
class Served:
    name: str
    """Under which the server knows the model."""
    window: int
    """The longest prompt and answer together, in tokens."""
    merged: str | None = None
    """A merged folder, or its hub id."""
    dtype: str = "bfloat16"
    """Of the merged weights."""
    base: str | None = None
    """The published base, beside which an adapter can be served."""
    adapter: str | None = None
    """The adapter's folder, or its hub id."""
    rank: int = 16
    dora: bool = False
    servable_as: str = "adapter"
    """As run.json has it: `adapter`, `merged` or `model`."""
    revision: str | None = None
    """Of the base."""
    ollama_reads: bool = False
    """Does Ollama convert the merged folder itself?"""


def max_lora_rank(rank: int) -> int:
    """The smallest that vLLM takes and the adapter fits in. Raises ValueError if there is none."""
    found = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if found is None:
        raise ValueError(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, and this one has rank {rank}; serve the merged model")
    return found


def why_merged_only(served: Served) -> str:
    """Why other programs cannot serve the adapter beside its base; empty if they can."""
    if served.servable_as != "adapter":
        return "the adapter has trained token rows or stands on a changed base, which vLLM and llama.cpp do not take"
    if served.dora:
        return "vLLM does not serve DoRA adapters"
    if served.rank > VLLM_RANKS[-1]:
        return f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}"
    return ""


def vllm(served: Served) -> list[str]:
    """One command each for the merged model and for the adapter beside its base, as far as there is one."""
    shared = ["--host", "127.0.0.1", "--port", "8000", "--max-model-len", str(served.window)]
    lines = []
    if served.merged:
        lines.append(shlex.join(["vllm", "serve", served.merged, "--served-model-name", served.name, "--dtype", served.dtype, *shared]))
    if served.adapter and served.base and not why_merged_only(served):
        revision = ["--revision", served.revision] if served.revision else []
        lora = ["--enable-lora", "--lora-modules", f"{served.name}={served.adapter}", "--max-lora-rank", str(max_lora_rank(served.rank))]
        words = ["vllm", "serve", served.base, *revision, "--tokenizer", served.adapter, *lora]  # its tokenizer has the chat template
        lines.append(shlex.join([*words, *shared]))
    return lines


def transformers(served: Served) -> list[str]:
    """Slow, and good for a look; its dependencies come with `pip install "transformers[serving]"`."""
    return [shlex.join(["transformers", "serve", served.merged, "--host", "127.0.0.1", "--port", "8000"])] if served.merged else []


def llama_cpp(served: Served) -> list[str]:
    """Convert and quantise, then serve with the template that stands in the GGUF file."""
    if not served.merged:
        return []
    export = ["scripts/export_gguf.sh", served.merged, "--name", served.name, "--quantize", QUANTIZED]
    serve = ["llama-server", "-m", f"{gguf_folder(served.merged)}/{served.name}-{QUANTIZED}.gguf", "--jinja", "--alias", served.name]
    return [shlex.join(export), shlex.join([*serve, "-c", str(served.window), "--host", "127.0.0.1", "--port", "8080"])]


def ollama(served: Served) -> list[str]:
    """From the merged folder where Ollama reads it, else from the GGUF folder; in both stands a Modelfile."""
    if not served.merged:
        return []
    folder = served.merged if served.ollama_reads else gguf_folder(served.merged)
    return [shlex.join(["ollama", "create", served.name, "-f", f"{folder}/Modelfile"]), shlex.join(["ollama", "run", served.name])]


def gguf_folder(merged: str) -> str:
    """Where scripts/export_gguf.sh writes to, if it is not told."""
    return f"{merged.rstrip('/')}-gguf"


def commands(served: Served) -> dict[str, list[str]]:
    """By program, in the order in which they are run."""
    found = {"vLLM": vllm(served), "llama.cpp": llama_cpp(served), "Ollama": ollama(served), "transformers": transformers(served)}
    return {program: lines for program, lines in found.items() if lines}


def check_commands(run: str, served: Served) -> dict[str, str]:
    """By program: is what it serves what was trained? `transformers serve` lists what is in the hub's cache, so its model is named."""
    ports = {"vLLM": 8000, "llama.cpp": 8080, "Ollama": 11434, "transformers": 8000}
    command = ["python", "scripts/check_served.py", run, "--url"]
    named = {"transformers": ["--model", served.merged or ""], "Ollama": ["--model", served.name]}
    return {p: shlex.join([*command, f"http://127.0.0.1:{ports[p]}/v1", *named.get(p, [])]) for p in commands(served)}
