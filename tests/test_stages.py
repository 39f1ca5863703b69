"""A run that began with another one's adapter knows what it goes on from: how long a conversation may be, and by which recipes."""
# ruff: noqa: F811 (fixtures are imported)

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from chain import WINDOWS, chain  # noqa: F401
from in_process import evaluate, metrics, script, train
from published import publish

from qlora_suite.assistant import load
from qlora_suite.conversations import Turn
from qlora_suite.files import read_json, write_json
from qlora_suite.prompts import room_for
from qlora_suite.recipe_file import load as load_recipe
from qlora_suite.stages import in_words, longest, stages_before
from qlora_suite.subject import subject_of


@pytest.fixture
def runs(chain: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that begin with each other's copies."""
    copies = {name: Path(shutil.copytree(run, tmp_path / name)) for name, run in chain.items()}
    for run in copies.values():
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(f"start_from: {chain['sft'].parent}", f"start_from: {tmp_path}"))
    return copies


def unnoted(run: Path) -> None:
    """As a run of an earlier version left it."""
    about = read_json(run / "run.json")
    del about["stages_before"]
    write_json(run / "run.json", about)


def test_a_run_notes_what_it_goes_on_from_back_to_the_first(chain: dict[str, Path]) -> None:
    noted = {name: [(s["method"], s["max_length"]) for s in read_json(run / "run.json")["stages_before"]] for name, run in chain.items()}
    assert noted == {"sft": [], "dpo": [("sft", 256)], "grpo": [("dpo", 200), ("sft", 256)]}
    first = read_json(chain["grpo"] / "run.json")["stages_before"][-1]
    assert first["adapter"] == str(chain["sft"])
    assert first["recipe"] == (chain["sft"] / "recipe.yaml").read_text()


def test_it_is_asked_within_the_longest_of_its_windows(chain: dict[str, Path]) -> None:
    """The recipe's own window stays what is scored and trained in."""
    for name, run in chain.items():
        subject = subject_of(run, [])
        assert (subject.asked_within, subject.recipe.data.max_length) == (256, WINDOWS[name])
    assistant = load(subject_of(chain["grpo"], []), torch.device("cpu"), torch.float32)
    ids = assistant.renderer.prompt([Turn("user", "word " * 100)])
    assert WINDOWS["grpo"] < len(ids) < 256
    assert room_for(assistant, ids, 1000) == 256 - len(ids)


def test_the_first_run_may_be_gone(runs: dict[str, Path]) -> None:
    shutil.rmtree(runs["sft"])
    shutil.rmtree(runs["dpo"])
    assert subject_of(runs["grpo"], []).asked_within == 256


def test_a_run_that_goes_on_keeps_what_it_noted_as_it_began(runs: dict[str, Path], tmp_path: Path) -> None:
    recipe, run = runs["dpo"] / "recipe.yaml", tmp_path / "again"
    ours = (f"output.dir={run}", f"adapter.start_from={runs['sft'] / 'final'}")
    train(recipe, *ours, "stop.after_minutes=1e-9")
    noted = read_json(run / "run.json")["stages_before"]
    assert [stage["method"] for stage in noted] == ["sft"]
    for path in runs["sft"].iterdir():  # all that resuming needs of it is its adapter
        if path.name != "final":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(recipe, *ours)
    about = read_json(run / "run.json")
    assert (about["stages_before"], about["attempt"]) == (noted, 2)


def test_of_a_run_without_the_note_the_folders_are_looked_at(runs: dict[str, Path]) -> None:
    unnoted(runs["grpo"])
    unnoted(runs["dpo"])
    assert [stage.method for stage in subject_of(runs["grpo"], []).before] == ["dpo", "sft"]
    assert subject_of(runs["grpo"], []).asked_within == 256
    shutil.rmtree(runs["sft"])
    assert subject_of(runs["grpo"], []).asked_within == 200
    shutil.rmtree(runs["dpo"])
    assert subject_of(runs["grpo"], []).asked_within == 160


def test_without_the_note_another_adapter_in_the_place_of_the_first_says_nothing(runs: dict[str, Path]) -> None:
    unnoted(runs["dpo"])
    shutil.rmtree(runs["sft"] / "final")
    shutil.copytree(runs["grpo"] / "final", runs["sft"] / "final")
    assert subject_of(runs["dpo"], []).asked_within == 200


