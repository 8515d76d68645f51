"""Random command lines train, or are refused in one line that names a flag; none ends in a traceback.

Each is drawn from a grammar of our flags and the common ones of Megatron, with values that are right, at the
edge and wrong, as a user might combine them without having read what excludes what.
"""

import random
import re

import pytest
from megatron_run import Runs
from selection import thinned

COMMANDS = 150
IN_THE_SUITE = 8
SEED = 20260

# Of a line one is chosen, or none.
MEGATRON = """
    --num-layers 1 | --num-layers 3 | --num-layers 0
    --hidden-size 32 | --hidden-size 72 | --hidden-size 50
    --num-attention-heads 8 | --num-attention-heads 6 --num-query-groups 3 | --num-attention-heads 5
    --num-query-groups 1 | --num-query-groups 4 | --num-query-groups 3 | --num-query-groups 0
    --kv-channels 8 | --kv-channels 24 | --kv-channels 0
    --ffn-hidden-size 96 | --ffn-hidden-size 0
    --seq-length 64 | --seq-length 100 | --seq-length 256 | --seq-length 1
    --micro-batch-size 1 | --micro-batch-size 3 | --micro-batch-size 0
    --global-batch-size 2 | --global-batch-size 5 | --global-batch-size 8
    --bf16 | --fp16 --initial-loss-scale 256 | --bf16 --fp16 | --bf16 --accumulate-allreduce-grads-in-fp32
    --lr 0 | --lr 1e-2 --min-lr 1e-2 | --lr -1 | --lr nan
    --lr-decay-style constant | --lr-decay-style linear --lr-warmup-iters 1 | --lr-warmup-iters 5
    --lr-warmup-fraction 0.5 | --lr-warmup-fraction 2 | --lr-decay-style WSD --lr-wsd-decay-iters 1
    --weight-decay 0 | --weight-decay 0.1 --start-weight-decay 0.05 --end-weight-decay 0.2
    --clip-grad 0 | --clip-grad 1.0 | --clip-grad -1
    --optimizer sgd | --adam-beta1 0.8 --adam-beta2 0.95 | --adam-eps 0
    --use-distributed-optimizer | --overlap-grad-reduce
    --use-distributed-optimizer --overlap-param-gather
    --tensor-model-parallel-size 2 | --pipeline-model-parallel-size 2 | --context-parallel-size 2
    --sequence-parallel | --expert-model-parallel-size 2
    --num-experts 2 | --num-experts 4 --moe-router-topk 2 | --num-experts 2 --moe-router-topk 3
    --recompute-activations
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --recompute-granularity full | --recompute-granularity selective --recompute-modules mlp
    --position-embedding-type none | --position-embedding-type learned_absolute | --rotary-percent 0.5
    --position-embedding-type yarn | --use-rope-scaling | --rotary-base 500000 | --rotary-base 0
    --normalization LayerNorm | --qk-layernorm | --norm-epsilon 1e-6 | --apply-layernorm-1p
    --squared-relu | --add-qkv-bias | --attention-softmax-in-fp32 | --apply-query-key-layer-scaling
    --attention-dropout 0.1 | --hidden-dropout 0.1 | --hidden-dropout 2
    --softmax-type learnable | --softmax-type off-by-one | --window-size 16,0
    --attention-backend unfused
    --vocab-size 1000 | --make-vocab-size-divisible-by 64 | --padded-vocab-size 320 | --vocab-size 0
    --eval-iters 0 | --eval-interval 1 | --eval-interval 0 | --eval-iters -1
    --log-interval 2 | --log-interval 0 | --log-params-norm | --log-num-zeros-in-grad | --log-throughput
    --log-timers-to-tensorboard | --log-memory-to-tensorboard | --timing-log-level 2
    --log-validation-ppl
    --exit-interval 1 | --exit-duration-in-mins 100 | --skip-train | --train-samples 8
    --save {here}/saved --save-interval 1 | --save {here}/saved | --save {here}/file/x --save-interval 1
    --load {here}/nothing | --load {here}/file | --finetune | --no-load-optim | --use-checkpoint-args
    --ckpt-format torch | --ckpt-format zarr | --dist-ckpt-strictness log_all | --no-save-optim
    --tensorboard-dir {here}/file | --data-cache-path {here}/file | --wandb-project x | --profile
    --seed 0 | --seed 7 --data-parallel-random-init | --init-method-std 0 | --use-cpu-initialization
    --cuda-graph-impl local | --fp8-format hybrid | --tp-comm-overlap | --use-torch-fsdp2
    --transformer-impl transformer_engine | --use-flash-attn | --use-mcore-models
    --distributed-backend nccl
    --reset-position-ids | --reset-attention-mask | --eod-mask-loss | --dataloader-inter-document-masking
    --rampup-batch-size 2 2 8 | --step-batch-size-schedule 0:2,4:4 | --decoupled-lr 1e-4 | --num-workers 1
    --untie-embeddings-and-output-weights | --multi-latent-attention | --mtp-num-layers 1 | --sft
    --no-such-flag | --lr | --seq-length many | --spec a b
"""
OURS = """
    --s2-block-size 16 | --s2-block-size 32 | --s2-block-size 48 | --s2-block-size 512
    --s2-local-blocks 1 | --s2-local-blocks 3 | --s2-local-blocks 0
    --s2-vert-stride 2 | --s2-vert-stride 2 4 | --s2-vert-stride 1 | --s2-vert-stride 3 3 3
    --s2-sink-blocks 1 | --s2-sink-blocks -1 | --s2-learnable-sink
    --s2-phases 0 1 | --s2-phases 9 | --s2-num-dense-heads 1 | --s2-num-dense-heads 9
    --s2-dense-layers 1 | --s2-dense-layers 1,7 | --s2-dense-layer-freq 2 | --s2-dense-layers x
    --s2-anneal-steps 2 | --s2-anneal-steps -1 | --s2-backend torch | --s2-backend triton
    --s2-backend reference | --s2-autotune | --s2-cp-schedule gather | --s2-cp-schedule ring
"""
OFFLOAD = """
    --s2-offload-gpu-fraction 0.5 | --s2-offload-gpu-fraction 1 | --s2-offload-gpu-fraction 2
    --s2-offload-subgroup-size 4096 | --s2-offload-subgroup-size 100
    --s2-offload-gpu-budget-gb 0.001 | --s2-offload-host-budget-gb 0.0001 | --s2-offload-gpu-budget-gb -1
    --s2-offload-host-budget-gb 0.0001 --s2-offload-nvme-dir {here} | --s2-offload-nvme-dir {here}/nothing
    --s2-offload-cpu-threads 1 | --s2-offload-trace {here}/trace.json | --s2-offload-trace {here}/x/y
    --optimizer-cpu-offload | --optimizer-offload-fraction 0.5 | --use-precision-aware-optimizer
"""


