#!/usr/bin/env bash
# A laptop run without a GPU: a small S2 GPT on mock data, two ranks, 20 steps, under a minute.
#
#   bash examples/tiny-cpu/train.sh [Megatron or --s2-… flags, which count more than those below]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# The active environment; if megatron-s2 is not in it, the .venv that scripts/quickstart.sh makes.
python -P -c 'import megatron_s2' 2>/dev/null || export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two ranks share the cores

MODEL=(
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 512 --max-position-embeddings 512
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
S2=(--s2-attention --s2-block-size 16 --s2-local-blocks 4 --s2-vert-stride 4 --s2-dense-layers 1)
TRAINING=(
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --seed 1234
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0
    --use-distributed-optimizer
)
DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0)
LOGGING=(--log-interval 1 --log-throughput --eval-interval 10 --eval-iters 2 --tensorboard-dir runs/tiny-cpu/tensorboard)

exec torchrun --standalone --nproc-per-node 2 scripts/pretrain_gpt.py \
    "${MODEL[@]}" "${S2[@]}" "${TRAINING[@]}" "${DATA[@]}" "${LOGGING[@]}" "$@"
