"""The recipe: what to train, typed, frozen and strict. `recipe_file.load` reads one.

Where to run (processes, precision, sharding) is the accelerate config's business: no key stands in both files.

Keys are of two kinds. A *curve* key changes what is learnt, so a run refuses to resume when one has changed. A *free*
key (marked `free(...)` below) changes only speed, memory, what is saved and what is shown.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


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
    drop_synthetic: bool = True
    drop_failed_review: bool = True
    """Drop messages whose `review_result` is false (null stays)."""
    min_chars: Positive = 1
    max_chars: Positive | None = None


Policy = Literal["best_path", "joined_replies", "best_replies", "all_replies", "all_paths", "each_message"]


class Data(Section):
    source: str | tuple[str, ...]
    """A hub id, or files and folders of JSONL, JSONL.gz or Parquet: OASST messages or trees, `messages` lists, `{"text"}`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that was read stands in the manifest."""
    validation_source: str | tuple[str, ...] | None = None
    """With `split: published`: local files that hold the validation split."""
    split: Literal["published", "by_tree", "all"] = "published"
    """`published`: the hub's own train and validation. `by_tree`: cut one source by a hash of the tree id. `all`: no validation."""
    validation_share: Fraction | None = None
    """With `split: by_tree`: share of the trees held out (null: 0.2)."""
    dev_share: Fraction = 0.05
    """Share of the train trees set aside to choose checkpoints on."""
    policy: Policy | None = None
    """How conversations are taken from OASST trees (see oasst1.py). Needed for OASST data, refused for other data."""
    filters: Filters | None = Filters()
    """`null` turns every filter off."""
    max_examples: Positive | None = None
    """Take the first N conversations of the train split (in the order of their trees' hashes)."""
    prepared: str
    """Folder that scripts/prepare_data.py writes and scripts/train.py reads."""
    max_length: Positive = 1024
    """Tokens in a row (packed) or in one conversation (unpacked)."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """A conversation is cut at the last whole assistant turn that fits. If none fits: `truncate` inside the turn, or `drop`
    the conversation. `split`: only for plain text, cut into consecutive pieces."""
    packing: bool = True
    """Several conversations in a row, each attending to itself alone. Off: one a row, grouped by length."""

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.validation_share is not None and self.split != "by_tree":
            raise ValueError(f"validation_share has no effect with split: {self.split}; remove it or set split: by_tree")
        if self.validation_source is not None and self.split != "published":
            raise ValueError(f"validation_source has no effect with split: {self.split}; use split: published")
        return self


class Chat(Section):
    format: Literal["oasst", "human_assistant", "instruct_output", "llama2", "text"] = "oasst"
    """How a conversation becomes tokens (see chat.py). `text`: no roles, every token is learnt."""
    role_markers: Literal["auto", "special", "text"] = "auto"
    """`oasst` only. `special`: control tokens in spare embedding rows, trained; `text`: ordinary text; `auto`: the base's
    own control tokens, else special if rows are spare, else text."""
    system_prompt: str | None = None
    """`llama2` only: the system message put before each conversation that has none."""
    loss_on: Literal["assistant", "all"] | None = None
    """Learn the assistant's words and end tokens only, or every token (null: assistant; with `format: text`, all)."""
    escape_markers: bool = False
    """Break up text in messages that looks like a plain-text role marker (it is always counted)."""

    @model_validator(mode="after")
    def _check(self) -> "Chat":
        if self.format != "oasst" and self.role_markers != "auto":
            raise ValueError(f"role_markers: {self.role_markers} has no effect with format: {self.format}, whose markers are plain text")
        if self.system_prompt is not None and self.format != "llama2":
            raise ValueError(f"format: {self.format} has no place for a system_prompt; use llama2 or remove it")
        if self.format == "text" and self.escape_markers:
            raise ValueError("escape_markers has no effect with format: text, which has no markers")
        if self.format == "text" and self.loss_on == "assistant":
            raise ValueError("loss_on: assistant has no meaning with format: text, which has no roles; remove it")
        return self


