"""Hidden states of a mixture of candidates; their gradients say what each candidate of each head does.

Each head's attention output is the mean of its candidates' outputs with weights alpha, which sum to one;
plans are the corners of that set. DuoAttention (arXiv 2410.10819) mixes full and streaming attention so;
here there are more candidates. One pass over the keys serves all of them: with E = exp(scores), the sums
S[r, j] of E over key block j give each candidate's denominator D[c, r] = sum over its blocks of S[r, j],
and

    out[r] = sum over keys t of E[r, t] W[r, block(t)] v[t]
    W[r, j] = sum over candidates c that see block j of alpha[c] / D[c, r]

so that candidates cost blocks, not keys. Only some rows of a text are computed (a *probe*); the keys and
values before them come from a run of the text with a given pattern (a *context*). No matrix of rows x
keys of a whole text is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_s2.calibration.candidates import Candidates
from megatron_s2.calibration.layered_model import Attend, LayeredModel

# Of a candidate that sees only keys with scores far below the largest one.
_SMALLEST = 1e-30
# Memory that a backward may keep of all layers; beyond it layers are computed again.
_KEPT_BYTES, _BYTES_PER_SCORE = 4 * 2**30, 16


@dataclass(frozen=True)
class Probe:
    """Rows of a text that are computed.

    Args:
        tokens: int64 `[inputs + 1]`.
        start: first row that is computed, a multiple of the block size.
        scored: number of rows whose loss counts, the last ones.
        context: number of the context that has the keys and values before `start`.
    """

    tokens: Tensor
    start: int
    scored: int
    context: int = 0

    @property
    def rows(self) -> int:
        return len(self.tokens) - 1 - self.start

    @property
    def labels(self) -> Tensor:
        """The tokens after the scored rows, `[scored]`."""
        return self.tokens[-self.scored :]


@dataclass(frozen=True)
class Context:
    """Keys and values of a text before the rows of probes: for each layer `[tokens, kv_heads, head_dim]`."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def run(cls, model: LayeredModel, tokens: Tensor, attend: Attend) -> Context:
        """Runs tokens, int64 `[tokens]`, with an attention."""
        keys, values = [], []

        def attend_and_keep(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            keys.append(k[0].clone())
            values.append(v[0].clone())
            return attend(layer, q, k, v, scale)

        with torch.no_grad():
            model.run(tokens, attend_and_keep)
        return cls(keys, values)


class Relaxation:
    """The mixture of candidates in a model.

    Args:
        model: the model.
        candidates: what each head is a mixture of.
    """

    def __init__(self, model: LayeredModel, candidates: Candidates) -> None:
        self._model, self._candidates = model, candidates
        self._masks: dict[int, Tensor] = {}

    def hidden(self, probe: Probe, context: Context, alpha: Tensor) -> Tensor:
        """Returns the hidden states `[1, scored, hidden]` of a probe's scored rows after the last layer.

        They are differentiable with respect to `alpha`.

        Args:
            alpha: float32 `[layers, kv_heads, rows, candidates]`, which sum to one over candidates; rows from
                `probe.start` on.
        """
        model, start = self._model, probe.start
        hidden = model.embed(probe.tokens[start:-1])
        rotary = model.rotary(start, hidden)
        rows = range(start // self._candidates.block_size, self._row(len(probe.tokens) - 2) + 1)
        masks = [self._mask(row) for row in rows]

        def layer(index: int, hidden: Tensor, weights: Tensor) -> Tensor:
            def attend(_, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
                k = torch.cat([context.keys[index][:start], k[0]])
                v = torch.cat([context.values[index][:start], v[0]])
                seen = [mask[index] for mask in masks]
                return mixed_attention(q[0], k, v, weights, seen, scale, self._candidates.block_size)[None]

            return model.layer(index, hidden, rotary, attend)

        scores = hidden.shape[1] * len(probe.tokens) * model.num_heads * model.num_layers
        for index in range(model.num_layers):
            if _BYTES_PER_SCORE * scores <= _KEPT_BYTES:
                hidden = layer(index, hidden, alpha[index])
            else:
                hidden = checkpoint(layer, index, hidden, alpha[index], use_reentrant=False)
        return hidden[:, -probe.scored :]

    def _row(self, position: int) -> int:
        return position // self._candidates.block_size

    def _mask(self, row: int) -> Tensor:
        if row not in self._masks:
            self._masks[row] = torch.from_numpy(self._candidates.masks(row)).to(
                self._model.device, torch.float32
            )
        return self._masks[row]


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, masks: Sequence[Tensor], scale: float, block_size: int
) -> Tensor:
    """Returns the mean of the candidates' attention outputs, `[rows, heads, head_dim]`.

    Args:
        q: `[rows, heads, head_dim]`, the last tokens of the keys, from the start of a block on.
        k, v: `[keys, kv_heads, head_dim]`.
        weights: float32 `[kv_heads, rows, candidates]`.
        masks: for each block of rows, the key blocks that each candidate sees, up to that of the rows;
            float32 `[kv_heads, candidates, blocks]`.
    """
    rows, keys, kv_heads = q.shape[0], k.shape[0], k.shape[1]
    q = (q * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, R, d]
    out = []
    for index, mask in enumerate(masks):
        of_block = slice(index * block_size, (index + 1) * block_size)
        part = q[:, :, of_block]
        size, blocks = part.shape[2], mask.shape[-1]
        seen = keys - rows + index * block_size + size  # keys up to the last of these rows
        scores = part.flatten(1, 2) @ k[:seen].permute(1, 2, 0)
        scores = scores.float().unflatten(1, (-1, size))  # [Hkv, G, R, T]
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        scores[..., seen - size :].masked_fill_(future, -torch.inf)
        e = scores.sub_(scores.detach().amax(-1, keepdim=True)).exp_()
        if padding := blocks * block_size - seen:
            e = F.pad(e, (0, padding))
        e = e.unflatten(-1, (blocks, block_size))
        denominators = torch.einsum("hgrj,hcj->hgrc", e.sum(-1), mask).clamp(min=_SMALLEST)
        shares = torch.einsum("hgrc,hcj->hgrj", weights[:, None, of_block] / denominators, mask)
        p = (e * shares[..., None]).to(v.dtype).flatten(-2)[..., :seen]
        mixed = p.flatten(1, 2) @ v[:seen].transpose(0, 1)  # [Hkv, G*R, d]
        out.append(mixed.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(out)
