"""scripts/publish.py: the folder holds all that a stranger needs and nothing of this machine; what arrives is what was shown."""
# ruff: noqa: F811 - fixtures are imported, and asked for by their names

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import OASST1, run_script
from hub_stand_in import TOKEN, Hub, Repo
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from markdown_it import MarkdownIt
from published import BASE, COMMIT, REPO, cache, into_cache, publish, run, trained_run  # noqa: F401
from safetensors.torch import load_file

from qlora_suite import base_origin, hub_folder, hub_upload, leaks, model_card
from qlora_suite.assistant import load
from qlora_suite.conversations import Turn
from qlora_suite.files import file_table, read_json, sha256, write_json
from qlora_suite.generation import answer
from qlora_suite.recipe import Model
from qlora_suite.subject import renderer_of, subject_of

ADAPTER_FILES = {
    "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
    "recipe.yaml", "report.html", "report.json", "report.md", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub folder of the run as it stands."""
    place = tmp_path_factory.mktemp("published") / "folder"
    done = publish(trained_run, "--repo", REPO, "--output", place, "--dry-run")
    assert done.code == 0, done.text
    return place


# the folder


def test_the_folder_holds_exactly_what_a_stranger_needs(run: Path) -> None:
    (run / "final" / "optimizer.safetensors").write_bytes(b"state")
    (run / "final" / "checkpoints").mkdir()
    (run / "final" / "checkpoints" / "state.json").write_text("{}")
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 0, done.text
    assert set(contents(run / "hub")) == ADAPTER_FILES
    for name, content in contents(run / "hub").items():
        assert name in done.said
        assert f"{len(content):,}" in done.said
    assert "nothing was sent" in done.said
    assert (run / "hub" / "README.md").read_text() in done.said
    ours, theirs = (load_file(run / place / "adapter_model.safetensors") for place in ("hub", "final"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_adapter_names_the_base_of_the_hub_although_it_was_loaded_from_a_folder(trained_run: Path, folder: Path) -> None:
    assert read_json(trained_run / "final" / "adapter_config.json")["base_model_name_or_path"].startswith("/")
    config = read_json(folder / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, COMMIT)
    stops = renderer_of(subject_of(trained_run, [])).stop_token_ids
    assert len(stops) == 3
    assert read_json(folder / "generation_config.json")["eos_token_id"] == list(stops)


def test_no_file_names_a_folder_of_this_machine(trained_run: Path, folder: Path) -> None:
    private = {str(trained_run.parent), str(Path.home()), str(Path.cwd())}
    recipe = (trained_run / "recipe.yaml").read_text()
    assert str(trained_run.parent) in recipe, "the run has to know such a path, or this shows nothing"
    for name, content in contents(folder).items():
        assert not [root for root in private if root.encode() in content], name
    assert "source: messages.jsonl" in (folder / "recipe.yaml").read_text()


@pytest.mark.parametrize("planted", ["path", "token"])
def test_a_path_or_a_token_that_stands_in_a_file_stops_it(run: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = f"{Path.home()}/secret/notes.txt" if planted == "path" else "hf_" + "plantedtoken" * 3
    template = run / "final" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# " + secret + " #}")
    monkeypatch.setattr("qlora_suite.subject.complaint_about_checkpoint", lambda _: None)
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 2
    assert "chat_template.jinja" in done.error
    assert secret not in done.text
    assert not (run / "hub").exists()
    assert not list(run.glob(".hub*"))


def test_weights_that_are_not_as_they_were_sealed_are_not_published(run: Path) -> None:
    path = run / "final" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 2
    assert "is damaged (adapter_model.safetensors" in done.error


def test_a_folder_of_somebody_else_is_not_replaced(trained_run: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "diary.txt").write_text("dear diary")
    done = publish(trained_run, "--repo", REPO, "--output", place, "--dry-run")
    assert done.code == 2
    assert contents(place) == {"diary.txt": b"dear diary"}


def merge_by_hand(run: Path, tiny_base: Path) -> Path:
    """What scripts/merge.py leaves in a run's folder, by the names of its files."""
    folder = run / "merged"
    shutil.copytree(run / "final", folder, ignore=shutil.ignore_patterns("adapter*", "chosen.json", "manifest.json"))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_base / name, folder / name)
    (folder / "Modelfile").write_text("FROM .")
    means = {"live": {"perplexity": 40.25}, "merged": {"perplexity": 40.5}}
    far = {**means, "tokens": 3251, "same_top_token": 0.9875, "largest_logit_difference": 0.125, "kl_divergence": 0.0}
    adapter = {"adapter_model.safetensors": sha256(run / "final" / "adapter_model.safetensors")}
    record = {"into": "dequantised", "dtype": "float16", "measured": {"dequantised": far}, "adapter": adapter}
    (folder / "merge.json").write_text(json.dumps({**record, "files": file_table(folder, but="merge.json")}))
    return folder


