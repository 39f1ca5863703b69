"""What scripts/evaluate.py is to score: the base alone, a run, or an adapter or full model that was trained elsewhere.

subject = subject_of(Path("runs/quickstart"), [])
ours, of_base = renderers_of(subject, manifest)     how it reads a conversation, and in which formats the base may try
columns_of(subject, dtype, ours, of_base)           the models to compare
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_suite import start_from
from qlora_suite.adapter import adapter_folder
from qlora_suite.base_config import load_config, load_tokenizer
from qlora_suite.chat import Renderer
from qlora_suite.checkpoint import complaint_about_checkpoint
from qlora_suite.files import hash_of, read_json
from qlora_suite.model import base_fingerprint, check_reachable
from qlora_suite.prequantized import quantization_of, record_of, source_of
from qlora_suite.recipe import Chat, Model, Recipe
from qlora_suite.recipe_file import load
from qlora_suite.role_markers import ASSISTANT, PROMPTER, RoleMarkers, add_role_markers
from qlora_suite.run_facts import START, prepared_tokenizer
from qlora_suite.stages import Stage, longest, noted_in, stages_before
from qlora_suite.template_source import IM_END, IM_START, is_chatml
from qlora_suite.tracking import say

PLAIN_FORMATS = ("human_assistant", "instruct_output")
"""In which a base that has never seen our markers may do better."""
START_LABEL = "adapter at the start"
LONGEST_REPORT_NAME = 100
"""In characters: a name that no file system takes would show after the scoring."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Subject:
    recipe: Recipe
    folder: Path
    """Where the report goes."""
    report: str
    """Name of the report's files: `report` belongs to the run in that folder, everything else has a name of its own."""
    format: str
    """The chat format it was trained in."""
    adapter: str | None = None
    model: str | None = None
    """A full model, instead of base and adapter."""
    elsewhere: bool = False
    """Not made by this recipe: with a tokenizer of its own."""
    chosen_by: str = "its maker"
    before: tuple[Stage, ...] = ()
    """Of a run that began with another one's adapter: the earlier ones, the latest first, as far as they are known."""
    window: int | None = None
    """The longest prompt and answer together when it is asked or served, in tokens; None: data.max_length of the recipe."""

    @property
    def asked_within(self) -> int:
        return self.window or self.recipe.data.max_length


@dataclass(frozen=True)
class Column:
    """One model of the comparison."""

    name: str
    """`base_unquantised`, `base_quantised`, `start` (what the run's training began with) or `adapter` (also a full model)."""
    label: str
    model: Model
    adapter: str | None
    renderers: dict[str, Renderer]
    """By format: those in which it is scored."""
    missing: str = ""
    """Why it cannot be scored, where that is known before it is loaded."""


def subject_of(
    target: Path, overrides: list[str], adapter: str | None = None, model: str | None = None, chat: str | None = None
) -> Subject:
    """What the command line names. Raises ValueError if it cannot be scored."""
    if adapter and model:
        raise ValueError("--adapter and --model name two different things to score; give one")
    if chat and not (adapter or model):
        raise ValueError("--format says how an --adapter or --model was trained; a run and a base are scored in the recipe's format")
    if not target.exists() and target.suffix not in (".yaml", ".yml"):
        raise ValueError(f"there is no run in {target} (working folder: {Path.cwd()}); train first, or give a recipe to score its base")
    if not target.is_dir():
        recipe, other = load(target, overrides), adapter or model
        name = f"report-{_file_name(other) if other else 'base'}"
        return Subject(recipe, Path(recipe.output.dir), name, chat or recipe.chat.format, adapter, model, elsewhere=bool(other))
    if adapter or model:
        raise ValueError(f"{target} is a run's folder and has a result of its own; give a recipe with --adapter or --model")
    if not (target / "recipe.yaml").is_file():
        raise ValueError(f"{target} is not a run's folder: it has no recipe.yaml (for an adapter, give a recipe and --adapter {target})")
    recipe, final = load(target / "recipe.yaml", overrides), target / "final"
    if not final.is_dir():
        state = read_json(target / "status.json")
        raise ValueError(
            f"{target} is not finished ({state['state']} at step {state['step']} of {state['num_steps']}); train on, then evaluate"
        )
    if complaint := complaint_about_checkpoint(final):
        raise ValueError(f"{final} is damaged ({complaint}); remove it, and scripts/train.py makes it again from the run's checkpoints")
    made = {"model" if recipe.adapter == "none" else "adapter": str(final)}
    made_in = Subject(recipe, target, "report", recipe.chat.format, **made, chosen_by=read_json(final / "chosen.json")["chosen_by"])
    before = tuple(_stages_before(made_in))
    asked_for = any(override.partition("=")[0].strip() == "data.max_length" for override in overrides)
    return replace(made_in, before=before, window=None if asked_for else longest(recipe, before))


