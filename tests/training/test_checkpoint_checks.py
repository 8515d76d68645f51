"""A checkpoint that does not fit the command line is refused by the flag that differs."""

from argparse import Namespace

import pytest

from megatron_s2.training.checkpoint_checks import check_optimizer, check_schedule, check_weights


def model(**given) -> Namespace:
    known = {"num_layers": 2, "hidden_size": 64, "num_query_groups": 2, "num_experts": None, "swiglu": True}
    known |= {"add_bias_linear": False, "add_qkv_bias": False, "position_embedding_type": "rope"}
    known |= {"softmax_type": "vanilla", "dist_ckpt_strictness": "assume_ok_unexpected"}
    return Namespace(**known | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 32}, "--hidden-size 32: the checkpoint was trained with 64; give the same"),
        ({"num_experts": 4}, "--num-experts 4: the checkpoint was trained without it"),
        ({"swiglu": False}, "--swiglu not given: the checkpoint was trained with it"),
        ({"add_bias_linear": True}, "--disable-bias-linear not given: the checkpoint was trained with it"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_absolute: the"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable: the checkpoint was trained with vanilla"),
    ],
)
def test_a_model_with_other_weights_is_refused(given, message):
    check_weights(model(), model())
    with pytest.raises(ValueError) as refusal:
        check_weights(model(**given), model())
    assert str(refusal.value).startswith(message)


def test_what_differs_in_no_weight_is_accepted():
    check_weights(model(position_embedding_type="none"), model())
    check_weights(model(softmax_type="off-by-one"), model())
    check_weights(model(add_qkv_bias=True, dist_ckpt_strictness="log_all"), model())
    check_weights(model(), Namespace(num_layers=2))  # a converted model says little
    # Megatron sets this argument while it trains, before it saves.
    every_head = {"group_query_attention": False, "num_attention_heads": 4}
    check_weights(model(**every_head, num_query_groups=1), model(**every_head, num_query_groups=4))


def optimizer(**given) -> Namespace:
    flags = "finetune no_load_optim use_distributed_optimizer bf16 fp16 dist_ckpt_optim_fully_reshardable"
    return Namespace(**{"optimizer": "adam", "lr": 1e-3} | dict.fromkeys(flags.split(), False) | given)


def test_state_of_another_optimizer_is_refused_where_it_would_be_loaded():
    cases = [
        ({"optimizer": "sgd"}, {}, "--optimizer sgd: the checkpoint was trained with adam"),
        ({"bf16": True}, {}, "--bf16 or --fp16: the checkpoint was trained with neither --bf16 nor --fp16"),
    ]
    sharded = {"use_distributed_optimizer": True}
    cases.append((sharded, {}, "--use-distributed-optimizer given: the checkpoint was trained without it"))
    cases.append(({**sharded, "fp16": True}, {**sharded, "bf16": True}, "--fp16: the checkpoint was trained"))
    for ours, theirs, message in cases:
        check_optimizer(optimizer(**ours), optimizer(**ours))
        with pytest.raises(ValueError) as refusal:
            check_optimizer(optimizer(**ours), optimizer(**theirs))
        assert str(refusal.value).startswith(message)
        for drops in ("finetune", "no_load_optim"):
            check_optimizer(optimizer(**ours, **{drops: True}), optimizer(**theirs))
        check_optimizer(optimizer(**ours), optimizer(**theirs, no_save_optim=True))
    check_optimizer(optimizer(bf16=True), optimizer(fp16=True))  # both have masters
    reshardable = {**sharded, "bf16": True, "dist_ckpt_optim_fully_reshardable": True}
    check_optimizer(optimizer(**sharded), optimizer(**reshardable))


def schedule(**given):
    names = (
        "decoupled_lr decoupled_min_lr train_iters train_samples lr_warmup_fraction step_batch_size_schedule"
    )
    flags = "finetune no_load_optim override_opt_param_scheduler use_checkpoint_opt_param_scheduler"
    known = dict.fromkeys(names.split()) | dict.fromkeys(flags.split(), False)
    known |= {"lr": 1e-3, "min_lr": 0.0, "start_weight_decay": 0.1, "end_weight_decay": 0.1}
    known |= {"lr_decay_iters": None, "lr_decay_samples": None, "lr_warmup_iters": 0, "lr_warmup_samples": 0}
    return Namespace(**known | {"global_batch_size": 4} | given)


def test_a_schedule_by_samples_is_compared_by_samples():
    # Megatron has set the iterations of the run that saved the checkpoint, and the end of its decay.
    saved = schedule(train_samples=80, train_iters=20, lr_decay_samples=80)
    check_schedule(schedule(train_samples=80, global_batch_size=8), saved)
    with pytest.raises(ValueError, match=r"^--train-samples 160: the checkpoint was trained with 80; give"):
        check_schedule(schedule(train_samples=160), saved)


def test_a_schedule_by_iterations_depends_on_the_batch():
    saved = schedule(train_iters=20, lr_decay_iters=20)
    check_schedule(schedule(train_iters=20), saved)
    with pytest.raises(ValueError, match=r"^--global-batch-size 8: the checkpoint was trained with 4; give"):
        check_schedule(schedule(train_iters=20, global_batch_size=8), saved)
