"""Other rotary positions for a model, so that it can be trained on longer sequences than before."""

from dataclasses import dataclass, replace

from megatron_s2.checkpoint.families import FAMILIES
from megatron_s2.checkpoint.model_config import LLAMA3_POSITIONS, ModelConfig, Yarn
from megatron_s2.errors import InputError

SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class LongerContext:
    """Changes of a model's positions; None changes nothing.

    Args:
        max_position_embeddings: number of positions.
        rotary_base: base of the rotary frequencies.
        rope_scaling: one of `SCALINGS`, in the place of the model's own scaling.
        rope_scaling_factor: factor of that scaling, from the context that the model had without any.
    """

    max_position_embeddings: int | None = None
    rotary_base: int | None = None
    rope_scaling: str | None = None
    rope_scaling_factor: float | None = None

    def of(self, model: ModelConfig) -> ModelConfig:
        """Returns `model` with these changes.

        Raises:
            InputError: the family, or Megatron, has no such scaling for the model.
        """
        changes = {"max_position_embeddings": self.max_position_embeddings, "rotary_base": self.rotary_base}
        changes = {field: value for field, value in changes.items() if value is not None}
        return replace(model, **changes, **self._scaling(model))

    def _scaling(self, model: ModelConfig) -> dict[str, object]:
        kind, factor = self.rope_scaling, self.rope_scaling_factor
        if kind is None and factor is None:
            return {}
        if kind is None or factor is None:
            missing, given = "--rope-scaling", "--rope-scaling-factor"
            if factor is None:
                missing, given = given, missing
            raise InputError(f"{missing}: must be given with {given}")
        allowed = [name for name in SCALINGS if name in FAMILIES[model.family].rope_types]
        if kind not in allowed:
            rule = f"one of {', '.join(allowed)}" if allowed else "left out, with its factor"
            raise InputError(f"--rope-scaling {kind}: must be {rule} for a {model.family} model")
        if kind == "linear" and factor != int(factor):
            raise InputError(f"--rope-scaling-factor {factor:g}: must be a whole number with linear")
        positions = _original_positions(model)
        if kind == "llama3" and positions != LLAMA3_POSITIONS:
            raise InputError(
                f"--rope-scaling llama3: needs a model of {LLAMA3_POSITIONS} positions, fixed in Megatron; "
                f"this one has {positions}: use yarn"
            )
        return {
            "linear_factor": int(factor) if kind == "linear" else None,
            "llama3_factor": factor if kind == "llama3" else None,
            "yarn": Yarn(factor, positions) if kind == "yarn" else None,
        }


def _original_positions(model: ModelConfig) -> int:
    """Returns the context of a model, in tokens, before it was given the scaling that it has."""
    if model.yarn is not None:
        return model.yarn.original_positions
    if model.llama3_factor is not None:
        return LLAMA3_POSITIONS
    return model.max_position_embeddings // (model.linear_factor or 1)
