"""The model card: what the hub reads (front matter) and what a person reads, from the run's own files.

    text = model_card(result, serve=[("vLLM", "vllm serve someone/tiny-oasst")])

Everything that goes into the text is escaped unless it is code in a fence of its own: answers, recipes and names of files may hold
Markdown, HTML or the end of a front matter.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora_suite.base_config import load_config
from qlora_suite.base_origin import HUB_ID
from qlora_suite.files import read_json
from qlora_suite.hub_folder import MARK, MERGED, Result, recipes_before
from qlora_suite.loss_unit import loss_unit
from qlora_suite.prequantized import quantization_of, source_of
from qlora_suite.recipe import Model, Recipe
from qlora_suite.report import COLUMNS, findings
from qlora_suite.report import reward_rows as report_rewards
from qlora_suite.rewards import in_words as rewards_in_words
from qlora_suite.serving import Served, commands
from qlora_suite.stages import in_words, method_of
from qlora_suite.subject import renderer_of
from qlora_suite.tracking import read_journal

OASST1 = "OpenAssistant/oasst1"
EMBEDDED = "7e422328a459d845c376785f4fd7812ff68472e2ce1d78acff807ea9db3e1b03"
"""assets/oasst1_en_validation.jsonl.gz, which is a part of OASST1."""
LANGUAGE = re.compile(r"^[a-z]{2,3}$")
TOO_FEW = "too few for a verdict"
CITED = {
    "dpo": """@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {36},
  year      = {2023}
}""",
    "grpo": """@misc{shao2024deepseekmath,
  title         = {{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models},
  author        = {Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and Bi, Xiao and Zhang, Haowei and
                   Zhang, Mingchuan and Li, Y. K. and Wu, Y. and Guo, Daya},
  year          = {2024},
  eprint        = {2402.03300},
  archivePrefix = {arXiv}
}""",
}
"""Beside QLoRA."""
NUM_SAMPLES = 3
QUESTION = "What is the capital of France?"


def model_card(result: Result, serve: Sequence[tuple[str, str]]) -> str:
    """README.md: front matter and text."""
    page = Environment(undefined=StrictUndefined, finalize=inline, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701
    page.filters |= {"fence": fence, "code": code}
    template = page.from_string((resources.files("qlora_suite") / "pages" / "model_card.md").read_text(encoding="utf-8"))
    recipe, run = result.subject.recipe, result.run
    text = template.render(
        result=result,
        recipe=recipe,
        run=run,
        report=result.report,
        findings=findings(result.report) if result.report else [],
        scores=score_rows(result.report) if result.report else [],
        rewards=reward_rows(result.report) if result.report else [],
        reward_labels=[one["label"] for one in ((result.report or {}).get("rewards") or {"columns": {}})["columns"].values()],
        stages=in_words(recipe, result.subject.before) if result.subject.before else "",
        earlier=list(recipes_before(result.subject)),
        unknown=any(stage.recipe is None for stage in result.subject.before),
        window=result.subject.asked_within,
        learnt_from=learnt_from(result),
        methods=[CITED[name] for name in CITED if name in methods_of(result)],
        labels=_labels(result.report) if result.report else [],
        merging=merging(result),
        snippet=use_snippet(result),
        example=prompt_example(result),
        samples=samples(result),
        training=training_rows(result),
        serve=serve,
        oasst1=OASST1,
        attributed=OASST1 in result.datasets,
    )
    return f"---\n{front_matter(result).to_yaml()}\n---\n\n{text}"


def front_matter(result: Result) -> ModelCardData:
    """What the hub reads. Values are single lines."""
    fields: dict[str, Any] = {
        "library_name": "peft" if result.form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "license": result.licence,
        "language": list(result.languages) or None,
        "datasets": list(result.datasets) or None,
        "tags": [
            MARK,
            *(["lora", "qlora"] if result.subject.recipe.adapter != "none" else []),
            *(name for name in ("dpo", "grpo") if name in methods_of(result)),
            *_conversational(result),
        ],
    }
    if result.origin:
        fields |= {"base_model": result.origin.id, "base_model_relation": "adapter" if result.form == "adapter" else "finetune"}
    if result.report:
        fields |= {"model_name": result.name, "eval_results": eval_results(result)}
    return ModelCardData(**fields)


def methods_of(result: Result) -> set[str]:
    """Of this training and of those before it: `sft`, `dpo`, `grpo`."""
    return {method_of(result.subject.recipe), *(stage.method for stage in result.subject.before if stage.method)}


def learnt_from(result: Result) -> str:
    """Of what its last training was made, in words."""
    recipe, train = result.subject.recipe, result.run["data_manifest"]["counts"]["train"]
    if recipe.dpo:
        return f"{train['kept']:,} conversations, each with a chosen and a rejected answer"
    return _prompts(result) if recipe.grpo else f"{train['kept']:,} conversations"


def _prompts(result: Result) -> str:
    """How many were really asked: a step takes the next ones, and begins anew when all have had their turn."""
    recipe, run = result.subject.recipe, result.run
    if "num_rows" not in run:  # of an earlier version
        return f"the prompts of up to {run['data_manifest']['counts']['train']['rows']:,} conversations"
    steps = [record["step"] for record in read_journal(result.subject.folder / "metrics.jsonl") if "loss" in record]
    asked = min(run["num_rows"], (steps[-1] if steps else 0) * recipe.train.rows_per_step)
    return f"{asked:,} prompts, of {run['num_rows']:,} that fit"


def _conversational(result: Result) -> list[str]:
    return [] if result.subject.format == "text" else ["conversational"]


def eval_results(result: Result) -> list[EvalResult]:
    """The model's own scores; the base's, the difference and its interval stand beside them as arguments of the metric."""
    report = result.report
    published = all(one.split == "published" for one in result.subject.recipe.data.each)
    where = {
        "task_type": "text-generation",
        "task_name": "Text Generation",
        "dataset_type": result.datasets[0] if result.datasets else "validation-split",
        "dataset_name": _line(report["data"]["name"])[:200],
        "dataset_split": "validation" if published else "held out by a hash",
        "dataset_args": {"answers": report["data"]["answers"], "trees": report["data"]["trees"]},
    }
    beside: dict[str, Any] = {"window": report["window"], "format": result.subject.format}
    if result.form == "merged":
        beside["measured"] = "before merging, as an adapter on the quantised base"
    found = []
    metrics = (("bits_per_byte", "bits per byte of the answers"), ("perplexity", "perplexity per token of the answers"))
    for key, name in metrics if report["adapter"] else ():
        arguments = dict(beside)
        if report["base"]:
            arguments["base"] = round(report["base"][key], 6)
        if report["difference"] and key == "bits_per_byte":
            arguments |= {
                "difference": round(report["difference"][key], 6),
                "better_than_base": report["difference"]["verdict"] == "better",
            }
            if report["difference"]["interval_95"]:
                arguments["interval_95_of_the_difference"] = [round(edge, 6) for edge in report["difference"]["interval_95"]]
        if report.get("start"):
            arguments["start"] = round(report["start"][key], 6)
        if (d := report.get("difference_from_start")) and key == "bits_per_byte":
            arguments |= {"difference_from_start": round(d["bits_per_byte"], 6), "verdict_against_start": d["verdict"] or TOO_FEW}
            if d["interval_95"]:
                arguments["interval_95_of_the_difference_from_start"] = [round(edge, 6) for edge in d["interval_95"]]
        value = round(report["adapter"][key], 6)
        found.append(EvalResult(**where, metric_type=key, metric_name=name, metric_value=value, metric_args=arguments))
    if (preferences := report.get("preferences")) and preferences["rewards"]:
        rewards = preferences["rewards"]
        arguments = {"pairs": preferences["pairs"], "trees": preferences["trees"], "against": rewards["start"], "chance": 0.5}
        arguments["verdict_against_chance"] = rewards["verdict"] or TOO_FEW
        if rewards["interval_95"]:
            arguments["interval_95"] = [round(edge, 6) for edge in rewards["interval_95"]]
        name, value = "reward accuracy on held-out pairs", round(rewards["accuracy"], 6)
        found.append(EvalResult(**where, metric_type="reward_accuracy", metric_name=name, metric_value=value, metric_args=arguments))
    if (rewards := report.get("rewards")) and "adapter" in rewards["columns"] and not rewards["left_out"]:  # else of some rewards only
        arguments = {"prompts": rewards["prompts"], "rewards": _line(rewards["in_words"])[:200]}
        arguments |= {side: round(one["mean"], 6) for side, one in rewards["columns"].items() if side != "adapter"}
        for side, d in (("start", rewards["difference_from_start"]), ("base", rewards["difference"])):
            if d and side in rewards["columns"]:
                arguments[f"verdict_against_{side}"] = d["verdict"] or TOO_FEW
                if d["interval_95"]:
                    arguments[f"interval_95_of_the_difference_from_{side}"] = [round(edge, 6) for edge in d["interval_95"]]
        name, value = "mean reward of answers to held-out prompts", round(rewards["columns"]["adapter"]["mean"], 6)
        found.append(EvalResult(**where, metric_type="mean_reward", metric_name=name, metric_value=value, metric_args=arguments))
    return found


def merging(result: Result) -> dict[str, Any] | None:
    """How far the merged model is from the one that was trained, as scripts/merge.py measured it."""
    if result.form != "merged":
        return None
    record = read_json(result.weights / MERGED)
    into = {"16bit": "the base as it was published", "dequantised": "the quantised base, written out"}
    return {**record["measured"][record["into"]], "into": into.get(record["into"], record["into"]), "dtype": record["dtype"]}


def hub_datasets(recipe: Recipe, manifest: Mapping[str, Any], named: Sequence[str]) -> tuple[str, ...]:
    """Hub ids of what was trained on: those in the recipe, OASST1 where the embedded file was used, and what the caller names."""
    found = list(named)
    for one in recipe.data.each:
        for source in [one.source] if isinstance(one.source, str) else one.source or ():
            if source not in manifest["sources"] and HUB_ID.match(source):
                found.append(source)
    if EMBEDDED in manifest["sources"].values():
        found.append(OASST1)
    return tuple(dict.fromkeys(found))


def languages_of(recipe: Recipe, report: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Codes of the languages that were filtered for, or that the validation split holds, where the data name them."""
    found = {code for one in recipe.data.each if one.filters for code in one.filters.languages or ()}
    if not found and report:
        found = {str(one.get("language") or "") for one in report["conversations"]}
    return tuple(sorted(code for code in found if LANGUAGE.match(code)))


def use_snippet(result: Result) -> str:
    """Python that answers one question with plain transformers (and PEFT). It is run, as it stands, by tests/test_publish.py."""
    adapter, loads = result.form == "adapter", []
    quantized = quantization_arguments(result.subject.recipe.model) if adapter else None
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantized else []), "GenerationConfig"]
    lines = ["import torch", *(["from peft import PeftModel"] if adapter else []), f"from transformers import {', '.join(names)}", ""]
    dtype = result.run["precision"]
    if adapter:
        loads = [repr(result.origin.id)] + ([f"revision={result.origin.revision!r}"] if result.origin.revision else [])
        if quantized:
            kind = [f"{key}={value!r}" for key, value in quantized.items()]
            kind += [f"bnb_4bit_compute_dtype=torch.{dtype}"] if "load_in_4bit" in quantized else []
            lines += ["as_trained = BitsAndBytesConfig(", *(f"    {one}," for one in kind), ")"]
            loads += ["quantization_config=as_trained"]
        lines += [
            "base = AutoModelForCausalLM.from_pretrained(",
            f"    {', '.join([*loads, f'dtype=torch.{dtype}'])}, device_map='auto'",
            ")",
        ]
        lines += [f"model = PeftModel.from_pretrained(base, {result.repo!r})"]
    else:
        lines += [f"model = AutoModelForCausalLM.from_pretrained({result.repo!r}, dtype='auto', device_map='auto')"]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({result.repo!r})",
        "# the tokens that end an answer come with it",
        f"how = GenerationConfig.from_pretrained({result.repo!r}, max_new_tokens=256, do_sample=False)",
        "",
    ]
    if result.subject.format == "text":
        lines += [f"inputs = tokenizer({QUESTION!r}, return_tensors='pt').to(model.device)"]
    else:
        lines += [
            f"chat = [{{'role': 'user', 'content': {QUESTION!r}}}]",
            "inputs = tokenizer.apply_chat_template(",
            "    chat, add_generation_prompt=True, return_dict=True, return_tensors='pt'",
            ").to(model.device)",
        ]
    lines += [
        "output = model.generate(**inputs, generation_config=how)",
        "print(tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True).strip())",
    ]
    return "\n".join(lines).replace("'", '"')


