"""The command line that Megatron gets can run in its environment, and no given flag is overridden."""

import pytest

from megatron_s2.training.environment import Environment, describe, runnable_arguments

CPU = Environment(gpu=False, transformer_engine=False, apex=False)
PLAIN_GPU = Environment(gpu=True, transformer_engine=False, apex=False)
NVIDIA_CONTAINER = Environment(gpu=True, transformer_engine=True, apex=True)
WITHOUT_APEX = Environment(gpu=True, transformer_engine=True, apex=False)


@pytest.mark.parametrize("environment", [NVIDIA_CONTAINER, WITHOUT_APEX], ids=["Apex", "no Apex"])
def test_nothing_changes_where_everything_is_there(environment):
    argv = ["--bf16", "--sequence-parallel", "--tensor-model-parallel-size", "8"]
    assert runnable_arguments(argv, environment) == (argv, [])
    assert describe(environment, []) is None


def test_local_layers_get_what_they_need_without_apex_beside_transformer_engine():
    given = ["--transformer-impl", "local"]
    _, added = runnable_arguments(given, WITHOUT_APEX)
    assert added == [
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
    ]
    assert describe(WITHOUT_APEX, added).startswith("megatron-s2: no Apex; set: --no-persist-layer-norm ")
    message = "^--apply-layernorm-1p: needs the norms of .* --transformer-impl local has"
    with pytest.raises(ValueError, match=message):
        runnable_arguments([*given, "--apply-layernorm-1p"], WITHOUT_APEX)


@pytest.mark.parametrize("environment", [CPU, PLAIN_GPU, WITHOUT_APEX], ids=["cpu", "gpu", "no Apex"])
def test_deferred_weight_gradients_are_refused_without_apex(environment):
    words = ["--defer-embedding-wgrad-compute", "--pipeline-model-parallel-size", "2"]
    assert runnable_arguments(words, NVIDIA_CONTAINER) == (words, [])
    with pytest.raises(ValueError, match=r"^--defer-embedding-wgrad-compute: needs Apex's extension"):
        runnable_arguments(words, environment)


@pytest.mark.parametrize("error", [AssertionError, FileNotFoundError, ImportError, OSError, RuntimeError])
def test_a_package_whose_import_fails_is_not_there(monkeypatch, error):
    def fail(name):
        raise error(name)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("megatron_s2.training.environment.import_module", fail)
    assert Environment.detect() == PLAIN_GPU


def test_cpu_gets_every_flag_it_needs_and_keeps_the_users_own_first():
    argv, added = runnable_arguments(["--lr", "1e-3"], CPU)
    assert argv == ["--lr", "1e-3", *added]
    line = " ".join(added)
    for words in (
        "--distributed-backend gloo",
        "--transformer-impl local",
        "--use-cpu-initialization",
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-rope-fusion",
    ):
        assert words in line
    assert describe(CPU, added) == f"megatron-s2: no GPU found, training on CPU (gloo); set: {line}"


def test_each_flag_is_added_once():
    for environment in (CPU, PLAIN_GPU):
        _, added = runnable_arguments([], environment)
        flags = [word for word in added if word.startswith("--")]
        assert len(flags) == len(set(flags))


def test_gpu_without_transformer_engine_keeps_nccl_and_its_fusions():
    _, added = runnable_arguments([], PLAIN_GPU)
    assert "--transformer-impl" in added
    assert "--distributed-backend" not in added
    assert "--no-bias-dropout-fusion" not in added


@pytest.mark.parametrize("given", [["--transformer-impl", "local"], ["--transformer-impl=local"]])
def test_what_the_user_gave_already_is_not_added(given):
    argv, added = runnable_arguments([*given, "--disable-jit-fuser"], CPU)
    assert "--transformer-impl" not in added
    assert "--disable-jit-fuser" not in added
    assert argv[: len(given)] == given


@pytest.mark.parametrize(
    "flags",
    [
        ["--transformer-impl", "transformer_engine"],
        ["--transformer-impl=transformer_engine"],
        ["--distributed-backend", "nccl"],
        ["--fp8-format", "hybrid"],
        ["--cuda-graph-impl", "local"],
        ["--use-megatron-fsdp"],
        ["--async-save"],
        ["--optimizer-cpu-offload"],
        ["--apply-layernorm-1p"],
    ],
    ids=" ".join,
)
def test_a_wish_that_needs_a_gpu_is_refused_by_name(flags):
    with pytest.raises(ValueError, match=f"^{flags[0].partition('=')[0]}.*: needs "):
        runnable_arguments(flags, CPU)


def test_a_refused_flag_with_its_harmless_value_is_let_through():
    runnable_arguments(["--cuda-graph-impl", "none"], CPU)


def test_a_flag_given_twice_counts_the_last_time():
    runnable_arguments(["--distributed-backend", "nccl", "--distributed-backend", "gloo"], CPU)


@pytest.mark.parametrize("environment", [CPU, PLAIN_GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "words", ["--recompute-modules core_attn layernorm", "--recompute-modules=layernorm"]
)
def test_modules_that_only_transformer_engine_recomputes_are_refused(environment, words):
    runnable_arguments(["--recompute-modules", "core_attn", "mlp", "--lr", "layernorm"], environment)
    runnable_arguments(words.split(), NVIDIA_CONTAINER)
    with pytest.raises(ValueError, match=r"^--recompute-modules layernorm: needs Transformer Engine"):
        runnable_arguments(words.split(), environment)
