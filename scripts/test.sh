#!/usr/bin/env bash
# The whole check, as the CI runs it: ruff, the shell scripts, the tests.
#
#     bash scripts/test.sh [--system] [pytest's arguments]           e.g. bash scripts/test.sh tests/test_packing.py -x
#
#     --system    as root on Debian or Ubuntu: installs what some tests need from the system (g++ and the Python headers, for
#                 DeepSpeed's ops; Chromium, for the pages), as with CI=true; without it those tests skip and say so
#
# All parts run even if one fails. The exit code is pytest's, or 1 if only another part failed.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

pytest_arguments=()
for argument in "$@"; do
  case "$argument" in
    --system) SYSTEM=true ;;
    -h | --help) usage && exit 0 ;;
    *) pytest_arguments+=("$argument") ;;
  esac
done

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt requirements-test.txt

install_what_deepspeed_builds_with() {
  local missing=()
  if ! command -v g++ >/dev/null; then missing+=(g++); fi
  # Only a Python from the system's packages lacks its headers; pyenv, uv and conda bring theirs.
  if ! python -c 'import sysconfig, pathlib; exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())'; then
    missing+=("python$(version_of python)-dev")
  fi
  if ((${#missing[@]} == 0)); then return; fi
  if may_install_system_packages; then
    install_system_packages "${missing[@]}"
  else
    say "Not here: ${missing[*]}. The tests that build DeepSpeed's ops will skip; \`sudo apt-get install ${missing[*]}\` enables them."
  fi
}

install_chromium() { # with which tests/browser.py uses the pages as a person does
  if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then return; fi
  if may_install_system_packages; then
    install_system_packages chromium fonts-dejavu-core
  else
    say "Not here: chromium. The tests of the pages will skip; \`sudo apt-get install chromium\` enables them."
  fi
}

check_shell_scripts() {
  local script status=0
  for script in .ci/run scripts/*.sh slurm/*.sh slurm/*.sbatch; do
    if [[ -f "$script" ]]; then bash -n "$script" || status=1; fi
  done
  if command -v shellcheck >/dev/null; then shellcheck -x .ci/run scripts/*.sh slurm/*.sh slurm/*.sbatch || status=1; fi
  return "$status"
}

install_what_deepspeed_builds_with
install_chromium
# A real SLURM for tests/test_slurm.py: Debian's packages, 3.5 MB, unpacked into build/ once; nothing is installed. As root each of its
# nodes has a network of its own.
"${PYTHON_COMMAND[@]}" tests/slurm_cluster.py unpack || true # it has said why those tests will skip
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false # the tests are hermetic: nothing is fetched

other=0
run_shown "${PYTHON_COMMAND[@]}" -m ruff check . || other=1
run_shown "${PYTHON_COMMAND[@]}" -m ruff format --check . || other=1
check_shell_scripts || other=1
tests=0
# Two files at a time, each in one process: half the time on two cores, and memory for two. One thread each: those of two processes that
# want both cores wait for each other in loops (three files took 168 s with two threads each, 109 s with one).
run_shown export "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
run_shown "${PYTHON_COMMAND[@]}" -m pytest -n 2 --dist loadfile ${pytest_arguments[@]+"${pytest_arguments[@]}"} || tests=$?

if [[ "$other" != 0 ]]; then say "ruff or the shell check failed: see above."; fi
if [[ "$tests" != 0 ]]; then exit "$tests"; fi
exit "$other"