def quantization_arguments(model: Model) -> dict[str, Any] | None:
    """How bitsandbytes is to quantise the published base, as it was while training; None if it is taken as it is."""
    if model.quantization == "none":
        return None
    if source_of(model.base) is None:
        try:
            if quantization_of(load_config(model)):
                return None  # published quantised: its config says how
        except ValueError:
            pass  # not at hand: the adapter alone was kept
    if model.quantization == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": model.double_quantization is not False}


def prompt_example(result: Result) -> dict[str, Any] | None:
    """A follow-up question as the template writes it, and what ends the answer; None for plain text, which has no roles."""
    renderer = renderer_of(result.subject)
    if renderer.is_plain_text:
        return None
    chat = [("user", "What is the capital of France?"), ("assistant", "Paris."), ("user", "And of Italy?")]
    messages = [{"role": role, "content": content} for role, content in chat]
    text = renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"text": text, "stops": renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_token_ids))}


def samples(result: Result) -> list[dict[str, Any]]:
    """The last previews of the run's own prompts, as they came."""
    records = read_journal(result.subject.folder / "previews.jsonl")
    return records[-1]["answers"][:NUM_SAMPLES] if records else []


def _labels(report: Mapping[str, Any]) -> list[str]:
    return [label for _, label in _columns(report)]


