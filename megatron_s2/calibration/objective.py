"""What calibration makes small, on sampled rows: how far predictions on texts are from the dense model's, and
the loss of needles' answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_s2.calibration.candidates import Candidates, Plan
from megatron_s2.calibration.layered_model import LayeredModel, dense_attention, pattern_attention
from megatron_s2.calibration.needles import Needle
from megatron_s2.calibration.relaxation import Context, Probe, Relaxation
from megatron_s2.pattern import S2Settings

# Loss of a token that is certainly the most probable one.
_FOUND = 0.693
# Half of the Fisher information is the curvature of one head's change. Heads that change together in one plan
# add to each other's, so that all of it is taken.
_CURVATURE = 1.0


@dataclass(frozen=True)
class Value:
    """Losses in nats per token.

    Args:
        text: Kullback-Leibler divergence of the predictions from the dense model's, a mean over the texts'
            rows. Where the dense model's probabilities are right, that is the loss over dense, without the
            noise of the tokens that happen to follow.
        needles: cross entropy of the answers of the needles; 0 without needles.
        found: share of the needles whose every token has a loss below log 2, which greedy decoding finds.
        total: `text + needle_weight * needles`.
    """

    text: float
    needles: float
    found: float
    total: float

    def __str__(self) -> str:
        needles = f"needles {self.needles:.3f} ({self.found:.0%} found)"
        return f"text {self.text:.4f}, {needles}, total {self.total:.4f}"


class Objective:
    """Text and needle losses of a model under a plan or a mixture of candidates.

    The keys and values before the sampled rows are those of a run of the whole text: dense at first, with a
    pattern after `refresh`.

    Args:
        model, candidates: the model and what its heads may have.
        texts: texts, each int64 `[seq_length + 1]`.
        needles: needles in other texts; those of one text together, as `hide_needles` returns them.
        needle_weight: weight of the needles' loss against that of the texts.
        rows: number of rows that a probe of a text has. Each text has two, and all lie spread evenly over the
            last seven eighths of the texts: before, patterns hardly differ.
    """

    def __init__(
        self,
        model: LayeredModel,
        candidates: Candidates,
        texts: Sequence[Tensor],
        needles: Sequence[Sequence[Needle]],
        needle_weight: float,
        rows: int,
    ) -> None:
        self._model, self._candidates = model, candidates
        self._relaxation = Relaxation(model, candidates)
        self.needle_weight = needle_weight
        self._texts = _text_probes(texts, rows, candidates.block_size)
        self._needles = [
            _needle_probe(needle, len(texts) + place, candidates.block_size)
            for place, of_text in enumerate(needles)
            for needle in of_text
        ]
        self._contexts: list[Context] = []
        self._dense = self._dense_rows(texts)

    def refresh(self, settings: S2Settings | None) -> None:
        """Computes the keys and values before the rows with a pattern; None for dense attention."""
        attend = pattern_attention(settings)
        last: dict[int, Probe] = {}
        for probe in (*self._texts, *self._needles):
            if probe.context not in last or probe.start > last[probe.context].start:
                last[probe.context] = probe
        self._contexts = []  # frees the memory of the old ones
        for _, probe in sorted(last.items()):
            self._contexts.append(Context.run(self._model, probe.tokens[: probe.start], attend))

    @torch.no_grad()
    def _dense_rows(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Returns the dense model's hidden states after the last layer, for each probe of the texts."""
        dense: list[Tensor] = [torch.empty(0)] * len(self._texts)
        for context, text in enumerate(texts):
            places = [place for place, probe in enumerate(self._texts) if probe.context == context]
            last = max(len(self._texts[place].tokens) for place in places)
            hidden = self._model.run(text[: last - 1], dense_attention)
            for place in places:
                probe = self._texts[place]
                dense[place] = hidden[:, probe.start : probe.start + probe.rows].clone()
        return dense

    def value(self, plan: Plan) -> Value:
        """Returns the losses with a plan."""
        value, _ = self._evaluate(lambda: self.corner(plan), with_effects=False)
        return value

    def effects(self, mixture: Tensor | Callable[[], Tensor]) -> tuple[Value, Tensor]:
        """Returns the losses of a mixture, and what each candidate would do to their total in its place.

        With g[r] the gradient of the summed loss with respect to the output of a head at row r, h[r] that of
        the summed cross entropy, and d[c, r] the output of candidate c minus that of the mixture, the effect
        of c is the sum over rows of

            g[r] d[c, r] + curvature (h[r] d[c, r])^2

        The second term is the diagonal of the Fisher information, half of which is the curvature of the loss
        where the model predicts well (Martens 2020, section 5). Without it a candidate that changes much
        would seem harmless where gradients cancel on average. It needs the cross entropy on texts, too: the
        divergence from the dense model has no gradient there.

        Args:
            mixture: `[layers, heads, candidates]`; or a function that returns another one for each text and
                needle.

        Returns:
            The losses, and effects `[layers, heads, candidates]` on the CPU.
        """
        return self._evaluate(mixture if callable(mixture) else lambda: mixture, with_effects=True)

    def corner(self, plan: Plan) -> Tensor:
        """Returns the mixture that is a plan, `[layers, heads, candidates]`."""
        candidates = self._candidates
        alpha = torch.zeros(candidates.num_layers, candidates.num_kv_heads, len(candidates.all))
        alpha.scatter_(2, torch.from_numpy(candidates.places(plan))[..., None], 1.0)
        return alpha.to(self._model.device)

    def _evaluate(self, mixture: Callable[[], Tensor], with_effects: bool) -> tuple[Value, Tensor | None]:
        means, found, effects = [], 0, 0.0
        for probes, weight in ((self._texts, 1.0), (self._needles, self.needle_weight)):
            total = 0.0
            for place, probe in enumerate(probes):
                share = 1 / (len(probes) * probe.scored)
                of_rows = mixture()[:, :, None].repeat(1, 1, probe.rows, 1).requires_grad_(with_effects)
                with torch.set_grad_enabled(with_effects):
                    hidden = self._relaxation.hidden(probe, self._contexts[probe.context], of_rows)
                    losses = entropies = self._model.token_losses(hidden, probe.labels)
                    if probes is self._texts:
                        losses = self._model.divergences(hidden, self._dense[place])
                if with_effects:
                    slopes = others = _gradient(entropies, of_rows)
                    if losses is not entropies:
                        slopes = _gradient(losses, of_rows)
                    effects += weight * share * (slopes + _CURVATURE * others**2).sum(2)
                total += share * losses.sum().item()
                found += probes is self._needles and bool((losses < _FOUND).all())
            means.append(total)
        text, needles = means
        value = Value(text, needles, found / max(1, len(self._needles)), text + self.needle_weight * needles)
        return value, effects.cpu() if with_effects else None


def _gradient(losses: Tensor, alpha: Tensor) -> Tensor:
    """Returns the gradient of the summed losses, less its component along the mixture: of what a candidate in
    place of the mixture does."""
    [gradient] = torch.autograd.grad(losses.sum(), alpha, retain_graph=True)
    return gradient - (gradient * alpha.detach()).sum(-1, keepdim=True)


def _text_probes(texts: Sequence[Tensor], rows: int, block_size: int) -> list[Probe]:
    """Returns two probes of each text: of text n of N those at n and N + n of 2 N places."""
    probes = []
    for index in range(2 * len(texts)):
        context = index % len(texts)
        text, inputs = texts[context], len(texts[context]) - 1
        last = (inputs - rows) // block_size
        first = min(last, inputs // block_size // 8)
        start = round(first + (index + 0.5) / (2 * len(texts)) * (last - first)) * block_size
        probes.append(Probe(text[: start + rows + 1], start, min(rows, inputs - start), context))
    return probes


def _needle_probe(needle: Needle, context: int, block_size: int) -> Probe:
    first = len(needle.tokens) - 1 - needle.answer - needle.question
    return Probe(needle.tokens, first // block_size * block_size, needle.answer, context)
