#!/usr/bin/env bash
# Writes requirements.lock: the exact version of every package that requirements.txt and requirements-test.txt bring in.
#
#     bash scripts/lock.sh            after a pin has changed; then run scripts/test.sh and commit both files
#
# pip resolves into nothing (--dry-run) and reports. The lock is used as a constraint file, so it may name fewer packages than a
# machine needs (a CUDA build of torch brings its own libraries, pinned by torch itself) and local versions (2.13.0+cpu) are cut
# off: the same file serves Python 3.11 to 3.13, with and without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
report="$(mktemp)"
trap 'rm -f "$report"' EXIT

"$PYTHON" -m pip install --dry-run --ignore-installed --quiet --report "$report" -r requirements.txt -r requirements-test.txt

"$PYTHON" - "$report" > requirements.lock <<'PY'
import json
import sys

packages = (item["metadata"] for item in json.load(open(sys.argv[1], encoding="utf-8"))["install"])
pins = {f"{p['name']}=={p['version'].partition('+')[0]}" for p in packages if p["name"] != "qlora-suite"}
print("# Made by scripts/lock.sh; do not edit. A constraint file: pip install -c requirements.lock -r requirements.txt")
print(*(pin for pin in sorted(pins, key=str.lower) if not pin.startswith(("nvidia-", "cuda-", "triton=="))), sep="\n")
PY
echo "requirements.lock: $(grep -c == requirements.lock) packages"
