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
      .step-000400.tmp/                                   being written, or deleted, when the run was killed; the next start removes it

What stands in it does not depend on the engine that trained it (one process, DDP, ZeRO, FSDP2): whole tensors by name.

A checkpoint is written under a temporary name, flushed, renamed, and read back; only then are older ones pruned. No pickle.
The hashes protect from damage, not from a person who can write the manifest as well: what is read is also looked at before it is used.
Dropout is a function of (seed, step), so the step is the whole random state.
"""

import contextlib
import fcntl
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_suite.disk_space import size_of
from qlora_suite.engine import Engine, shape_of
from qlora_suite.files import complaint_about, errors_name, file_table, flush, hash_of, read_json, remove, write_json
from qlora_suite.micro_batch import is_share
from qlora_suite.recipe import default_of

FORMAT_VERSION = 1
LEFTOVERS = (
    *("checkpoints/.step-*.tmp", ".final.tmp", ".final.old.tmp", ".previews.md.*.tmp", ".status.json.*.tmp", ".run.json.*.tmp"),
    *(".recipe.yaml.*.tmp", ".metrics.jsonl.*.tmp", ".previews.jsonl.*.tmp", "black_box/.step-*.tmp", ".out_of_memory.json.*.tmp"),
    *(".shared", "..shared.*.tmp", ".slurm_starts.json.*.tmp", ".samples.jsonl.*.tmp", ".samples.md.*.tmp", ".reference.jsonl.*.tmp"),
)
"""What a killed process was writing in a run's folder, or in a mirror."""
MANIFEST = "manifest.json"
ADAPTER, WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "weights.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step-([0-9]{6,18})")


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
    black_boxes: int = 0
    """Steps that have left one."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last steps that were applied, against which a spike is told; none of 0, from which nothing is learnt."""
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
    """`rows`, `tokens` and `checkpointing` (share of the layers) of a forward pass, as found by trial."""
    answers_at_once: int | None = None
    """Of GRPO: how many a process samples in one batch; None: all that a step wants, for memory was never short."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Curve keys of the recipe, hash of the data, hash of the base."""
    scaler: dict[str, Any] = field(default_factory=dict)
    optimizer_numbers: dict[str, Any] = field(default_factory=dict)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _has(value: Any, **keys: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and value.keys() == keys.keys() and all(good(value[key]) for key, good in keys.items())


def _is_scale(value: Any) -> bool:
    numbers = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    return value == {} or (_has(value, **dict.fromkeys(numbers, _is_number)) and value["scale"] > 0)


def _is_row_limit(value: Any) -> bool:
    return value is None or _has(value, rows=lambda x: _is_count(x, 1), tokens=lambda x: _is_count(x, 1), checkpointing=is_share)


GOOD: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("step", "tokens", "skipped_steps", "skipped_in_a_row", "black_boxes", "evaluations_without_gain", "evaluated", "processes"),
        _is_count,
    ),
    "seconds": lambda value: _is_number(value) and value >= 0,
    "best": lambda value: value is None or _has(value, step=lambda x: _is_count(x, 1), loss=_is_number),
    "norms": lambda value: isinstance(value, list) and all(_is_number(norm) and norm >= 0 for norm in value),
    "precision": lambda value: isinstance(value, str),
    "micro_batch": _is_row_limit,
    "answers_at_once": lambda value: value is None or _is_count(value, 1),
    "identity": lambda value: isinstance(value, dict),
    "scaler": _is_scale,
    "optimizer_numbers": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
}
"""What each value of a State must be, when it is read back."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made, and clear away what a killed process was writing there.

    Raises ValueError if another process holds it; the kernel lets go when a process dies.
    """
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
        for leftover in (left for pattern in LEFTOVERS for left in folder.glob(pattern)):
            with contextlib.suppress(OSError):
                remove(leftover)
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
        remove(leftover)
    aside = folder / f".{final.name}.tmp"
    aside.mkdir()
    try:
        if isinstance(model, PeftModel):
            write_adapter_config(model, aside, *base)
        write_tensors({k: v.contiguous() for k, v in learnt.weights.items()}, aside / learnt.file)
        check_weights(aside / learnt.file, learnt.weights, trained=bool(state.norms))
        write_tensors(learnt.optimizer, aside / OPTIMIZER)
        with errors_name(aside):
            tokenizer.save_pretrained(aside)
        write_json(aside / STATE, {**asdict(state), "optimizer_numbers": learnt.optimizer_numbers})
        (aside / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        seal(aside)
        if final.exists():  # it is there but did not verify
            set_aside(final)
        aside.rename(final)
        flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if complaint := complaint_about_checkpoint(final):
        raise OSError(f"{final} does not read back as it was written: {complaint}")
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
    manifest = {"format_version": FORMAT_VERSION, "files": file_table(folder, but=MANIFEST)}
    write_json(folder / MANIFEST, {**manifest, "sha256": hash_of(manifest)})


def complaint_about_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Raises ValueError for one that a newer version wrote: it is good, but not for us."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(folder / MANIFEST)
        own_hash = manifest.pop("sha256", None)  # or one flipped bit could make a newer version's of it; the first ones had none
        if own_hash != hash_of(manifest) and not (own_hash is None and manifest.keys() == {"format_version", "files"}):
            return f"{MANIFEST} does not have the hash it was written with"
        version, files = int(manifest["format_version"]), manifest["files"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if version > FORMAT_VERSION:
        raise ValueError(f"{folder} was written by a newer version (format {version}, this one reads {FORMAT_VERSION}); update qlora-suite")
    return complaint_about(folder, files)


def complaint_about_contents(folder: Path) -> str | None:
    """What in a checkpoint whose files are as they were written cannot be gone on from, or None."""
    for path in (folder, *folder.iterdir()):
        if path.is_symlink():
            return f"{path.name} is a symbolic link"
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    try:
        state = read_state(folder)
    except ValueError as error:
        return str(error)
    if folder.name != f"step-{state.step:06d}":
        return f"{STATE} is that of step {state.step}"
    weights = next((name for name in (ADAPTER, WEIGHTS) if (folder / name).is_file()), ADAPTER)
    for name in (weights, OPTIMIZER):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            with safe_open(folder / name, "pt") as tensors:
                bad = next((key for key in tensors.keys() if not tensors.get_tensor(key).isfinite().all()), None)  # noqa: SIM118
        except SafetensorError as error:
            return f"{name} cannot be read ({error})"
        if bad is not None:
            return f"{name}: {bad} is not finite"
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, oldest first, verified or not."""
    found = (NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match and match[0] == f"step-{int(match[1]):06d}")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; newer ones that do not are set aside with a warning.

    None if there never was one. Raises ValueError if there are some and none is good: a run never starts afresh over them.
    """
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:06d}"
        complaint = complaint_about_checkpoint(path) or complaint_about_contents(path)
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
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.corrupt-{number}")
    return path.rename(target)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. Called only after the newest was verified."""
    for step in steps(folder)[:-keep]:
        if step != best:
            _delete(folder / f"step-{step:06d}")


def _delete(checkpoint: Path) -> None:
    """Renamed first: half of it, left by a kill, would look like a damaged checkpoint."""
    remove(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.tmp")))


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
        _delete(path)
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
    """The state of a verified checkpoint. Raises ValueError for what no run can have written."""
    values = read_json(folder / STATE)
    if not isinstance(values, dict):
        raise ValueError(f"{STATE} holds no state")
    known = {f.name: values[f.name] for f in fields(State) if f.name in values}
    for key, value in known.items():
        if not GOOD[key](value):
            raise ValueError(f"{STATE}: {key} is {str(value)[:60]!r}, which no run writes")
    return State(**known)


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Give a verified checkpoint's optimiser state to an engine. Raises ValueError if it does not fit."""
    state, tensors = read_state(folder), load_file(folder / OPTIMIZER)
    found: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **state.optimizer_numbers}.items():
        name, _, part = key.rpartition(":")
        found.setdefault(name, {})[part] = value
    moments = ("exp_avg", "exp_avg_sq") if state.identity.get("optim.name", "adamw") == "adamw" else ("state1", "state2")
    for name, parts in found.items():
        shape = shape_of(engine.parameters[name]) if name in engine.parameters else None
        wrong = [part for part in moments if getattr(parts.get(part), "shape", None) != shape]
        if wrong or "step" not in parts or (isinstance(parts["step"], Tensor) and parts["step"].numel() != 1):
            raise ValueError(f"the optimiser's state in {folder} does not fit this run: {name}, {', '.join(wrong) or 'step'}")
    engine.load_optimizer_state(tensors, state.optimizer_numbers)


