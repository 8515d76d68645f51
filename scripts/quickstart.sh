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
            (($# > 1)) || die "$1: needs a value"
            case $1 in --steps) STEPS=$2 ;; --out) OUT=$2 ;; --data) DATA=$2 ;; esac
            shift 2
            ;;
        -h | --help) usage && exit 0 ;;
        *) die "$1: must be --steps, --out or --data" ;;
    esac
done
[[ $STEPS =~ ^[1-9][0-9]*$ ]] || die "--steps $STEPS: must be a whole number >= 1"
[[ -z $DATA || -e $DATA ]] || die "--data $DATA: does not exist"
[[ -z $DATA ]] || DATA=$(realpath "$DATA")
[[ $OUT == runs/quickstart ]] && OUT=$ROOT/$OUT || OUT=$(realpath -m "$OUT")

enter_environment dev
trap 'say "interrupted; run it again to start over"; exit 130' INT TERM
mkdir -p "$OUT/data"

if [[ -z $DATA ]]; then
    DATA=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    FILES=(--pattern '*.py' --exclude site-packages)
else
    FILES=()
fi
CORPUS="$DATA ${FILES[*]-}"
if [[ -e $OUT/data/corpus && $(<"$OUT/data/corpus") == "$CORPUS" ]]; then
    say "tokenizer and dataset of $DATA are in $OUT/data already"
else
    rm -rf "$OUT/data" && mkdir -p "$OUT/data"
    say "1/4 tokenizer: a byte-level BPE of 4096 tokens from $DATA"
    python scripts/train_tokenizer.py --input "$DATA" "${FILES[@]}" --vocab-size 4096 --output "$OUT/data/tokenizer"
    say "2/4 dataset: the same text, tokenized, in Megatron's indexed format"
    python scripts/preprocess_data.py --input "$DATA" "${FILES[@]}" --output-prefix "$OUT/data/corpus_of" \
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

BLOCK=16 WINDOW=4 STRIDE=4 KV_HEADS=2
MORE=$((STEPS / 10 > 0 ? STEPS / 10 : 1))
FLAGS=(
    --num-layers 4 --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 6
    --group-query-attention --num-query-groups "$KV_HEADS"
    --seq-length 512 --max-position-embeddings 512 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0
    --s2-attention --s2-block-size "$BLOCK" --s2-local-blocks "$WINDOW" --s2-vert-stride "$STRIDE"
    --micro-batch-size 4 --global-batch-size $((RANKS * 8)) --use-distributed-optimizer "${PRECISION[@]}"
    --train-iters $((STEPS + MORE)) --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters $((STEPS / 20))
    --weight-decay 0.1 --clip-grad 1.0 --seed 1234
    --data-path "$OUT/data/corpus_of_text_document" --data-cache-path "$OUT/data/cache" --split 98,2,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/data/tokenizer"
    --log-interval 1 --log-throughput --eval-interval $((STEPS / 4 > 0 ? STEPS / 4 : 1)) --eval-iters 4
    --tensorboard-dir "$OUT/tensorboard" --num-workers 1
    --save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval "$STEPS" --ckpt-format torch_dist
)

# Megatron's log goes to a file; people see the startup table, the losses, and whatever went wrong.
train() {
    local log=$OUT/$1.log
    shift
    torchrun --standalone --nproc-per-node "$RANKS" scripts/pretrain_gpt.py "${FLAGS[@]}" "$@" 2>&1 \
        | tee "$log" | python scripts/lib/watch.py \
        || die "the training failed; its whole log is $log"
}

rm -rf "$OUT/checkpoint" "$OUT/tensorboard"
say "3/4 training $STEPS steps on $RANKS ranks ($( ((GPUS > 0)) && echo GPU || echo CPU)); log: $OUT/train.log"
train train --exit-interval "$STEPS"
say "4/4 resuming from the checkpoint for $MORE more; log: $OUT/resume.log"
train resume

SUMMARY=$(python scripts/plot_losses.py --tensorboard-dir "$OUT/tensorboard" --output "$OUT/loss.png" --title "S2 GPT, quickstart")
python scripts/plot_pattern.py --output "$OUT/pattern.png" --num-query-groups "$KV_HEADS" --layers 2 \
    --s2-block-size "$BLOCK" --s2-local-blocks "$WINDOW" --s2-vert-stride "$STRIDE"
say "$SUMMARY"
say "look at $OUT/loss.png and $OUT/pattern.png; tensorboard --logdir $OUT/tensorboard; checkpoint: $OUT/checkpoint"
