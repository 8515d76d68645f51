"""What megatron-s2 claims to be faster or smaller at, measured; `scripts/bench.py` runs it.

benchmark, registry  interface of a benchmark; all benchmarks by name
device               what plain work reaches on the device
attention            S2 attention against dense attention and others on the same inputs; made of cases,
                     implementations, exactness (the check before timing) and attention_trial
attention_profile    kernels and hardware counters of an attention call
host_time            host time of a layer's attention around the launches of its kernels
training_step        a whole training step, S2 against dense
context_parallel     bytes and time of S2 attention on local_ranks, ranks of this machine
offload              optimizer offload in training, of offload_cases; offload_timeline, one step of it;
                     offload_schedules, other schedules simulated beside ours
decode               attention of a decoded token over the small cache and over everything
prefixes             prompts with a common prefix, prefilled once and each by itself
patterns             what patterns cost a pretrained model: loss, needles found
quickstart           the quickstart's time and losses
training_process     a Megatron training in a process of its own
measure, options     time and memory of functions; options that benchmarks share
environment          what a row says about machine, versions and commit
results, display     rows on disk; rows in tables and pictures
targets              what must be reached on a GPU; results_page: docs/results.md from the rows
tests_passed         a pytest plugin that stores a row for each test
"""
