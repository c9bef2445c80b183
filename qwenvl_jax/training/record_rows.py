"""The forward pass over rows of whole records: the numbers of each record alone, in fewer and fuller rows."""

import jax
import jax.numpy as jnp

from qwenvl_jax.models.qwen_vl import Remat, frequencies
from qwenvl_jax.nn.row_attention import PackedRows


def record_hidden(model, batch: dict[str, jax.Array], *, longest: int, remat: Remat = "none"):
    """Last hidden states [B, T, D] and picture features [I, Q, D] (None without pictures), in training mode.

    batch: see `data.record_batches.RecordBatches`; `longest` is that source's and static. As `step.packed_hidden`,
    which is for rows of branches.
    """
    features = model.encode_images(batch["pixels"]) if "pixels" in batch else batch.get("features")
    rows = batch["ids"].shape[0]
    context = model.context(
        PackedRows(batch["group"], longest, batch.get("branch")),
        batch["positions"],
        jnp.asarray(frequencies(model.config, [0])).repeat(rows, axis=0),
        training=True,
    )
    return model(model.embed(batch["ids"], features, batch["slots"]), context, remat=remat)[0], features
