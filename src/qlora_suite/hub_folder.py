"""A run's result as a folder for the hub: everything that a stranger needs, and nothing else of this machine.

    runs/quickstart/hub/
      adapter_model.safetensors  adapter_config.json      whose base is the hub's, or model*.safetensors and config.json
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      generation_config.json                              the tokens that end an answer
      README.md                                           the card (model_card.py)
      recipe.yaml  report.md  report.json  report.html  LICENSE       as far as they are there
      recipe-1-sft.yaml  recipe-2-dpo.yaml                of the runs that it goes on from

Files are taken by name: what else lies beside them (optimiser state, checkpoints, scores) is not published.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from qlora_suite.base_origin import Origin, base_file
from qlora_suite.checkpoint import ADAPTER, MANIFEST
from qlora_suite.comparison import REPORT_VERSION
from qlora_suite.files import check_version, complaint_about, file_table, folder_aside, read_json, sha256, write_json, write_text
from qlora_suite.leaks import complaint_about_leaks, machine_roots, without_paths
from qlora_suite.subject import Subject, renderer_of

Form = Literal["adapter", "merged", "model"]
CARD, MARK = "README.md", "qlora-suite"
MERGED, MERGED_VERSION = "merge.json", 1
"""What scripts/merge.py says of a merged model."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt")
TEMPLATE = "chat_template.jinja"
REPORTS = ("report.md", "report.json", "report.html")
WHAT = {
    ADAPTER: "the adapter's weights",
    "adapter_config.json": "what PEFT reads beside them: base, revision, rank, modules",
    "config.json": "the model's architecture",
    "model.safetensors": "the model's weights",
    "model.safetensors.index.json": "which weight is in which file",
    "generation_config.json": "the tokens that end an answer",
    TEMPLATE: "the chat template that it was trained in",
    CARD: "the card",
    "recipe.yaml": "the recipe that it was trained by",
    "report.md": "the evaluation, to read",
    "report.json": "the evaluation, every number",
    "report.html": "the evaluation as a page; it quotes conversations of the validation split",
    "LICENSE": "the licence of the base",
    "app.py": "the Space's chat page",
    "space.json": "what it loads, and how",
    "requirements.txt": "the versions that it runs with",
}


@dataclass(frozen=True)
class Result:
    """What is published of a run, and as what."""

    repo: str
    subject: Subject
    form: Form
    origin: Origin | None
    """The base on the hub; None for what was trained from nothing, or merged from a base that the hub does not have."""
    run: dict[str, Any]
    """run.json"""
    report: dict[str, Any] | None
    """report.json, if it is of this result."""
    licence: str | None
    datasets: tuple[str, ...]
    languages: tuple[str, ...]

    @property
    def weights(self) -> Path:
        return self.subject.folder / ("merged" if self.form == "merged" else "final")

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


def form_of(subject: Subject, merged: bool) -> Form:
    """Raises ValueError if there is nothing merged, or nothing to merge."""
    if subject.adapter is None:
        if merged:
            raise ValueError(f"every weight of {subject.folder} was trained, so there is nothing to merge; leave --merged out")
        return "model"
    if merged:
        check_merged(subject)
    return "merged" if merged else "adapter"


def check_merged(subject: Subject) -> None:
    """Raises ValueError unless runs/NAME/merged is whole and was made from this run's adapter."""
    folder = subject.folder / "merged"
    again = f"remove it and make it again: python scripts/merge.py {subject.folder}"
    if not (folder / MERGED).is_file():
        raise ValueError(f"there is no merged model in {folder}; make it: python scripts/merge.py {subject.folder}")
    record = read_json(folder / MERGED)
    check_version(folder / MERGED, record, MERGED_VERSION)
    if complaint := complaint_about(folder, record["files"]):
        raise ValueError(f"{folder} is damaged ({complaint}); {again}")
    if record["adapter"][ADAPTER] != sha256(subject.folder / "final" / ADAPTER):
        raise ValueError(f"{folder} was merged from another adapter than the run has now; {again}")


def report_of(subject: Subject) -> tuple[dict[str, Any] | None, str]:
    """report.json, or None and why there is none that counts."""
    path, command = subject.folder / "report.json", f"python scripts/evaluate.py {subject.folder}"
    if not path.is_file():
        return None, f"not evaluated; the card says so. First: {command}"
    report = read_json(path)
    check_version(path, report, REPORT_VERSION)
    if (report.get("adapter") is None and not report.get("rewards")) or report.get("chosen_by") != subject.chosen_by:
        return None, f"{path} is of another result, so the card says: not evaluated. Again: {command}"
    return report, ""


