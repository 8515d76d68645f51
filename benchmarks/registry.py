"""Every benchmark there is, by name."""

from benchmarks import attention, context_parallel, decode, offload, quickstart
from benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        attention.BENCHMARK,
        context_parallel.BENCHMARK,
        decode.BENCHMARK,
        offload.BENCHMARK,
        quickstart.BENCHMARK,
    )
}