class Adapter(Section):
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules to adapt. Every name must match in every layer that has such a module."""
    rslora: bool = False
    dora: bool = False
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the input embeddings while training, of size alpha / sqrt(length x width) (Jain et al., 2023)."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """lora_A's initialisation (lora_B starts at zero). Those that rewrite the base need quantization: none."""
    allow_partial: bool = False
    """Accept targets that match only some layers. Without it that is an error."""


class Optim(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' with 8-bit and/or paged states."""
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where linear and cosine end, as a share of learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> "Optim":
        if self.schedule == "constant" and self.min_learning_rate_ratio > 0:
            raise ValueError("min_learning_rate_ratio has no effect with schedule: constant")
        return self


class Train(Section):
    rows_per_step: Positive
    """Rows in one optimiser step, over all processes. Accumulation follows: rows_per_step / (micro_batch x processes)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    """Stop the schedule here if the epochs would take longer."""
    micro_batch: Positive | Literal["auto"] = free("auto")
    """Rows in one forward pass on one process; `auto` finds what fits."""
    gradient_checkpointing: bool | Literal["auto"] = free("auto")
    """Recompute activations in the backward pass; `auto` only if nothing fits otherwise."""
    max_nonfinite_steps: Positive = free(5)
    """End the run after this many steps in a row with a non-finite loss or gradient (none is ever applied)."""


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
    keep: Annotated[int, Field(ge=2)] = free(2)
    """How many of the newest stay; the best on the development split stays as well."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]


class Tracking(Section):
    trackers: tuple[Tracker, ...] = free(())
    """Beside metrics.jsonl, which is always written. Each needs its own package."""
    project: str = free("qlora-suite")


class Output(Section):
    dir: str
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
    stop: Stop = Stop()
    evaluation: Evaluation = Evaluation()
    previews: Previews = Previews()
    checkpoints: Checkpoints = Checkpoints()
    tracking: Tracking = Tracking()
    output: Output

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
        if self.adapter == "none":
            if self.model.quantization != "none":
                problems.append(f"adapter: none trains every weight, which {self.model.quantization} forbids; set model.quantization: none")
        else:
            if self.model.random_init:
                problems.append("model.random_init makes sense with adapter: none alone")
            if self.output.final_dtype is not None:
                problems.append("output.final_dtype has an effect with adapter: none alone; adapters are saved as they were trained")
            if self.adapter.dora and self.model.quantization == "int8":
                problems.append("adapter.dora fails on an 8-bit base (in PEFT and bitsandbytes); use model.quantization: nf4 or none")
            if self.adapter.init not in ("default", "gaussian") and self.model.quantization != "none":
                problems.append(
                    f"adapter.init: {self.adapter.init} needs an unquantised base; use default or gaussian, or model.quantization: none"
                )
        if self.data.too_long == "split" and self.chat.format != "text":
            problems.append("data.too_long: split is for chat.format: text; a conversation is never split, use truncate or drop")
        if self.data.policy == "each_message" and self.chat.format != "text":
            problems.append("data.policy: each_message gives plain texts; set chat.format: text")
        if self.chat.format == "text" and self.data.policy not in (None, "each_message"):
            problems.append(f"chat.format: text has no roles; data.policy: {self.data.policy} gives conversations (use each_message)")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def flatten(recipe: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 0.001, ...}; a section set to null or a word stands under its own name."""
    out: dict[str, Any] = {}
    for key in type(recipe).model_fields:
        value = getattr(recipe, key)
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, BaseModel) else {prefix + key: value})
    return out


def curve_keys(recipe: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The flattened keys that change what is learnt."""
    out: dict[str, Any] = {}
    for key, field in type(recipe).model_fields.items():
        value = getattr(recipe, key)
        if isinstance(value, BaseModel):
            out.update(curve_keys(value, f"{prefix}{key}."))
        elif not (field.json_schema_extra or {}).get("free") and prefix + key not in ("data.prepared", "output.dir"):
            out[prefix + key] = value
    return out
