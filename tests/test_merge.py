"""scripts/merge.py: the folder computes what the live QLoRA model computes, loads in plain transformers, and stops by itself."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from in_process import script
from torch import nn
from trained_runs import QUESTIONS, trained_run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora_suite.assistant import Assistant, load
from qlora_suite.conversations import Turn
from qlora_suite.files import read_json
from qlora_suite.loss import collate
from qlora_suite.merge_quality import Rows, compare, measured_rows, recommended
from qlora_suite.merging import merged, target_type
from qlora_suite.model import load_base
from qlora_suite.recipe import Model
from qlora_suite.subject import subject_of

CPU = torch.device("cpu")
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "oasst": ("phi2", [], {}),
    "human_assistant": ("phi2", ["chat.format=human_assistant"], {}),
    "chatml": ("phi2", ["chat.format=chatml"], {}),
    "chatml, tied, new rows": ("llama3", ["chat.format=chatml"], {"tie_word_embeddings": True}),
    "model": ("llama3", ["chat.format=model"], {}),
    "dora": ("phi2", ["adapter.dora=true"], {}),
    "rslora": ("phi2", ["adapter.rslora=true", "adapter.alpha=4"], {}),
    "some targets, plain quantisation": ("phi2", ["adapter.targets=[q_proj, fc1]", "model.double_quantization=false"], {}),
    "int8": ("phi2", ["model.quantization=int8"], {}),
    "olora": ("phi2", ["model.quantization=none", "adapter.init=olora"], {}),
}
NEEDS_STOPPING = [name for name in CASES if name not in ("some targets, plain quantisation", "int8", "olora")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "Runs":
    return Runs(tmp_path_factory.mktemp("runs"))


class Runs:
    """Each run, its live model and its merged folders, made once and when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.live_models = folder, {}, {}

    def run(self, name: str) -> Path:
        if name not in self.made:
            family, overrides, keys = CASES[name]
            self.made[name] = trained_run(self.folder / name.replace(", ", "-").replace(" ", "-"), family, *overrides, **keys)
        return self.made[name]

    def live(self, name: str) -> Assistant:
        if name not in self.live_models:
            self.live_models[name] = load(subject_of(self.run(name), []), CPU, torch.float32)
        return self.live_models[name]

    def merged(self, name: str, into: str, dtype: str = "float32") -> Path:
        folder = self.run(name).with_name(f"{into}-{dtype}")
        if not folder.exists():
            merge(self.run(name), folder, into, dtype)
        return folder


def merge(run: Path, output: Path | None = None, into: str | None = None, dtype: str | None = None, tokens: int = 256) -> None:
    script("merge").run(run, output, into, dtype, tokens, "cpu")


def words_for(assistant: Assistant) -> torch.Tensor:
    """With the markers in it: their rows are trained."""
    return torch.tensor([[*assistant.renderer.prompt([Turn("user", "say hi")]), *IDS[0].tolist()]])


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# --- the weights


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("int8", "olora")])
def test_the_dequantised_merge_computes_what_the_live_model_computes(name: str, runs: Runs) -> None:
    ids = words_for(runs.live(name))
    live = logits(runs.live(name).net, ids)
    torch.testing.assert_close(logits(plain(runs.merged(name, "dequantised")), ids), live, atol=2e-4, rtol=2e-4)
    with runs.live(name).as_base():
        assert (logits(runs.live(name).net, ids) - live).abs().max() > 0.5, "the adapter changes little, so that this shows nothing"


def test_an_8_bit_base_is_dequantised_too(runs: Runs) -> None:
    """It rounds activations as well, so that the two cannot be equal."""
    base = logits(plain(runs.run("int8").with_name("base")))
    live, merge_ = logits(runs.live("int8").net), logits(plain(runs.merged("int8", "dequantised")))
    assert (merge_ - live).abs().mean() < 0.05 * (base - live).abs().mean()