def load_weights(folder: Path, model: nn.Module, cast: bool = False) -> None:
    """Load trained weights into a model of the same shape, before an engine shards it. Raises ValueError if they do not fit it.

    `cast`: those of another program may be stored in 16 bits.
    """
    name, expected = in_file(model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    tensors = load_file(folder / name)
    if cast:
        tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    wrong = sorted(
        k
        for k in expected.keys() | tensors.keys()
        if k not in expected or k not in tensors or (expected[k].shape, expected[k].dtype) != (tensors[k].shape, tensors[k].dtype)
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


def changed_rewards(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{key: function} of a person's own rewards whose file has changed and whose function is named as before (rewards.fingerprints)."""
    found = {}
    for key in (key for key in now if key.startswith("grpo.rewards.") and ".path (" in key and key in then):
        (before, _, hash_before), (function, _, hash_now) = (str(identity[key]).partition(" ") for identity in (then, now))
        if before == function and hash_before != hash_now:
            found[key] = function
    return found


def check_identity(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Raises ValueError, field by field, if a run would go on with another recipe, other data or another base.

    A key that did not exist when the run was started counts as its default, which is what the run did. Returns the functions of a
    person's own rewards whose file has changed: they may have been mended, and the run goes on with them.
    """
    mended = changed_rewards(then, now)
    lines = [
        f"  {key}: was {then.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted((then.keys() | now.keys()) - mended.keys())
        if then.get(key) != now.get(key) and not (key in now and key not in then and _as_in_json(default_of(key)) == now[key])
    ]
    if lines:
        raise ValueError(
            f"the run in {folder} cannot go on, for these would change its curve:\n" + "\n".join(lines) + "\n"
            "put them back, or choose another output.dir for a new run"
        )
    return list(mended.values())


def _as_in_json(value: Any) -> Any:
    """Tuples are lists there."""
    return list(value) if isinstance(value, tuple) else value