def test_the_merged_model_is_a_finetune_without_anything_of_the_adapter(run: Path, tiny_base: Path) -> None:
    done = publish(run, "--repo", REPO, "--merged", "--dry-run")
    assert done.code == 2
    assert f"python scripts/merge.py {run}" in done.error
    merged = merge_by_hand(run, tiny_base)
    done = publish(run, "--repo", REPO, "--merged", "--dry-run")
    assert done.code == 0, done.text
    weights = {"config.json", "model.safetensors"}
    assert set(contents(run / "hub")) == ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"} | weights
    card = ModelCard.load(run / "hub" / "README.md")
    assert (card.data.base_model, card.data.get("base_model_relation"), card.data.library_name) == (BASE, "finetune", "transformers")
    assert "before it was merged" in card.text
    assert "98.75 %, and the perplexity is 40.500 instead of 40.250" in card.text
    (merged / "model.safetensors").write_bytes(b"others")
    assert "is damaged (model.safetensors" in publish(run, "--repo", REPO, "--merged", "--dry-run").error


def test_a_model_merged_from_another_adapter_is_not_published(run: Path, tiny_base: Path) -> None:
    record = merge_by_hand(run, tiny_base) / "merge.json"
    record.write_text(record.read_text().replace(sha256(run / "final" / "adapter_model.safetensors"), "0" * 64))
    done = publish(run, "--repo", REPO, "--merged", "--dry-run")
    assert done.code == 2
    assert "merged from another adapter" in done.error


# which base it is


def test_where_the_base_on_the_hub_is_read_from(tiny_base: Path, tmp_path: Path) -> None:
    def origin(base: str | Path, fingerprint: str = "", **options: str | None) -> tuple[str, str | None] | None:
        found = base_origin.origin_of(Model(base=str(base)), fingerprint, options.get("id"), options.get("revision"))
        return found and (found.id, found.revision)

    assert origin("microsoft/phi-2", "microsoft/phi-2@abc123") == ("microsoft/phi-2", "abc123")
    assert origin(into_cache(tmp_path / "cache", BASE, COMMIT, tiny_base)) == (BASE, COMMIT)
    assert origin(tiny_base) is None
    assert origin(tiny_base, id="microsoft/phi-2", revision="abc") == ("microsoft/phi-2", "abc")
    named = Path(shutil.copytree(tiny_base, tmp_path / "named"))
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "_name_or_path": "microsoft/phi-2"}))
    assert origin(named) == ("microsoft/phi-2", None)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "quantized_base.json").write_text(json.dumps({"source": {"base": "microsoft/phi-2", "revision": "abc"}}))
    assert origin(quantized, "microsoft/phi-2@def456") == ("microsoft/phi-2", "def456")
    for wrong in ({"id": str(tiny_base)}, {"id": "phi-2"}, {"id": "a/b/c"}, {"revision": "abc"}, {"id": "a/b", "revision": "a b"}):
        with pytest.raises(ValueError, match=r"--base-(id|revision)"):
            origin(tiny_base, **wrong)
    with pytest.raises(ValueError, match="stands on microsoft/phi-2"):
        origin("microsoft/phi-2", id="someone/other")


