#!/usr/bin/env bash
# One GPU of 80 GB: a GPT of 1.3 billion parameters at 32768 tokens. Run it again and it goes on from its last
# checkpoint.
#
#   bash examples/one-gpu/train.sh [--data-prefix P --tokenizer DIR] [--out DIR] [Megatron or --s2-… flags]
#
# --data-prefix P   dataset written by scripts/preprocess_data.py, without .bin (default: mock data)
# --tokenizer DIR   the Hugging Face tokenizer it was made with
# --out DIR         checkpoints and tensorboard logs (default runs/one-gpu)
#
# Every other argument goes to the training and counts more than the flags below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# The active environment; if megatron-s2 is not in it, the .venv that scripts/quickstart.sh makes.
python -P -c 'import megatron_s2' 2>/dev/null || export PATH="$PWD/.venv/bin:$PATH"

PREFIX='' TOKENIZER='' OUT=runs/one-gpu MORE=()
while (($#)); do
    case $1 in
        --data-prefix) PREFIX=${2:?--data-prefix: needs a value} && shift ;;
        --tokenizer) TOKENIZER=${2:?--tokenizer: needs a value} && shift ;;
        --out) OUT=${2:?--out: needs a value} && shift ;;
        *) MORE+=("$1") ;;
    esac
    shift
done

MODEL=(
    --num-layers 24 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16
    --group-query-attention --num-query-groups 4 --seq-length 32768 --max-position-embeddings 32768
    --position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
S2=(--s2-attention --s2-block-size 64 --s2-local-blocks 8 --s2-vert-stride 16 --s2-dense-layers 1,2)
TRAINING=(
    --bf16 --micro-batch-size 1 --global-batch-size 16 --train-iters 20000 --seed 1234
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --use-distributed-optimizer
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
)
if [[ $PREFIX || $TOKENIZER ]]; then
    DATA=(
        --data-path "${PREFIX:?--data-prefix: must be given with --tokenizer}" --split 99,1,0
        --tokenizer-type HuggingFaceTokenizer
        --tokenizer-model "${TOKENIZER:?--tokenizer: must be given with --data-prefix}"
    )
else
    DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 32000)
fi
CHECKPOINTS=(--save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval 500 --ckpt-format torch_dist)
LOGGING=(
    --log-interval 10 --log-throughput --eval-interval 500 --eval-iters 10 --tensorboard-dir "$OUT/tensorboard"
)

exec torchrun --standalone --nproc-per-node 1 scripts/pretrain_gpt.py \
    "${MODEL[@]}" "${S2[@]}" "${TRAINING[@]}" "${DATA[@]}" "${CHECKPOINTS[@]}" "${LOGGING[@]}" "${MORE[@]}"