def command(number: int) -> str:
    """The flags of the command line of that number."""
    draw = random.Random(SEED + number)

    def some(grammar: str, chance: float) -> list[str]:
        lines = grammar.strip().splitlines()
        return [draw.choice(line.split(" | ")).strip() for line in lines if draw.random() < chance]

    chosen = some(MEGATRON, draw.choice([0.02, 0.05, 0.1]))
    if draw.random() < 0.6:
        chosen += ["--s2-attention", *some(OURS, 0.25)]
    if draw.random() < 0.4:
        chosen += ["--s2-offload", *some(OFFLOAD, 0.25)]
    chosen += some(OURS + OFFLOAD, 0.01)  # without the flag that they need
    draw.shuffle(chosen)
    return " ".join(chosen)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    here = tmp_path_factory.mktemp("commands")
    (here / "file").touch()
    flags = {f"command-{n}": command(n).format(here=here) for n in range(COMMANDS)}
    return Runs(here, {name: f"--train-iters 2 {words}" for name, words in flags.items()})


@pytest.mark.parametrize("number", thinned(range(COMMANDS), lambda n: n < IN_THE_SUITE))
def test_it_trains_or_is_refused_by_a_flag(runs, number):
    run = runs[f"command-{number}"]
    assert "Traceback" not in run.output, command(number)
    errors = re.findall(r"^error: (.*)", run.output, re.MULTILINE)
    if run.status == 0:
        assert not errors, command(number)
    else:
        assert run.status == 2, f"{command(number)}\n{run.output[-2000:]}"
        assert len(errors) == 1 and "--" in errors[0], f"{command(number)}\n{errors}"