def test_an_adapter_whose_base_nothing_tells_is_not_published(run: Path, tiny_base: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    base = next(line.split("base: ")[1] for line in recipe.splitlines() if line.startswith("  base: "))
    (run / "recipe.yaml").write_text(recipe.replace(base, str(tiny_base)))
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 2
    assert "--base-id OWNER/NAME" in done.error
    assert publish(run, "--repo", REPO, "--dry-run", "--base-id", BASE).code == 0
    assert read_json(run / "hub" / "adapter_config.json")["base_model_name_or_path"] == BASE


# the card


def test_the_hub_reads_from_the_card_what_was_measured(trained_run: Path, folder: Path) -> None:
    data, report = ModelCard.load(folder / "README.md").data, read_json(trained_run / "report.json")
    assert (data.base_model, data.get("base_model_relation"), data.library_name) == (BASE, "adapter", "peft")
    assert (data.pipeline_tag, data.license, data.language) == ("text-generation", "mit", ["en"])
    bits, perplexity = data.eval_results
    assert (bits.metric_type, perplexity.metric_type) == ("bits_per_byte", "perplexity")
    assert bits.metric_value == round(report["adapter"]["bits_per_byte"], 6)
    assert bits.metric_args["base"] == round(report["base"]["bits_per_byte"], 6)
    assert bits.metric_args["interval_95_of_the_difference"] == [round(x, 6) for x in report["difference"]["interval_95"]]
    assert data.datasets is None
    assert bits.dataset_split == "held out by a hash"
    text = (folder / "README.md").read_text()
    assert f"{report['formats']['oasst']['adapter']['bits_per_byte']:.4f}" in text
    assert "No licence is stated" not in text


def test_data_of_the_hub_are_named_and_oasst1_is_credited(run: Path) -> None:
    assert publish(run, "--repo", REPO, "--dry-run", "--dataset", "OpenAssistant/oasst1", "--license", "apache-2.0").code == 0
    card = ModelCard.load(run / "hub" / "README.md")
    assert (card.data.datasets, card.data.license) == (["OpenAssistant/oasst1"], "apache-2.0")
    assert "published under Apache-2.0" in card.text
    assert sha256(OASST1) == model_card.EMBEDDED


def test_the_card_says_in_which_formats_the_base_was_scored(run: Path) -> None:
    report = read_json(run / "report.json")
    for formats, expected in (
        (report["formats"], "in several formats, and its best"),
        ({"oasst": report["formats"]["oasst"]}, "in the same format"),
    ):
        write_json(run / "report.json", {**report, "formats": formats})
        assert publish(run, "--repo", REPO, "--dry-run").code == 0
        (sentence,) = re.findall(r"The base is\s+scored [^.;]*", ModelCard.load(run / "hub" / "README.md").text)
        assert expected in sentence


@pytest.mark.parametrize("how", ["none", "of another result"])
def test_what_was_not_evaluated_says_so(run: Path, how: str) -> None:
    if how == "none":
        (run / "report.json").unlink()
    else:
        (run / "report.json").write_text((run / "report.json").read_text().replace('"chosen_by": "', '"chosen_by": "long ago, '))
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 0
    assert f"python scripts/evaluate.py {run}" in done.said
    card = ModelCard.load(run / "hub" / "README.md")
    assert "**Not evaluated.**" in card.text
    assert card.data.eval_results is None
    assert "report.json" not in contents(run / "hub")


def test_the_snippet_of_the_card_runs_as_it_stands_and_answers_as_the_run_does(
    trained_run: Path, folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    assert f'revision="{COMMIT}"' in code
    assert "load_in_4bit=True" in code
    program = tmp_path / "snippet.py"
    program.write_text(code)
    with Hub() as hub:
        hub.repos["model", BASE] = Repo(private=False, sha=COMMIT, files=contents(tiny_base))
        hub.repos["model", REPO] = Repo(private=True, files=contents(folder))
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        env |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assistant = load(subject_of(trained_run, []), torch.device("cpu"), torch.float32)
    (expected,) = answer(assistant.net, assistant.renderer, [[Turn("user", model_card.QUESTION)]], 256)
    assert expected.text.strip(), "an empty answer would show nothing"
    assert done.stdout.strip() == expected.text.strip()


HOSTILE = (
    "x\n---\nlicense: stolen\n---\n<img src=x onerror=alert(1)> <!-- ``` ```` [a](javascript:alert(1)) | `b` "
    "![p](http://evil.example/p) </p>"
)


def test_hostile_text_cannot_break_the_front_matter_or_become_html(trained_run: Path, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "previews.jsonl").read_text().splitlines()]
    for record in lines:
        record["answers"] = [{**a, "text": HOSTILE + "\n```\n<script>alert(2)</script>", "prompt": HOSTILE} for a in record["answers"]]
    (run / "previews.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = read_json(run / "report.json")
    report["data"]["name"] = HOSTILE
    report["labels"] = dict.fromkeys(report["labels"], HOSTILE)
    report["chosen_by"] = HOSTILE
    (run / "report.json").write_text(json.dumps(report))
    chosen = read_json(run / "final" / "chosen.json")
    record = read_json(run / "run.json")
    record["hardware"]["device"] = record["engine"] = HOSTILE
    record["versions"]["torch"] = HOSTILE
    subject = replace(subject_of(run, []), chosen_by=HOSTILE)
    origin = base_origin.Origin(BASE, COMMIT, "test")
    result = hub_folder.Result(REPO, subject, "adapter", origin, record, report, "mit", (), ("en",))
    card = model_card.model_card(result, [(HOSTILE, HOSTILE)])
    assert chosen["chosen_by"] != HOSTILE
    assert ModelCard(card).data.license == "mit"
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    assert not [token.content for token in flat if token.type in ("html_block", "html_inline", "image")]
    links = [token.attrGet("href") for token in flat if token.type == "link_open"]
    assert links
    assert all(link.startswith(("https://huggingface.co/", "https://arxiv.org/")) for link in links)
    blocks = [token.content for token in flat if token.type == "fence"]
    assert any("<script>alert(2)</script>" in block for block in blocks)
    rows = {len(token.children) for token in flat if token.type == "tr_open" and token.children}
    assert len(rows) <= 1


# the upload


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> object:
    """The stand-in as the hub of this process."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        _http.close_session()
        yield hub
        _http.close_session()


def test_what_arrives_is_byte_for_byte_what_was_built_and_the_token_stands_nowhere(run: Path) -> None:
    with Hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
        done = run_script("publish.py", run, "--repo", REPO, "--space", env=online)
        assert done.returncode == 0, done.stderr
        model, space = hub.repos["model", REPO], hub.repos["space", REPO]
        assert f"published {hub.url}/{REPO}\n" in done.stdout
        assert f"published {hub.url}/spaces/{REPO}\n" in done.stdout
    assert model.files == contents(run / "hub")
    assert space.files == contents(run / "space")
    assert set(model.files) == ADAPTER_FILES
    assert len(hub.stored) == 2, "weights and tokenizer travel by LFS"
    assert (model.private, space.private, space.sdk) == (True, True, "gradio")
    assert (len(model.commits), len(space.commits)) == (1, 1)
    for text in (done.stdout, done.stderr, *(p.read_text(errors="replace") for p in run.rglob("*") if p.is_file())):
        assert TOKEN not in text


def test_what_the_hub_refuses_is_said_in_a_sentence(online: Hub, folder: Path) -> None:
    def refused(repo: str = REPO, public: bool = False) -> str:
        with pytest.raises(ValueError, match=r".+") as caught:
            hub_upload.push(folder, repo, "model", public, "test")
        return str(caught.value)

    online.token = "another"
    assert "does not know the token" in refused()
    online.token = TOKEN
    assert "the token may not write to stranger/tiny" in refused("stranger/tiny")
    online.no_such_type = True
    assert "another type" in refused()
    online.no_such_type = False
    assert online.repos == {}
    hub_upload.push(folder, REPO, "model", True, "in public")
    assert "everybody can read it" in refused()
    online.repos["model", REPO].files["model.safetensors"] = b"of another model"
    assert "already holds model.safetensors" in refused(public=True)


@pytest.mark.parametrize("where", ["/lfs/", "/commit/", "/create"])
def test_a_connection_that_breaks_leaves_nothing_behind_and_the_same_command_goes_through(
    online: Hub,
    trained_run: Path,
    tmp_path: Path,
    where: str,
) -> None:
    online.break_at = where
    command = (trained_run, "--repo", REPO, "--output", tmp_path / "folder")
    done = publish(*command)
    assert done.code == 2
    assert "nothing was committed. The same command again" in done.error
    assert "Traceback" not in done.text
    assert not any(repo.files for repo in online.repos.values())
    online.break_at = ""
    assert publish(*command).code == 0
    assert online.repos["model", REPO].files == contents(tmp_path / "folder")


def test_without_a_token_or_a_network_nothing_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        hub_upload.push(folder, REPO, "model", False, "test")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    with pytest.raises(ValueError, match="set HF_TOKEN"):
        hub_upload.push(folder, REPO, "model", False, "test")


@pytest.mark.parametrize("argument", [TOKEN, f"--token={TOKEN}", f"--token {TOKEN}"])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(trained_run: Path, argument: str) -> None:
    done = publish(trained_run, "--repo", REPO, *argument.split())
    assert done.code == 2
    assert "HF_TOKEN" in done.error
    assert TOKEN not in done.text


def test_paths_become_relative_and_common_words_stay() -> None:
    roots = ["/home/me/suite/data", "/home/me"]
    assert leaks.without_paths('"/home/me/suite/data/x.jsonl" /home/me/.cache /home/men', roots) == '"x.jsonl" .cache /home/men'
    assert leaks.without_paths("cd /home/me; ls /usr/bin", roots) == "cd .; ls /usr/bin"


def test_what_a_person_changed_in_the_folder_is_not_lost_to_the_next_call(run: Path) -> None:
    assert publish(run, "--repo", REPO, "--dry-run").code == 0
    assert publish(run, "--repo", REPO, "--dry-run").code == 0  # nothing was changed: it is written anew
    card = run / "hub" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    (run / "hub" / "mine.png").write_bytes(b"x")
    done = publish(run, "--repo", REPO, "--dry-run")
    assert done.code == 2
    assert "was changed by hand since it was made (README.md, mine.png)" in done.error
    assert "My own words." in card.read_text()
    (run / "hub").rename(run / "kept")
    assert publish(run, "--repo", REPO, "--dry-run").code == 0
