"""The losses of a run: read from the tensorboard files that Megatron writes, and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_s2.report.figure import Colour, new_figure, save_figure

TRAIN_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"


def read_scalars(log_dir: str | Path, tag: str) -> dict[int, float]:
    """Returns the values that a run logged under a tensorboard tag, by iteration.

    For an iteration that a resumed run repeated, the later value counts.

    Args:
        log_dir: `--tensorboard-dir` of the run; resumed runs add files to it.
        tag: name of the scalar in tensorboard.

    Raises:
        ValueError: there is no such directory, or nothing was logged under that tag.
    """
    if not Path(log_dir).is_dir():
        raise ValueError(f"{log_dir}: there is no such directory")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise ValueError(f"{log_dir}: must hold tensorboard scalars named {tag!r}")
    return {event.step: event.value for event in events.Scalars(tag)}


@dataclass(frozen=True)
class Losses:
    """Training and validation loss by iteration, in nats per token."""

    train: dict[int, float]
    validation: dict[int, float]

    @classmethod
    def read(cls, log_dir: str | Path) -> Losses:
        """Reads the losses of the run that logged to `log_dir`.

        Raises:
            ValueError: there is no such directory, or one of the losses was not logged.
        """
        return cls(read_scalars(log_dir, TRAIN_LOSS), read_scalars(log_dir, VALIDATION_LOSS))

    @property
    def untrained(self) -> float:
        """Loss of the untrained model: the loss of the first batch, before the first update."""
        return self.train[min(self.train)]

    @property
    def last_validation(self) -> float:
        return self.validation[max(self.validation)]

    def __str__(self) -> str:
        return (
            f"validation loss {self.last_validation:.3f} after {max(self.validation)} steps; the untrained "
            f"model's loss was {self.untrained:.3f}: {self.untrained - self.last_validation:.2f} nats better"
        )


def draw_losses(losses: Losses, path: str | Path, title: str | None = None) -> None:
    """Draws both losses over the iterations to `path`, a PNG or an SVG by its suffix.

    Raises:
        ValueError: another suffix.
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.2, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*sorted(losses.train.items())), color="#7fb2dd", linewidth=1.2, label="train")
    axes.plot(
        *zip(*sorted(losses.validation.items())),
        color=Colour.NAVY,
        marker="o",
        markersize=4,
        label="validation",
    )
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=Colour.PALE)
    axes.legend(frameon=False)
    save_figure(figure, path)
