"""scripts/export_gguf.sh against a stand-in for llama.cpp: real processes and files, no conversion."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

CONVERTER = """import pathlib, sys
a = sys.argv[1:]
assert a[1] == "--outfile" and a[3] == "--outtype"
if pathlib.Path(a[0], "broken").exists():
    pathlib.Path(a[2]).write_text("half")
    sys.exit("no such architecture")
pathlib.Path(a[2]).write_text(f"GGUF of {a[0]} as {a[4]}")
"""
QUANTIZE = """#!/usr/bin/env bash
echo "$(cat "$1"), $3" > "$2"
"""


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "mine" / "merged model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "Modelfile").write_text(
        '# a comment\nFROM .\nTEMPLATE """{{ range .Messages }}FROM here{{ end }}"""\nPARAMETER stop "<|end|>"\n'
    )
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A checkout with the two programs, where the script looks for them."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "build" / "bin" / "llama-quantize").write_text(QUANTIZE)
    (folder / "build" / "bin" / "llama-quantize").chmod(0o755)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def export(*args: str | Path, **env: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "export_gguf.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **{k: str(v) for k, v in env.items()}}, timeout=60)


def test_it_converts_quantises_and_writes_a_modelfile_for_the_file_that_is_served(merged: Path, llama_cpp: Path) -> None:
    done = export(merged, "--quantize", "Q4_K_M", "--outtype", "bf16", LLAMA_CPP=llama_cpp)
    assert done.returncode == 0, done.stderr
    output = merged.with_name("merged model-gguf")
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "mine-Q4_K_M.gguf", "mine-bf16.gguf"]
    assert (output / "mine-Q4_K_M.gguf").read_text() == f"GGUF of {merged} as bf16, Q4_K_M\n"
    before, after = (path.read_text().splitlines() for path in (merged / "Modelfile", output / "Modelfile"))
    assert after[1] == "FROM ./mine-Q4_K_M.gguf"
    assert [line for i, line in enumerate(after) if i != 1] == [line for i, line in enumerate(before) if i != 1]
    assert "this script was written for b" in done.stdout, "another checkout than the pinned one is not said"


def test_without_quantising_the_first_file_is_the_one_that_is_served(merged: Path, llama_cpp: Path, tmp_path: Path) -> None:
    done = export(merged, "--name", "other", "--output", tmp_path / "out", LLAMA_CPP=llama_cpp)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "other-auto.gguf"]


def test_a_dry_run_prints_every_command_and_runs_none(merged: Path) -> None:
    done = export(merged, "--quantize", "Q4_K_M", "--dry-run", LLAMA_CPP="/nowhere/llama.cpp")
    assert done.returncode == 0, done.stderr
    for word in ("cmake -S /nowhere/llama.cpp", "convert_hf_to_gguf.py", "/nowhere/llama.cpp/build/bin/llama-quantize", "Q4_K_M"):
        assert word in done.stdout
    assert not merged.with_name("merged model-gguf").exists()


def test_a_conversion_that_fails_leaves_nothing_half(merged: Path, llama_cpp: Path) -> None:
    (merged / "broken").touch()
    done = export(merged, "--quantize", "Q4_K_M", LLAMA_CPP=llama_cpp)
    assert done.returncode != 0
    assert "no such architecture" in done.stderr
    assert list(merged.with_name("merged model-gguf").iterdir()) == []


def test_an_adapter_is_refused_in_one_sentence(merged: Path) -> None:
    (merged / "adapter_config.json").write_text("{}")
    done = export(merged)
    assert done.returncode == 2
    assert done.stderr == f"error: {merged} is an adapter without its base; make a merged folder of it first: python scripts/merge.py RUN\n"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "name a merged folder"),
        (["/nowhere"], "/nowhere is no folder"),
        (["{merged}", "--outtype", "int4"], "--outtype int4 is none of"),
        (["{merged}", "--quantize", "Q4; rm"], "is no type of llama-quantize"),
        (["{merged}", "--name", "../x"], "is no name for a file"),
        (["{merged}", "--quantize"], "--quantize wants a value"),
        (["{merged}", "--fast"], "--fast is no option"),
        (["{merged}", "{merged}"], "one merged folder at a time"),
    ],
)
def test_mistakes_are_named(args: list[str], complaint: str, merged: Path) -> None:
    done = export(*(arg.format(merged=merged) for arg in args))
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_checkout_that_is_none_is_refused(merged: Path, tmp_path: Path) -> None:
    done = export(merged, LLAMA_CPP=tmp_path)
    assert done.returncode == 2
    assert "is no checkout of llama.cpp" in done.stderr
