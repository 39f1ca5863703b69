"""What an attacker could put beside or in the place of a file: pickles and modules that make a marker file when they are opened.

Functions below are preludes of tests/processes.py too, so they are in a module that a new process can import.
"""

import pickle
import resource
import sys
from pathlib import Path

import torch

PICKLES = (
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin"),
    *("optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
)
"""Names under which transformers, PEFT and accelerate keep pickles."""


class Payload:
    """Makes the file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return _make, (self.marker,)


def _make(marker: str) -> None:
    Path(marker).touch()


def plant_pickles(folder: Path, marker: Path, *names: str) -> None:
    """Half of them as torch writes them, half as plain pickles."""
    for i, name in enumerate(names or PICKLES):
        if i % 2:
            (folder / name).write_bytes(pickle.dumps(Payload(marker)))
        else:
            torch.save({"weight": Payload(marker)}, folder / name)


def plant_modules(folder: Path, marker: Path, *names: str) -> None:
    """Python files that make the marker when they are imported, with the classes that an auto_map would name."""
    classes = "\n".join(f"class {name}:\n    pass" for name in ("EvilConfig", "EvilModel", "EvilTokenizer"))
    for name in names:
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n{classes}\n")


def without_memory_to_spare(gib: float) -> None:
    """A prelude: the process may take so much memory more than it has, and no more."""
    now = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(gib * 2**30),) * 2)


def hub_that_tells(kind: str, token: str) -> None:
    """A prelude: reading a base fails, with an error that holds the token, as one that repeats a request's headers does."""
    from transformers import AutoTokenizer

    def fail(*_: object, **__: object) -> None:
        raise {"OSError": OSError, "RuntimeError": RuntimeError, "KeyError": KeyError}[kind](f"401 for authorization: Bearer {token}")

    AutoTokenizer.from_pretrained = fail


def library_that_tells(token: str) -> None:
    """A prelude: what every script calls first fails, in a way that nobody expects."""
    import qlora_suite.recipe_file

    def fail(*_: object) -> None:
        raise RuntimeError(f"no way to send {token}")

    qlora_suite.recipe_file.read_yaml = fail


def without_bitsandbytes() -> None:
    """A prelude: the package is not there, or its library does not load."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        del sys.modules[name]

    class Hidden:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] == "bitsandbytes":
                raise ImportError("libbitsandbytes: no kernel image")

    sys.meta_path.insert(0, Hidden())


def on_a_t4() -> None:
    """A prelude: a GPU of compute capability 7.5, of which torch says that it knows bf16."""
    from qlora_suite import engine

    def take_the_card(state: object) -> None:
        state.device = torch.device("cuda", 0)

    torch.cuda.get_device_capability = lambda *_: (7, 5)
    torch.cuda.get_device_name = lambda *_: "Tesla T4"
    torch.cuda.is_bf16_supported = lambda *_: True
    engine._check_device = take_the_card
