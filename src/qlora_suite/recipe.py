"""The recipe: what to train, typed, frozen and strict. `recipe_file.load` reads one.

Where to run (processes, precision, sharding) is the accelerate config's business: no key stands in both files.

Keys are of two kinds. A *curve* key changes what is learnt, so a run refuses to resume when one has changed. A *free*
key (marked `free(...)` below) changes only speed, memory, what is saved and what is shown.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr, model_validator

Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Marker = Annotated[str, Field(min_length=1)]
Markers = Annotated[tuple[Marker, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
AsItems = (AfterValidator(lambda mapping: tuple(mapping.items())), PlainSerializer(dict))
"""A mapping in YAML, held as its items, which are frozen: dict(...) makes the mapping again."""


def free(default: Any, **kwargs: Any) -> Any:
    """A field that may change between two starts of the same run."""
    return Field(default, json_schema_extra={"free": True}, **kwargs)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Section):
    base: str
    """A hub id (`microsoft/phi-2`) or a folder with a causal LM in Hugging Face format."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is stored: 4-bit NF4 (QLoRA), 8-bit (LLM.int8), or as it is."""
    double_quantization: bool | None = None
    """NF4 only: quantise the quantisation constants too, which saves 0.37 bits a weight (null: yes)."""
    random_init: bool = False
    """Take config and tokenizer from `base` but not its weights: pretraining from scratch."""

    @model_validator(mode="after")
    def _check(self) -> "Model":
        if self.quantization != "nf4" and self.double_quantization is not None:
            raise ValueError(f"double_quantization has no effect with quantization: {self.quantization}; remove it")
        if self.random_init and self.quantization != "none":
            raise ValueError("random_init needs quantization: none, for random weights are there to be trained")
        return self


class Filters(Section):
    """Which OASST messages stay. A dropped message takes its descendants with it; each is counted by reason."""

    languages: tuple[str, ...] | None = None
    """Keep these `lang` codes only."""
    drop_deleted: bool = True
    """Drop messages that were deleted."""
    drop_synthetic: bool = True
    """Drop messages that a model wrote."""
    drop_failed_review: bool = True
    """Drop messages whose `review_result` is false (null stays)."""
    min_chars: Positive = 1
    """Of a message's text."""
    max_chars: Positive | None = None


Policy = Literal[
    "best_path", "joined_replies", "best_replies", "all_replies", "all_paths", "each_message", "preference_pairs", "conciseness_pairs"
]
PAIR_POLICIES: tuple[Policy, ...] = ("preference_pairs", "conciseness_pairs")
"""They give pairs of a chosen and a rejected answer, which `dpo` trains on."""


