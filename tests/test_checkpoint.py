"""A checkpoint is wholly there or not there, and nothing damaged is ever trusted, loaded or started over."""

import itertools
import json
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import write_recipe
from in_process import metrics, prepared, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qlora_suite import checkpoint, optimizer
from qlora_suite.checkpoint import State
from qlora_suite.engine import Engine
from qlora_suite.files import hash_of
from qlora_suite.recipe import Optim

KEPT = re.compile(r"(\.safetensors|\.json|\.yaml|\.jinja|/merges\.txt|/README\.md)$")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> PeftModel:
    """An adapter with tensors of 4,096 and more elements, below which bitsandbytes keeps 32-bit states."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["q_proj", "fc1"]))


def learn(model: nn.Module, opt: torch.optim.Optimizer, step: int) -> None:
    """A step on random tokens, a function of its number."""
    torch.manual_seed(step)
    ids = torch.randint(0, 1000, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    opt.zero_grad()


@pytest.fixture
def opt(model: PeftModel) -> torch.optim.Optimizer:
    opt = optimizer.build(model, Optim(learning_rate=1e-3))
    learn(model, opt, 0)
    return opt


def engine_of(model: nn.Module, opt: torch.optim.Optimizer) -> Engine:
    return Engine(Accelerator(cpu=True), model, opt, torch.float32, max_grad_norm=1.0)


def trained(model: nn.Module, opt: torch.optim.Optimizer) -> checkpoint.Trained:
    return checkpoint.trained(model, engine_of(model, opt))


Save = Callable[[int], Path]


@pytest.fixture
def save(tmp_path: Path, model: PeftModel, opt: torch.optim.Optimizer, tokenizer: PreTrainedTokenizerBase) -> Save:
    return lambda step: checkpoint.save(tmp_path, State(step=step), model, trained(model, opt), tokenizer, "seed: 0\n", ("some/base", None))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is damaged is seen


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


FILES = (
    checkpoint.ADAPTER,
    "adapter_config.json",
    "optimizer.safetensors",
    "state.json",
    "recipe.yaml",
    "tokenizer.json",
    checkpoint.MANIFEST,
)


def test_any_damage_to_any_file_makes_the_older_one_count(save: Save, tmp_path: Path) -> None:
    older, newer = save(1), save(2)
    whole = tmp_path / "whole"
    shutil.copytree(newer, whole)
    for count, (name, damage) in enumerate(itertools.product(FILES, (truncate, empty, flip, Path.unlink)), start=1):
        damage(newer / name)
        with pytest.warns(UserWarning, match=re.escape(name)) as caught:
            assert checkpoint.latest(tmp_path) == older, f"{damage.__name__} of {name}"
        assert "step-000002.corrupt" in str(caught[0].message)
        assert len(list(tmp_path.glob("step-000002.corrupt*"))) == count, "set aside, not deleted"
        shutil.copytree(whole, newer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoint.latest(tmp_path) == newer


def test_a_flipped_bit_anywhere_in_the_weights_is_seen(save: Save) -> None:
    folder = save(1)
    path = folder / checkpoint.ADAPTER
    good = path.read_bytes()
    for place in range(0, len(good), len(good) // 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert checkpoint.complaint_about_checkpoint(folder)
    path.write_bytes(good)
    assert checkpoint.complaint_about_checkpoint(folder) is None


def test_all_bad_is_an_error_and_never_a_fresh_start(save: Save, tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(step) / checkpoint.ADAPTER)
    before = sum(path.is_file() for path in tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        checkpoint.latest(tmp_path)
    with pytest.raises(ValueError, match="every checkpoint"):
        checkpoint.latest(tmp_path)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == before, "nothing was deleted"


def test_a_newer_format_is_refused_and_left_alone(save: Save) -> None:
    """It is good, only not for us: nothing is renamed, and nothing starts over it."""
    folder = save(1)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    newer = {**manifest, "format_version": checkpoint.FORMAT_VERSION + 1}
    del newer["sha256"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**newer, "sha256": hash_of(newer)}))
    with pytest.raises(ValueError, match="written by a newer version"):
        checkpoint.latest(folder.parent)
    assert folder.is_dir()


def test_nothing_there_is_a_beginning(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


# --- interrupted and failing writes


def test_what_an_interrupted_write_leaves_is_no_checkpoint_and_is_cleaned_up(save: Save, tmp_path: Path) -> None:
    good = save(1)
    shutil.copytree(good, tmp_path / ".step-000002.tmp")
    assert checkpoint.latest(tmp_path) == good
    assert checkpoint.steps(tmp_path) == [1]
    save(3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_write_in_progress_is_no_checkpoint(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is killed before the rename was no checkpoint at any time, even when all its files were there."""
    real, seen = checkpoint.seal, []
    monkeypatch.setattr(checkpoint, "seal", lambda folder: (real(folder), seen.append(checkpoint.steps(tmp_path))))
    save(1)
    save(2)
    assert seen == [[], [1]]


