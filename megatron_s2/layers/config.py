"""The S2 fields of Megatron's transformer configuration.

Megatron copies each argument into the field of the same name, so that every layer has the `--s2-…` flags in
its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_s2.layers.arguments import from_s2_fields
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Settings


@dataclass
class S2TransformerConfig(TransformerConfig):
    """Megatron's `TransformerConfig` with the fields of `S2Settings` and `Cluster`, prefixed by `s2_`.

    With `seq_length` (`--seq-length`), layers choose their context-parallel schedules when they are built.

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
    s2_layers: tuple | None = S2Settings.layers
    s2_pattern_heads: int | None = S2Settings.pattern_heads
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
    """Returns the S2 settings of a transformer configuration; the defaults for one without S2 fields.

    Args:
        config: configuration of the model. In that of a layer, `num_query_groups` may be padded to the
            tensor-parallel size.
        overrides: fields of `S2Settings` that replace those of the configuration.
    """
    model = {"num_layers": config.num_layers, "num_kv_heads": config.num_query_groups}
    settings = from_s2_fields(S2Settings, config, **model | overrides)
    settings.check_query_heads(config.num_attention_heads)
    return settings


def cluster_of(config: TransformerConfig) -> Cluster:
    """Returns the planner's rates of a transformer configuration; the defaults for one without S2 fields."""
    return from_s2_fields(Cluster, config)
