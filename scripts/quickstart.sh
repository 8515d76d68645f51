#!/usr/bin/env bash
# From a fresh clone to a trained S2 GPT: environment, tokenizer, dataset, training, resume, pictures.
#
#   bash scripts/quickstart.sh [--steps N] [--out DIR] [--data DIR_OR_JSONL]
#
# --steps N             training steps before the resume (default 150)
# --out DIR             where everything goes (default runs/quickstart)
# --data DIR_OR_JSONL   your own text: a directory of text files, or a .jsonl file with a key "text"
#                       (default: the source of Python's standard library, which is on the machine)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

STEPS=150 OUT=runs/quickstart DATA=
while (($#)); do
    case $1 in
        --steps | --out | --data)
            (($# > 1)) || refuse "$1: needs a value"
            case $1 in --steps) STEPS=$2 ;; --out) OUT=$2 ;; --data) DATA=$2 ;; esac
            shift 2
            ;;
        -h | --help) usage && exit 0 ;;
        *) refuse "$1: must be --steps, --out or --data" ;;
    esac
done
[[ $STEPS =~ ^[1-9][0-9]*$ ]] || refuse "--steps $STEPS: must be a whole number >= 1"
[[ -z $DATA || -e $DATA ]] || refuse "--data $DATA: does not exist"
[[ -z $DATA || -d $DATA || $DATA == *.jsonl ]] || refuse "--data $DATA: must be a directory or a .jsonl file"
[[ -z $DATA ]] || DATA=$(realpath "$DATA")
[[ $OUT == runs/quickstart ]] && OUT=$ROOT/$OUT || OUT=$(realpath -m "$OUT")

# What is in --out gets replaced, so it must be ours.
if [[ -d $OUT && -n $(ls -A "$OUT") && ! -e $OUT/.quickstart ]]; then
    refuse "--out $OUT: must be a new or empty directory, or that of an earlier quickstart"
fi

enter_environment dev
interrupted() {
    say "interrupted; run it again to start over"
    exit 130
}
trap interrupted INT TERM
mkdir -p "$OUT/data"
touch "$OUT/.quickstart"

if [[ -z $DATA ]]; then
    DATA=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    FILES=(--pattern '*.py' --exclude site-packages)
else
    FILES=()
fi
CORPUS="$DATA ${FILES[*]-}"
if [[ -e $OUT/data/corpus && $(<"$OUT/data/corpus") == "$CORPUS" ]]; then
    say "tokenizer and dataset of $DATA are in $OUT/data already (remove it to make them anew)"
else
    rm -rf "$OUT/data" && mkdir -p "$OUT/data"
    say "1/4 tokenizer: a byte-level BPE of 4096 tokens from $DATA"
    python scripts/train_tokenizer.py --input "$DATA" "${FILES[@]}" --vocab-size 4096 --output "$OUT/data/tokenizer"
    say "2/4 dataset: the same text, tokenized, in Megatron's indexed format"
    python scripts/preprocess_data.py --input "$DATA" "${FILES[@]}" --output-prefix "$OUT/data/corpus" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/data/tokenizer" --append-eod
    printf '%s\n' "$CORPUS" >"$OUT/data/corpus"
fi

# One rank per GPU; without one, two ranks that share the cores.
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
RANKS=$((GPUS > 0 ? GPUS : 2))
CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}
PRECISION=()
if ((GPUS > 0)); then PRECISION=(--bf16); fi

MORE=$((STEPS / 10 > 0 ? STEPS / 10 : 1))
EVERY=$((STEPS / 4 > 0 ? STEPS / 4 : 1))
read -r -d '' -a MODEL <scripts/lib/quickstart.args || true
FLAGS=(
    "${MODEL[@]}" "${PRECISION[@]}" --global-batch-size $((RANKS * 8))
    --train-iters $((STEPS + MORE)) --lr-warmup-iters $((STEPS / 20))
    --data-path "$OUT/data/corpus_text_document" --data-cache-path "$OUT/data/cache" --split 98,2,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/data/tokenizer" --num-workers 1
    --log-interval 1 --log-throughput --eval-interval "$EVERY" --eval-iters 4 --tensorboard-dir "$OUT/tensorboard"
    --save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval "$STEPS" --ckpt-format torch_dist
)

# Megatron's log goes to a file; people see the startup table, the losses, and whatever went wrong.
train() {
    local log=$OUT/$1.log
    shift
    if torchrun --standalone --nproc-per-node "$RANKS" scripts/pretrain_gpt.py "${FLAGS[@]}" "$@" 2>&1 \
        | tee -i "$log" | python scripts/lib/watch.py; then return; fi
    if grep -q "^megatron-s2: interrupted" "$log"; then interrupted; fi
    die "the training failed; its whole log is $log"
}

rm -rf "$OUT/checkpoint" "$OUT/tensorboard"
say "3/4 training $STEPS steps on $RANKS ranks ($( ((GPUS > 0)) && echo GPU || echo CPU)); log: $OUT/train.log"
train train --exit-interval "$STEPS"
say "4/4 resuming from the checkpoint for $MORE more; log: $OUT/resume.log"
train resume

SUMMARY=$(python scripts/plot_losses.py --tensorboard-dir "$OUT/tensorboard" --output "$OUT/loss.png" --title "S2 GPT, quickstart")
python scripts/plot_pattern.py --output "$OUT/pattern.png" "${MODEL[@]}" --layers 2
say "$SUMMARY"
say "look at $OUT/loss.png and $OUT/pattern.png; tensorboard --logdir $OUT/tensorboard; checkpoint: $OUT/checkpoint"
