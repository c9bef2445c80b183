"""The features of a run's pictures, encoded once before the first step, where the vision tower is not trained."""

import dataclasses
from collections.abc import Set
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from qwenvl_jax.checkpoints.huggingface import host_value
from qwenvl_jax.config import UserError
from qwenvl_jax.data.feature_cache import FeatureCache
from qwenvl_jax.data.measure import FEW, Source
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn.lora import copy
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class PictureCache:
    """Features in the folder `features` of the run, and the model whose vision tower, whole on this host, makes them.

    The hosts of a cluster share that folder, as they share the run's checkpoints: each encodes the pictures of its
    share of the records, and waits for the others.
    """

    features: FeatureCache
    model: QwenVL

    def fill(self, records: Source, processor: Processor, workers: int) -> None:
        """Encodes what is missing of the pictures of all records."""
        own = _EveryNth(records, jax.process_index(), jax.process_count())
        self.features.fill(self.model, own, processor, workers=workers if len(own) > FEW else 0)
        multihost_utils.sync_global_devices("all pictures are encoded")


@dataclasses.dataclass(frozen=True)
class _EveryNth:
    """The records `first`, `first + step`, ... of a source."""

    source: Source
    first: int
    step: int

    def __len__(self) -> int:
        return len(range(self.first, len(self.source), self.step))

    def __getitem__(self, index: int):
        return self.source[self.first + index * self.step]


def open_cache(recipe: Recipe, model: QwenVL, trained: Set[str]) -> PictureCache | None:
    """The cache of a run that wants one. model: as it is trained, `trained` the paths of what moves.

    Raises UserError where some of the vision tower moves: its features would change with every step.
    """
    if recipe.records is None or not recipe.records.cache_features:
        return None
    moving = sorted(path for path in trained if path.startswith("model.visual."))
    if moving:
        freeze = "--parts.vision.freeze and --parts.resampler.freeze" if recipe.lora is None else "leave it out of lora"
        raise UserError(f"records.cache_features: the vision tower is trained ({moving[0]}); {freeze}, or do not cache")
    tower = copy(model)
    tower.visual = jax.tree.map(
        lambda leaf: jax.device_put(host_value(leaf, None), jax.local_devices()[0]), model.visual
    )
    return PictureCache(FeatureCache(Path(recipe.output).absolute() / "features", tower), tower)
