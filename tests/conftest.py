"""What all tests share: one thread, the scripts as modules, and Ctrl-C in what they start, however they were
started themselves; tests marked `gpu` are left out where there is no CUDA device, those marked `te` where
Transformer Engine is not installed; long files go first."""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, settings

# Before torch is imported: at the sizes of tests threads cost more than they bring, in commands started by
# tests, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

# A worker that began one of these last would leave the other without work. Longest first.
LONG = (
    "test_pretrain",
    "test_command_lines",
    "test_triton",
    "test_s2_training",
    "test_resources",
    "test_offload_checkpoints",
    "test_offload_training",
    "test_generate",
    "test_cp_training",
    "test_context_parallel",
    "test_annealing",
    "test_executor",
    "test_preprocess",
    "test_converted_training",
    "test_golden",
    "test_examples",
    "test_record",
    "test_eval_loss",
    "test_context_parallel_bench",
    "test_s2_checkpoints",
    "test_converted_logits",
    "test_lost_peer",
    "test_offload_bench",
    "test_attention_bench",
)

# Without a GPU Megatron must not use it in the tests' own processes, where nothing stands in for its kernels.
HAS_TRANSFORMER_ENGINE = find_spec("transformer_engine") is not None
if HAS_TRANSFORMER_ENGINE:
    from megatron_run import hide_transformer_engine_without_gpu

    hide_transformer_engine_without_gpu()

# No limit on the time of an example: the first one imports torch, and other programs use the machine too.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_addoption(parser):
    parser.addoption("--pretrained", metavar="DIR", help="model that scripts/get_small_model.sh wrote")


def pytest_configure():
    """Restores the default handlers of signals that this process was started to ignore.

    A background job of a script, nohup and many CI agents ignore SIGINT, and child processes inherit that:
    no test could interrupt what it started. SIGHUP stays ignored, so that nohup keeps its meaning.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


def pytest_collection_modifyitems(config, items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(Path(item.path).stem, len(LONG)))
    for marker, is_available in (("gpu", _has_gpu), ("te", lambda: HAS_TRANSFORMER_ENGINE)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_available():
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