def _columns(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    present = {column for cells in report["formats"].values() for column in cells}
    labels = dict(COLUMNS) | report["labels"]
    return [(column, labels[column]) for column, _ in COLUMNS if column in present]


def reward_rows(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Of a run of GRPO, for each reward: its mean of each model."""
    return [(name, [f"{value:.4f}" for value in values]) for name, values, _ in report_rewards(report)]


def score_rows(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For each format: bits per byte and perplexity of each model."""
    return [
        (name, [f"{cells[c]['bits_per_byte']:.4f} ({cells[c]['perplexity']:.2f})" if c in cells else "" for c, _ in _columns(report)])
        for name, cells in report["formats"].items()
    ]


def training_rows(result: Result) -> list[tuple[str, str]]:
    """How it was made, a fact a row."""
    recipe, run = result.subject.recipe, result.run
    counts, records = run["data_manifest"]["counts"], read_journal(result.subject.folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    tuned, optim, train = recipe.adapter, recipe.optim, counts["train"]
    rows = []
    if tuned != "none":
        kind = {"nf4": "QLoRA on the base in 4-bit NF4", "int8": "LoRA on the base in 8-bit", "none": "LoRA"}[recipe.model.quantization]
        doubled = recipe.model.quantization == "nf4" and recipe.model.double_quantization is not False
        extra = [word for word, on in (("rank-stabilised", tuned.rslora), ("DoRA", tuned.dora)) if on]
        rows += [
            ("method", ", ".join([kind + (" with double quantisation" if doubled else ""), *extra])),
            ("adapter", f"rank {tuned.rank}, alpha {tuned.alpha:g}, dropout {tuned.dropout:g}, on {_names(tuned.targets)}"),
        ]
    else:
        rows += [("method", "every weight was trained" + (", from random weights" if recipe.model.random_init else ""))]
    rows += [("trained parameters", f"{run['parameters']['trainable']:,} beside {run['parameters']['base']:,} of the base")]
    if recipe.dpo:
        of = "length-normalised, " if recipe.dpo.length_normalized else ""
        rows += [("preferences", f"DPO on pairs of a chosen and a rejected answer, {of}beta {recipe.dpo.beta:g}")]
    if recipe.grpo:
        rows += [
            ("preferences", f"GRPO on answers of its own, {recipe.grpo.group_size} to a prompt, beta {recipe.grpo.beta:g}"),
            ("rewards", rewards_in_words(recipe.grpo.rewards, published=True)),
        ]
    if tuned != "none" and tuned.start_from is not None:
        rows += [("start", f"an adapter that was there already (adapter.start_from): {in_words(recipe, result.subject.before)}")]
    what = "conversations with two answers each," if recipe.dpo else "conversations"
    kept = f"{train['kept']:,} {what} in {train['rows']:,} rows; {train['tokens']:,} tokens, {train['supervised']:,} learnt"
    packed = ", packed, each conversation attends to itself" if recipe.data.packing else ""
    if recipe.grpo:
        kept = learnt_from(result)
    rate = f"{optim.name}, rate {optim.learning_rate:g}, {optim.schedule}, {optim.warmup_steps} warm-up steps"
    rows += [
        ("data", kept),
        ("rows", f"up to {recipe.data.max_length:,} tokens{packed}"),
        ("optimiser", f"{rate}, weight decay {optim.weight_decay:g}"),
    ]
    if steps:
        unit = "pairs" if recipe.dpo else "prompts" if recipe.grpo else "rows"
        taken = f"{steps[-1]['step']:,} of {recipe.train.rows_per_step} {unit}, {steps[-1]['tokens']:,} tokens; seed {recipe.seed}"
        rows += [
            ("steps", taken),
            ("loss", f"{steps[0]['loss']:.3f} at the first step, {steps[-1]['loss']:.3f} at the last ({loss_unit(records)})"),
        ]
    machine, engine = run["hardware"], run["engine"]
    engine = engine if run["processes"] == 1 else f"{run['processes']} processes ({engine})"
    rows += [
        ("chosen", result.subject.chosen_by),
        ("hardware", f"{machine['device']}, {engine}, {run['precision']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]
    return rows


def _names(targets: str | Sequence[str]) -> str:
    return {"all-linear": "every linear layer"}.get(targets, targets) if isinstance(targets, str) else ", ".join(targets)


def code(text: str) -> Markup:
    """Inline code whose content cannot end it."""
    text = _line(text)
    ticks = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return Markup(f"{ticks}{pad}{text}{pad}{ticks}")  # noqa: S704


def fence(text: str, language: str = "") -> Markup:
    """A block of code whose content cannot end it: one backtick more than it holds."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    text = "\n".join(text.splitlines())
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")  # noqa: S704


def inline(value: Any) -> Any:
    """Text that Markdown leaves as it is, on one line. Jinja calls it for every value that is not marked safe."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]<>|&~$])", r"\\\1", re.sub(r"\s+", " ", str(value)))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return Markup(re.sub(r"^([#+=-])(?=[\s#=-]|$)", r"\\\1", text))  # noqa: S704


def _line(text: str) -> str:
    return " ".join(text.split())


def serving_lines(result: Result) -> list[tuple[str, str]]:
    """(program, commands) for each that serves it from the hub; none for an adapter that has to be merged first."""
    recipe, origin = result.subject.recipe, result.origin
    adapter = recipe.adapter if result.form == "adapter" else None
    served = Served(
        name=result.name,
        window=result.subject.asked_within,
        merged=None if adapter else result.repo,
        dtype="auto",
        base=origin.id if origin else None,
        revision=origin.revision if origin else None,
        adapter=result.repo if adapter else None,
        rank=adapter.rank if adapter else 16,
        dora=adapter is not None and adapter.dora,
        servable_as=result.run["servable_as"],
    )
    # llama.cpp and Ollama convert a folder first: scripts/export_gguf.sh
    return [(program, "\n".join(lines)) for program, lines in commands(served).items() if program in ("vLLM", "transformers")]
