#!/usr/bin/env bash
# A merged folder -> a GGUF file for llama.cpp and Ollama, quantised, with a Modelfile beside it.
#
#   scripts/export_gguf.sh runs/quickstart/merged --name quickstart --quantize Q4_K_M
#   LLAMA_CPP=~/llama.cpp scripts/export_gguf.sh runs/quickstart/merged --quantize Q8_0
#   scripts/export_gguf.sh runs/quickstart/merged --dry-run
#
# Without LLAMA_CPP it clones a pinned llama.cpp to build/llama.cpp and checks the commit. It builds llama-quantize with cmake where it is
# not built, and runs llama.cpp's converter with PYTHON (python3), which needs the packages of its own
# requirements/requirements-convert_hf_to_gguf.txt: a virtual environment of its own is best, for they pin other versions than this suite.
#
#   --name NAME        of the files (the name of the folder above the merged one)
#   --outtype TYPE     of the first file: f32, f16, bf16, q8_0 or auto, which is that of the weights (auto)
#   --quantize TYPE    of the second file, such as Q4_K_M, Q5_K_M or Q8_0; without it there is only the first
#   --output FOLDER    where they go (the merged folder's name with -gguf)
#   --dry-run          print the commands and run nothing
set -euo pipefail

readonly REPOSITORY=https://github.com/ggml-org/llama.cpp
readonly TAG=b10621
readonly COMMIT=c1d0e7a004015f23bc0233470b747b596f29b264

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"
}

merged="" name="" outtype=auto quantize="" output="" dry_run=no
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=yes ;;
    --name | --outtype | --quantize | --output)
      [ $# -ge 2 ] || fail "$1 wants a value"
      case "$1" in
        --name) name=$2 ;;
        --outtype) outtype=$2 ;;
        --quantize) quantize=$2 ;;
        --output) output=$2 ;;
      esac
      shift
      ;;
    -*) fail "$1 is no option; see --help" ;;
    *)
      [ -z "$merged" ] || fail "one merged folder at a time: $merged or $1"
      merged=$1
      ;;
  esac
  shift
done

[ -n "$merged" ] || fail "name a merged folder, as scripts/merge.py writes it; see --help"
[ -d "$merged" ] || fail "$merged is no folder"
merged=${merged%/}
if [ -f "$merged/adapter_config.json" ]; then
  fail "$merged is an adapter without its base; make a merged folder of it first: python scripts/merge.py RUN"
fi
[ -f "$merged/config.json" ] || fail "$merged is no model's folder: it has no config.json"
compgen -G "$merged/*.safetensors" >/dev/null || fail "$merged has no weights (*.safetensors)"
case "$outtype" in
  f32 | f16 | bf16 | q8_0 | auto) ;;
  *) fail "--outtype $outtype is none of f32, f16, bf16, q8_0 and auto" ;;
esac
case "$quantize" in
  *[!A-Za-z0-9_]*) fail "--quantize $quantize is no type of llama-quantize, such as Q4_K_M" ;;
esac
if [ -z "$name" ]; then
  name=$(basename "$(cd "$merged/.." && pwd)")
fi
case "$name" in
  *[!A-Za-z0-9._-]*) fail "--name $name is no name for a file: letters, digits, dots, dashes and underscores" ;;
esac
output=${output:-$merged-gguf}
llama_cpp=${LLAMA_CPP:-$(cd "$(dirname "$0")/.." && pwd)/build/llama.cpp}
python=${PYTHON:-python3}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ "$dry_run" = yes ] || "$@"
}

# ---- llama.cpp

if [ -z "${LLAMA_CPP:-}" ] && [ ! -d "$llama_cpp" ]; then
  run git clone --depth 1 --branch "$TAG" "$REPOSITORY" "$llama_cpp"
fi
if [ "$dry_run" = no ]; then
  [ -f "$llama_cpp/convert_hf_to_gguf.py" ] || fail "$llama_cpp is no checkout of llama.cpp: it has no convert_hf_to_gguf.py"
  commit=$(git -C "$llama_cpp" rev-parse HEAD)
  if [ "$commit" != "$COMMIT" ]; then
    [ -n "${LLAMA_CPP:-}" ] || fail "$llama_cpp is at $commit, and $TAG is $COMMIT; remove it and run this again"
    echo "note: LLAMA_CPP is at $commit; this script was written for $TAG ($COMMIT)"
  fi
fi
if [ -n "$quantize" ] && [ ! -x "$llama_cpp/build/bin/llama-quantize" ]; then
  run cmake -S "$llama_cpp" -B "$llama_cpp/build" -DCMAKE_BUILD_TYPE=Release
  run cmake --build "$llama_cpp/build" --config Release --target llama-quantize --parallel
fi

# ---- the files: written aside and renamed, so that none is there by half

run mkdir -p "$output"
whole="$output/$name-$outtype.gguf"
trap 'rm -f "$output"/.*.gguf.part "$output/.Modelfile.part"' EXIT
run "$python" "$llama_cpp/convert_hf_to_gguf.py" "$merged" --outfile "$output/.$name-$outtype.gguf.part" --outtype "$outtype"
run mv "$output/.$name-$outtype.gguf.part" "$whole"
served=$whole
if [ -n "$quantize" ]; then
  served="$output/$name-$quantize.gguf"
  run "$llama_cpp/build/bin/llama-quantize" "$whole" "$output/.$name-$quantize.gguf.part" "$quantize"
  run mv "$output/.$name-$quantize.gguf.part" "$served"
fi

# ---- the Modelfile: the merged folder's, for this file

if [ -f "$merged/Modelfile" ]; then
  echo "+ $output/Modelfile: FROM ./$(basename "$served")"
  if [ "$dry_run" = no ]; then
    sed "s|^FROM .*|FROM ./$(basename "$served")|" "$merged/Modelfile" >"$output/.Modelfile.part"
    mv "$output/.Modelfile.part" "$output/Modelfile"
  fi
else
  echo "note: $merged has no Modelfile, so that none is written; scripts/merge.py makes one"
fi

echo "serve it: llama-server -m $served --jinja --host 127.0.0.1 --port 8080"
