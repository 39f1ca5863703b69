"""How to serve what is published, for the model card."""

from qlora_suite.hub_folder import Result
from qlora_suite.run_folder import servable_as


def serving_lines(result: Result) -> list[tuple[str, str]]:
    """(title, command) for each server that can take it; none for an adapter that has to be merged first."""
    if result.form != "adapter":
        return [("vLLM", f"vllm serve {result.repo}")]
    form, _ = servable_as(result.subject.recipe, result.run["data_manifest"])
    if form != "adapter":
        return []
    revision = f" --revision {result.origin.revision}" if result.origin.revision else ""
    rank = max(8, 1 << (result.subject.recipe.adapter.rank - 1).bit_length())  # vLLM takes powers of two
    return [
        (
            "vLLM",
            f"hf download {result.repo} --local-dir {result.name}\n"
            f"vllm serve {result.origin.id}{revision} --enable-lora --max-lora-rank {rank} \\\n"
            f"    --lora-modules {result.name}={result.repo} --chat-template {result.name}/chat_template.jinja",
        )
    ]
