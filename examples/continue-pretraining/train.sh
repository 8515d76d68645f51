#!/usr/bin/env bash
# From a dense Hugging Face model to a sparse one: convert, judge, train on, judge again, convert back, generate.
# Run it again and it goes on from its last checkpoint.
#
#   bash examples/continue-pretraining/train.sh --hf DIR --data-prefix P [--eval-prefix P] [--out DIR]
#        [--ranks N] [--seq-length N] [--longer "FLAGS"] [--keep-activations] [--prompt TEXT]
#        [Megatron or --s2-… flags]
#
# --hf DIR          model and tokenizer in safetensors, of a family in docs/checkpoints.md
# --data-prefix P   dataset written by scripts/preprocess_data.py with that tokenizer, without .bin
# --eval-prefix P   dataset to judge by (default: the training data)
# --out DIR         everything that is made (default runs/continue-pretraining); the result in DIR/exported
# --ranks N         processes, one per GPU (default 1)
# --seq-length N    tokens per sequence (default 32768)
# --longer "FLAGS"  for a context longer than the model's: --max-position-embeddings N, --rotary-base N,
#                   --rope-scaling TYPE --rope-scaling-factor F (docs/checkpoints.md); as one argument
# --keep-activations  do not compute layers again in backward: faster, where memory is enough
# --prompt TEXT     what the result continues (default: The)
#
# Relative paths count from the repository. Every other argument goes to the training and counts more than the
# flags below; those of the pattern (--s2-block-size and so on, or --s2-pattern-file FILE) belong in PATTERN, since
# the checkpoint is made for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# The active environment; if megatron-s2 is not in it, the .venv that scripts/quickstart.sh makes.
python -P -c 'import megatron_s2' 2>/dev/null || export PATH="$PWD/.venv/bin:$PATH"

HF='' PREFIX='' EVAL='' OUT=runs/continue-pretraining RANKS=1 LENGTH=32768 LONGER=() PROMPT=The MORE=()
RECOMPUTE=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
while (($#)); do
    case $1 in
        --hf) HF=${2:?--hf: needs a value} && shift ;;
        --data-prefix) PREFIX=${2:?--data-prefix: needs a value} && shift ;;
        --eval-prefix) EVAL=${2:?--eval-prefix: needs a value} && shift ;;
        --out) OUT=${2:?--out: needs a value} && shift ;;
        --ranks) RANKS=${2:?--ranks: needs a value} && shift ;;
        --seq-length) LENGTH=${2:?--seq-length: needs a value} && shift ;;
        --longer) read -ra LONGER <<<"${2:?--longer: needs a value}" && shift ;;
        --keep-activations) RECOMPUTE=() ;;
        --prompt) PROMPT=${2:?--prompt: needs a value} && shift ;;
        *) MORE+=("$1") ;;
    esac
    shift
done
: "${HF:?--hf: must be given}" "${PREFIX:?--data-prefix: must be given}"
DEFAULT='--s2-block-size 64 --s2-local-blocks 8 --s2-vert-stride 16 --s2-sink-blocks 1 --s2-dense-layers 1,2'
read -ra PATTERN <<<"${PATTERN:-$DEFAULT}"
START=$OUT/start TRAINED=$OUT/checkpoint

TRAINING=(
    --seq-length "$LENGTH" --micro-batch-size 1 --global-batch-size 16 --train-iters 2000 --seed 1234
    --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 50
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --use-distributed-optimizer --s2-anneal-steps 500
)
DATA=(--data-path "$PREFIX" --split 100,0,0 --eval-iters 0)
LOGGING=(--log-interval 10 --log-throughput --tensorboard-dir "$OUT/tensorboard")
JUDGE=(--data-path "${EVAL:-$PREFIX}" --seq-length "$LENGTH" --samples "${SAMPLES:-16}")

say() { printf '\n%s\n' "$*"; }

refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

ASKED="$HF ${PATTERN[*]}${LONGER:+ ${LONGER[*]}}"
mkdir -p "$OUT"
[[ -e $OUT/asked ]] || printf '%s\n' "$ASKED" >"$OUT/asked"
[[ $(<"$OUT/asked") == "$ASKED" ]] || refuse "--out $OUT: was made from $(<"$OUT/asked"); give another"
if [[ ! -e $START ]]; then
    say "Converting $HF"
    python scripts/convert_checkpoint.py hf-to-megatron --input "$HF" --output "$START" \
        "${LONGER[@]}" --s2-attention "${PATTERN[@]}"
fi
if [[ ! -e $TRAINED/latest_checkpointed_iteration.txt ]]; then
    say "Before training, as it is"
    python scripts/eval_loss.py --hf "$HF" "${JUDGE[@]}"
    say "Before training, with the pattern"
    python scripts/eval_loss.py --load "$START" "${JUDGE[@]}"
    FROM=(--load "$START" --finetune) # the checkpoint knows no annealing
else
    FROM=(--load "$TRAINED")
fi

say "Training: ${FROM[*]}"
read -ra MODEL -d '' <"$START/resume.args" || true
torchrun --standalone --nproc-per-node "$RANKS" scripts/pretrain_gpt.py \
    "${MODEL[@]}" "${TRAINING[@]}" "${RECOMPUTE[@]}" "${DATA[@]}" "${LOGGING[@]}" \
    "${FROM[@]}" --save "$TRAINED" --save-interval 500 --ckpt-format torch_dist "${MORE[@]}"

# Refuses what is still being annealed.
rm -rf "$OUT/exported.new"
python scripts/convert_checkpoint.py megatron-to-hf --input "$TRAINED" --output "$OUT/exported.new"
rm -rf "$OUT/exported"
mv "$OUT/exported.new" "$OUT/exported"
say "After training, with the pattern"
python scripts/eval_loss.py --load "$TRAINED" "${JUDGE[@]}"
say "It goes on: $PROMPT"
python scripts/generate.py --hf "$OUT/exported" --prompt "$PROMPT" --max-new-tokens 32