def build(result: Result, folder: Path, card: str, with_reports: bool) -> None:
    """Write `folder` anew, aside first. Raises ValueError if something else is in its place, or if anything leaks."""
    check_place(folder, result.subject.folder)
    aside, roots = folder_aside(folder, "tmp"), roots_of(result.subject)
    try:
        _take_weights(result, aside)
        for name in TOKENIZER:
            if (result.weights / name).is_file():
                shutil.copyfile(result.weights / name, aside / name)
        _clean_tokenizer_config(aside / "tokenizer_config.json")
        _take_template(result, aside)
        _write_generation_config(result, aside)
        for name in ("recipe.yaml", *(REPORTS if with_reports and result.report else ())):
            if (result.subject.folder / name).is_file():
                text = (result.subject.folder / name).read_text(encoding="utf-8")
                write_text(aside / name, without_paths(text, roots))
        for name, text in recipes_before(result.subject):
            write_text(aside / name, without_paths(text, roots))
        if licence := base_file(result.subject.recipe.model, result.origin, "LICENSE"):
            shutil.copyfile(licence, aside / "LICENSE")
        write_text(aside / CARD, without_paths(card, roots))
        if complaint := complaint_about_leaks(aside, roots):
            raise ValueError(f"nothing was published: {complaint}")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        write_json(built(folder), file_table(folder, but=""))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def roots_of(subject: Subject) -> list[str]:
    """`machine_roots` of a run and of those that it goes on from."""
    return machine_roots(subject.folder, (text for _, text in recipes_before(subject)))


def recipes_before(subject: Subject) -> Iterator[tuple[str, str]]:
    """(file's name, text) of the recipes of the runs that this one goes on from, the first one first, as far as they are known."""
    for number, stage in enumerate(reversed(subject.before), 1):
        if stage.recipe is not None:
            yield f"recipe-{number}-{stage.method}.yaml", stage.recipe


def built(folder: Path) -> Path:
    """Beside the folder, for it is not published: what `build` wrote, so that a person's own changes are not lost to the next one."""
    return folder.with_name(f".{folder.name}.json")


def check_place(folder: Path, run: Path) -> None:
    """Raises ValueError if what is there was not written by `build`."""
    ours = folder == run / "hub" or ((folder / CARD).is_file() and MARK in (folder / CARD).read_text(encoding="utf-8", errors="replace"))
    if folder.exists() and not (folder.is_dir() and (ours or not any(folder.iterdir()))):
        raise ValueError(f"{folder} is there already and is no folder that this script made; give another --output")
    if folder.exists() and built(folder).is_file():
        table, now = read_json(built(folder)), file_table(folder, but="")
        if changed := sorted(name for name in table.keys() | now.keys() if table.get(name) != now.get(name)):
            raise ValueError(
                f"{folder} was changed by hand since it was made ({', '.join(changed[:3])}), and would be written anew; move it away, "
                "publish, and make your changes on the hub"
            )


def listing(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and what it is, of every file."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        shard = "a part of the model's weights" if path.suffix == ".safetensors" else "the tokenizer"
        stage = "the recipe of an earlier stage" if name.startswith("recipe-") else shard
        yield name, path.stat().st_size, WHAT.get(name, stage)


def _take_weights(result: Result, folder: Path) -> None:
    if result.form == "adapter":
        _link(result.weights / ADAPTER, folder / ADAPTER)
        expected = read_json(result.weights / MANIFEST)["files"][ADAPTER]["sha256"]
        if sha256(folder / ADAPTER) != expected:
            raise ValueError(f"{result.weights / ADAPTER} changed while it was copied; nothing was published")
        config = read_json(result.weights / "adapter_config.json")
        config |= {"base_model_name_or_path": result.origin.id, "revision": result.origin.revision}
        write_json(folder / "adapter_config.json", config)
        return
    for path in sorted(result.weights.glob("model*.safetensors*")):
        _link(path, folder / path.name)
    config = read_json(result.weights / "config.json")
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, where the disk can; weights are large and are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _clean_tokenizer_config(path: Path) -> None:
    """Without how it was loaded here: `local_files_only` would keep the reader's transformers off the hub."""
    config = read_json(path)
    write_json(path, {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "name_or_path")})


def _take_template(result: Result, folder: Path) -> None:
    path = result.weights / TEMPLATE
    if path.is_file():
        shutil.copyfile(path, folder / TEMPLATE)


def _write_generation_config(result: Result, folder: Path) -> None:
    """The merged model's own, or one that says what ends an answer: PEFT reads none, and transformers takes it from here by name."""
    path = result.weights / "generation_config.json"
    if result.form == "merged" and path.is_file():
        shutil.copyfile(path, folder / path.name)
        return
    renderer = renderer_of(result.subject)
    stop = list(renderer.stop_token_ids)
    GenerationConfig(bos_token_id=renderer.bos, eos_token_id=stop if len(stop) > 1 else stop[0], pad_token_id=stop[0]).save_pretrained(
        folder
    )
