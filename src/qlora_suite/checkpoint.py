"""Checkpoints that are wholly there or not there, and that are verified before they are trusted.

    runs/quickstart/checkpoints/
      step-000200/
        adapter_model.safetensors  adapter_config.json    the adapter in PEFT's layout (or weights.safetensors: every trained weight)
        tokenizer files                                   with role markers and chat template
        optimizer.safetensors                             by parameter name
        state.json                                        step, counters, what the run must find again to resume
        recipe.yaml
        manifest.json                                     size and SHA-256 of every file above, written last
      step-000300/
      step-000100.corrupt/                                did not verify: set aside, never deleted

What stands in it does not depend on the engine that trained it (one process, DDP, ZeRO, FSDP2): whole tensors by name.

A checkpoint is written under a temporary name, flushed, renamed, and read back; only then are older ones pruned. No pickle.
Dropout is a function of (seed, step), so the step is the whole random state.
"""

import contextlib
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_suite.disk_space import size_of
from qlora_suite.engine import Engine
from qlora_suite.files import complaint_about, errors_name, file_table, flush, read_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ADAPTER, WEIGHTS = "adapter_model.safetensors", "weights.safetensors"
NAME = re.compile(r"^step-(\d{6,})$")


@dataclass
class State:
    """What a run knows of itself beside its weights. Everything else follows from the recipe and the step."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens seen, without padding."""
    seconds: float = 0.0
    """Time in training steps, over all attempts."""
    skipped_steps: int = 0
    """Steps that were not applied."""
    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last steps that were applied, against which a spike is told."""
    best: dict[str, float] | None = None
    """`step` and `loss` (nats a token) of the best evaluation on the development split."""
    evaluations_without_gain: int = 0
    evaluated: int = 0
    """The step of the last whole evaluation on the development split: one that a request interrupts is made up for."""
    processes: int = 0
    """How many there were when this was saved."""
    precision: str = ""
    """What it was computed in."""
    micro_batch: dict[str, Any] | None = None
    """`rows`, `tokens` and `checkpointing` of a forward pass, as found by trial."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Curve keys of the recipe, hash of the data, hash of the base."""
    scaler: dict[str, Any] = field(default_factory=dict)
    optimizer_numbers: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made. Raises ValueError if another process holds it; the kernel lets go when a process dies."""
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)  # a link to a folder that was deleted is no error
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(f"another run (process {holder}) is writing to {folder}; wait for it, stop it, or set output.dir") from None
        except OSError as error:
            warnings.warn(f"{folder} is on a file system without locks ({error}); see to it that no second run writes there", stacklevel=2)
        file.truncate(0)
        file.write(_holder_name())
        file.flush()
        yield


def is_locked_by_us(folder: Path) -> bool:
    """Does the folder's lock still name this process? Not if the folder was deleted while it was held."""
    try:
        return (folder / ".lock").read_text(encoding="utf-8") == _holder_name()
    except OSError:
        return False


def _holder_name() -> str:
    return f"{os.getpid()} on {os.uname().nodename}"


@dataclass(frozen=True)
class Trained:
    """What a run has learnt, whole and on the CPU, whichever engine learnt it."""

    file: str
    """ADAPTER or WEIGHTS: where the weights go."""
    weights: dict[str, Tensor]
    """By their names in that file."""
    optimizer: dict[str, Tensor]
    """`parameter:key`"""
    optimizer_numbers: dict[str, Any]


def trained(model: nn.Module, engine: Engine) -> Trained | None:
    """Collect what `model` has learnt under its engine. All ranks must call it; the main process alone gets it."""
    parameters = engine.full_parameters()
    tensors, numbers = engine.optimizer_state()
    if not engine.accelerator.is_main_process:
        return None
    file, weights = in_file(model, parameters)
    return Trained(file, weights, tensors, numbers)


