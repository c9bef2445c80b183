"""Evaluation during training: loss and answers right, by kind of question, on validation scenes.

An answer counts as right when every one of its tokens is the likeliest given the true ones before it. That is cheap
and, for one-token answers, the same as asking; `evaluation/scenes.py` is the real examination.
"""

from collections.abc import Callable

import numpy as np

from qwenvl_jax.data.packing import collate
from qwenvl_jax.data.questions import KINDS
from qwenvl_jax.data.scene_rows import SceneRows


def validation_batches(rows: SceneRows, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches of a validation source, held in memory."""
    queries, size = rows.config.visual.n_queries, rows.batch_size
    return [collate([rows[i] for i in range(n * size, (n + 1) * size)], queries) for n in range(count)]


def evaluate(step: Callable, batches: list[tuple[dict, dict]]) -> dict[str, float]:
    """{"loss": mean over targets, "right/<kind>": share of answers right}; kinds that do not occur are absent.

    batches: each as it was made, and what of it goes to the devices. Batches of records have no kinds of answers.
    """
    names = ["", *KINDS, "conversation"]
    total = count = 0.0
    right = np.zeros(len(names))
    asked = np.zeros(len(names))
    for batch, placed in batches:
        batch_total, batch_count, hits = step(placed)
        total, count, hits = total + float(batch_total), count + float(batch_count), np.asarray(hits)
        for row in range(len(hits) if "target_branch" in batch else 0):
            branch = batch["target_branch"][row]
            for number in range(1, branch.max() + 1):
                where = branch == number
                kind = batch["branch_kind"][row, number]
                if where.any():
                    asked[kind] += 1
                    right[kind] += hits[row, where].all()
    result = {"loss": total / max(count, 1)}
    return result | {f"right/{names[k]}": right[k] / asked[k] for k in range(1, len(names)) if asked[k]}


def device_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the compiled step reads of a batch; the rest is for the host."""
    return {name: value for name, value in batch.items() if name not in ("target_branch", "branch_kind")}
