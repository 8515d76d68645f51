"""Every benchmark there is, by name."""

from benchmarks import (
    attention,
    attention_profile,
    context_parallel,
    decode,
    device,
    offload,
    offload_timeline,
    quickstart,
    training_step,
)
from benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        device.BENCHMARK,
        attention.BENCHMARK,
        attention_profile.BENCHMARK,
        training_step.BENCHMARK,
        context_parallel.BENCHMARK,
        offload.BENCHMARK,
        offload_timeline.BENCHMARK,
        decode.BENCHMARK,
        quickstart.BENCHMARK,
    )
}