def _stages_before(subject: Subject) -> list[Stage]:
    """As the run noted them, or as they are found where one of an earlier version began, if that is what it began with."""
    if (noted := noted_in(subject.folder)) is not None:
        return noted
    start, gone = start_of(subject)
    if start is None or gone:
        return [Stage(subject.recipe.adapter.start_from)] if start else []
    return stages_before(subject.recipe)


def _file_name(place: str) -> str:
    """The last part of a path or hub id, fit for a file's name; of a run's result, the run's."""
    path = Path(place).resolve() if os.path.exists(place) else None  # Path.exists() raises for a long name
    path = path.parent if path and path.name == "final" and (path.parent / "recipe.yaml").is_file() else path
    last = path.name if path else place.rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "other"
    return name if len(name) <= LONGEST_REPORT_NAME else f"{name[: LONGEST_REPORT_NAME - 9]}-{hash_of(last)[:8]}"


def renderers_of(subject: Subject, manifest: dict[str, Any]) -> tuple[Renderer, dict[str, Renderer]]:
    """How the subject reads a conversation, and how its base may: in the trained format (first) and in the plain-text ones, unless
    `evaluation.base_formats: trained`. Raises ValueError if that has no effect.

    Scores are of the answers, whatever was trained on.
    """
    recipe, chat = subject.recipe, _chat(subject)
    if subject.format == "text" and recipe.evaluation.base_formats != "all":
        raise ValueError("evaluation.base_formats has no effect on --format text, which is scored as text alone; set it to all")
    base_tokenizer = load_tokenizer(recipe.model)
    if subject.elsewhere:
        ours = renderer_of(subject)
        shared = base_tokenizer.get_vocab().items() <= ours.tokenizer.get_vocab().items()
        of_base = {subject.format: ours if shared else _renderer(load_tokenizer(recipe.model), chat, recipe.model)}
    else:
        ours = Renderer(prepared_tokenizer(Path(recipe.data.prepared)), chat, RoleMarkers.from_json(manifest["role_markers"]))
        of_base = {subject.format: ours}
    for name in PLAIN_FORMATS if subject.format != "text" and recipe.evaluation.base_formats == "all" else ():
        if name not in of_base:
            of_base[name] = _renderer(base_tokenizer, Chat(format=name), recipe.model)
    return ours, of_base


def renderer_of(subject: Subject) -> Renderer:
    """How the subject is asked, from the files that stand beside its weights: it needs no prepared data."""
    recipe, chat = subject.recipe, _chat(subject)
    if subject.elsewhere:
        return _renderer(tokenizer_of(subject), chat, Model(base=subject.model) if subject.model else recipe.model)
    if not (subject.adapter or subject.model):
        return _renderer(load_tokenizer(recipe.model), chat, recipe.model)
    markers = read_json(subject.folder / "run.json")["data_manifest"]["role_markers"]
    return Renderer(AutoTokenizer.from_pretrained(subject.folder / "final", trust_remote_code=False), chat, RoleMarkers.from_json(markers))


def _chat(subject: Subject) -> Chat:
    """The format, with the system prompt of the recipe if it is the recipe's."""
    chat = subject.recipe.chat
    own = chat if chat.format == subject.format else Chat(format=subject.format)
    return own.model_copy(update={"loss_on": None})


