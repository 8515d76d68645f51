"""What megatron-s2 claims to be faster or smaller at, measured. `scripts/bench.py` runs it.

registry          every benchmark, by name
attention         S2 attention against dense attention and others on the same inputs, made of
                  cases, implementations, exactness and attention_report
context_parallel  bytes and time of S2 attention over ranks of this machine
measure           time and memory of a function
environment       what a row must say about machine, versions and commit
results           rows on disk
"""