def in_file(model: nn.Module, parameters: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The trained parameters by their names in a file, and the file's name: PEFT's layout for an adapter."""
    if isinstance(model, PeftModel):
        return ADAPTER, get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return WEIGHTS, parameters


def write_adapter_config(model: PeftModel, folder: Path, base: str, revision: str | None) -> None:
    """What plain PEFT reads beside the weights."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(folder)
    config.inference_mode = False


def check_weights(path: Path, expected: Mapping[str, Tensor], trained: bool) -> None:
    """Reopen saved weights. Raises RuntimeError unless they are complete, finite and (once trained) not all zero in lora_B.

    Empty adapters were saved for years by people who did not look.
    """
    found = load_file(path)
    if found.keys() != expected.keys():
        raise RuntimeError(f"{path} was saved without {sorted(expected.keys() ^ found.keys())[:5]}")
    for name, tensor in found.items():
        if tensor.numel() == 0 or tensor.shape != expected[name].shape or not tensor.isfinite().all():
            raise RuntimeError(f"{path}: {name} was saved with shape {tuple(tensor.shape)} or with values that are not finite")
    halves = [tensor for name, tensor in found.items() if "lora_B" in name]
    if trained and halves and not any(tensor.any() for tensor in halves):
        raise RuntimeError(f"{path}: every lora_B is zero after training, so the adapter would change nothing")


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    learnt: Trained,
    tokenizer: PreTrainedTokenizerBase,
    recipe_yaml: str,
    base: tuple[str, str | None],
) -> Path:
    """Write `folder/step-NNNNNN` as described above and return it, verified. Raises OSError or RuntimeError; nothing half stays."""
    final = folder / f"step-{state.step:06d}"
    if final.exists() and complaint_about_checkpoint(final) is None:
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    aside = folder / f".{final.name}.tmp"
    aside.mkdir()
    try:
        if isinstance(model, PeftModel):
            write_adapter_config(model, aside, *base)
        write_tensors({k: v.contiguous() for k, v in learnt.weights.items()}, aside / learnt.file)
        check_weights(aside / learnt.file, learnt.weights, trained=state.step > state.skipped_steps)
        write_tensors(learnt.optimizer, aside / "optimizer.safetensors")
        with errors_name(aside):
            tokenizer.save_pretrained(aside)
        write_json(aside / "state.json", {**asdict(state), "optimizer_numbers": learnt.optimizer_numbers})
        (aside / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        seal(aside)
        if final.exists():  # it is there but did not verify
            set_aside(final)
        aside.rename(final)
        flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if complaint := complaint_about_checkpoint(final):
        raise RuntimeError(f"{final} does not read back as it was written: {complaint}")
    return final


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError where the disk is full; safetensors has an error of its own for it, which is none."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def seal(folder: Path) -> None:
    """Flush every file, then write the manifest: the mark that the folder is complete."""
    mode = (folder.stat().st_mode & 0o666) | 0o600
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes files that nobody else may read, whatever the umask
        flush(path)
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": file_table(folder, but=MANIFEST)})


def complaint_about_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Raises ValueError for one that a newer version wrote: it is good, but not for us."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(folder / MANIFEST)
        version, files = int(manifest["format_version"]), manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if version > FORMAT_VERSION:
        raise ValueError(f"{folder} was written by a newer version (format {version}, this one reads {FORMAT_VERSION}); update qlora-suite")
    try:
        return complaint_about(folder, files)
    except (AttributeError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error})"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, oldest first, verified or not."""
    found = (NAME.match(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; newer ones that do not are set aside with a warning.

    None if there never was one. Raises ValueError if there are some and none is good: a run never starts afresh over them.
    """
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:06d}"
        complaint = complaint_about_checkpoint(path)
        if complaint is None:
            return path
        warnings.warn(
            f"checkpoint {path} is damaged ({complaint}); set aside as {set_aside(path).name}, trying the one before", stacklevel=2
        )
    if any(folder.glob("step-*")):
        raise ValueError(f"every checkpoint in {folder} is damaged; put a good one back, or choose another output.dir to start afresh")
    return None


def set_aside(path: Path) -> Path:
    """Rename to the first free of `NAME.corrupt`, `NAME.corrupt-2`, ..."""
    number, target = 1, path.with_name(f"{path.name}.corrupt")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt-{number}")
    return path.rename(target)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Called only after the newest was verified."""
    for step in steps(folder)[:-keep]:
        if step != best:
            shutil.rmtree(folder / f"step-{step:06d}")


def make_room(folder: Path, best: int | None) -> list[str]:
    """On a full disk, delete all but the newest checkpoint that verifies and the best one, if one more will fit then. Their names."""
    there = steps(folder)
    newest = next((step for step in reversed(there) if complaint_about_checkpoint(folder / f"step-{step:06d}") is None), None)
    if newest is None:
        return []
    old = [folder / f"step-{step:06d}" for step in there if step < newest and step != best]
    room = shutil.disk_usage(folder).free + sum(map(size_of, old))
    if not old or room < 0.95 * size_of(folder / f"step-{newest:06d}"):  # two checkpoints differ by some bytes
        return []
    for path in old:
        shutil.rmtree(path)
    return [path.name for path in old]


def copy_checked(source: Path, target: Path) -> None:
    """Copy a checkpoint to a place where rename may not be atomic: the manifest goes last, then the copy is verified."""
    if target.exists() and complaint_about_checkpoint(target) is None:
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*"), key=lambda p: p.name == MANIFEST):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            flush(copy)
    if complaint := complaint_about_checkpoint(target):
        raise OSError(f"the copy {target} does not verify: {complaint}")


def read_state(folder: Path) -> State:
    """The state of a verified checkpoint."""
    values = read_json(folder / "state.json")
    known = {f.name for f in fields(State)}
    return State(**{key: value for key, value in values.items() if key in known})


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Give a verified checkpoint's optimiser state to an engine."""
    engine.load_optimizer_state(load_file(folder / "optimizer.safetensors"), read_state(folder).optimizer_numbers)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load trained weights into a model of the same shape, before an engine shards it. Raises ValueError if they do not fit it."""
    name, expected = in_file(model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    tensors = load_file(folder / name)
    wrong = sorted(
        k for k in expected.keys() | tensors.keys() if k not in expected or k not in tensors or expected[k].shape != tensors[k].shape
    )
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit this model: {', '.join(wrong[:5])}")
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, tensors)
    else:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in tensors:
                    parameter.copy_(tensors[key])


def check_identity(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError, field by field, if a run would go on with another recipe, other data or another base."""
    lines = [
        f"  {key}: was {then.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if lines:
        raise ValueError(
            f"the run in {folder} cannot go on, for these would change its curve:\n" + "\n".join(lines) + "\n"
            "put them back, or choose another output.dir for a new run"
        )
