"""A chat page for one model: a Gradio Space that needs the files beside it and nothing else. `python app.py` runs it anywhere.

space.json says which model and how it is loaded; the environment variable MODEL_ID names another one, a hub id or a folder.
"""

import contextlib
import copy
import html
import json
import os
import threading
from pathlib import Path

SETTINGS = json.loads((Path(__file__).parent / "space.json").read_text(encoding="utf-8"))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if SETTINGS["hardware"] == "zerogpu":
    import spaces  # has to come before torch: it lends the GPU only while `answer` runs

    lend_gpu = spaces.GPU(duration=120)
else:

    def lend_gpu(function):
        return function


import gradio as gr  # noqa: E402
import torch  # noqa: E402
from peft import PeftConfig, PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

MODEL_ID = os.environ.get("MODEL_ID", SETTINGS["model"])
MAX_CHARS, MAX_SECONDS, MAX_WAITING = 8000, 110, 20
TUNED, BASE = "fine-tuned", "base"


def computes_in(device):
    """The Space's dtype; `half` follows the card: bf16 from Ampere on, fp16 before, fp32 without a GPU."""
    if SETTINGS["dtype"] != "half":
        return getattr(torch, SETTINGS["dtype"])
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load():
    """The model in eval mode: base and adapter, or the whole."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"dtype": computes_in(device), "device_map": {"": device}, "use_safetensors": True}
    if SETTINGS["quantization"]:
        in_4bit = {"bnb_4bit_compute_dtype": how["dtype"]} if "load_in_4bit" in SETTINGS["quantization"] else {}
        how["quantization_config"] = BitsAndBytesConfig(**SETTINGS["quantization"], **in_4bit)
    if not SETTINGS["adapter"]:
        return AutoModelForCausalLM.from_pretrained(MODEL_ID, **how).eval()
    config = PeftConfig.from_pretrained(MODEL_ID)
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision, **how)
    return PeftModel.from_pretrained(base, MODEL_ID).eval()


tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
stops = GenerationConfig.from_pretrained(MODEL_ID)
model = load()


def plain(content):
    """The text of a message, in which no control token can be spelt: a zero-width space breaks it up."""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content if isinstance(part, dict))
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def prompt(message, history, room):
    """Ids of the chat up to where the answer starts, without the oldest pairs if they leave no room for it."""
    turns = [{"role": "user", "content": plain(message)}]
    for turn in reversed(history):
        text = plain(turn["content"])
        turns.insert(0, {"role": turn["role"], "content": html.unescape(text) if turn["role"] == "assistant" else text})
    while True:
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        if inputs["input_ids"].shape[1] + room <= SETTINGS["window"]:
            return inputs.to(model.device)
        if len(turns) < 3:
            raise gr.Error(f"The message is too long: it and the answer have to fit into {SETTINGS['window']} tokens.")
        turns = turns[2:]


def shown(text):
    """What a model writes, as text: the chat would take HTML in it for HTML, also without Markdown. `prompt` turns it back."""
    return html.escape(text, quote=False)


class Stopped(StoppingCriteria):
    """Ends the answer when its reader has left or pressed stop."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@lend_gpu
def answer(message, history, which=TUNED, max_new_tokens=SETTINGS["max_new_tokens"], temperature=0.0):
    """The answer so far, again and again, until it is whole."""
    if not message.strip():
        raise gr.Error("Type a message first.")
    if len(message) > MAX_CHARS:
        raise gr.Error(f"At most {MAX_CHARS:,} characters, please.")
    room = max(1, min(int(max_new_tokens), SETTINGS["max_new_tokens"]))
    inputs, stop, failed = prompt(message, history, room), threading.Event(), []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how = copy.deepcopy(stops)
    how.update(max_new_tokens=room, max_time=MAX_SECONDS, do_sample=temperature > 0)
    if temperature > 0:
        how.update(temperature=min(float(temperature), 2.0))

    def generate():
        base = model.disable_adapter() if SETTINGS["adapter"] and which == BASE else contextlib.nullcontext()
        try:
            with base, torch.no_grad():
                model.generate(
                    **inputs,
                    generation_config=how,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
                )
        except Exception as error:  # shown below: a thread's own would be lost
            failed.append(error)
        finally:
            streamer.end()

    thread, text = threading.Thread(target=generate, daemon=True), ""
    thread.start()
    try:
        for piece in streamer:
            text += piece
            yield shown(text.lstrip())
    finally:
        stop.set()
        thread.join()
    if failed:
        raise gr.Error(f"No answer: {type(failed[0]).__name__}.")
    yield shown(text.strip()) or "(the model ended its answer at once)"


def page():
    controls = [
        gr.Radio([TUNED, BASE], value=TUNED, label="answers from", visible=SETTINGS["adapter"]),
        gr.Slider(1, SETTINGS["max_new_tokens"], value=SETTINGS["max_new_tokens"], step=1, label="tokens of an answer, at most"),
        gr.Slider(0, 1.5, value=0, step=0.1, label="temperature (0: always the most likely word)"),
    ]
    return gr.ChatInterface(
        answer,
        # without Markdown, which would load pictures from anywhere
        chatbot=gr.Chatbot(render_markdown=False, show_label=False, height="55vh", placeholder="Ask something.", buttons=["copy"]),
        textbox=gr.Textbox(placeholder="Your message", max_length=MAX_CHARS, show_label=False, submit_btn=True, stop_btn=True),
        additional_inputs=controls,
        additional_inputs_accordion=gr.Accordion("Settings", open=True),
        examples=[[text] for text in SETTINGS["examples"]] or None,
        cache_examples=False,
        run_examples_on_click=False,
        title=SETTINGS["title"],
        description=SETTINGS["description"],
        flagging_mode="never",
        concurrency_limit=1,
        api_visibility="private",
    )


if __name__ == "__main__":
    system = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # Gradio's own come from another host
    page().queue(max_size=MAX_WAITING).launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # the hub sets it; elsewhere nobody else gets in
        share=False,
        ssr_mode=False,
        theme=gr.themes.Default(**system),
        footer_links=[],
    )
