#!/usr/bin/env bash
# Check, then submit: training, and an evaluation that waits for it.
#
#     bash slurm/submit.sh RECIPE CONFIG [options] [key=value ...]
#     bash slurm/submit.sh recipes/phi2_oasst1.yaml accelerate_configs/ddp.yaml --nodes 2 --gpus-per-node 4 --time 4:00:00
#
#     --nodes N            default 1
#     --gpus-per-node G    default: what slurm/env.sh asks for, else none: then the CPUs are trained on
#     --time T             time limit, as sbatch takes it; the run saves, is requeued and goes on
#     --chain N            N jobs, each waiting for the one before, for sites that forbid requeueing; the rest of a finished run's chain
#                          ends at once, and so does the chain of a run that makes no checkpoint
#     --sweep FILE         an array: a run for each line of FILE, which holds its overrides; see sweep.sbatch
#     --grid key=v1,v2     the same for each value, and for each combination if given several times
#     --at-once M          so many runs of an array at a time
#     --no-evaluate        training alone; a sweep is never evaluated
#     --dry-run            check, and print the commands
#
# Account, partition and the like stand in slurm/env.sh or in SBATCH_* variables. Paths are relative to the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/common.sh
source slurm/common.sh

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' slurm/submit.sh; }

NODES=1 GPUS="" TIME="" CHAIN=1 AT_ONCE="" EVALUATE=true DRY_RUN=false WHAT_VARIES=() WORDS=()
while (($# > 0)); do
  case "$1" in
    --nodes | --gpus-per-node | --time | --chain | --sweep | --grid | --at-once) (($# >= 2)) || fail "$1 wants a value (bash slurm/submit.sh --help)" ;;&
    --nodes | --chain | --at-once) [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 wants a number of at least 1, not $2" ;;&
    --gpus-per-node) [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 wants a number, not $2" ;;&
    --nodes) NODES="$2" && shift ;;
    --gpus-per-node) GPUS="$2" && shift ;;
    --time) TIME="$2" && shift ;;
    --chain) CHAIN="$2" && shift ;;
    --sweep | --grid) WHAT_VARIES+=("$1" "$2") && shift ;;
    --at-once) AT_ONCE="%$2" && shift ;;
    --no-evaluate) EVALUATE=false ;;
    --dry-run) DRY_RUN=true ;;
    -h | --help) usage && exit 0 ;;
    -*) fail "unknown option $1 (bash slurm/submit.sh --help lists them)" ;;
    *) WORDS+=("$1") ;;
  esac
  shift