@pytest.mark.parametrize("name", ["oasst", "human_assistant", "chatml, tied, new rows", "dora", "rslora"])
def test_the_16bit_merge_is_the_published_base_with_the_adapter(name: str, runs: Runs) -> None:
    """Against PEFT's own merge, which is right on an unquantised base."""
    from qlora_suite.adapter import load_adapter

    base = load_base(Model(base=str(runs.run(name).with_name("base")), quantization="none"), torch.float32, CPU)
    theirs = load_adapter(base, str(runs.run(name) / "final")).merge_and_unload()
    ids = words_for(runs.live(name))
    torch.testing.assert_close(logits(plain(runs.merged(name, "16bit")), ids), logits(theirs, ids), atol=1e-3, rtol=1e-3)


def test_a_base_that_the_initialisation_has_changed_is_merged_as_it_was_changed(runs: Runs) -> None:
    merge(runs.run("olora"), runs.run("olora").with_name("merged"), None, "float32")
    torch.testing.assert_close(logits(plain(runs.run("olora").with_name("merged"))), logits(runs.live("olora").net), atol=1e-3, rtol=1e-3)


def test_the_heads_bias_goes_where_the_model_learnt_without_it(runs: Runs) -> None:
    """PEFT leaves out the bias of a layer with trained rows: with it, the merged model would be another one."""
    folder = runs.merged("chatml", "dequantised")
    assert plain(folder).lm_head.bias.abs().max() == 0
    assert plain(runs.run("chatml").with_name("base")).lm_head.bias.abs().max() > 0
    (note,) = read_json(folder / "merge.json")["measured"]["dequantised"]["notes"]
    assert note.startswith("lm_head.bias is zero")
    assert plain(runs.merged("oasst", "dequantised")).lm_head.bias.abs().max() > 0


def test_tied_weights_stay_tied_where_they_can(runs: Runs) -> None:
    model = plain(runs.merged("chatml, tied, new rows", "dequantised"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_that_training_made_differ_become_two(runs: Runs, tmp_path: Path) -> None:
    """As in an adapter whose rows are of the embedding alone; ours train the tied head with them."""
    from qlora_suite.merging import write_model

    assistant = runs.live("chatml, tied, new rows")
    weights, _ = merged(assistant.net, assistant.net.get_base_model(), torch.float32)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][5] += 1
    note = write_model(tmp_path / "untied", weights, assistant, torch.float32)
    assert "are two weights now" in note
    model = plain(tmp_path / "untied")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_nothing_is_rounded_twice(runs: Runs) -> None:
    exact, rounded = (plain(runs.merged("oasst", "dequantised", dtype)).state_dict() for dtype in ("float32", "bfloat16"))
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert torch.equal(weight.to(torch.bfloat16), rounded[name]), name


def test_a_weight_that_fp16_cannot_hold_is_refused_by_name(runs: Runs) -> None:
    assistant = load(subject_of(runs.run("oasst"), []), CPU, torch.float32)
    layer = assistant.net.get_base_model().model.layers[0].mlp.fc1
    layer.lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"layers.0.mlp.fc1.weight does not fit into float16 .* use --dtype bfloat16"):
        merged(assistant.net, assistant.net.get_base_model(), torch.float16)


def test_the_type_is_the_runs_or_the_bases_or_bf16() -> None:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    assert [target_type(*args) for args in (("float16", bf16, bf16), (None, fp16, bf16), (None, fp32, fp16), (None, fp32, fp32))] == [
        fp16,
        fp16,
        fp16,
        bf16,
    ]


# --- the folder


@pytest.mark.parametrize("name", NEEDS_STOPPING)
def test_plain_transformers_loads_it_and_it_answers_and_stops_by_itself(name: str, runs: Runs) -> None:
    dtype = "bfloat16" if name == "oasst" else "float32"
    folder, renderer = runs.merged(name, "dequantised", dtype), runs.live(name).renderer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    answers = []
    for question in QUESTIONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**asked, max_new_tokens=40)[0][asked["input_ids"].shape[1] :].tolist()
        assert made[-1] in renderer.stop_token_ids, f"{tokenizer.decode(made)!r} does not stop"
        answers.append(renderer.answer_text(made))
    stored = json.loads((runs.run(name) / "previews.jsonl").read_text().splitlines()[-1])["answers"]
    assert answers == [answer["text"] for answer in stored]
    assert any(answers), "it says nothing"


