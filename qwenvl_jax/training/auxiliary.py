"""What replaces the CLIP initialisation when a small model is trained from nothing.

Qwen-VL starts from OpenCLIP, whose patches already know what they show. From random weights the next-token loss alone
leaves a small model blind for very long. Two things help: `start_local`, an initialisation under which every resampler
query begins by reading its own part of the picture, and `CellHead`, a classifier on the visual features that must name
what covers each cell. Both leave no trace in the checkpoint: the head is dropped, the initialisation is only a start.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import VisionConfig
from qwenvl_jax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class CellTargets:
    """How many classes each label of a cell has; a label of 0 means nothing is there."""

    color: int
    shape: int
    size: int
    glyph: int

    @property
    def classes(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class CellHead(nnx.Module):
    """Names, for every query, what covers each of the `cells` x `cells` parts of its share of the picture."""

    def __init__(self, config: VisionConfig, targets: CellTargets, *, cells: int, rngs: nnx.Rngs):
        self.cells, self.query_grid, self.classes = cells, config.query_grid, targets.classes
        outputs = sum(self.classes.values()) + 4
        shape, axes = (cells * cells, outputs), ("embed", None, None)
        self.linear = Linear(config.output_dim, shape, axes=axes, bias=True, dtype=jnp.float32, rngs=rngs)

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        """features [I, Q, D] -> float32 [I, G*G, classes] per label and "box" [I, G*G, 4], with G = cells * sqrt(Q)."""
        images, side, cells = features.shape[0], self.query_grid, self.cells
        out = self.linear(features.astype(jnp.float32)).reshape(images, side, side, cells, cells, -1)
        out = out.transpose(0, 1, 3, 2, 4, 5).reshape(images, (side * cells) ** 2, -1)
        ends = np.cumsum(list(self.classes.values())).tolist()
        parts = jnp.split(out, ends, axis=-1)
        return dict(zip([*self.classes, "box"], parts, strict=True))


def cell_loss(predictions: dict[str, jax.Array], labels: dict[str, jax.Array]) -> jax.Array:
    """Mean over labels of the cross-entropy, and of the absolute error of the box, where there is something to name.

    Cells without a label count half as much, all together, as those that have one: most of a picture is empty.
    """
    total = jnp.zeros(())
    for name, logits in predictions.items():
        if name == "box":
            error = jnp.abs(jax.nn.sigmoid(logits) - labels["box"]).sum(-1) * labels["mask"]
            total += 4.0 * error.sum() / jnp.maximum(labels["mask"].sum(), 1)
        else:
            log_p = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_p, labels[name][..., None], axis=-1)[..., 0]
            named = labels[name] > 0
            total += (nll * named).sum() / jnp.maximum(named.sum(), 1)
            total += 0.5 * (nll * ~named).sum() / jnp.maximum((~named).sum(), 1)
    return total / len(predictions)


def start_local(model, *, frequencies: int = 8, sharpness: float = 6.0):
    """The model with a resampler whose queries begin by attending to their own neighbourhood.

    Query and key see only the fastest `frequencies` sines and cosines of the position table, amplified by `sharpness`,
    so that the score of a patch falls with its distance from the query's cell; the patch content is kept out of those
    dimensions. Value and output projections start as a pass-through.
    """
    resampler = model.visual.resampler
    dim, width = resampler.config.output_dim, resampler.config.width
    quarter = dim // 4
    positional = np.zeros(dim, bool)
    for start in range(0, dim, quarter):  # sin x, cos x, sin y, cos y
        positional[start : start + frequencies] = True
    free = np.flatnonzero(~positional)

    kv = np.zeros((width, dim), np.float32)
    rng = np.random.default_rng(0)
    rows = min(width, len(free))
    orthogonal = np.linalg.qr(rng.normal(size=(max(width, len(free)),) * 2))[0][:width, : len(free)]
    kv[:, free] = orthogonal * (width / rows) ** 0.5
    # The norm after it subtracts the mean of all dimensions, which must not shift the positional ones.
    kv[:, free] -= kv[:, free].mean(axis=1, keepdims=True)
    heads = resampler.attention.heads
    gain = np.diag(positional.astype(np.float32)) * sharpness * (dim / heads / 128) ** 0.25
    qkv = np.stack([gain, gain, np.eye(dim, dtype=np.float32)], axis=1)

    resampler.kv.kernel[...] = jnp.asarray(kv, resampler.kv.kernel[...].dtype)
    resampler.attention.qkv.kernel[...] = jnp.asarray(qkv, resampler.attention.qkv.kernel[...].dtype)
    resampler.attention.out.kernel[...] = jnp.eye(dim, dtype=resampler.attention.out.kernel[...].dtype)
    resampler.norm_query.scale[...] = jnp.full_like(resampler.norm_query.scale[...], 0.1)
    return model
