"""The S2 fields of Megatron's transformer configuration.

Megatron copies every argument whose name is a field of the configuration class into it, so each `--s2-…`
flag of `arguments.py` arrives here, and with the configuration in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings


@dataclass
class S2TransformerConfig(TransformerConfig):
    """Megatron's `TransformerConfig` with S2 attention: fields of `S2Settings` and `Cluster`, prefixed `s2_`.

    `seq_length` (`--seq-length`) lets layers choose their context-parallel schedules when they are built.

    Raises:
        ValueError: as `S2Settings`.
    """

    seq_length: int | None = None
    s2_attention: bool = False
    s2_block_size: int = S2Settings.block_size
    s2_local_blocks: int = S2Settings.local_blocks
    s2_vert_stride: int | tuple[int, ...] = S2Settings.vert_stride
    s2_sink_blocks: int = S2Settings.sink_blocks
    s2_phases: tuple[int, ...] | None = S2Settings.phases
    s2_num_dense_heads: int = S2Settings.num_dense_heads
    s2_dense_layers: tuple[int, ...] = S2Settings.dense_layers
    s2_dense_layer_freq: int = S2Settings.dense_layer_freq
    s2_anneal_steps: int = 0
    s2_backend: str = "auto"
    s2_autotune: bool = False
    s2_cp_schedule: str = "auto"
    s2_gpus_per_node: int = Cluster.gpus_per_node
    s2_intra_gigabytes_per_s: float = Cluster.intra_gigabytes_per_s
    s2_inter_gigabytes_per_s: float = Cluster.inter_gigabytes_per_s
    s2_chip_tflops: float = Cluster.chip_tflops
    s2_efficiency: float = Cluster.efficiency

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s2_attention:
            s2_settings(self)


def s2_settings(config: TransformerConfig, **overrides) -> S2Settings:
    """The S2 settings of a transformer configuration; the defaults where it has no S2 fields.

    `overrides` are fields of `S2Settings` that count more than the configuration's.

    Must see the model's own configuration: in a layer, `num_query_groups` may be the one Megatron pads to
    the tensor-parallel size.
    """
    chosen = {
        name: getattr(config, f"s2_{name}")
        for name in S2Settings.__dataclass_fields__
        if hasattr(config, f"s2_{name}")
    }
    whole = {"num_layers": config.num_layers, "num_kv_heads": config.num_query_groups}
    return S2Settings(**whole | chosen | overrides)


def cluster_of(config: TransformerConfig) -> Cluster:
    """The planner's rates of a transformer configuration; the defaults where it has no S2 fields."""
    rates = {name: getattr(config, f"s2_{name}", default) for name, default in vars(Cluster()).items()}
    return Cluster(**rates)
