"""S2 attention as a Megatron core attention module."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide, get_pg_rank, get_pg_size
from torch import Tensor

from megatron_s2.kernels import s2_attention
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.cached_attention import cached_attention
from megatron_s2.layers.packed_row import packed_row
from megatron_s2.parallel.collectives import ContextParallelGroup, Traffic
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.cost import AttentionCall
from megatron_s2.parallel.gather_plan import Documents
from megatron_s2.parallel.planner import choose
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.annealing import Annealing

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class S2CoreAttention(MegatronModule):
    """Core attention of one layer: S2, or dense causal attention if `settings` keep the layer dense.

    The choice, and the phases of the heads, depend on the global layer number and the global heads of this
    tensor-parallel rank, so that the model is the same in every parallel layout. The pattern is not part of
    the state: a checkpoint contains at most the sink logits.

    Args:
        config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
            pg_collection: as in every core attention module of Megatron.
        settings: S2 settings of the whole model.
        backend: implementation of S2 attention.
        autotune: whether to measure which tiles of the Triton kernels are fastest.
        cp_schedule: schedule of context parallelism: `auto`, `gather` or `a2a`.
        cluster: rates from which `auto` predicts the faster schedule.
        traffic: counters of the bytes that context parallelism exchanges in training.
        annealing: annealing schedule of the run; None without annealing.

    Attributes:
        kv_cache: cache of the earlier tokens in generation, to which `forward` appends the new ones.

    Raises:
        ValueError: the layer is not causal self-attention, or has dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        settings: S2Settings,
        backend: str = "auto",
        autotune: bool = False,
        cp_schedule: str = "auto",
        cluster: Cluster | None = None,
        traffic: Traffic | None = None,
        annealing: Annealing | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attention_type != "self":
            raise ValueError(f"attention_type {attention_type}: must be self: S2 attention is causal")
        if dropout:
            raise ValueError(f"--attention-dropout {dropout}: must be 0 with S2 attention")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = pg_collection.tp
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.tuning = "autotune" if autotune else None
        self.is_dense = settings.is_dense(layer_number)
        self.annealing = annealing
        target, tensor_parallel = settings.pattern(layer_number), get_pg_size(self.tp_group)
        heads = divide(config.num_attention_heads, tensor_parallel)
        self._kv_heads = max(1, settings.num_kv_heads // tensor_parallel)  # of this rank
        self._stages = tuple(
            pattern.tp_slice(get_pg_rank(self.tp_group), tensor_parallel).shared_by(self._kv_heads)
            for pattern in (annealing.stages(target) if annealing else (target,))
        )
        self.context_parallel = None
        if config.context_parallel_size > 1:
            self.context_parallel = ContextParallelGroup(pg_collection.cp, layer_number, traffic or Traffic())
            self.cp_schedule, self.cluster = cp_schedule, cluster
            # A plain `TransformerConfig` has no sequence length; the first call with a length then chooses.
            if (seq_length := getattr(config, "seq_length", None)) is not None:
                for pattern in self._stages:
                    self._choose_schedule(pattern, seq_length)
        self.kv_cache: KVCache | None = None
        self.current_max_attn_logits = None  # read by Megatron's qk-clip, which is refused with S2
        self._add_sink_logits(heads)

    @property
    def pattern(self) -> S2Pattern:
        """Pattern of the KV heads of this tensor-parallel rank in the current step; or of its query heads,
        where those of a group see different blocks."""
        return self.annealing.current(self._stages) if self.annealing else self._stages[-1]

    def _add_sink_logits(self, heads: int) -> None:
        """Adds the sink logits `[heads of this rank]` under Megatron's name, initialized to 0."""
        kind = self.config.softmax_type
        if kind == "vanilla":
            self.softmax_offset = None
            return
        zeros = torch.zeros(heads, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        if kind == "off-by-one":
            self.softmax_offset = zeros
            return
        self.softmax_offset = torch.nn.Parameter(zeros)
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Computes causal attention of the heads of this rank.

        Args:
            query: queries after the rotary embedding `[seq_q, batch, heads, head_dim]`; packed
                `[tokens, heads, head_dim]`.
            key, value: `[seq_k, batch, kv_heads, head_dim]`; packed `[tokens, kv_heads, head_dim]`. If there
                are more keys than queries, the queries are the last positions. With `kv_cache`, keys and
                values are those of the new tokens.
            attention_mask: ignored, because attention is causal within each document.
            attn_mask_type: a causal type, or `no_mask` for a single query.
            attention_bias: must be None.
            packed_seq_params: document boundaries of packed sequences (thd).

        Returns:
            `[seq_q, batch, heads * head_dim]`; packed `[tokens, heads * head_dim]`.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: must be None with S2 attention")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type not in _CAUSAL and not (mask_type == AttnMaskType.no_mask and query.shape[0] == 1):
            raise ValueError(f"attn_mask_type {mask_type.name}: must be causal with S2 attention")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if self.context_parallel is not None:
            if self.kv_cache is not None or q.shape[1] != k.shape[1]:
                raise ValueError("--context-parallel-size: must be 1 in generation with S2 attention")
            return self._attend_over_ranks(q, k, v).transpose(0, 1).flatten(2)
        if self.kv_cache is not None:
            out = self._attend_to_cache(q, k, v)
        elif self.is_dense and self.softmax_offset is None and q.shape[1] == k.shape[1]:
            out = _dense_causal(q, k, v, self.softmax_scale)
        else:
            out = self._attend(q, k, v, q_start=k.shape[1] - q.shape[1])
        return out.transpose(0, 1).flatten(2)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams) -> Tensor:
        if packed.qkv_format != "thd":
            raise ValueError(f"qkv_format {packed.qkv_format}: must be thd")
        padded = packed.cu_seqlens_q_padded
        row = packed_row(packed.cu_seqlens_q if padded is None else padded)
        if self.context_parallel is None:
            return self._attend(q, k, v, cu_seqlens=row.edges).flatten(1)
        if not getattr(packed, "s2_zigzag_over_row", False):
            raise ValueError(
                "packed_seq_params: must come from megatron_s2's entry point with context parallelism, which "
                "splits the row of packed documents as one sequence"
            )
        return self._attend_over_ranks(q[None], k[None], v[None], row.documents)[0].flatten(1)

    def _attend_over_ranks(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        group = self.context_parallel
        if not self.training:
            group = replace(group, traffic=Traffic())
        return context_parallel_attention(
            q,
            k,
            v,
            self.pattern,
            group,
            self._choose_schedule(self.pattern, tokens=q.shape[1] * group.ranks),
            softmax_scale=self.softmax_scale,
            sink_logits=self.softmax_offset,
            documents=documents,
            backend=self.backend,
        )

    def _choose_schedule(self, pattern: S2Pattern, tokens: int) -> str:
        """Returns the schedule of context parallelism for sequences of `tokens` tokens over all ranks."""
        tensor_parallel = get_pg_size(self.tp_group)
        call = AttentionCall(
            ranks=self.config.context_parallel_size,
            tokens=tokens,
            batch=1,
            query_heads=divide(self.config.num_attention_heads, tensor_parallel),
            head_dim=self.config.kv_channels,
            v_head_dim=self.config.kv_channels,
            element_size=self.config.params_dtype.itemsize,
            kv_group=pattern.num_kv_heads // self._kv_heads,
        )
        return choose(self.cp_schedule, pattern, call, self.cluster, tensor_parallel).schedule

    def _attend_to_cache(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cached_attention(
            q,
            k,
            v,
            self.kv_cache,
            softmax_scale=self.softmax_scale,
            sink_logits=self.softmax_offset,
            new=self.kv_cache.incoming,
            backend=self.backend,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **positions) -> Tensor:
        return s2_attention(
            q,
            k,
            v,
            self.pattern,
            softmax_scale=self.softmax_scale,
            sink_logits=self.softmax_offset,
            return_lse=False,
            backend=self.backend,
            tuning=self.tuning,
            **positions,
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Returns the sink logits, sharded over tensor-parallel ranks by head, for Megatron's checkpoints."""
        learned = (
            self.state_dict(prefix="", keep_vars=True) if self.config.softmax_type == "learnable" else {}
        )
        return make_sharded_tensors_for_checkpoint(
            learned,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _dense_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Returns dense causal attention of `[batch, seq, heads, head_dim]`, by PyTorch's SDPA."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
