"""Interleaved CPU/GPU/NVMe optimizer offload."""