def test_it_holds_all_that_a_server_wants(runs: Runs) -> None:
    folder, live = runs.merged("oasst", "dequantised", "bfloat16"), runs.live("oasst")
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "Modelfile"} <= files
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert generation["eos_token_id"] == list(live.renderer.stop_token_ids)
    assert generation["pad_token_id"] == live.renderer.eos
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "some file is for the owner alone"


def test_a_large_model_is_written_in_shards(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_suite.merging.MAX_SHARD", "200KB")
    merge(runs.run("oasst"), tmp_path / "out", "dequantised", "float32")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(plain(tmp_path / "out")), logits(plain(runs.merged("oasst", "dequantised"))))


# --- what is measured


def test_both_ways_are_measured_and_the_nearer_one_is_kept(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(runs.run("oasst"), tmp_path / "out", None, "float32")
    record = read_json(tmp_path / "out" / "merge.json")
    assert list(record["measured"]) == ["16bit", "dequantised"]
    near, far = record["measured"]["dequantised"], record["measured"]["16bit"]
    assert near["largest_logit_difference"] < 1e-2 < far["largest_logit_difference"]
    assert near["kl_divergence"] < 1e-6 < far["kl_divergence"]
    assert record["into"] == "dequantised"
    assert record["base"]["id"] == str(runs.run("oasst").with_name("base"))
    assert record["step"] == 30
    assert record["measured_on"]["rows"] == "held-out conversations of the validation split"
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(runs.live("oasst").net), atol=2e-4, rtol=2e-4)
    said = capsys.readouterr().out
    for words in ("perplexity", "chosen     dequantised", "vllm serve", "check_served.py"):
        assert words in said


