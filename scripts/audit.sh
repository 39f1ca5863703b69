#!/usr/bin/env bash
# Asks the public databases whether any locked version has a known vulnerability. Needs a network; installs nothing into .venv.
#
#     bash scripts/audit.sh [pip-audit's options]        e.g. bash scripts/audit.sh --format json
#
# The versions that must never come back stand in tests/faults/known_bad_versions.py, which the tests compare without a network.
# Exit code: 0 nothing known, 1 something is (pip-audit says what and which version mends it), 2 it could not be asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if command -v pip-audit >/dev/null; then
  audit=(pip-audit)
elif command -v uvx >/dev/null; then
  audit=(uvx pip-audit)
elif command -v pipx >/dev/null; then
  audit=(pipx run pip-audit)
else
  echo "error: pip-audit is not here, nor uvx or pipx to run it with; pip install pip-audit into an environment of its own" >&2
  exit 2
fi
# --no-deps: every package is in the lock, so nothing has to be resolved or built.
exec "${audit[@]}" --requirement requirements.lock --no-deps --disable-pip "$@"