WRITES = ("save_file", "write_json", "check_weights", "seal", "file_table", "flush")


@pytest.mark.parametrize("where", [*WRITES, "Path.rename", "tokenizer"])
def test_a_write_that_fails_leaves_the_older_one_good_and_nothing_half(
    save: Save, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The disk is full at the first, the second, ... call of each function that writes."""
    save(1)
    target, name = {"Path.rename": (Path, "rename"), "tokenizer": (tokenizer, "save_pretrained")}.get(where, (checkpoint, where))
    real, failures = getattr(target, name), 0
    for fail_at in itertools.count():
        calls = itertools.count()

        def full(*args: object, calls: itertools.count = calls, fail_at: int = fail_at, **kwargs: object) -> object:
            if next(calls) == fail_at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            try:
                save(2)
            except OSError:
                failures += 1
                left = names(tmp_path)
                assert left in (["step-000001"], ["step-000001", "step-000002"])  # the second if it was complete before
                assert all(checkpoint.complaint_about_checkpoint(tmp_path / each) is None for each in left)
                shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
            else:
                break
    assert failures >= 1
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002", "the next save is none the worse"


def test_a_checkpoint_that_does_not_read_back_is_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk took the bytes and lost one after the manifest was made."""
    real = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda folder: real(folder) or flip(folder / checkpoint.ADAPTER))
    with pytest.raises(OSError, match="does not read back"):
        save(1)


def test_a_damaged_one_of_the_same_step_is_set_aside_for_the_new_one(save: Save, tmp_path: Path) -> None:
    flip(save(1) / checkpoint.ADAPTER)
    assert checkpoint.complaint_about_checkpoint(save(1)) is None
    assert names(tmp_path) == ["step-000001", "step-000001.corrupt"]


def test_prune_keeps_the_newest_and_the_best(save: Save, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(step)
    checkpoint.prune(tmp_path, keep=2, best=2)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    checkpoint.prune(tmp_path, keep=2, best=5)
    assert checkpoint.steps(tmp_path) == [4, 5]
    checkpoint.prune(tmp_path, keep=2, best=None)
    assert checkpoint.steps(tmp_path) == [4, 5]


# --- what is in it


def test_there_is_no_pickle_in_it(save: Save) -> None:
    for path in save(1).rglob("*"):
        assert KEPT.search(str(path)), f"{path.name} is of an unknown kind"
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), path.name


