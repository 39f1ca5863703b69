# Sourced by the scripts beside it, from the repository's root: the site's settings, and the Python that they name.
# shellcheck shell=bash

fail() { # one line: what was seen, what was wanted, what to do
  printf 'error: %s\n' "$*" >&2
  exit 1
}

unpack_environment() { # once a node, into $1: jobs that start together wait for the first
  [[ -r "$PACKED_ENVIRONMENT" ]] || fail "PACKED_ENVIRONMENT=$PACKED_ENVIRONMENT is not there: make it with \`bash slurm/prefetch.sh RECIPE --pack\`, or unset it in slurm/env.sh"
  FOLDER="$1/qlora-suite-$(id -u)-$(stat -c '%Y-%s' "$PACKED_ENVIRONMENT")" # another file, another folder
  (
    flock 9
    if [[ ! -e "$FOLDER/unpacked" ]]; then
      mkdir -p "$FOLDER" && tar -xf "$PACKED_ENVIRONMENT" -C "$FOLDER" && touch "$FOLDER/unpacked"
    fi
  ) 9>"$FOLDER.lock" || fail "$PACKED_ENVIRONMENT could not be unpacked into $FOLDER (its messages are above): is the disk full?"
}

use_environment() { # afterwards "${PYTHON_COMMAND[@]}" is the Python to run
  local disk="${SLURM_TMPDIR:-${TMPDIR:-}}" FOLDER="$PYTHON_ENVIRONMENT"
  if [[ -n "$PACKED_ENVIRONMENT" && -d "$disk" ]]; then unpack_environment "$disk"; fi
  if [[ -n "$FOLDER" ]]; then
    [[ -x "$FOLDER/bin/python" ]] || fail "there is no Python in $FOLDER: make it with \`bash scripts/quickstart.sh\`, or set PYTHON_ENVIRONMENT in slurm/env.sh"
    PATH="$(cd "$FOLDER" && pwd)/bin:$PATH"
    export PATH
  fi
  if [[ -z "${PYTHON_COMMAND[*]:-}" ]]; then PYTHON_COMMAND=(python); fi
}

[[ -f slurm/env.sh && -f scripts/train.py ]] || fail "$PWD is not qlora-suite's folder: submit from the repository's root"
# shellcheck source=slurm/env.sh
source slurm/env.sh