Form = Literal["oasst", "messages", "sharegpt", "alpaca", "prompt", "pairs", "text"]
FIELDS: dict[Form, tuple[str, ...]] = {
    "oasst": (),
    "messages": ("messages", "role", "content", "system", "weight", "train"),
    "sharegpt": ("conversations", "from", "value", "system", "weight", "train"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt": ("prompt", "completion", "system"),
    "pairs": ("prompt", "chosen", "rejected", "system"),
    "text": ("text",),
}
"""What a row of each form is made of, under the names that data.fields can give to other keys (see chats.py)."""


class Pairs(Section):
    """Which replies to one prompt make a pair, by their `rank` (0 is best) and length; those without a rank are in none (see oasst1.py)."""

    choose: Literal["all", "adjacent", "best_worst"] = "all"
    """Of each prompt's pairs: all; those of neighbours, the replies being ordered by rank (conciseness: by length); or the one pair that
    lies furthest apart."""
    margin: Positive = 1
    """preference_pairs: the two ranks differ by at least so much."""
    within: Annotated[int, Field(ge=0)] = 1
    """conciseness_pairs: the two ranks differ by at most so much (in OASST1's validation file no two siblings share a rank)."""
    shorter: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """conciseness_pairs: the chosen reply has at most this share of the other's words."""


class LengthWeight(Section):
    up_to_words: Positive | None = None
    """Conversations whose learnt replies (of a pair: both answers) have at most so many words on average; null: all that are left."""
    weight: Annotated[float, Field(ge=0)]


class Replies(Section):
    """Which replies are learnt, by their number of words (what white space separates)."""

    min_words: Positive = 1
    """As max_words, at the other end."""
    max_words: Positive | None = None
    """Replies outside of the two are context and are not learnt; a conversation in which none is left is dropped, and so is a pair with
    one of its answers outside."""
    weights: tuple[LengthWeight, ...] = ()
    """How often a conversation is taken, times `weight`: the first entry whose length it does not pass; 1 beyond the last."""

    @model_validator(mode="after")
    def _check(self) -> "Replies":
        limits = [entry.up_to_words or float("inf") for entry in self.weights]
        if any(a >= b for a, b in pairwise(limits)):
            raise ValueError("weights must stand in rising order of up_to_words, null last")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words is {self.max_words}, below min_words: {self.min_words}; no reply would be learnt")
        return self


class Source(Section):
    """One data set: where it is, what its rows look like, and how much of it is taken."""

    source: Name | tuple[Name, ...] | None = Field(None, min_length=1)
    """A hub id, or files and folders of JSON, JSONL, JSONL.gz or Parquet."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that was read stands in the manifest."""
    validation_source: Name | tuple[Name, ...] | None = Field(None, min_length=1)
    """With `split: published`: local files that hold the validation split."""
    split: Literal["published", "by_hash", "all"] = "published"
    """`published`: the hub's own train and validation. `by_hash`: cut one source by a hash of the tree's id, or of the first
    question. `all`: no validation."""
    validation_share: Fraction | None = None
    """With `split: by_hash`: share of the trees (first questions) held out (null: 0.2)."""
    form: Form | None = None
    """What a row is (null: seen from its keys). `scripts/prepare_data.py RECIPE --inspect FILE` shows it."""
    fields: Annotated[dict[str, str], *AsItems] = ()
    """Keys of the rows that have another name than the form's: {instruction: question, output: answer}."""
    roles: Annotated[dict[str, Literal["system", "user", "assistant", "tool"]], *AsItems] = ()
    """Names of roles beside the usual ones (user, human, gpt, ...): {customer: user, agent: assistant}."""
    same_role: Literal["merge", "keep", "skip"] = "merge"
    """Turns of one role behind each other: made one, with a blank line between; left as they are; or the row is skipped."""
    tool_turns: Literal["skip", "drop", "keep"] = "skip"
    """Rows in which tools are called: skipped; learnt without the calls and what the tools said; or kept, where the calls are text
    (`chat.format: model`)."""
    learn_after: Markers = ()
    """Plain text: learn only what stands behind one of these markers (and before the next of either list)."""
    learn_until: Markers = ()
    """Plain text: a marker that ends what is learnt."""
    policy: Policy | None = None
    """How conversations are taken from OASST trees (see oasst1.py). Needed for OASST data, refused for other data."""
    filters: Filters | None = Filters()
    """OASST data; `null` turns every filter off."""
    pairs: Pairs | None = None
    """With the policies preference_pairs and conciseness_pairs: which pairs (null: as the defaults say)."""
    replies: Replies = Replies()
    """By length: which replies are learnt, and how often their conversations are taken."""
    max_examples: Positive | None = None
    """Take the first N conversations of the train split (in the order of their groups' hashes)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each conversation of the train split is taken: 2 is twice, 0.25 a quarter of them, chosen by a hash."""

    @model_validator(mode="after")
    def _check_source(self) -> "Source":
        problems = []
        if self.validation_share is not None and self.split != "by_hash":
            problems.append(f"validation_share has no effect with split: {self.split}; remove it or set split: by_hash")
        if self.validation_source is not None and self.split != "published":
            problems.append(f"validation_source has no effect with split: {self.split}; use split: published")
        if self.policy is not None and self.form not in (None, "oasst"):
            problems.append(f"policy has no effect on rows of form: {self.form}, which are no trees; remove it")
        if self.pairs is not None:
            problems += _useless_in_pairs(self.pairs, self.policy)
        form = "oasst" if self.policy is not None else self.form
        for key in ("roles", "same_role", "tool_turns"):
            if form in ("oasst", "text") and getattr(self, key) != type(self).model_fields[key].default:
                problems.append(f"{key} has no effect on rows of form: {form}, which are no chats; remove it")
        if self.learn_until and not self.learn_after:
            problems.append("learn_until has no effect without learn_after; name the markers behind which is learnt")
        if self.learn_after and form not in (None, "text"):
            problems.append(f"learn_after has no effect on rows of form: {form}, whose roles say what is learnt; remove it")
        known = {field for of_form in ([form] if form else FIELDS) for field in FIELDS[of_form]}
        if unknown := sorted(set(dict(self.fields)) - known):
            of_form = f" of form: {form}" if form else ""
            problems.append(f"fields: {', '.join(unknown)} is no part of a row{of_form}; known: {', '.join(sorted(known)) or 'none'}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _useless_in_pairs(pairs: Pairs, policy: Policy | None) -> list[str]:
    """What is set there and has no effect with the policy, one sentence each."""
    if policy not in PAIR_POLICIES:
        return [f"pairs has no effect with policy: {policy or 'null'}; it is for {' and '.join(PAIR_POLICIES)}"]
    keys = ("within", "shorter") if policy == "preference_pairs" else ("margin",)
    useless = [key for key in keys if getattr(pairs, key) != Pairs.model_fields[key].default]
    return [f"pairs.{key} has no effect with policy: {policy}; remove it" for key in useless]


class Data(Source):
    sets: tuple[Source, ...] = ()
    """Instead of `source`: several data sets, each with the keys above for itself. They are mixed into one order of rows."""
    dev_share: Fraction = 0.05
    """Share of the train trees (first questions) set aside to choose checkpoints on."""
    prepared: str
    """Folder that scripts/prepare_data.py writes and scripts/train.py reads."""
    max_length: Positive = 1024
    """Tokens in a row (packed) or in one conversation (unpacked); of a pair, in each of its two."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """A conversation is cut at the last whole assistant turn that fits. If none fits: `truncate` inside the turn, or `drop`
    the conversation. `split`: only for plain text, cut into consecutive pieces."""
    packing: bool = True
    """Several conversations in a row, each attending to itself alone. Off: one a row, or one pair, grouped by length."""

    @property
    def each(self) -> tuple[Source, ...]:
        """The data sets, one or several."""
        return self.sets or (self,)

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.sets:
            beside = [key for key, field in Source.model_fields.items() if getattr(self, key) != field.default]
            if beside:
                raise ValueError(f"{', '.join(beside)}: has no effect beside data.sets; put it into each set that it is meant for")
        for place, source in [(f"sets.{i}.", s) for i, s in enumerate(self.sets)] or [("", self)]:
            if source.source is None:
                raise ValueError(f"{place}source: missing; name a hub id, a file or a folder")
        return self


class Chat(Section):
    format: Literal["oasst", "human_assistant", "instruct_output", "llama2", "chatml", "model", "text"] = "oasst"
    """How a conversation becomes tokens (see chat.py). `model`: the base's own chat template, or ChatML if it has none; `text`:
    no roles, every token is learnt."""
    role_markers: Literal["auto", "special", "text"] = "auto"
    """`oasst` only. `special`: control tokens in spare embedding rows, trained; `text`: ordinary text; `auto`: the base's
    own control tokens, else special if rows are spare, else text."""
    system_prompt: str | None = None
    """`llama2`, `chatml` and `model`: the system message put before each conversation that has none."""
    template_arguments: Annotated[dict[str, str | bool | int], *AsItems] = ()
    """`model` only: what the base's template is called with beside the messages: {enable_thinking: false}."""
    rewritten_history: Literal["last_turn", "each_turn", "refuse"] = "last_turn"
    """`model` only: where the base's template writes an earlier answer in another way than the last one, learn the last alone, or
    each as the last one of an example of its own (its context is read once more for each), or refuse the base."""
    loss_on: Literal["assistant", "all"] | None = None
    """Learn the assistant's words and end tokens only, or every token (null: assistant; with `format: text`, all)."""
    escape_markers: bool = False
    """Break up text in messages that looks like a plain-text role marker (it is always counted)."""

    @model_validator(mode="after")
    def _check(self) -> "Chat":
        if self.format != "oasst" and self.role_markers != "auto":
            raise ValueError(f"role_markers: {self.role_markers} has no effect with format: {self.format}; remove it")
        if self.system_prompt is not None and self.format not in ("llama2", "chatml", "model"):
            raise ValueError(f"format: {self.format} has no place for a system_prompt; use llama2, chatml or model, or remove it")
        if self.format != "model":
            for key in ("template_arguments", "rewritten_history"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} has no effect with format: {self.format}, which is not the base's own template; remove it")
        if self.format in ("text", "chatml", "model") and self.escape_markers:
            raise ValueError(f"escape_markers has no effect with format: {self.format}, which has no plain-text markers")
        if self.format == "text" and self.loss_on == "assistant":
            raise ValueError("loss_on: assistant has no meaning with format: text, which has no roles; use data.learn_after, or remove it")
        return self


class Adapter(Section):
    rank: Annotated[int, Field(gt=0, le=2**16)] = 16
    """Of lora_A and lora_B: how much can be learnt, and how large the adapter is."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    """Share of each LoRA input that is left out while training, at random."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules to adapt. Every name must match in every layer that has such a module."""
    rslora: bool = False
    """Scale by the root of the rank, for large ranks (Kalajdzievski, 2023)."""
    dora: bool = False
    """Learn the length of each weight row apart from its direction (Liu et al., 2024)."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the input embeddings while training, of size alpha / sqrt(length x width) (Jain et al., 2023)."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """lora_A's initialisation (lora_B starts at zero). Those that rewrite the base need quantization: none."""
    start_from: Name | None = None
    """Begin with this adapter instead of a new one: a run's folder, an adapter's, or a hub id. It must be of the rank, the targets and the
    trained token rows that stand here (see start_from.py)."""
    allow_partial: bool = False
    """Accept targets that match only some layers. Without it that is an error."""


class Optim(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' with 8-bit and/or paged states."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises from 0 in a line."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where linear and cosine end, as a share of learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, times the rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of a step is scaled down to this norm."""
    spike_ratio: Annotated[float, Field(gt=1)] = 10.0
    """A gradient norm above so many times the median of the last 200 is a spike: noted, with a black box (not under GRPO)."""
    on_spike: Literal["clip", "skip"] = "clip"
    """What becomes of such a step: clipped to max_grad_norm, like every other, or not applied."""

    @model_validator(mode="after")
    def _check(self) -> "Optim":
        if self.schedule == "constant" and self.min_learning_rate_ratio > 0:
            raise ValueError("min_learning_rate_ratio has no effect with schedule: constant")
        return self


class Train(Section):
    rows_per_step: Positive
    """Rows in one optimiser step, over all processes. Accumulation follows: rows_per_step / (micro_batch x processes)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times that the data is gone through; 0.5 is half of it."""
    max_steps: Positive | None = None
    """Stop the schedule here if the epochs would take longer."""
    micro_batch: Positive | Literal["auto"] = free("auto")
    """Rows in one forward pass on one process; `auto` finds what fits."""
    gradient_checkpointing: bool | Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = free("auto")
    """Recompute activations in the backward pass: in all layers, in none, or in a share of them (0.5: every second), evenly spread;
    `auto` in as few as memory allows."""
    max_skipped_steps: Positive = free(5)
    """End the run after this many steps in a row that were not applied: a loss or gradient was not finite, or `optim.on_spike: skip`."""


class Dpo(Section):
    """Learn from pairs of answers which one is preferred (dpo.py)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to what it was at the start: a small one lets it go further."""
    length_normalized: bool = False
    """Compare means over an answer's tokens instead of sums, so that length is no advantage (with a beta some 10 times as large)."""


NEEDED = {"within_words": "words", "format": "pattern", "no_repetition": None}
"""The rewards of rewards.py by name, and the key that each needs."""


def _file_and_function(path: str) -> str:
    if re.fullmatch(r".+\.py:[A-Za-z_]\w*", path) is None:
        raise ValueError(f"{path!r} names no function in a file; write FILE.py:FUNCTION, for example my_rewards.py:polite")
    return path


class Reward(Section):
    """What an answer is judged by: a number from 0 to 1, times `weight`."""

    name: Literal["within_words", "format", "no_repetition"] | None = None
    """`within_words`: it ends by itself within `words`; `format`: `pattern` is found in it; `no_repetition`: the share of its windows of 4
    tokens that did not stand in it before."""
    path: Annotated[str, AfterValidator(_file_and_function)] | None = None
    """Instead of a name: FILE.py:FUNCTION, a function of your own. The file is run (see rewards.py)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    words: Positive | None = None
    min_words: Positive | None = None
    """`within_words`: an answer of fewer is worth nothing (null: 1), or the best one would be to say as good as nothing."""
    pattern: Name | None = None
    """`format`: a regular expression, searched for; ^ and $ are the beginning and the end of the answer."""

    @model_validator(mode="after")
    def _check(self) -> "Reward":
        if (self.name is None) == (self.path is None):
            raise ValueError(f"give either a name ({', '.join(NEEDED)}) or a path (FILE.py:FUNCTION)")
        needed = NEEDED[self.name] if self.name else None
        problems = [f"{self.name} needs {needed}"] if needed and getattr(self, needed) is None else []
        takes = {"words", "min_words"} if self.name == "within_words" else {needed}
        for key in ("words", "min_words", "pattern"):
            if getattr(self, key) is not None and key not in takes:
                problems.append(f"{key} has no effect with {self.name or 'a function of your own'}; remove it")
        if self.words is not None and self.min_words is not None and self.min_words > self.words:
            problems.append(f"min_words is {self.min_words}, above words: {self.words}; no answer could be good")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                problems.append(f"pattern is no regular expression: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _one_at_least(rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
    if not rewards:
        raise ValueError("nothing says what an answer is worth; name a reward, for example {name: within_words, words: 60}")
    return rewards


class Grpo(Section):
    """scripts/train_grpo.py: answers are sampled, judged, and made likelier or less likely (Shao et al., 2024, DeepSeekMath)."""

    rewards: Annotated[tuple[Reward, ...], AfterValidator(_one_at_least)]
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt, which are judged against each other. train.rows_per_step counts the prompts of a step."""
    max_new_tokens: Positive = 256
    """Of an answer. Prompts that leave no room for as many within data.max_length are left out."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampling, and of the probabilities that are compared."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """How much a distance from the model as it began (its KL divergence) costs."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """A token's probability may leave 1 - clip to 1 + clip times what it was when the answer was sampled, but gains nothing by it."""
    updates: Positive = 1
    """Optimiser steps with the same answers."""


class Speed(Section):
    """How the same numbers are computed. `auto` is the fast way, where a trial on the loaded base shows that it gives the plain way's
    results; `plain` is the way of transformers and PEFT, to compare with.
    """

    attention: Literal["auto", "plain"] = free("auto")
    """Each conversation of a row by itself, or the whole row behind a mask."""
    head: Literal["auto", "plain"] = free("auto")
    """The loss of some tokens at a time, within the output head, or the logits of all at once."""
    lora: Literal["auto", "plain"] = free("auto")
    """A linear layer and its LoRA as one operation, which keeps less for the backward pass, or PEFT's."""
    gelu: Literal["auto", "plain"] = free("auto")
    """`gelu_new` as one operation, or as transformers' eight."""
    dequantize_once: bool | Literal["auto"] = free("auto")
    """Keep a copy of 4-bit weights in the precision that is computed in, instead of making it in each pass; `auto` where it fits."""
    compile: bool = free(False)
    """torch.compile each decoder layer: minutes at the start, for faster steps on a GPU. Training alone; needs a C++ compiler."""


class Stop(Section):
    after_minutes: Annotated[float, Field(gt=0)] | None = free(None)
    """End with a checkpoint after this time; the same command goes on from there."""
    hung_after_minutes: Annotated[float, Field(gt=0, le=25)] = free(15.0)
    """End as failed, with the stacks of every thread, if nothing happens for so long: no micro-batch, evaluation batch or save."""


class Evaluation(Section):
    every_steps: Positive | None = free(None)
    """Evaluate on the development split this often (and at the end); the best checkpoint is kept."""
    budget_tokens: Positive | None = free(None)
    """Look at the first rows of the development split up to this many tokens. null: all of it."""
    patience: Positive | None = free(None)
    """Stop after this many evaluations without a better one."""
    bootstrap_samples: Positive = free(2000)
    """scripts/evaluate.py: resamplings of the trees for the interval."""
    base_formats: Literal["all", "trained"] = free("all")
    """scripts/evaluate.py: the chat formats in which the base is scored, by `trained` in that of the run alone, a third of the work. It is
    for later runs of a chain: whether plain text suits the base better, the first one has shown by `all`. What does not fit into the window
    in one of the formats is cut in all, so `trained` may cut less."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        if self.every_steps is None:
            for key in ("budget_tokens", "patience"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} has no effect without every_steps")
        return self


class Previews(Section):
    prompts: tuple[str, ...] = free(())
    """Answered greedily before training, every `every_steps` and at the end."""
    every_steps: Positive = free(100)
    max_new_tokens: Positive = free(128)


class Checkpoints(Section):
    every_steps: Positive | None = free(None)
    every_minutes: Annotated[float, Field(gt=0)] | None = free(10.0)
    """Save this often. The last step is saved in any case."""
    keep: Annotated[int, Field(ge=2)] = free(2)
    """How many of the newest stay; the best on the development split stays as well."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]


class Tracking(Section):
    trackers: tuple[Tracker, ...] = free(())
    """Beside metrics.jsonl, which is always written. Each needs its own package."""
    project: str = free("qlora-suite")
    """The name that the trackers show."""


class Output(Section):
    dir: str
    """The run's folder: checkpoints, result, reports."""
    mirror: str | None = free(None)
    """Copy every verified checkpoint here too (a mounted drive)."""
    final_dtype: Literal["float32", "float16", "bfloat16"] | None = free(None)
    """adapter: none only: type of the weights in `final/` (null: float32)."""


class Recipe(Section):
    _command_line: str = PrivateAttr("RECIPE")

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Order of the rows, adapter initialisation, dropout."""
    model: Model
    data: Data
    chat: Chat = Chat()
    adapter: Adapter | Literal["none"] = Adapter()
    """LoRA, or `none`: train every parameter."""
    optim: Optim
    train: Train
    dpo: Dpo | None = None
    """Learn from pairs of a chosen and a rejected answer. null: supervised fine-tuning."""
    grpo: Grpo | None = None
    """Only for scripts/train_grpo.py."""
    speed: Speed = Speed()
    stop: Stop = Stop()
    evaluation: Evaluation = Evaluation()
    previews: Previews = Previews()
    checkpoints: Checkpoints = Checkpoints()
    tracking: Tracking = Tracking()
    output: Output

    @property
    def several_in_a_row(self) -> bool:
        """May a row hold several conversations, which must not see each other?"""
        return self.data.packing or self.dpo is not None

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have."""
        return self.data.max_length * (2 if self.dpo is not None else 1)

    @property
    def draws_noise(self) -> bool:
        """Does a forward pass draw random numbers? Then the micro-batch is part of the curve."""
        return self.adapter != "none" and (self.adapter.dropout > 0 or self.adapter.neftune_noise_alpha is not None)

    @property
    def command_line(self) -> str:
        """The recipe's file and overrides, as they stand behind a script's name."""
        return self._command_line

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        problems = []
        if self.speed.dequantize_once is True and self.model.quantization != "nf4":
            kind = self.model.quantization
            problems.append(f"speed.dequantize_once: true has no effect with model.quantization: {kind}; use nf4, or remove it")
        if self.adapter == "none":
            if self.model.quantization != "none":
                problems.append(f"adapter: none trains every weight, which {self.model.quantization} forbids; set model.quantization: none")
        else:
            if self.model.random_init:
                problems.append("model.random_init makes sense with adapter: none alone")
            if self.output.final_dtype is not None:
                problems.append("output.final_dtype has an effect with adapter: none alone; adapters are saved as they were trained")
            if self.adapter.start_from is not None and self.adapter.init != "default":
                problems.append(
                    f"adapter.init: {self.adapter.init} has no effect with adapter.start_from, whose weights are taken; remove it"
                )
            if self.adapter.dora and self.model.quantization == "int8":
                problems.append("adapter.dora fails on an 8-bit base (in PEFT and bitsandbytes); use model.quantization: nf4 or none")
            if self.adapter.init not in ("default", "gaussian") and self.model.quantization != "none":
                problems.append(
                    f"adapter.init: {self.adapter.init} needs an unquantised base; use default or gaussian, or model.quantization: none"
                )
        if self.model.random_init and self.evaluation.base_formats != "all":
            problems.append("evaluation.base_formats has no effect with model.random_init, which leaves no base to be scored; remove it")
        text = self.chat.format == "text"
        if self.dpo is not None:
            if self.adapter == "none":
                problems.append("dpo compares with the weights it starts from, which adapter: none overwrites; train an adapter")
            if self.data.packing:
                problems.append("dpo takes one pair a row; set data.packing: false")
            if text:
                problems.append("dpo compares two answers to one prompt, and chat.format: text has no roles; choose another format")
            elif self.chat.loss_on == "all":
                problems.append("dpo compares the answers alone, so chat.loss_on: all has no meaning; remove it")
        if self.data.too_long == "split" and not text:
            problems.append("data.too_long: split is for chat.format: text; a conversation is never split, use truncate or drop")
        for place, source in [(f"data.sets.{i}", s) for i, s in enumerate(self.data.sets)] or [("data", self.data)]:
            if source.policy == "each_message" and not text:
                problems.append(f"{place}.policy: each_message gives plain texts; set chat.format: text")
            if text and source.policy not in (None, "each_message"):
                problems.append(f"chat.format: text has no roles; {place}.policy: {source.policy} gives conversations (use each_message)")
            if source.form is not None and source.policy is None and text != (source.form == "text"):
                problems.append(
                    f"{place}.form: {source.form} does not go with chat.format: {self.chat.format}; only plain text has no roles"
                )
            taken = f"policy: {source.policy}" if source.policy is not None else f"form: {source.form}"
            pairs = source.policy in PAIR_POLICIES or source.form == "pairs"
            if self.grpo is not None and source.policy in PAIR_POLICIES:
                problems.append(f"{place}.{taken} gives pairs, of which grpo would ask the prompts; use policy: all_paths, which has them")
            elif pairs and self.dpo is None and self.grpo is None:
                problems.append(f"{place}.{taken} gives pairs of a chosen and a rejected answer; add dpo: {{}}, which trains on them")
            if self.dpo is not None and not pairs and (source.policy, source.form) not in ((None, None), (None, "oasst")):
                problems.append(f"dpo needs pairs, and {place}.{taken} gives none; use a policy of pairs or rows with chosen and rejected")
            if source.learn_after and not text:
                problems.append(f"{place}.learn_after is for chat.format: text; a chat's roles say what is learnt")
            if source.tool_turns == "keep" and self.chat.format != "model":
                problems.append(f"{place}.tool_turns: keep needs chat.format: model; other formats have no place for tools, use drop")
        if text and self.evaluation.base_formats != "all":
            problems.append("evaluation.base_formats has no effect with chat.format: text, the only one in which text is scored; remove it")
        problems += self._grpo_problems() if self.grpo is not None else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _grpo_problems(self) -> list[str]:
        problems = []
        if self.dpo is not None:
            problems.append("dpo and grpo are two ways of learning; give the recipe one, and let the other start from its run")
        if self.data.packing:
            problems.append("grpo needs data.packing: false, for each row is the conversation of one prompt")
        if self.grpo.max_new_tokens >= self.data.max_length:
            limits = f"grpo.max_new_tokens: {self.grpo.max_new_tokens} and data.max_length: {self.data.max_length}"
            problems.append(f"{limits} leave no room for a prompt; lower the one or raise the other")
        if self.chat.format == "text" or self.chat.loss_on == "all":
            problems.append(
                "grpo needs answers that are told from their prompts; use a chat.format with roles, and chat.loss_on: assistant"
            )
        if self.draws_noise:
            problems.append(
                "grpo compares how likely an answer is with how likely it was, and adapter.dropout and neftune_noise_alpha change that at "
                "random; remove them"
            )
        if self.evaluation.every_steps is not None:
            problems.append(
                "evaluation.every_steps keeps the checkpoint with the lowest development loss, which is not what grpo lowers; set it to "
                "null (scripts/evaluate.py measures the result)"
            )
        if self.speed.compile:
            problems.append("speed.compile would compile anew for each length of an answer that grpo samples; set it to false")
        return problems


def flatten(recipe: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 0.001, "data.sets.0.weight": 1.0, ...}; a section set to null or a word stands under its own name."""
    return {name: v for key in type(recipe).model_fields for name, v in _flat(prefix + key, getattr(recipe, key), flatten).items()}


def curve_keys(recipe: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The flattened keys that change what is learnt."""
    out: dict[str, Any] = {}
    for key, field in type(recipe).model_fields.items():
        if not (field.json_schema_extra or {}).get("free") and prefix + key not in ("data.prepared", "output.dir"):
            out.update(_flat(prefix + key, getattr(recipe, key), curve_keys))
    return out


def default_of(key: str) -> Any:
    """What a flattened key is where a recipe does not name it; `...`, which no value equals, if it has to be named."""
    *sections, last = [part for part in key.split(".") if not part.isdecimal()]
    kind: type[BaseModel] = Recipe
    for name in sections:
        section = section_of(kind.model_fields[name].annotation) if name in kind.model_fields else None
        if section is None:
            return ...
        kind = section
    field = kind.model_fields.get(last)
    return ... if field is None or field.is_required() else field.default


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (or several, or a word instead)."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def names_files(key: str) -> bool:
    """Is it a curve key that only names files? Their contents are compared by hash, so that a folder may be moved."""
    return (
        re.fullmatch(
            r"data\.(sets\.\d+\.)?(source|validation_source)|model\.(base|revision)|adapter\.start_from|grpo\.rewards\.\d+\.path", key
        )
        is not None
    )


def _flat(name: str, value: Any, flat: Callable[[BaseModel, str], dict[str, Any]]) -> dict[str, Any]:
    """One key as one, or a section (or a list of sections) as many."""
    if isinstance(value, BaseModel):
        return flat(value, f"{name}.")
    if isinstance(value, tuple) and value and all(isinstance(part, BaseModel) for part in value):
        return {inner: v for i, part in enumerate(value) for inner, v in flat(part, f"{name}.{i}.").items()}
    return {name: value}