def test_plain_peft_reads_it(save: Save, model: PeftModel, tiny_base: Path) -> None:
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), save(1))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert json.loads((save(1) / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def spoil_nothing(_: dict[str, Tensor]) -> None:
    pass


def spoil_all(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


def spoil_one(tensors: dict[str, Tensor]) -> None:
    tensors.popitem()


def spoil_nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[5] = float("nan")


def spoil_shape(tensors: dict[str, Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1].contiguous()


def spoil_zero(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoil_nothing, None),
        (spoil_all, "without"),
        (spoil_one, "without"),
        (spoil_nan, "not finite"),
        (spoil_shape, "shape"),
        (spoil_zero, "lora_B is zero"),
    ],
)
def test_saved_weights_are_looked_at_again(
    save: Save, model: PeftModel, spoil: Callable[[dict[str, Tensor]], None], complaint: str | None
) -> None:
    path = save(1) / checkpoint.ADAPTER
    tensors, expected = load_file(path), load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    if complaint is None:
        checkpoint.check_weights(path, expected, trained=True)
    else:
        with pytest.raises(RuntimeError, match=complaint):
            checkpoint.check_weights(path, expected, trained=True)


def test_an_untrained_adapter_may_be_zero(model: PeftModel, tmp_path: Path) -> None:
    name, tensors = checkpoint.in_file(model, dict(model.named_parameters()))
    save_file(tensors, tmp_path / name)
    checkpoint.check_weights(tmp_path / name, tensors, trained=False)
    with pytest.raises(RuntimeError, match="lora_B"):
        checkpoint.check_weights(tmp_path / name, tensors, trained=True)


def test_a_full_disk_is_an_oserror_and_leaves_nothing_half(save: Save, tmp_path: Path) -> None:
    """safetensors calls it by a name of its own; a periodic save that meets it must not end the run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
            save(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
    save(1)


# --- the optimiser


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole_state(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, object]:
    tensors, numbers = optimizer.state_tensors(opt, trainable(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {**{f"state {k}": v.clone() for k, v in tensors.items()}, **numbers, **weights}


def assert_equal(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "adapter none"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged")
def test_weights_and_optimiser_come_back_bit_by_bit(
    tiny_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, adapter: bool
) -> None:
    """Two steps, saved, loaded into a fresh model; the third step is then the same, too."""

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        if adapter:
            net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["q_proj", "fc1"]))
        return net, optimizer.build(net, Optim(name=name, learning_rate=1e-3, weight_decay=0.01))

    model, opt = fresh(0)
    for step in (1, 2):
        learn(model, opt, step)
    tensors = optimizer.state_tensors(opt, trainable(model))[0].values()
    assert any(t.dtype == torch.uint8 for t in tensors) == name.endswith("8bit"), "the states are not of the kind that was asked for"
    learnt_by = {"optim.name": name}
    saved = checkpoint.save(
        tmp_path, State(step=2, tokens=64, identity=learnt_by), model, trained(model, opt), tokenizer, "", ("base", None)
    )

    other, other_opt = fresh(1)
    learn(other, other_opt, 9)
    checkpoint.load_weights(saved, other)
    checkpoint.restore_optimizer(saved, engine_of(other, other_opt))
    state = checkpoint.read_state(saved)
    assert (state.step, state.tokens) == (2, 64)
    assert_equal(whole_state(model, opt), whole_state(other, other_opt))
    for net, o in ((model, opt), (other, other_opt)):
        learn(net, o, 3)
    assert_equal(whole_state(model, opt), whole_state(other, other_opt))


def test_weights_of_another_shape_are_refused(save: Save, tiny_base: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    other = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=32, target_modules=["q_proj", "fc1"]))
    with pytest.raises(ValueError, match="do not fit this model"):
        checkpoint.load_weights(save(1), other)


# --- the mirror


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, oasst_file: Path) -> Path:
    overrides = ("train.max_steps=6", "checkpoints.every_steps=2", f"output.mirror={tmp_path}/mirror")
    return prepared(write_recipe(tmp_path, tiny_base, oasst_file, *overrides))


def test_a_run_that_lost_its_disk_goes_on_from_the_mirror(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the first start after the loss is killed while it copies."""
    whole = train(recipe, f"output.dir={tmp_path}/whole", "output.mirror=null")
    run = train(recipe, "stop.after_minutes=1e-6")
    assert checkpoint.steps(run / "checkpoints") == [1]
    mirrored = tmp_path / "mirror" / "checkpoints"
    assert snapshot(mirrored) == snapshot(run / "checkpoints")
    assert checkpoint.complaint_about_checkpoint(mirrored / "step-000001") is None

    shutil.rmtree(run)
    real = shutil.copyfile

    def killed(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "optimizer.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(recipe)
    assert [r["step"] for r in metrics(run)] == [2, 3, 4, 5, 6]
    assert (run / "final" / checkpoint.ADAPTER).read_bytes() == (whole / "final" / checkpoint.ADAPTER).read_bytes()
    assert checkpoint.steps(mirrored) == [4, 6], "the mirror is pruned as well"


def test_a_copy_cut_short_does_not_count(save: Save, tmp_path: Path) -> None:
    """The manifest goes last; a copy that does not verify is made again."""
    source, mirror = save(1), tmp_path / "mirror"
    checkpoint.copy_checked(source, mirror / source.name)
    (mirror / source.name / checkpoint.MANIFEST).unlink()
    truncate(mirror / source.name / checkpoint.ADAPTER)
    checkpoint.copy_checked(source, mirror / source.name)
    assert checkpoint.latest(mirror) == mirror / source.name


def test_a_mirror_that_lies_is_an_error(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(1)
    real = shutil.copyfile
    monkeypatch.setattr(checkpoint.shutil, "copyfile", lambda a, b: real(a, b) and b.name == checkpoint.ADAPTER and flip(b))
    with pytest.raises(OSError, match="does not verify"):
        checkpoint.copy_checked(source, tmp_path / "mirror" / source.name)


def test_time_is_not_in_the_weights(save: Save, tmp_path: Path) -> None:
    """The same state gives the same bytes, so that runs can be compared by hash."""
    first = snapshot(save(1))
    shutil.rmtree(tmp_path / "step-000001")
    time.sleep(0.01)
    assert snapshot(save(1)) == first
