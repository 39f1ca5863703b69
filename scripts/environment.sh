# Sourced by quickstart.sh and test.sh, not run: finds or makes a Python environment in which the project works.
#
#     source scripts/environment.sh
#     make_environment requirements.txt [requirements-test.txt ...]     # afterwards `python` and `accelerate` are the environment's
#     choose_device                                                     # sets DEVICE to cpu, single_gpu or single_t4
#
# From outside:  PYTHON=python3.12   uses that environment (Colab, Kaggle, an HPC module) instead of making .venv
#                CI=true             allows apt-get, as root on Debian or Ubuntu (like the option --system)
# shellcheck shell=bash disable=SC2034  # what it sets is used by the scripts that source it

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
SUPPORTED="3.11 3.12 3.13"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
SYSTEM="${SYSTEM:-false}"
COMMAND="bash scripts/$(basename "$0")" # how the person called us, for the messages

# ---- what a person sees -------------------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

fail() { # one line, or a few: what is wrong and what to do
  printf '\n%s\n' "$*" >&2
  exit 1
}

show_line() { # in a style of its own, apart from what the commands print
  if [[ -t 1 ]]; then printf '\n\033[1;36m+ %s\033[0m\n' "$1"; else printf '\n+ %s\n' "$1"; fi
}

run_shown() { # what is shown can be copied into a shell as it stands
  local line
  line="$(printf '%q ' "$@")"
  show_line "${line% }"
  "$@"
}

# ---- which Python -------------------------------------------------------------------------------------------------------------

