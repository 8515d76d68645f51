"""Context parallelism by head-shard assignment."""
