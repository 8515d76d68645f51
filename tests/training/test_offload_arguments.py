"""Specification of the offload flags: what they set, what they refuse, and the settings that follow."""

import pytest
from megatron_arguments import parse

from megatron_s2.offload.plan import GB
from megatron_s2.offload.settings import OffloadSettings
from megatron_s2.training.offload_arguments import offload_settings, validate_offload_args


def validate(*words: str):
    args = parse(words)
    return args, validate_offload_args(args, words)


def test_without_offload_nothing_is_changed():
    before = vars(parse([])).copy()
    args, told = validate()
    assert vars(args) == before and told == []


def test_what_megatron_needs_is_set_and_told():
    args, told = validate("--s2-offload", "--use-distributed-optimizer")
    assert (
        args.optimizer_cpu_offload and args.use_precision_aware_optimizer and args.use_distributed_optimizer
    )
    assert told == ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
    assert offload_settings(args) == OffloadSettings()


def test_a_fully_reshardable_save_gathers_the_state_on_one_rank():
    args, told = validate("--s2-offload", "--dist-ckpt-optim-fully-reshardable")
    assert args.distrib_optim_fully_reshardable_mem_efficient
    assert "--distrib-optim-fully-reshardable-mem-efficient" in told


def test_every_flag_reaches_the_settings(tmp_path):
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    args, _ = validate(
        *("--s2-offload", "--s2-offload-gpu-fraction", "0.25", "--s2-offload-subgroup-size", "128"),
        *("--s2-offload-gpu-budget-gb", "2", "--s2-offload-host-budget-gb", "0.5"),
        *("--s2-offload-nvme-dir", ",".join(map(str, directories)), "--s2-offload-cpu-threads", "3"),
        *("--s2-offload-trace", f"{tmp_path}/trace.json", "--s2-offload-gpu-adam", "triton"),
    )
    found = offload_settings(args)
    assert found == OffloadSettings(
        gpu_fraction=0.25,
        subgroup_size=128,
        gpu_budget=2 * GB,
        host_budget=GB // 2,
        nvme_dirs=tuple(map(str, directories)),
        cpu_threads=3,
        trace=f"{tmp_path}/trace.json",
    )


def test_auto_is_what_happens_without_a_fraction():
    args, _ = validate("--s2-offload", "--s2-offload-gpu-fraction", "auto")
    assert offload_settings(args).gpu_fraction is None


REFUSED = {
    "--s2-offload-gpu-budget-gb 1": "--s2-offload-gpu-budget-gb: needs --s2-offload",
    "--s2-offload --optimizer-offload-fraction=0.5": "--optimizer-offload-fraction: must not be set with",
    "--s2-offload --overlap-cpu-optimizer-d2h-h2d": "--overlap-cpu-optimizer-d2h-h2d: must not be set with",
    "--s2-offload --use-torch-optimizer-for-cpu-offload": "--use-torch-optimizer-for-cpu-offload: must not",
    "--s2-offload --no-pin-cpu-grads": "--no-pin-cpu-grads: must not be set with --s2-offload",
    "--s2-offload --optimizer sgd": "--optimizer sgd: must be adam with --s2-offload",
    "--s2-offload --exp-avg-dtype bf16": "--exp-avg-dtype bf16: must be fp32",
    "--s2-offload --use-megatron-fsdp": "--use-megatron-fsdp: must not be set with --s2-offload: it holds",
    "--s2-offload --cuda-graph-impl full_iteration": "--cuda-graph-impl full_iteration: must be another with",
    "--s2-offload --cuda-graph-scope full_iteration": "--cuda-graph-impl full_iteration: must be another",
    "--s2-offload --qk-clip": "--qk-clip: must not be set with --s2-offload",
    "--s2-offload --load-main-params-from-ckpt": "--load-main-params-from-ckpt: must not be set with",
    "--s2-offload --optimizer-cuda-graph": "--optimizer-cuda-graph: must not be set with --s2-offload",
    "--s2-offload --ckpt-format fsdp_dtensor": "--ckpt-format fsdp_dtensor: must be torch_dist or torch",
    "--s2-offload --s2-offload-subgroup-size 100": "--s2-offload-subgroup-size 100: must be a positive",
    "--s2-offload --s2-offload-cpu-threads 0": "--s2-offload-cpu-threads 0: must be >= 1",
    "--s2-offload --s2-offload-host-budget-gb -1": "--s2-offload-host-budget-gb -1: must be >= 0",
    "--s2-offload --s2-offload-nvme-dir /tmp": "--s2-offload-nvme-dir: needs --s2-offload-host-budget-gb",
    "--s2-offload --s2-offload-host-budget-gb 1 --s2-offload-nvme-dir /nowhere": "--s2-offload-nvme-dir "
    "/nowhere: there is no such directory",
    "--s2-offload --s2-offload-host-budget-gb 1 --s2-offload-nvme-dir /tmp,/tmp/.": "--s2-offload-nvme-dir "
    "/tmp,/tmp/.: must name each directory once",
    "--s2-offload --s2-offload-trace /nowhere/trace.json": "--s2-offload-trace /nowhere/trace.json: there is",
    "--s2-offload --dist-ckpt-optim-fully-reshardable --disable-gloo-process-groups": "--disable-gloo-"
    "process-groups: must not be set with --s2-offload and --dist-ckpt-optim-fully-reshardable",
    "--s2-offload --s2-offload-host-budget-gb 1 --s2-offload-nvme-dir /tmp --async-save "
    "--use-persistent-ckpt-worker": "--use-persistent-ckpt-worker: must not be set with",
    "--s2-offload --s2-offload-gpu-adam apex": "--s2-offload-gpu-adam apex: needs a GPU",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_by_flag_and_value(words):
    with pytest.raises(ValueError) as refusal:
        validate(*words.split())
    assert str(refusal.value).startswith(REFUSED[words])


@pytest.mark.parametrize("value", ["1.5", "-0.1", "half"])
def test_a_fraction_is_from_0_to_1(value, capsys):
    with pytest.raises(SystemExit):
        parse(["--s2-offload", "--s2-offload-gpu-fraction", value])
    assert "--s2-offload-gpu-fraction: invalid auto, or a number from 0 to 1 value" in capsys.readouterr().err