def test_what_is_measured_is_what_the_definitions_say(runs: Runs) -> None:
    """Against the whole logits of both models, computed here in another way."""
    live, other = runs.live("oasst"), plain(runs.merged("oasst", "16bit"))
    rows = measured_rows(live, 200)
    found = compare(live.net, other, rows, live.renderer, CPU, torch.float32)
    differences, kls, nats, num_bytes, agree = [], [], [], 0, []
    for part in rows.parts:
        ids = collate([{"input_ids": part.ids, "supervised": part.supervised, "lengths": [len(part.ids)]}], 0).input_ids
        ours, theirs = logits(live.net, ids)[0, :-1], logits(other, ids)[0, :-1]
        wanted = torch.tensor(part.supervised[1:])
        differences.append((ours - theirs).abs()[wanted])
        p, q = ours.double().softmax(-1)[wanted], theirs.double().softmax(-1)[wanted]
        kls.append((p * (p / q).log()).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        for turn in part.turns:
            if turn.learn:
                places = torch.arange(turn.start, turn.end)
                nats.append(-theirs.log_softmax(-1)[places - 1, ids[0, places]])
                num_bytes += turn.num_bytes
    assert found["largest_logit_difference"] == pytest.approx(torch.cat(differences).max().item(), rel=1e-3)
    assert found["mean_logit_difference"] == pytest.approx(torch.cat(differences).mean().item(), rel=1e-3)
    assert found["kl_divergence"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-2, abs=1e-6)
    assert found["same_top_token"] == pytest.approx(torch.cat(agree).double().mean().item())
    assert found["merged"]["perplexity"] == pytest.approx(torch.cat(nats).mean().exp().item(), rel=1e-4)
    assert found["merged"]["bits_per_byte"] == pytest.approx(torch.cat(nats).sum().item() / 0.6931471805599453 / num_bytes, rel=1e-4)
    assert found["live"]["perplexity"] != found["merged"]["perplexity"]


def test_the_nearer_perplexity_decides_and_then_the_divergence() -> None:
    def one(live: float, merged: float, kl: float) -> dict[str, Any]:
        return {"live": {"perplexity": live}, "merged": {"perplexity": merged}, "kl_divergence": kl}

    assert recommended({"16bit": one(10, 9.5, 0.0), "dequantised": one(10, 10.4, 0.1)}) == "dequantised"
    assert recommended({"16bit": one(10, 10.1, 0.2), "dequantised": one(10, 9.8, 0.1)}) == "16bit"
    assert recommended({"16bit": one(10, 9, 0.2), "dequantised": one(10, 11, 0.1)}) == "dequantised"
    assert recommended({"16bit": one(10, 10.1, 0.2), "dequantised": one(10, float("nan"), 0.1)}) == "16bit"


def test_without_the_prepared_data_it_is_measured_on_the_runs_own_answers(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.run("oasst"), run)
    text = (run / "recipe.yaml").read_text()
    prepared = runs.run("oasst").with_name("prepared")
    (run / "recipe.yaml").write_text(text.replace(str(prepared), str(tmp_path / "gone")))
    rows: Rows = measured_rows(load(subject_of(run, []), CPU, torch.float32), 512)
    assert "own answers to its preview prompts (there is no prepared data in" in rows.kind
    assert len(rows.parts) == len(QUESTIONS)


# --- mistakes


def test_a_run_that_trained_every_weight_is_a_whole_model_already(runs: Runs, tmp_path: Path) -> None:
    run = trained_run(tmp_path, "phi2", "adapter=none", "model.quantization=none", "train.max_steps=2")
    with pytest.raises(ValueError, match=f"{run / 'final'} is a whole model already"):
        merge(run)
    assert not (run / "merged").exists()


def test_what_is_there_is_not_overwritten(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already; remove it, or give another folder with --output"):
        merge(runs.run("oasst"), tmp_path / "out")


def test_a_way_that_does_not_exist_for_the_run_is_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--into dequantised: the run's base is not quantised"):
        merge(runs.run("olora"), tmp_path / "out", "dequantised")


def test_a_base_that_does_not_say_where_it_is_from_is_merged_dequantised(runs: Runs, tmp_path: Path) -> None:
    """A quantised base of somebody else's: there is no way back to its weights."""
    from qlora_suite.prequantized import RECORD

    base = runs.run("human_assistant").with_name("base")
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(runs.run("human_assistant") / "recipe.yaml", recipe)
    script("quantize_base").run(Model(base=str(base)), tmp_path / "nf4", None, None)
    run = tmp_path / "run"
    shutil.copytree(runs.run("human_assistant"), run)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(base), str(tmp_path / "nf4")))
    merge(run, tmp_path / "both", None, "float32")
    assert read_json(tmp_path / "both" / "merge.json")["base"]["id"] == str(base), "the published base is not named"

    (tmp_path / "nf4" / RECORD).unlink()
    with pytest.raises(ValueError, match=r"--into 16bit wants the base as it was published: .* does not say what it was made from"):
        merge(run, tmp_path / "out", "16bit")
    merge(run, tmp_path / "out", None, "float32")
    assert list(read_json(tmp_path / "out" / "merge.json")["measured"]) == ["dequantised"]
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    torch.testing.assert_close(
        logits(plain(tmp_path / "out")), logits(load(subject_of(run, []), CPU, torch.float32).net), atol=2e-4, rtol=2e-4
    )


def test_an_interrupted_merge_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    """Stopped when the first merged model is written and is being measured."""
    command = [sys.executable, "-u", str(ROOT / "scripts" / "merge.py"), str(runs.run("oasst")), "--output", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--tokens", "100000000"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        for line in process.stdout:
            if line.startswith("measuring 16bit"):
                break
        assert any(tmp_path.glob(".out.*.tmp/16bit/model.safetensors"))
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "nothing was written" in process.stdout.read()
        assert process.returncode not in (None, 0)
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []
