#!/usr/bin/env bash
# From a dense Hugging Face model of 8192 tokens to sparse ones of 32768 and then 131072: each stage converts what the
# one before exported, with a larger rotary base, and trains it on longer sequences. Run it again and it goes on.
#
#   bash examples/longer-context/train.sh --hf DIR --data-prefix P [--out DIR] [any argument of continue-pretraining]
#
# The bases are those of NTK-aware scaling, base * (tokens / 8192) ^ (d / (d - 2)), for a model with a base of 500000
# and heads of d = 128, such as Llama 3. For another model write "tokens base iterations" of each stage into STAGES,
# one per line. Under YaRN the base stays: docs/checkpoints.md.
#
# --hf DIR          model and tokenizer of 8192 positions
# --data-prefix P   dataset with documents as long as the last stage's sequences, or packed ones
# --out DIR         everything that is made (default runs/longer-context); results in DIR/TOKENS/exported
# --s2-anneal-steps N   of the first stage, which makes the model sparse (default 500); the others have none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

HF='' OUT=runs/longer-context ANNEAL=500 MORE=()
while (($#)); do
    case $1 in
        --hf) HF=${2:?--hf: needs a value} && shift ;;
        --out) OUT=${2:?--out: needs a value} && shift ;;
        --s2-anneal-steps) ANNEAL=${2:?--s2-anneal-steps: needs a value} && shift ;; # of the first stage alone
        *) MORE+=("$1") ;;
    esac
    shift
done
: "${HF:?--hf: must be given}"
STAGES=${STAGES:-$'32768 2044000 1000\n131072 8360000 500'}

MODEL=$HF # the first stage makes the model sparse
while read -r TOKENS BASE ITERATIONS; do
    printf '\nStage of %s tokens, rotary base %s\n' "$TOKENS" "$BASE"
    [[ -e $OUT/$TOKENS/exported ]] || bash examples/continue-pretraining/train.sh --hf "$MODEL" \
        --out "$OUT/$TOKENS" --seq-length "$TOKENS" --train-iters "$ITERATIONS" --s2-anneal-steps "$ANNEAL" \
        --longer "--max-position-embeddings $TOKENS --rotary-base $BASE" "${MORE[@]}" </dev/null
    MODEL=$OUT/$TOKENS/exported ANNEAL=0
done <<<"$STAGES"
