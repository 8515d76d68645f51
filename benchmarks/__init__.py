"""What megatron-s2 claims to be faster or smaller at, measured. `scripts/bench.py` runs it.

registry           every benchmark, by name
device             what plain work reaches on the device
attention          S2 attention against dense attention and others on the same inputs, made of
                   cases, implementations, exactness and attention_report
attention_profile  kernels and hardware counters of an attention call
training_step      a whole training step, S2 against dense
context_parallel   bytes and time of S2 attention over ranks of this machine
offload            optimizer offload in training; offload_timeline: one step of it, predicted and measured;
                   offload_schedules: other schedules simulated beside ours
decode             attention of a decoded token over the small cache and over everything
quickstart         the quickstart's time and losses
training_process   a Megatron training in a process of its own
measure            time and memory of a function
environment        what a row must say about machine, versions and commit
results            rows on disk
record             all that is claimed of a GPU, measured by one command
results_page       docs/results.md from the rows
"""
