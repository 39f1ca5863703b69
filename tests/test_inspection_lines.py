"""The lines that `prepare_data.py --inspect` prints stand as they are in the recipe that it was given, whatever the recipe was for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import OASST1, ROOT, MakeRecipe, run_script
from in_process import script

from qlora_suite.preparation import prepare
from qlora_suite.recipe_file import load
from qlora_suite.selection import selected

ASKED, SAID = "what is the capital of France, of number {}?", "it is Paris, as everybody knows"
ROWS: dict[str, Any] = {
    "messages": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "prompt": {"prompt": ASKED, "completion": SAID},
    "pairs": {"prompt": ASKED, "chosen": SAID, "rejected": "no idea"},
    "text": {"text": f"{ASKED} {SAID}"},
}
RECIPES = {
    "sft": (),
    "dpo": ("data.policy=preference_pairs", "data.pairs.choose=all", "data.packing=false", "data.too_long=drop", "dpo.beta=0.3"),
    "conciseness": ("data.policy=conciseness_pairs", "data.pairs.shorter=0.5", "data.packing=false", "dpo={}"),
    "grpo": ("data.packing=false", "data.max_length=256", "grpo={rewards: [{name: no_repetition}], max_new_tokens: 32}"),
    "text": ("data.policy=each_message", "data.too_long=split", "chat.format=text", "data.filters.min_chars=3"),
    "chats": ("data.policy=null", "data.same_role=keep", "data.roles={x: user}", "data.fields={weight: w, history: past}"),
    "base's template": ("chat.format=chatml", "chat.loss_on=all", "chat.system_prompt=Be brief."),
}


def file_of(form: str, folder: Path) -> Path:
    if form == "oasst":
        return OASST1
    rows = [json.loads(json.dumps(ROWS[form]).replace("{}", str(i))) for i in range(40)]
    path = folder / f"my {form}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(recipe: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    script("prepare_data").show_inspection(load(recipe), str(file))
    shown = capsys.readouterr().out
    return yaml.safe_load(shown.split("of a recipe:")[1]), shown


@pytest.mark.parametrize("form", [*ROWS, "oasst"])
@pytest.mark.parametrize("kind", RECIPES)
def test_the_lines_stand_in_the_recipe_as_they_are(kind: str, form: str, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    path = make_recipe(*RECIPES[kind])
    lines, shown = printed(path, file_of(form, tmp_path), capsys)
    assert "problem" not in shown
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **lines}))
    pasted = load(tmp_path / "pasted.yaml")
    assert lines["data"].get("pairs") == ({"shorter": 0.5} if (kind, form) == ("conciseness", "oasst") else None)
    pairs = form == "pairs" or (form == "oasst" and kind in ("dpo", "conciseness"))
    assert (pasted.dpo is not None) is pairs
    assert (pasted.grpo is not None) is (kind == "grpo" and form not in ("pairs", "text"))
    assert pasted.data.packing is not (pairs or pasted.grpo is not None or kind in ("dpo", "conciseness", "grpo"))
    if pairs and kind == "dpo":
        assert (pasted.dpo.beta, pasted.data.too_long) == (0.3, "drop")


@pytest.mark.parametrize("form", ["pairs", "sharegpt"])
def test_the_lines_prepare_the_file(form: str, make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    lines, _ = printed(make_recipe(*RECIPES["dpo"]), file_of(form, tmp_path), capsys)
    assert lines["data"]["prepared"] == f"prepared/my_{form}"
    lines["data"]["prepared"] = str(tmp_path / "mine")
    path = tmp_path / "pasted.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(make_recipe().read_text()), **lines}))
    with selected(load(path)) as selection:
        counts = prepare(load(path), selection)[0]["counts"]["train"]
    assert counts["kept"] > 20
    assert counts["pairs"] == (counts["kept"] if form == "pairs" else 0)


def test_what_the_rest_of_the_recipe_does_not_go_with_is_said(make_recipe: MakeRecipe, tmp_path: Path, capsys) -> None:
    whole = make_recipe("model.quantization=none", "adapter=none")
    _, shown = printed(whole, file_of("pairs", tmp_path), capsys)
    assert "# with these lines the recipe has 1 problem:\n#   dpo compares with the weights it starts from" in shown


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_suites_recipes_take_a_file_of_pairs(recipe: str, tmp_path: Path, capsys) -> None:
    values = load(ROOT / "recipes" / recipe, [f"model.base={ROOT / 'assets' / 'tiny_phi'}", "model.revision=null"])
    if values.adapter == "none":
        pytest.skip("trains no adapter")
    script("prepare_data").show_inspection(values, str(file_of("pairs", tmp_path)))
    assert "problem" not in capsys.readouterr().out


def test_without_a_recipe_no_network_is_waited_for(tmp_path: Path) -> None:
    """The example's base is asked for once, at an address where nothing answers: the hub's client would try again for half a minute."""
    file, asked = file_of("pairs", tmp_path), []
    with HTTPServer(("127.0.0.1", 0), handler(asked)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        looked = run_script("prepare_data.py", "--inspect", file, env=away)
        server.shutdown()
    assert looked.returncode == 0, looked.stderr
    assert "is not at hand; tokens are those of assets/tiny_phi, shorter ones" in looked.stdout
    assert "pairs           40; turns" in looked.stdout
    assert [path for path in asked if "Qwen" in path] == ["/api/models/Qwen/Qwen2.5-1.5B-Instruct"]
    chosen = run_script("prepare_data.py", "model.base=someone/else", "--inspect", file)
    assert chosen.returncode == 2, "a base that a person has chosen is not replaced by another"


def handler(asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """A hub that is out of order."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler
