"""The shell scripts that make the environment, run against stand-in programs: no network, no installation, no GPU."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SHELL_FILES = [ROOT / ".ci/run", *sorted(ROOT.glob("scripts/*.sh")), *sorted(ROOT.glob("slurm/*.sh")), *sorted(ROOT.glob("slurm/*.sbatch"))]
# What the scripts take from the system. Anything else (python3, nvidia-smi, uv, apt-get) exists only where a test puts it.
SYSTEM_TOOLS = [
    "basename",
    "bash",
    "cat",
    "dirname",
    "env",
    "grep",
    "head",
    "id",
    "mktemp",
    "rm",
    "sed",
    "sha256sum",
    "tail",
    "tee",
    "tr",
    "uname",
]

FAKE_PYTHON = """#!{bash}
# Stands for a Python {version}: answers what environment.sh asks of it.
case "$*" in
  *version_info*) echo {version} ;;
  *"import ensurepip, venv"*) exit {venv_status} ;;
  *"-m virtualenv"*) exit 1 ;;
  "-m venv "*) echo "venv made by {version}"; exit 7 ;;
esac
"""


def requirements(name):
    """The (line, comment) pairs of a requirements file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return [(pin.strip(), comment.strip()) for pin, _, comment in (line.partition("#") for line in lines)]


@pytest.fixture
def machine(tmp_path):
    """A copy of the scripts in a folder with a space in its name, and a PATH with nothing on it but the basic tools."""

    class Machine:
        root = tmp_path / "my checkout"
        bin = tmp_path / "bin"

        def add(self, name, text):
            path = self.bin / name
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            return path

        def add_python(self, name, version, has_venv=True):
            return self.add(name, FAKE_PYTHON.format(bash=shutil.which("bash"), version=version, venv_status=0 if has_venv else 1))

        def run(self, *command, **env):
            env = {"PATH": str(self.bin), "HOME": str(tmp_path), **env}
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
            return done.returncode, done.stdout + done.stderr

        def quickstart(self, *options, **env):
            return self.run("bash", str(self.root / "scripts/quickstart.sh"), *options, **env)

        def source(self, code, **env):
            return self.run("bash", "-c", f'set -euo pipefail; source "{self.root}/scripts/environment.sh"; {code}', **env)

    machine = Machine()
    machine.bin.mkdir()
    for tool in SYSTEM_TOOLS:
        (machine.bin / tool).symlink_to(shutil.which(tool))
    shutil.copytree(ROOT / "scripts", machine.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, machine.root)
    return machine


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "extra"), [("requirements.txt", None), ("requirements-test.txt", "test")])
def test_pins_are_exact_commented_and_inside_the_ranges_of_pyproject(name, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    ranges = {r.name.lower(): r.specifier for r in map(Requirement, declared)}
    pins = {}
    for line, comment in requirements(name):
        assert comment, f"{name}: {line} does not say what it is for"
        if line != "-e .":
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{name}: {line} is not an exact pin"
            package, _, pins_version = line.partition("==")
            pins[package.lower()] = pins_version
    assert pins.keys() == ranges.keys()
    for package, version in pins.items():
        assert ranges[package].contains(version), f"{package}=={version} is outside {ranges[package]}"


def test_everything_that_is_imported_is_pinned():
    pinned = {
        canonicalize_name(line.partition("==")[0])
        for name in ("requirements.txt", "requirements-test.txt")
        for line, _ in requirements(name)
    }
    distributions = metadata.packages_distributions()
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} & distributions.keys() - {"qlora_suite"}:
                assert pinned & {canonicalize_name(d) for d in distributions[name]}, (
                    f"{path.name} imports {name}, which no requirements file pins"
                )


def test_the_lock_agrees_with_the_pins():
    pins = (line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    locked = {canonicalize_name(package): version for package, version in pins}
    for name in ("requirements.txt", "requirements-test.txt"):
        for line, _ in requirements(name):
            if line != "-e .":
                package, version = line.split("==")
                assert locked.get(canonicalize_name(package)) == version, f"{line}: requirements.lock is stale, run `bash scripts/lock.sh`"
    assert not any("+" in version for version in locked.values()), "a local version binds the lock to one build"


def test_an_old_python_alone_is_refused_with_the_way_to_a_newer_one(machine):
    machine.add_python("python3", "3.10")
    code, output = machine.quickstart()
    assert code != 0
    assert "Python 3.11, 3.12 or 3.13 is needed" in output
    assert "seen: 3.10" in output
    assert "uv python install 3.12" in output
    assert not (machine.root / ".venv").exists()


def test_a_newer_python_is_found_beside_an_old_one(machine):
    machine.add_python("python3", "3.10")
    machine.add_python("python3.13", "3.13")
    code, output = machine.quickstart()
    assert code == 7  # what the stand-in's `-m venv` answers
    assert "venv made by 3.13" in output


def test_a_newer_python_is_found_in_the_folder_of_pyenv(machine, tmp_path):
    machine.add_python("python3", "3.10")
    inside = tmp_path / ".pyenv/versions/3.12.1/bin"
    inside.mkdir(parents=True)
    shutil.move(machine.add_python("python3.12", "3.12"), inside / "python3.12")
    assert "venv made by 3.12" in machine.quickstart()[1]


def test_a_python_that_can_make_environments_goes_before_one_that_cannot(machine):
    machine.add_python("python3", "3.12", has_venv=False)
    machine.add_python("python3.11", "3.11")
    assert "venv made by 3.11" in machine.quickstart()[1]


def test_without_venv_the_package_to_install_is_named(machine):
    machine.add_python("python3", "3.12", has_venv=False)
    code, output = machine.quickstart()
    assert code != 0
    assert "apt-get install python3.12-venv" in output
    assert "virtualenv" in output


def test_without_venv_virtualenv_is_used(machine):
    machine.add_python("python3", "3.12", has_venv=False)
    machine.add("virtualenv", f'#!{shutil.which("bash")}\necho "virtualenv called with $*"; exit 7\n')
    code, output = machine.quickstart()
    assert code == 7
    assert f"--python {machine.bin}/python3" in output


def test_a_half_made_environment_is_made_again(machine):
    machine.add_python("python3", "3.12")
    half = machine.root / ".venv/bin"
    half.mkdir(parents=True)
    shutil.copy(machine.bin / "python3", half / "python")  # runs, but there is no pip and no activate yet
    code, output = machine.quickstart()
    assert code == 7
    assert "Remaking .venv" in output
    assert not half.exists()


def test_an_environment_of_the_wrong_version_is_refused(machine):
    python = machine.add_python("conda-python", "3.10")
    code, output = machine.quickstart(PYTHON=str(python))
    assert code != 0
    assert "is Python 3.10; 3.11, 3.12 or 3.13 is needed" in output


@pytest.mark.parametrize(("torch", "kept"), [("2.10.0+cu126", True), ("2.11.0a0+site", True), ("2.9.1", False), ("3.0.0", False)])
def test_an_existing_environment_keeps_its_torch_if_it_is_in_range_and_is_refused_otherwise(machine, tmp_path, torch, kept):
    packages = tmp_path / "packages"
    info = packages / "torch-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    code, output = machine.source("list_missing requirements.txt", ENV_PYTHON=sys.executable, PYTHONPATH=str(packages))
    if kept:
        assert code == 0, output
        assert "torch==" not in output
        assert "-e ." in output  # the package comes from this folder, not from wherever else it is installed
    else:
        assert code != 0
        assert f"torch {torch}" in output
        assert "outside the range" in output


def gpu_machine(machine, describes):
    bash = shutil.which("bash")
    query = 'case "$*" in -L) echo "GPU 0: Tesla T4 (UUID: GPU-0)" ;; *) echo 550.54.15 ;; esac'
    machine.add("nvidia-smi", f"#!{bash}\n{query}\n")
    return str(machine.add("torch-python", f'#!{bash}\necho "{describes}"\n'))


def test_a_gpu_that_torch_cannot_use_stops_the_run_and_says_what_to_do(machine):
    python = gpu_machine(machine, "2.13.0+cu130|13.0||2|")
    code, output = machine.source('choose_device; echo "went on with $DEVICE"', ENV_PYTHON=python)
    assert code != 0
    assert "went on" not in output
    for part in ("550.54.15", "CUDA 13.0", "driver 580", "https://download.pytorch.org/whl/cu126", "--cpu", "ACCELERATE_USE_CPU"):
        assert part in output, part


def test_a_gpu_that_the_build_has_no_kernels_for_stops_the_run_with_torchs_words(machine):
    python = gpu_machine(machine, "2.13.0+cu130|13.0||2|no kernel image is available")
    code, output = machine.source("choose_device", ENV_PYTHON=python)
    assert code != 0
    assert "no kernel image is available" in output


def test_the_cpu_is_used_beside_an_unusable_gpu_only_when_asked_for(machine):
    python = gpu_machine(machine, "2.13.0+cu130|13.0||2|")
    code, output = machine.source("choose_device; echo $DEVICE", ENV_PYTHON=python, ACCELERATE_USE_CPU="true")
    assert (code, output) == (0, "cpu\n")


@pytest.mark.parametrize(("capability", "device"), [("75", "single_t4"), ("80", "single_gpu"), ("90", "single_gpu"), ("120", "single_gpu")])
def test_the_config_follows_the_compute_capability(machine, capability, device):
    python = gpu_machine(machine, f"2.13.0+cu130|13.0|{capability}|2|")
    assert machine.source("choose_device; echo $DEVICE", ENV_PYTHON=python) == (0, f"{device}\n")
    assert (ROOT / f"accelerate_configs/{device}.yaml").exists()


def test_an_unknown_option_is_refused_before_anything_is_done(machine):
    code, output = machine.quickstart("--frehs")
    assert code == 2
    assert "--frehs" in output
    assert "--fresh" in output
    assert not (machine.root / ".venv").exists()


def test_shown_commands_can_be_copied(machine):
    code, output = machine.source("run_shown export 'PATH=/my folder/bin'")
    assert code == 0
    assert "+ export PATH=/my\\ folder/bin\n" in output


def test_ci_runs_exactly_what_a_person_runs():
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if not line.startswith("#")]
    assert lines[-1] == "exec bash scripts/test.sh"
    assert os.access(ROOT / ".ci/run", os.X_OK)
