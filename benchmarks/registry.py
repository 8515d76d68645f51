"""All benchmarks by name."""

from benchmarks import (
    attention,
    attention_profile,
    context_parallel,
    decode,
    device,
    generation,
    host_time,
    offload,
    offload_timeline,
    patterns,
    prefixes,
    quality,
    quickstart,
    training_step,
)
from benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        device,
        attention,
        attention_profile,
        host_time,
        training_step,
        context_parallel,
        offload,
        offload_timeline,
        decode,
        prefixes,
        generation,
        patterns,
        quality,
        quickstart,
    )
}
