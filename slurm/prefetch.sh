#!/usr/bin/env bash
# On the login node, which has a network: fetch all that jobs need, for compute nodes have none.
#
#     bash slurm/prefetch.sh RECIPE [options] [key=value ...]
#
# The base and the data go into HF_HOME (slurm/env.sh), the packed rows into the recipe's data.prepared. Run again it fetches nothing
# twice. Options:
#
#     --wheelhouse DIR     also the wheels of requirements.txt, for a machine without an index:
#                          pip install --no-index --find-links DIR -r requirements.txt
#     --deepspeed-ops      also compile what DeepSpeed would compile when a job starts, into TORCH_EXTENSIONS_DIR; wants g++, and a login
#                          node like the compute nodes
#     --pack FILE          also pack the Python environment into one tar file; PACKED_ENVIRONMENT in slurm/env.sh names it to the jobs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/common.sh
source slurm/common.sh

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' slurm/prefetch.sh; }

WHEELHOUSE="" OPS=false PACK="" WORDS=()
while (($# > 0)); do
  case "$1" in
    --wheelhouse | --pack) (($# >= 2)) || fail "$1 wants a value (bash slurm/prefetch.sh --help)" ;;&
    --wheelhouse) WHEELHOUSE="$2" && shift ;;
    --pack) PACK="$2" && shift ;;
    --deepspeed-ops) OPS=true ;;
    -h | --help) usage && exit 0 ;;
    -*) fail "unknown option $1 (bash slurm/prefetch.sh --help lists them)" ;;
    *) WORDS+=("$1") ;;
  esac
  shift
done
((${#WORDS[@]} >= 1)) || fail "slurm/prefetch.sh wants RECIPE (bash slurm/prefetch.sh --help)"
PACKED_ENVIRONMENT="" # packed from the folder, so run from there
use_environment
unset HF_HUB_OFFLINE HF_DATASETS_OFFLINE # here, and here alone
mkdir -p "$HF_HOME" "$TORCH_EXTENSIONS_DIR" || fail "the caches cannot be made; set SHARED_CACHE in slurm/env.sh to a folder on the shared disk"

"${PYTHON_COMMAND[@]}" slurm/job.py fetch "${WORDS[@]}"
"${PYTHON_COMMAND[@]}" scripts/prepare_data.py "${WORDS[@]}"

if [[ -n "$WHEELHOUSE" ]]; then
  constraint=()
  if [[ -f requirements.lock ]]; then constraint=(--constraint requirements.lock); fi
  # Not -e .: this package is installed from its own folder. setuptools is what that is built with.
  grep -v '^-e' requirements.txt | "${PYTHON_COMMAND[@]}" -m pip download --dest "$WHEELHOUSE" ${constraint[@]+"${constraint[@]}"} -r /dev/stdin 'setuptools>=77'
fi

if [[ "$OPS" == true ]]; then
  "${PYTHON_COMMAND[@]}" - <<'PY'
from deepspeed.accelerator import get_accelerator

# All that DeepSpeed compiles for our engines: the optimisers are torch's and bitsandbytes', and on GPUs NCCL exchanges the gradients.
device = get_accelerator()
if device.device_name() == "cpu":
    device.create_op_builder("ShareMemCommBuilder").load()
    print("compiled DeepSpeed's exchange of gradients between CPU processes")
else:
    print(f"DeepSpeed has nothing to compile for {device.device_name()}")
PY
fi

if [[ -n "$PACK" ]]; then
  [[ -n "$PYTHON_ENVIRONMENT" ]] || fail "--pack packs the folder PYTHON_ENVIRONMENT, which slurm/env.sh leaves empty"
  mkdir -p "$(dirname "$PACK")"
  tar -cf "$PACK.part" -C "$PYTHON_ENVIRONMENT" . && mv "$PACK.part" "$PACK"
  echo "packed $PYTHON_ENVIRONMENT into $PACK; set PACKED_ENVIRONMENT=$(realpath "$PACK") in slurm/env.sh"
fi
echo "fetched; now: bash slurm/submit.sh ${WORDS[0]} CONFIG ..."
