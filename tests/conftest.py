"""What all tests share: tests marked `gpu` are left out where there is no CUDA device; long
files go first; one thread for those that ask."""

from pathlib import Path

import pytest

# A worker that began one of these last would leave the other without work. Longest first.
LONG = (
    "test_pretrain",
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


def pytest_collection_modifyitems(config, items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(Path(item.path).stem, len(LONG)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="module")
def one_thread():
    """At the sizes of tests, threads cost more than they bring, many times more on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