done
((${#WORDS[@]} >= 2)) || fail "slurm/submit.sh wants RECIPE CONFIG (bash slurm/submit.sh --help)"
RECIPE="${WORDS[0]}" CONFIG="${WORDS[1]}" OVERRIDES=("${WORDS[@]:2}")
((CHAIN == 1 || ${#WHAT_VARIES[@]} == 0)) || fail "--chain is for one run; a sweep's runs are requeued one by one"

# ---- checks: what would only show after hours in the queue -----------------------------------------------------------------------
command -v sbatch >/dev/null || fail "there is no sbatch on this machine: run this on the cluster's login node"
account_is_known() { # does the site know which account pays?
  [[ -z "${SBATCH_ACCOUNT:-}" ]] || return 0
  [[ "$ACCOUNT_REQUIRED" != yes ]] || return 1
  if ! scontrol show config 2>/dev/null | grep -q '^AccountingStorageEnforce.*associations'; then return 0; fi
  [[ -n "$(sacctmgr -nP show user "$(id -un)" format=DefaultAccount 2>/dev/null)" ]]
}
account_is_known || fail "this site wants an account: export SBATCH_ACCOUNT=your_project in slurm/env.sh"
use_environment

PER_NODE="$GPUS"
if [[ -z "$GPUS" && -z "${SBATCH_GPUS_PER_NODE:-}${SBATCH_GRES:-}${SBATCH_GPUS:-}" || "$GPUS" == 0 ]]; then PER_NODE="${PROCESSES_PER_NODE:-1}"; fi
PROCESSES=()
if [[ -n "$PER_NODE" ]]; then PROCESSES=(--processes "$((NODES * PER_NODE))"); fi # else only SLURM knows what env.sh asks for
CHECKED="$("${PYTHON_COMMAND[@]}" slurm/job.py check --nodes "$NODES" ${PROCESSES[@]+"${PROCESSES[@]}"} \
  ${WHAT_VARIES[@]+"${WHAT_VARIES[@]}"} "$RECIPE" "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"})" || exit 1
STATES=() RUNS=()
while read -r state run; do
  STATES+=("$state")
  RUNS+=("$run")
done <<<"$CHECKED"
if [[ " ${STATES[*]} " != *" open "* ]]; then
  fail "${RUNS[0]} is finished already; evaluate it with slurm/evaluate.sbatch, or train anew with another output.dir=..."
fi

# ---- the commands ---------------------------------------------------------------------------------------------------------------
NAME="$(basename "${RECIPE%.*}")"
RESOURCES=() # of one node
if [[ -n "$TIME" ]]; then RESOURCES+=(--time="$TIME"); fi
gpus_and_cpus() { # for so many GPUs on a node
  local words
  read -ra words <<<"$(gpu_request "$1")"
  if [[ -n "$CPUS_PER_GPU" ]]; then words+=(--cpus-per-task="$(($1 * CPUS_PER_GPU))"); fi
  printf '%s\n' "${words[@]}"
}
FOR_TRAINING=() FOR_EVALUATION=()
if ((${GPUS:-0} > 0)); then
  mapfile -t FOR_TRAINING < <(gpus_and_cpus "$GPUS")
  mapfile -t FOR_EVALUATION < <(gpus_and_cpus 1)
fi
TRAIN=(--job-name="$NAME" --nodes="$NODES" ${RESOURCES[@]+"${RESOURCES[@]}"} ${FOR_TRAINING[@]+"${FOR_TRAINING[@]}"})
if ((${#WHAT_VARIES[@]} > 0)); then
  LOGS="$(dirname "${RUNS[0]}")"
  TRAIN+=(--array="0-$((${#RUNS[@]} - 1))$AT_ONCE" --output="$LOGS/slurm-%A_%a.out" slurm/sweep.sbatch "${WHAT_VARIES[@]}")
  EVALUATE=false
else
  LOGS="${RUNS[0]}"
  TRAIN+=(--output="$LOGS/slurm-%j.out")
  if ((CHAIN > 1)); then TRAIN+=(--no-requeue); fi # one of the two goes on with a stopped run, never both
  TRAIN+=(slurm/train.sbatch)
fi
TRAIN+=("$RECIPE" "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
EVALUATION=(--job-name="evaluate-$NAME" ${RESOURCES[@]+"${RESOURCES[@]}"} ${FOR_EVALUATION[@]+"${FOR_EVALUATION[@]}"}
  --output="$LOGS/slurm-%j.out" slurm/evaluate.sbatch "$LOGS")

# ---- would SLURM take them? It also has to give as many nodes as were asked for --------------------------------------------------
test_only() { # nodes wanted, sbatch's arguments
  local answer nodes wanted="$1"
  shift
  answer="$(sbatch --test-only "$@" 2>&1)" || fail "SLURM would not take this job: $(tail -n 1 <<<"${answer//sbatch: /}") (asked by: sbatch --test-only $(printf '%q ' "$@"))"
  nodes="$(sed -nE 's/.* processors on (nodes )?([^ ]+).*/\2/p' <<<"$answer")"
  nodes="$(scontrol show hostnames "$nodes" 2>/dev/null | grep -c .)" || true
  [[ "$nodes" == "$wanted" ]] || fail "SLURM would give $nodes nodes instead of $wanted: $(tail -n 1 <<<"$answer")"
  printf '%s\n' "${answer#sbatch: }" | tail -n 1
}
test_only "$NODES" "${TRAIN[@]}"
if [[ "$EVALUATE" == true ]]; then test_only 1 "${EVALUATION[@]}"; fi

if [[ -z "$GPUS" && -z "${SBATCH_GPUS_PER_NODE:-}${SBATCH_GRES:-}${SBATCH_GPUS:-}" ]]; then
  echo "no GPUs are asked for (--gpus-per-node G, or slurm/env.sh): the nodes' CPUs will train"
fi

# ---- submit ---------------------------------------------------------------------------------------------------------------------
if [[ "$DRY_RUN" == false ]]; then
  mkdir -p "$LOGS" # SLURM makes no folder for a log, and without one the job fails in silence
  for run in "${RUNS[@]}"; do rm -f "$run/slurm_starts.json"; done # a person's wish is a new chance
fi
submit() { # sets JOB
  printf '+ sbatch %s\n' "$(printf '%q ' "$@")"
  if [[ "$DRY_RUN" == true ]]; then
    JOB="JOB$((${JOB#JOB} + 1))"
    return
  fi
  JOB="$(sbatch --parsable "$@")" || fail "sbatch did not take the job (its message is above)"
  JOB="${JOB%%;*}" # on a federation the cluster's name follows
  JOBS+=("$JOB")
  echo "submitted $JOB"
}
JOB=0 JOBS=()
submit "${TRAIN[@]}"
for ((link = 2; link <= CHAIN; link++)); do submit --dependency="afterany:$JOB" "${TRAIN[@]}"; done
if [[ "$EVALUATE" == true ]]; then submit --dependency="afterok:$JOB" --kill-on-invalid-dep=yes "${EVALUATION[@]}"; fi
if [[ "$DRY_RUN" == true ]]; then
  echo "checked; nothing was submitted"
else
  echo "logs and results: $LOGS   the queue: squeue --me   to give up: scancel ${JOBS[*]}"
fi
