"""Training that begins with an adapter which is there already: SFT before DPO or GRPO, or one more round on other data.

    adapter: {rank: 16, alpha: 32, start_from: runs/phi2_oasst1}      # a run's folder, or one in PEFT's layout, or a hub id

It goes on as the run's own adapter: what is saved is one adapter on the same base. Its optimiser starts afresh.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from qlora_suite import adapter_config, checkpoint
from qlora_suite.adapter import adapter_folder
from qlora_suite.files import hash_of, sha256

KEYS = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora",
    "target_modules": "adapter.targets",
    "trainable_token_indices": "chat.role_markers",
}
"""What decides the function that its weights are part of: in PEFT's words, and in the recipe's."""


def folder_of(adapter: str) -> Path:
    """Where its files are. Raises ValueError for a run that is not finished, and if there is no adapter."""
    run = Path(adapter)
    if (run / "recipe.yaml").is_file() and not (run / CONFIG_NAME).is_file():
        if not (run / "final").is_dir():
            raise ValueError(f"adapter.start_from: the run in {run} is not finished and has no final/; train on, or name a checkpoint")
        return adapter_folder(str(run / "final"))
    return adapter_folder(adapter)


def fingerprint(adapter: str) -> str:
    """Names its weights and what they are part of, wherever they lie."""
    folder = folder_of(adapter)
    config = LoraConfig.from_pretrained(folder)
    return hash_of([sha256(folder / checkpoint.ADAPTER), {key: _plain(getattr(config, key)) for key in KEYS}])


def load(net: PeftModel, base: PreTrainedModel, adapter: str) -> None:
    """Give a new adapter the weights of a saved one. Raises ValueError unless it is the same function, on this base."""
    folder = folder_of(adapter)
    try:
        adapter_config.check(folder, base)
        theirs, ours = LoraConfig.from_pretrained(folder), net.peft_config["default"]
        differing = [
            f"{name}: there {_words(getattr(theirs, key))}, here {_words(getattr(ours, key))}"
            for key, name in KEYS.items()
            if _plain(getattr(theirs, key)) != _plain(getattr(ours, key))
        ]
        if differing:
            raise ValueError(f"{'; '.join(differing)}; give the recipe what the adapter has")
        checkpoint.load_weights(folder, net)
    except ValueError as error:
        raise ValueError(f"adapter.start_from: {adapter} cannot be gone on from: {error}") from None


def _plain(value: object) -> object:
    """Comparable, and fit for JSON: PEFT makes sets of lists."""
    if isinstance(value, dict):
        return {key: sorted(inner) for key, inner in sorted(value.items())}
    return sorted(value) if isinstance(value, set | list | tuple) else value or None


def _words(value: object) -> str:
    return str(_plain(value) if value is not None else "none")[:200]