version_of() { # "3.12", or nothing where the command does not run (a pyenv shim of a version that is not selected)
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

is_supported() { [[ -n "$1" && " $SUPPORTED " == *" $1 "* ]]; }

candidate_pythons() { # python3 first: it is the one that this machine's owner has set up; then the others, also those not on PATH
  local name version
  for name in python3 python3.12 python3.13 python3.11; do
    if command -v "$name" >/dev/null; then command -v "$name"; fi
  done
  for version in 3.12 3.13 3.11; do
    compgen -G "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions/$version.*/bin/python$version" || true
    if command -v uv >/dev/null; then uv python find --no-python-downloads "$version" 2>/dev/null || true; fi
  done
}

# Debian and Ubuntu package ensurepip apart, in python3.X-venv; without it `python -m venv` leaves half an environment.
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

has_virtualenv() { "$1" -m virtualenv --version >/dev/null 2>&1 || command -v virtualenv >/dev/null; }

find_python() { # sets FOUND to a supported Python: one that can make an environment if there is one, else any, else stops
  local python version seen=""
  FOUND=""
  while IFS= read -r python; do
    version="$(version_of "$python")"
    seen+="${version:+ $version}"
    is_supported "$version" || continue
    FOUND="${FOUND:-$python}"
    if has_venv "$python"; then
      FOUND="$python"
      return
    fi
  done < <(candidate_pythons)
  [[ -n "$FOUND" ]] || fail "Python 3.11, 3.12 or 3.13 is needed and was not found (seen:${seen:- none}).
Get one by \`uv python install 3.12\`, by pyenv (\`pyenv install 3.12\`), or on Ubuntu from the deadsnakes archive
(\`add-apt-repository ppa:deadsnakes/ppa && apt-get install python3.12-venv\`), then run this again; PYTHON=/path/to/python names one."
}

# ---- system packages ----------------------------------------------------------------------------------------------------------

may_install_system_packages() {
  [[ "$(id -u)" == 0 && ("$SYSTEM" == true || "${CI:-}" == true) ]] && command -v apt-get >/dev/null
}

install_system_packages() {
  say "Installing system packages: $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null \
    || fail "apt-get could not install $* (its messages are above)."
}

# ---- .venv --------------------------------------------------------------------------------------------------------------------

venv_works() { # complete, with a supported Python and pip, and made in this very folder: the scripts in bin hold the folder's name
  [[ -f "$VENV/bin/activate" ]] || return 1 # the last thing that `python -m venv` writes
  is_supported "$(version_of "$VENV/bin/python")" || return 1
  [[ ! -f "$VENV/made_in" || "$(<"$VENV/made_in")" == "$ROOT" ]] || return 1
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null 2>&1
}

make_venv() {
  if [[ -e "$VENV" ]]; then
    say "Remaking .venv: it was left half made, was moved, or has a Python other than ${SUPPORTED// /, }."
    rm -rf "$VENV"
  fi
  find_python
  local version package
  version="$(version_of "$FOUND")"
  package="python$version-venv"
  if ! has_venv "$FOUND" && may_install_system_packages; then install_system_packages "$package"; fi
  say "Making .venv with Python $version ($FOUND)"
  if has_venv "$FOUND"; then
    "$FOUND" -m venv "$VENV"
  elif "$FOUND" -m virtualenv --version >/dev/null 2>&1; then
    "$FOUND" -m virtualenv --quiet "$VENV"
  elif has_virtualenv "$FOUND"; then
    virtualenv --quiet --python "$FOUND" "$VENV"
  else
    fail "Python $version ($FOUND) cannot make environments: install the package $package
(\`sudo apt-get install $package\`; as root, \`$COMMAND --system\` does it) or virtualenv, then run this again."
  fi
  printf '%s\n' "$ROOT" >"$VENV/made_in"
}

# ---- installing ---------------------------------------------------------------------------------------------------------------

pin_of_torch() { grep -o '^torch==[^ ]*' "$ROOT/requirements.txt"; }

torch_version() { # of the environment, with its build: "2.13.0+cpu", or nothing
  "$ENV_PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; }

show_pip_progress() { # a terminal gets one line that changes; a log gets the big downloads and what pip complains of
  local line
  while IFS= read -r line; do
    case "$line" in
      "WARNING: Location "* | "WARNING: Running pip as the 'root' user"*) ;;
      ERROR:* | WARNING:* | error:*) printf '%s%s\n' "$CLEAR" "$line" ;;
      *Downloading*" MB)"* | Collecting* | Building* | Installing* | Processing*)
        line="${line#"${line%%[![:space:]]*}"}"
        if [[ -t 1 ]]; then
          printf '%s  %.100s' "$CLEAR" "$line"
        elif [[ "$line" == Downloading* ]]; then
          say "  $line"
        fi
        ;;
    esac
  done
  printf '%s' "$CLEAR"
}

run_pip() {
  local log CLEAR="" status=0
  if [[ -t 1 ]]; then CLEAR=$'\r\033[K'; fi
  log="$(mktemp)"
  "$ENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee "$log" | show_pip_progress \
    || status=$?
  # pip says why at the end of its output
  if [[ "$status" != 0 && "${QUIET_FAILURE:-false}" != true ]]; then tail -n 25 "$log" >&2; fi
  rm -f "$log"
  return "$status"
}

# Without a GPU the CUDA build would be several GB for nothing. Only torch itself comes from PyTorch's index (--no-deps): what it
# needs is taken from the package index like everything else, so no package can come from the wrong place. The index may be out of
# reach (a mirror, an air gap): one quick try, and then pip takes what it finds, which may be a CPU build in a local wheel folder.
install_cpu_build_of_torch() {
  [[ -z "$(torch_version)" && "$(uname -s)" == Linux ]] || return 0
  say "No NVIDIA GPU here: trying the CPU build of torch first"
  QUIET_FAILURE=true run_pip --no-deps --timeout 10 --retries 0 --index-url "$TORCH_CPU_INDEX" "$(pin_of_torch)" \
    || say "  not to be had from $TORCH_CPU_INDEX; the package index's build works too, but is larger"
}

stamp_of() { # changes when anything does that an installation depends on
  (cd "$ROOT" && { "$ENV_PYTHON" -VV && cat pyproject.toml "$@" && { cat requirements.lock 2>/dev/null || true; }; } | sha256sum)
}

install_into_venv() {
  local stamp_file="$VENV/installed_${1%.txt}" stamp constraint=()
  stamp="$(stamp_of "$@")"
  if [[ -f "$stamp_file" && "$(<"$stamp_file")" == "$stamp" ]]; then return; fi
  say "Installing $1 into .venv"
  if [[ "$1" == requirements.txt ]] && ! has_nvidia_gpu; then install_cpu_build_of_torch; fi
  if [[ -f "$ROOT/requirements.lock" ]]; then constraint=(--constraint requirements.lock); fi
  run_pip ${constraint[@]+"${constraint[@]}"} -r "$1" || fail "pip could not install $1: its messages are above. Run \`$COMMAND\` again to go on."
  printf '%s\n' "$stamp" >"$stamp_file" # last: an interrupted installation is taken up again
}

# An environment that somebody else looks after: what is missing or of another version is installed, except torch, which was built
# for that machine's driver. Prints what pip has to do; fails where the torch that is there is out of pyproject's range.
list_missing() {
  (cd "$ROOT" && "$ENV_PYTHON" - "$@" <<'PY'
import importlib.metadata as metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlparse

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

def installed_from_here():
    try:
        url = json.loads(metadata.distribution("qlora-suite").read_text("direct_url.json") or "{}").get("url", "")
    except metadata.PackageNotFoundError:
        return False
    return Path(unquote(urlparse(url).path)).resolve() == Path.cwd().resolve()

dependencies = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
torch_range = next(d.removeprefix("torch") for d in dependencies if re.match(r"torch[<>=]", d))
torch = version("torch")
if torch is not None:
    from pip._vendor.packaging.specifiers import SpecifierSet

    if not SpecifierSet(torch_range).contains(torch, prereleases=True):
        sys.exit(f"torch {torch} in {sys.prefix} is outside the range {torch_range}, and an environment named by PYTHON keeps its torch.\n"
                 "Upgrade it there, or leave PYTHON unset to get a .venv.")
for line in (line.partition("#")[0].strip() for name in sys.argv[1:] for line in Path(name).read_text().splitlines()):
    name, _, pin = line.partition("==")
    if line == "-e ." and not installed_from_here():
        print(line)
    elif pin and version(name) != pin and not (name == "torch" and torch is not None):
        print(line)
PY
  )
}

install_into_existing() {
  local missing work status=0
  missing="$(list_missing "$@")" || fail "PYTHON=$PYTHON cannot be used as it is (see above)."
  if [[ -z "$missing" ]]; then return; fi
  if "$ENV_PYTHON" -c 'import sys, sysconfig, pathlib
sys.exit(sys.prefix != sys.base_prefix or not (pathlib.Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists())'; then
    fail "PYTHON=$PYTHON belongs to the operating system, which does not let pip install into it. Leave PYTHON unset to get a .venv,
or keep its packages visible: \`$ENV_PYTHON -m venv --system-site-packages DIR\`, then PYTHON=DIR/bin/python $COMMAND"
  fi
  "$ENV_PYTHON" -m pip --version >/dev/null 2>&1 || fail "PYTHON=$PYTHON has no pip: \`$ENV_PYTHON -m ensurepip\` adds it (\`uv pip install pip\` in uv's environments)."
  if [[ "$missing" == *torch==* ]] && ! has_nvidia_gpu; then install_cpu_build_of_torch; fi
  say "Installing into $ENV_PYTHON: $(tr '\n' ' ' <<<"$missing")"
  work="$(mktemp -d)"
  printf '%s\n' "$missing" >"$work/requirements.txt"
  if [[ -n "$(torch_version)" ]]; then printf 'torch==%s\n' "$(torch_version)"; fi >"$work/constraints.txt"
  (cd "$ROOT" && run_pip -c "$work/constraints.txt" -r "$work/requirements.txt") || status=$?
  rm -rf "$work"
  [[ "$status" == 0 ]] || fail "pip could not install into $ENV_PYTHON: its messages are above."
}

make_environment() { # requirement files, relative to the root
  local requirements
  cd "$ROOT" || fail "$ROOT cannot be entered."
  if [[ -n "${PYTHON:-}" ]]; then
    is_supported "$(version_of "$PYTHON")" \
      || fail "PYTHON=$PYTHON is Python $(v="$(version_of "$PYTHON")"; echo "${v:-(it does not run)}"); 3.11, 3.12 or 3.13 is needed."
    ENV_PYTHON="$("$PYTHON" -c 'import sys; print(sys.executable)')"
    install_into_existing "$@"
  else
    if ! venv_works; then make_venv; fi
    ENV_PYTHON="$VENV/bin/python"
    for requirements in "$@"; do install_into_venv "$requirements"; done
  fi
  enter_environment
}

enter_environment() { # so that the commands shown are short and mean this environment
  ENV_BIN="$(dirname "$ENV_PYTHON")"
  if [[ "$ENV_PYTHON" == "$VENV/bin/python" ]]; then
    HOW_TO_ENTER="source .venv/bin/activate"
  else
    HOW_TO_ENTER="export PATH=$(printf '%q' "$ENV_BIN"):\"\$PATH\""
  fi
  export PATH="$ENV_BIN:$PATH"
  hash -r
  # An existing environment may have no plain `python`, or have put `accelerate` into the user's folder.
  PYTHON_COMMAND=(python)
  if [[ ! -x "$ENV_BIN/python" ]]; then PYTHON_COMMAND=("$ENV_PYTHON"); fi
  LAUNCH_COMMAND=(accelerate launch)
  if [[ ! -x "$ENV_BIN/accelerate" ]]; then LAUNCH_COMMAND=("${PYTHON_COMMAND[@]}" -m accelerate.commands.launch); fi
}

# ---- GPU or CPU ---------------------------------------------------------------------------------------------------------------

describe_torch() { # "version|CUDA of the build|capability or nothing|threads|why the GPU does not work"
  "$ENV_PYTHON" -W ignore - 2>/dev/null <<'PY'
import torch

capability, why = "", ""
if torch.cuda.is_available():
    try:
        torch.zeros(8, device="cuda").add_(1).sum().item()  # a build may lack the kernels of an old GPU, and only says so here
        capability = "%d%d" % torch.cuda.get_device_capability()
    except Exception as error:
        why = str(error).splitlines()[0]
print(torch.__version__, torch.version.cuda or "none", capability, torch.get_num_threads(), why, sep="|")
PY
}

choose_device() {
  local torch cuda capability threads why
  IFS='|' read -r torch cuda capability threads why < <(describe_torch) \
    || fail "torch cannot be imported: run \`$ENV_PYTHON -c 'import torch'\` to see why (\`rm -rf .venv\` starts the environment anew)."
  CPU_THREADS="$threads"
  DEVICE=cpu
  if [[ "${ACCELERATE_USE_CPU:-}" =~ ^([Tt]rue|1|yes)$ ]]; then return; fi
  if [[ -n "$capability" ]]; then
    DEVICE=single_gpu
    if ((capability < 80)); then DEVICE=single_t4; fi # no bf16 units below 8.0
  elif has_nvidia_gpu; then
    fail "$(explain_unusable_gpu "$torch" "$cuda" "$why")"
  elif command -v nvidia-smi >/dev/null; then
    say "nvidia-smi is here but lists no GPU ($(nvidia-smi -L 2>&1 | head -n 1)): running on the CPU."
  fi
}

explain_unusable_gpu() {
  local torch="$1" cuda="$2" why="$3" driver needs=""
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
  case "$cuda" in
    13.*) needs=", which needs driver 580 or newer" ;;
    12.*) needs=", which needs driver 525 or newer" ;;
  esac
  say "THIS MACHINE HAS A GPU THAT TORCH CANNOT USE. Nothing was run: on the CPU it would take many times as long."
  say "  GPU     $(nvidia-smi -L | head -n 1)"
  say "  driver  ${driver:-unknown}"
  if [[ "$cuda" == none ]]; then
    say "  torch   $torch, a build without CUDA"
  else
    say "  torch   $torch, built for CUDA $cuda$needs"
  fi
  if [[ -n "$why" ]]; then say "  error   $why"; fi
  say "Do one of these, then run \`$COMMAND\` again:"
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    say "  - show it the GPU: CUDA_VISIBLE_DEVICES is set to '$CUDA_VISIBLE_DEVICES'   unset CUDA_VISIBLE_DEVICES"
  fi
  say "  - driver 580 or newer:     upgrade it if need be, and take torch's default build"
  say "      $ENV_PYTHON -m pip uninstall -y torch && $ENV_PYTHON -m pip install $(pin_of_torch)"
  say "  - an older driver or GPU:  take the build for CUDA 12.6"
  say "      $ENV_PYTHON -m pip uninstall -y torch && $ENV_PYTHON -m pip install $(pin_of_torch) --index-url https://download.pytorch.org/whl/cu126"
  say "  - the CPU on purpose:      $COMMAND --cpu   (or ACCELERATE_USE_CPU=true in the environment)"
}
