"""Does a chat template of somebody's end, and write no more than it was given? Tried in a process of its own, within limits.

    complaint = trial(source)      # None, or why the template must not be used

Jinja's sandbox keeps a template from files and from Python's insides, but not from loops that never end or texts that fill the memory.
The process is this file run as a program: it imports Jinja alone, and Linux ends it when its time or its memory is used up.
"""

import contextlib
import json
import subprocess
import sys
from functools import cache

SECONDS, MEMORY, MOST_CHARACTERS = 2, 2**30, 100_000
CONVERSATION = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}] * 16


@cache
def trial(source: str) -> str | None:
    """Why the template must not be used, or None. What it raises is no complaint: templates refuse conversations that way."""
    command = [sys.executable, "-I", __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = subprocess.Popen(command, **pipes)  # noqa: S603
    try:
        # Jinja may be where only this process looks for it: on a cluster's PYTHONPATH, in a user's own packages.
        said, error = program.communicate(json.dumps([sys.path, source]).encode(), timeout=60)
    except subprocess.TimeoutExpired:
        program.kill()
        program.communicate()
        said, error = b"", b""
    if said:
        return json.loads(said)
    if program.returncode > 0:  # it did not end because of a limit, which is a signal
        last = (error.decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
        raise RuntimeError(f"the process that tries chat templates failed: {last}")
    return f"takes more than {SECONDS} s or {MEMORY >> 30} GiB for a conversation of {len(CONVERSATION)} one-letter turns"


def _render(source: str) -> str | None:
    """In the process of its own: as transformers renders it, which has the same tags, filters and names."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(number)

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = json.dumps
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: form)
    environment.globals.update(dict.fromkeys(("bos_token", "eos_token"), "<s>"))
    for messages, prompt in ((CONVERSATION, False), (CONVERSATION[:1], True), (CONVERSATION[:-1], True)):
        written = 0
        try:
            for piece in environment.from_string(source).generate(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None
            ):
                written += len(piece)
                if written > MOST_CHARACTERS:
                    return f"writes more than {MOST_CHARACTERS:,} characters for a conversation of {len(messages)} one-letter turns"
        except MemoryError:
            return f"takes more than {MEMORY >> 30} GiB for a conversation of {len(messages)} one-letter turns"
        except Exception:  # noqa: S112 - it refuses the conversation; whoever uses it will say so
            continue
    return None


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    with contextlib.suppress(OSError, ValueError):  # macOS limits no memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.path, text = json.load(sys.stdin)
    json.dump(_render(text), sys.stdout)