def _renderer(tokenizer: PreTrainedTokenizerBase, chat: Chat, model: Model) -> Renderer:
    """For a model that is not ours to train: role markers are control tokens only if its tokenizer has them, else plain text.

    A new control token would stand for a row of the embedding that nobody has trained.
    """
    rows = load_config(model).get_text_config().vocab_size
    if chat.format == "oasst":
        vocabulary = tokenizer.get_vocab()
        known = [marker for marker in (PROMPTER, ASSISTANT) if marker in vocabulary]
        if outside := [marker for marker in known if vocabulary[marker] >= rows]:
            raise ValueError(f"the tokenizer has {outside[0]} as token {vocabulary[outside[0]]}, but {model.base} has {rows:,} rows")
        chat = chat.model_copy(update={"role_markers": "auto" if len(known) == 2 else "text"})
    if chat.format in ("chatml", "model") and is_chatml(tokenizer, chat):
        vocabulary = tokenizer.get_vocab()
        lacking = [marker for marker in (IM_START, IM_END) if vocabulary.get(marker, rows) >= rows]
        if lacking:
            template = "" if chat.format == "chatml" else "has no chat template, and "
            raise ValueError(
                f"{model.base} {template}has no token {' and '.join(lacking)}, so it was not trained in ChatML; "
                "name the format it was trained in with --format"
            )
    return Renderer(tokenizer, chat, add_role_markers(tokenizer, rows, chat))


def tokenizer_of(subject: Subject) -> PreTrainedTokenizerBase:
    """The tokenizer of something trained elsewhere: its own, or else the base's. Raises ValueError if its own is damaged."""
    place = subject.model or str(adapter_folder(subject.adapter))
    if not Path(place).is_dir() or any((Path(place) / name).is_file() for name in TOKENIZER_FILES):
        try:
            return load_tokenizer(Model(base=place))
        except ValueError:
            if Path(place).is_dir():
                raise
    say(f"{subject.model or subject.adapter} has no tokenizer of its own; it gets the one of {subject.recipe.model.base}")
    return load_tokenizer(subject.recipe.model)


def columns_of(subject: Subject, dtype: torch.dtype, ours: Renderer, of_base: dict[str, Renderer]) -> list[Column]:
    """The models to compare, in the order in which they are shown. Raises ValueError if there are none."""
    model, columns = subject.recipe.model, []
    unquantised, missing = unquantised_base(model)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    trained = {subject.format: ours}
    if not model.random_init:
        columns.append(Column("base_unquantised", f"base, {short}", unquantised, None, of_base, missing))
        if model.quantization != "none":
            columns.append(Column("base_quantised", f"base, {model.quantization}", model, None, of_base))
    start, gone = start_of(subject)
    if start:
        columns.append(Column("start", START_LABEL, model, start, trained, gone))
    if subject.adapter:
        columns.append(Column("adapter", "adapter", model, subject.adapter, trained))
    if subject.model:
        columns.append(Column("adapter", "model", Model(base=subject.model, quantization="none"), None, trained))
    if not columns:
        raise ValueError("the recipe makes its model from nothing, so there is no base to score; give its run's folder instead")
    return columns


def start_of(subject: Subject) -> tuple[str | None, str]:
    """The adapter that the run's training began with, if it was no new one, and why it cannot be had ("" if it can).

    It must be the very weights that training began with: their hash is in the run's status.json.
    """
    tuned = subject.recipe.adapter
    if subject.elsewhere or subject.adapter is None or tuned == "none" or tuned.start_from is None:
        return None, ""
    try:
        folder, now = str(start_from.folder_of(tuned.start_from)), start_from.fingerprint(tuned.start_from)
    except (ValueError, OSError) as why:
        return tuned.start_from, f"what adapter.start_from names is not at hand: {why}"
    if now != (read_json(subject.folder / "status.json").get("identity") or {}).get(START):
        return tuned.start_from, f"{tuned.start_from} is another adapter now than the one that training began with"
    return folder, ""


def unquantised_base(model: Model) -> tuple[Model, str]:
    """The recipe's base as it was published, and why it cannot be had ("" if it can).

    A base that is quantised already leads to what it was made from, by its record, if that is reachable and still the same.
    """
    plain = Model(base=model.base, revision=model.revision, quantization="none")
    if model.random_init or quantization_of(load_config(model)) is None:
        return plain, ""
    record, source = record_of(model.base), source_of(model.base)
    if source is None:
        return plain, f"{model.base} is quantised and does not say what it was made from"
    try:
        check_reachable(source)
        same = base_fingerprint(source) == record["source"]["fingerprint"]
    except ValueError as why:
        return source, f"{model.base} is quantised, and what it was made from is not at hand: {why}"
    return source, "" if same else f"{model.base} is quantised, and {source.base}, which it was made from, has changed since"
