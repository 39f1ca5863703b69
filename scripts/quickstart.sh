#!/usr/bin/env bash
# The main job, end to end, on the data and the small model in assets/: prepare, evaluate the base, train QLoRA, evaluate the adapter.
#
#     bash scripts/quickstart.sh [--fresh] [--cpu] [--system]
#     bash scripts/quickstart.sh dpo      and then: which of two answers people preferred, from where the first run ended
#     bash scripts/quickstart.sh grpo     and then: short answers that end, by the model's own samples
#
#     --fresh     removes what an earlier quickstart of this kind made (runs/quickstart, prepared/quickstart) and starts anew
#     --cpu       runs on the CPU although there is a GPU
#     --system    as root on Debian or Ubuntu: installs system packages that are missing (as with CI=true)
#
# Makes .venv on the first call; PYTHON=/path/to/python uses an existing environment instead. Every command is shown before it
# runs and can be copied. Run again, it reuses what is there and shows the finished result.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

fresh=false name=quickstart script=train before=
for option in "$@"; do
  case "$option" in
    dpo | grpo)
      [[ -z "$before" ]] || { printf 'dpo and grpo are two runs, one after the other: give one at a time.\n' >&2 && exit 2; }
      if [[ "$option" == dpo ]]; then name=quickstart_dpo before=quickstart; fi
      if [[ "$option" == grpo ]]; then name=quickstart_grpo script=train_grpo before=quickstart_dpo; fi
      ;;
    --fresh) fresh=true ;;
    --cpu) export ACCELERATE_USE_CPU=true ;;
    --system) SYSTEM=true ;;
    -h | --help) usage && exit 0 ;;
    *) printf 'Unknown option: %s. Known: dpo, grpo, --fresh, --cpu, --system, --help.\n' "$option" >&2 && exit 2 ;;
  esac
done

root="$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n "$before" && ! -d "$root/runs/$before/final" ]]; then
  stage="${before#quickstart}"
  printf 'It goes on from runs/%s, which is not there yet (or not finished): run bash scripts/quickstart.sh%s first.\n' \
    "$before" "${stage:+ ${stage#_}}" >&2
  exit 2
fi

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt
choose_device

say
say "Everything below can be typed by hand, in $ROOT:"
show_line "$HOW_TO_ENTER"
# The default is embedded in assets/: nothing is fetched, and no library waits for a network that is not there.
run_shown export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ "$DEVICE" == cpu ]]; then
  # One thread a core, as torch counts them; accelerate would otherwise choose by itself and warn about it.
  run_shown export "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPU_THREADS}"
  # Evaluation runs without the launcher, so hiding the GPU is what keeps it on the CPU too.
  if [[ -n "${ACCELERATE_USE_CPU:-}" ]]; then run_shown export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=; fi
fi
if [[ "$fresh" == true ]]; then run_shown rm -rf "runs/$name" "prepared/$name"; fi

run_shown "${PYTHON_COMMAND[@]}" scripts/prepare_data.py "recipes/$name.yaml"
if [[ -z "$before" ]]; then run_shown "${PYTHON_COMMAND[@]}" scripts/evaluate.py "recipes/$name.yaml"; fi
run_shown "${LAUNCH_COMMAND[@]}" --config_file "accelerate_configs/$DEVICE.yaml" "scripts/$script.py" "recipes/$name.yaml"
run_shown "${PYTHON_COMMAND[@]}" scripts/evaluate.py "runs/$name"

say
say "Written:"
for path in "prepared/$name" "runs/$name"{,/report.html,/report.md,/report.json,/previews.md,/samples.md,/metrics.jsonl}; do
  if [[ -e "$path" ]]; then say "  $path"; fi
done
say "Total time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
say
say "Now open runs/$name/report.html in a browser, and talk to what was trained:"
show_line "python scripts/chat.py runs/$name"
case "$name" in
  quickstart) say "Then teach it which answers people preferred:" && show_line "bash scripts/quickstart.sh dpo" ;;
  quickstart_dpo) say "Then teach it to keep its answers short, by its own samples:" && show_line "bash scripts/quickstart.sh grpo" ;;
esac
