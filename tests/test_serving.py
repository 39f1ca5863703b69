"""The commands that serve what a run made, and Ollama's Modelfile, which writes the chat format a second time."""

import itertools
import shlex

import pytest
from families import tokenizer_of
from go_template import render
from transformers import PreTrainedTokenizerFast

from qlora_suite.chat import Renderer
from qlora_suite.chat_templates import jinja
from qlora_suite.modelfile import go_template, modelfile, reads_safetensors
from qlora_suite.recipe import Chat
from qlora_suite.role_markers import add_role_markers
from qlora_suite.serving import VLLM_RANKS, Served, check_commands, commands, max_lora_rank

SYSTEM, HI, HELLO, AND = (
    {"role": role, "content": text} for role, text in (("system", 'Be "brief".'), ("user", "hi"), ("assistant", "hello"), ("user", "and?"))
)
CHATS = [
    [HI],
    [HI, HELLO, AND],
    [SYSTEM, HI],
    [SYSTEM, HI, HELLO, AND],
    [HI, SYSTEM, AND],
    [HI, HELLO, SYSTEM, AND],
    [HI, SYSTEM, HELLO, AND],
    [HI, HELLO, AND, HELLO, HI],
    [{"role": "system", "content": ""}, HI],
    [{"role": "user", "content": '{{ .System }} \\ "quoted"\n```\n} € 漢字'}],
]
FORMATS = {
    "oasst": Chat(),
    "oasst as text": Chat(role_markers="text"),
    "human_assistant": Chat(format="human_assistant"),
    "instruct_output": Chat(format="instruct_output"),
    "llama2": Chat(format="llama2"),
    "llama2 with a system prompt": Chat(format="llama2", system_prompt='Say "yes"\nor no.'),
    "chatml": Chat(format="chatml"),
    "chatml with a system prompt": Chat(format="chatml", system_prompt='Say "yes"\nor no.'),
    "model, which has no template": Chat(format="model"),
}


def renderer_of(family: str, chat: Chat) -> Renderer:
    tokenizer = tokenizer_of(family)
    markers = add_role_markers(tokenizer, len(tokenizer) + 8, chat)
    tokenizer.chat_template = jinja(tokenizer, chat, markers)
    return Renderer(tokenizer, chat, markers)


def by_jinja(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    """Without the begin token that Ollama adds by itself where the tokenizer does."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    adds_it = tokenizer.bos_token is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_it else text


@pytest.mark.parametrize(
    ("name", "family"),
    [*itertools.product(FORMATS, ["phi2"]), *itertools.product([n for n in FORMATS if n[:5] != "model"], ["mistral_v1"])],
)
def test_ollamas_template_writes_what_the_saved_jinja_template_writes(name: str, family: str) -> None:
    renderer = renderer_of(family, FORMATS[name])
    template = go_template(renderer)
    assert template is not None
    assert '"""' not in template
    for messages in CHATS:
        assert render(template, messages) == by_jinja(renderer.tokenizer, messages), messages


def test_a_plain_text_begins_as_it_was_learnt() -> None:
    for family in ("phi2", "mistral_v1"):
        renderer = renderer_of(family, Chat(format="text"))
        assert render(go_template(renderer), [HI]) == by_jinja(renderer.tokenizer, [HI])


def test_the_modelfile_stops_at_every_trained_stop_token() -> None:
    text = modelfile(renderer_of("phi2", Chat()), source="./quickstart.gguf", window=1024)
    lines = text.splitlines()
    assert "FROM ./quickstart.gguf" in lines
    assert "PARAMETER num_ctx 1024" in lines
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|prompter|>"',
        'PARAMETER stop "<|assistant|>"',
    ]


def test_a_bases_own_template_is_left_to_the_gguf_and_that_is_said() -> None:
    text = modelfile(renderer_of("llama3", Chat(format="model")), source=".", window=8192)
    assert 'TEMPLATE """' not in text
    assert "# No TEMPLATE: the chat format is the base's own" in text
    assert 'PARAMETER stop "<|eot_id|>"' in text


def test_ollama_converts_only_the_classes_that_it_names() -> None:
    assert [reads_safetensors(f"{name}ForCausalLM") for name in ("Llama", "Gemma2", "Phi3", "Phi", "Qwen2")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (4, 8), (8, 8), (16, 16), (17, 32), (65, 128), (300, 320), (512, 512)])
def test_vllm_gets_the_smallest_rank_that_it_takes(rank: int, wanted: int) -> None:
    assert max_lora_rank(rank) == wanted
    assert wanted in VLLM_RANKS


def test_a_rank_that_vllm_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="up to rank 512, and this one has rank 513"):
        max_lora_rank(513)


def served(**values: object) -> Served:
    return Served(**{"name": "mine", "window": 2048, "merged": "my runs/merged", "base": "a/base", "adapter": "runs/x/final", **values})


def test_an_adapter_is_served_beside_its_base_with_its_own_tokenizer_and_rank() -> None:
    merged, adapter = (shlex.split(line) for line in commands(served(rank=20, revision="abc"))["vLLM"])
    assert merged[:3] == ["vllm", "serve", "my runs/merged"]
    assert merged[merged.index("--served-model-name") + 1] == "mine"
    assert adapter[:5] == ["vllm", "serve", "a/base", "--revision", "abc"]
    for option, value in (("--max-lora-rank", "32"), ("--lora-modules", "mine=runs/x/final"), ("--tokenizer", "runs/x/final")):
        assert adapter[adapter.index(option) + 1] == value


@pytest.mark.parametrize("values", [{"servable_as": "merged"}, {"dora": True}, {"rank": 600}])
def test_what_no_server_takes_as_an_adapter_is_served_merged_alone(values: dict[str, object]) -> None:
    (line,) = commands(served(**values))["vLLM"]
    assert "lora" not in line


def test_every_server_listens_on_the_loopback_interface() -> None:
    lines = list(itertools.chain(*commands(served()).values()))
    servers = [shlex.split(line) for line in lines if line.startswith(("vllm", "llama-server", "transformers"))]
    assert len(servers) == 4
    assert all(words[words.index("--host") + 1] == "127.0.0.1" for words in servers)


def test_ollama_reads_the_folder_that_has_what_it_reads() -> None:
    assert shlex.split(commands(served())["Ollama"][0])[-1] == "my runs/merged-gguf/Modelfile"
    assert shlex.split(commands(served(ollama_reads=True))["Ollama"][0])[-1] == "my runs/merged/Modelfile"


def test_each_program_has_its_own_way_to_be_checked():
    served = Served(name="oasst", window=64, merged="runs/oasst/merged", servable_as="merged")
    lines = check_commands("runs/oasst", served)
    assert lines.keys() == commands(served).keys()
    assert lines["vLLM"] == "python scripts/check_served.py runs/oasst --url http://127.0.0.1:8000/v1"
    assert lines["transformers"].endswith(":8000/v1 --model runs/oasst/merged")
    assert (":8080/v1" in lines["llama.cpp"], lines["Ollama"].endswith(":11434/v1 --model oasst")) == (True, True)