@pytest.mark.parametrize("wanted", [100, 200, 400])
def test_what_the_command_line_says_holds(chain: dict[str, Path], wanted: int) -> None:
    assert subject_of(chain["grpo"], [f"data.max_length={wanted}"]).asked_within == wanted
    assert subject_of(chain["grpo"], ["seed=3"]).asked_within == 256


def test_a_prompt_that_is_too_long_is_refused_with_a_way_that_works(chain: dict[str, Path]) -> None:
    assistant = load(subject_of(chain["grpo"], []), torch.device("cpu"), torch.float32)
    ids = assistant.renderer.prompt([Turn("user", "word " * 190)])
    assert 256 < len(ids) < 512
    with pytest.raises(
        ValueError, match=r"share a window of 256; shorten the prompt, or add data\.max_length=512 to the command"
    ) as refused:
        room_for(assistant, ids, 200)
    (named,) = [word for word in str(refused.value).replace(",", "").split() if word.startswith("data.max_length=")]
    wider = load(subject_of(chain["grpo"], [named]), torch.device("cpu"), torch.float32)
    assert room_for(wider, ids, 200) > 0
    with pytest.raises(ValueError, match=r"shorten the prompt$"):  # the base takes 512
        room_for(wider, ids * 3, 200)


def test_what_is_merged_is_served_within_the_longest_window(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    script("merge").run(runs["grpo"], None, None, None, 64, "cpu")
    assert "PARAMETER num_ctx 256" in (runs["grpo"] / "merged" / "Modelfile").read_text()
    assert "--max-model-len 256" in " ".join(capsys.readouterr().out.split())


def test_stages_have_words_and_end_where_nothing_is_known(runs: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(runs["grpo"] / "recipe.yaml")
    assert in_words(recipe, stages_before(recipe)) == "SFT, then DPO, then GRPO"
    alone = Path(shutil.copytree(runs["dpo"] / "final", tmp_path / "adapter"))
    other = load_recipe(runs["grpo"] / "recipe.yaml", [f"adapter.start_from={json.dumps(str(alone))}"])
    (stage,) = stages_before(other)
    assert (stage.adapter, stage.method, stage.max_length, stage.recipe) == (str(alone), None, None, None)
    assert longest(other, [stage]) == 160
    assert in_words(other, [stage]) == "an adapter that was there already, then GRPO"


def test_runs_that_name_each_other_end_the_search(runs: dict[str, Path]) -> None:
    """A folder was trained anew from what had begun with it."""
    for name in ("sft", "dpo"):
        unnoted(runs[name])
    text = (runs["sft"] / "recipe.yaml").read_text()
    (runs["sft"] / "recipe.yaml").write_text(text.replace("start_from: null", f"start_from: {runs['dpo']}"))
    recipe = load_recipe(runs["dpo"] / "recipe.yaml")
    assert longest(recipe, stages_before(recipe)) == 256


# --- the card


@pytest.fixture(scope="module")
def hub(chain: dict[str, Path]) -> Path:
    """The run of GRPO as a folder for the hub, evaluated."""
    evaluate(chain["grpo"], num_answers=10, answer_tokens=None)
    done = publish(chain["grpo"], "--repo", "me/tiny", "--dry-run", "--base-id", "someone/tiny-base")
    assert done.code == 0, done.text
    return chain["grpo"] / "hub"


def test_the_card_names_the_stages_and_brings_their_recipes(hub: Path, chain: dict[str, Path]) -> None:
    card = (hub / "README.md").read_text()
    assert "It was made in stages: SFT, then DPO, then GRPO." in card
    assert "trains it again" not in card
    for number, name in ((1, "sft"), (2, "dpo")):
        recipe = hub / f"recipe-{number}-{name}.yaml"
        assert f"`{recipe.name}`" in card
        ours, theirs = (yaml.safe_load(path.read_text()) for path in (recipe, chain[name] / "recipe.yaml"))
        assert ours["train"] == theirs["train"]
        assert ours["dpo"] == theirs["dpo"]
    assert str(chain["sft"].parent) not in card


def test_where_the_earlier_runs_lay_and_read_is_in_no_published_file(chain: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain["grpo"], run, ignore=shutil.ignore_patterns("hub", ".hub.json", "report*"))
    about = read_json(run / "run.json")
    for number, stage in enumerate(about["stages_before"]):
        its = yaml.safe_load(stage["recipe"])
        its["data"]["source"] = [f"/proj/secret_lab{number}/customers/chats.jsonl"]
        its["output"]["dir"] = f"/scratch/alice{number}/runs/one"
        stage["recipe"] = yaml.safe_dump(its)
    write_json(run / "run.json", about)
    done = publish(run, "--repo", "me/tiny", "--dry-run", "--base-id", "someone/tiny-base")
    assert done.code == 0, done.text
    texts = {path.name: path.read_bytes() for path in (run / "hub").iterdir() if path.is_file()}
    assert b"chats.jsonl" in texts["recipe-1-sft.yaml"]
    for name, content in texts.items():
        assert not any(word in content for word in (b"secret_lab", b"alice")), name


def test_the_card_names_the_rewards_the_prompts_and_the_window(hub: Path, chain: dict[str, Path]) -> None:
    card = (hub / "README.md").read_text()
    assert "| rewards | letters (a function of its maker's own, in own.py) + 0.25 x no_repetition |" in card
    fitting = read_json(chain["grpo"] / "run.json")["num_rows"]
    asked = min(fitting, 4 * metrics(chain["grpo"])[-1]["step"])
    assert 0 < asked < fitting
    assert f"| data | {asked} prompts, of {fitting} that fit |" in card
    assert f"on {asked} prompts, of {fitting} that fit, after the stages before" in card
    assert "trained on up to 256 tokens of conversation, in its last stage on up to 160;" in card
    assert "--max-model-len 256" in card or "Serve it" not in card


def test_the_card_says_the_aim_first_and_cites_what_was_used(hub: Path, chain: dict[str, Path]) -> None:
    front, _, text = (hub / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    report = read_json(chain["grpo"] / "report.json")
    metrics_of = {one["type"]: one for one in yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]}
    rewards = report["rewards"]
    assert metrics_of["mean_reward"]["value"] == pytest.approx(rewards["columns"]["adapter"]["mean"], abs=1e-6)
    assert metrics_of["mean_reward"]["args"]["start"] == pytest.approx(rewards["columns"]["start"]["mean"], abs=1e-6)
    assert metrics_of["mean_reward"]["args"]["verdict_against_start"] == rewards["difference_from_start"]["verdict"]
    beside = metrics_of["bits_per_byte"]["args"]
    assert beside["verdict_against_start"] == report["difference_from_start"]["verdict"]
    assert beside["difference_from_start"] == pytest.approx(report["difference_from_start"]["bits_per_byte"], abs=1e-6)
    assert "better_than_base" in beside
    assert text.index("The mean reward of answers") < text.index("After GRPO: ") < text.index("The adapter needs ")
    assert "| reward, the weighted sum |" in text
    assert {"dpo", "grpo"} < set(yaml.safe_load(front)["tags"])
    for key in ("dettmers2023qlora", "rafailov2023direct", "shao2024deepseekmath"):
        assert text.count(f"{{{key},") == 1


def test_the_card_of_a_first_run_is_as_it_was(chain: dict[str, Path]) -> None:
    done = publish(chain["sft"], "--repo", "me/first", "--dry-run", "--base-id", "someone/tiny-base")
    assert done.code == 0, done.text
    card = (chain["sft"] / "hub" / "README.md").read_text()
    assert "trains it again" in card
    assert "in stages" not in card
    assert "rafailov" not in card
    assert not list((chain["sft"] / "hub").glob("recipe-*"))


def test_a_report_without_bits_per_byte_is_published_with_its_rewards(runs: dict[str, Path], hub: Path) -> None:
    """Of prompts alone."""
    run = runs["grpo"]
    report = read_json(run / "report.json")
    nothing = dict.fromkeys(("adapter", "base", "start", "difference", "difference_from_start"))
    write_json(run / "report.json", {**report, **nothing, "formats": {}, "slices": [], "conversations": []})
    done = publish(run, "--repo", "me/tiny", "--dry-run", "--base-id", "someone/tiny-base")
    assert done.code == 0, done.text
    card = (run / "hub" / "README.md").read_text()
    assert "mean_reward" in card
    assert "bits_per_byte" not in card
    assert "there is nothing to score in bits per byte" in card
