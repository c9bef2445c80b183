"""The parts of the model that a recipe can freeze or give a learning rate of their own."""

import dataclasses

from qwenvl_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """How one part of the model is trained."""

    freeze: bool = False
    learning_rate: float | None = None  # None: that of the optimizer

    def __post_init__(self):
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UserError(f"a part's learning_rate is {self.learning_rate}; it must be above 0; freeze holds it")


@dataclasses.dataclass(frozen=True)
class VisionPart(Part):
    """The vision tower's. `layer_decay`: each block of the ViT learns by this factor of the rate of the one above it.

    The patch embedding counts as a block below the first (Bao et al. 2022, BEiT); 1: all alike.
    """

    layer_decay: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"parts.vision.layer_decay is {self.layer_decay}; it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The four parts. `fix_vit` of the original is `vision.freeze`: its resampler goes on learning."""

    language: Part = dataclasses.field(default_factory=Part)  # decoder layers and the last norm
    embeddings: Part = dataclasses.field(default_factory=Part)  # token embeddings and the output head
    resampler: Part = dataclasses.field(default_factory=Part)  # queries, positions and cross-attention
    vision: VisionPart = dataclasses.field(
        default_factory=VisionPart
    )  # ViT, and the norm and projection after the resampler

    def of(self, path: str) -> Part:
        """The part that a parameter belongs to; what is not of the model (an auxiliary head) is trained as usual."""
        name = part_name(path)
        return Part() if name is None else getattr(self, name)


def part_name(path: str) -> str | None:
    """The field of Parts for a parameter path such as "model.visual.vit.positions"; None outside the model."""
    if not path.startswith("model."):
        return None
    if path.startswith("model.visual.resampler."):
        return "resampler"
    if path.startswith("model.visual."):
        return "vision"
    return "embeddings" if path.startswith(("model.embedding.", "model.lm_head.")) else "language"
