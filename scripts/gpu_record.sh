#!/usr/bin/env bash
# Measures everything that is claimed of a GPU on the one of this machine, inside a time budget: device, GPU tests,
# attention, training step, optimizer offload, decoding; then draws the pictures and writes docs/results.md. Each
# result is stored as soon as it is there. Run it again, and it goes on where it stopped.
#
#   bash scripts/gpu_record.sh [--out DIR] [--minutes M] [--stages NAME …] [--plan] [--toy] [--python PATH]
#
# --out DIR       directory of the rows (default benchmarks/results; the page is then DIR/results.md for another)
# --minutes M     time budget (default 30)
# --stages NAME … only these of what --plan lists, and pictures and page
# --plan          say what would run, and for how long
# --toy           all of it on the CPU at toy sizes, in minutes; needs --out, since these are no measurements
# --python PATH   a Python that has what is needed, in place of the .venv that is made otherwise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"
source "$ROOT/scripts/lib/record.sh"

DRAWING_SECONDS=40 # of the budget are kept for pictures and page

# ---------------------------------------------------------------------------------------------------------
# stages

bench() { stage "$1" "$2" "$3" scripts/bench.py "$4" --device "$DEVICE" --out "$ROWS" "${@:5}"; }

# A benchmark that trains.
train() {
    bench "$@"
    has megatron || IMPOSSIBLE[$1]="megatron-core is not installed for $INTERPRETER"
}

gpu_tests() {
    stage tests 20 150 -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors \
        -p benchmarks.tests_passed --tests-passed "$ROWS" "$@"
}

has() { "$INTERPRETER" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

#     name                least most  benchmark and its options
gpu_stages() {
    # 2.04e9 parameters of 18 bytes each, beside activations: more than 40 GB, without optimizer state less.
    local large=(--hidden-size 2560 --num-layers 26 --seq-length 1024) parallel=()
    if has xdist; then parallel=(-n auto); fi # compiling takes the cores, not the GPU
    bench device                  5   60  device
    gpu_tests "${parallel[@]}"
    bench attention              30  240  attention --seq-lengths 131072,65536,32768,16384,8192,4096
    bench attention-stride-64    25  120  attention --cases stride-64 --seq-lengths 131072
    bench profile                25  120  profile --cases grouped --implementations s2-triton sdpa-flash sdpa-cudnn
    train step                  150  420  step --seq-lengths 131072 --cases s2 dense s2-first-two-dense \
        --warm-up 1 --repeats 2
    train step-shorter           90  300  step --seq-lengths 32768,65536,8192 --warm-up 2 --repeats 3
    train offload                90  360  offload "${large[@]}" --gpu-memory-gb 40 --accumulation 1 --repeats 3 \
        --cases s2-auto-flush hybrid hybrid-overlap s2-1-flush s2-0.5-flush
    train timeline               30  120  timeline "${large[@]}"
    bench decode                 20  120  decode
    bench attention-256k         60  300  attention --seq-lengths 262144 --repeats 3
}

toy_stages() {
    local small=(--hidden-size 64 --num-layers 1 --seq-length 8 --subgroup-size 4096 --bucket-size 16384)
    bench device      5  300  device --repeats 2
    gpu_tests tests/benchmarks
    bench attention   5  600  attention --seq-lengths 1024 --repeats 2 --implementations s2-torch sdpa
    bench profile     5  300  profile --seq-lengths 128 --implementations s2-torch
    train step        5 1200  step --seq-lengths 256 --cases s2 --warm-up 1 --repeats 2
    train offload     5  900  offload "${small[@]}" --accumulation 1 --repeats 1 --cases s2-auto-flush
    train timeline    5  600  timeline "${small[@]}"
    bench decode      5  300  decode --context 256,512 --repeats 1
}

# ---------------------------------------------------------------------------------------------------------
# options

COMMITTED=$ROOT/benchmarks/results
OUT='' MINUTES=30 NAMES=() PLAN='' TOY='' INTERPRETER=''
while (($#)); do
    case $1 in
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --plan) PLAN=yes && shift ;;
        --toy) TOY=yes && shift ;;
        --stages)
            shift
            while (($#)) && [[ $1 != -* ]]; do NAMES+=("$1") && shift; done
            ((${#NAMES[@]})) || refuse "--stages: needs a value"
            ;;
        --out | --minutes | --python)
            (($# > 1)) || refuse "$1: needs a value"
            case $1 in
                --out) OUT=$(realpath -m "$2") ;;
                --minutes) MINUTES=$2 ;;
                --python)
                    INTERPRETER=$(type -P "$2") || die "--python $2: must be a Python that runs"
                    INTERPRETER=$(realpath -s "$INTERPRETER") # absolute, but still that of its environment
                    ;;
            esac
            shift 2
            ;;
        *) refuse "$1: must be one of the options that --help lists" ;;
    esac
done
[[ $MINUTES =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] || refuse "--minutes $MINUTES: must be a number >= 0"
if [[ -n $TOY && (-z $OUT || $OUT == "$COMMITTED") ]]; then
    refuse "--toy: needs --out DIR, another than benchmarks/results, which is for measurements"
fi
OUT=${OUT:-$COMMITTED}
if [[ -z $INTERPRETER ]]; then
    enter_environment dev
    INTERPRETER=python
fi
cd "$ROOT"

HERE=$("$INTERPRETER" -m benchmarks.environment ${TOY:+cpu}) || exit
read -r DEVICE MACHINE SETTING <<<"$HERE"
if [[ -z $TOY && -z $PLAN && $DEVICE != cuda ]]; then
    refuse "no CUDA device: this measures one GPU; --toy --out DIR runs all stages on the CPU at toy sizes"
fi
[[ -n $TOY ]] || DEVICE=cuda
ROWS=${OUT#"$ROOT"/} LOG=$OUT/$MACHINE/record.tsv
if [[ -n $TOY ]]; then toy_stages; else gpu_stages; fi
drawing plots scripts/bench.py plot --out "$ROWS"
PAGE=$ROWS/results.md
if [[ $OUT == "$COMMITTED" ]]; then PAGE=docs/results.md; fi
drawing page -m benchmarks.results_page --results "$ROWS" --page "$PAGE"
if ((${#NAMES[@]})); then choose_stages "${NAMES[@]}"; fi

DEADLINE=$((SECONDS + $(awk -v minutes="$MINUTES" 'BEGIN { printf "%d", 60 * minutes }') - DRAWING_SECONDS))
if [[ -n $PLAN ]]; then print_plan; else run_stages; fi
