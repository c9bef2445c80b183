"""Rows of fixed shape from a shared prefix and the branches that continue it.

A prefix is what several continuations share (a system prompt, a picture); a branch is one of them (a question about
that picture with its answer). A branch sees the prefix and itself, never another branch, so a picture is encoded and
stored once for all its questions and the numbers are those of separate sequences. Branches are packed, first fit, into
blocks that none of them crosses, which `nn.attention.attend_packed` uses.
"""

import dataclasses

import numpy as np

from qwenvl_jax.processing.template import IGNORED, Segment


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static shape of a row in tokens: a prefix, then `blocks` blocks of `block`; at most `targets` are trained."""

    prefix: int
    blocks: int
    block: int
    targets: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.blocks * self.block


def pack_branches(prefix: Segment, branches: list[tuple[Segment, list[int]]], shape: RowShape) -> dict[str, np.ndarray]:
    """One row of a prefix and as many of its branches, in order, as fit; the others are left out.

    A branch is a segment and its labels (unshifted, IGNORED where nothing is trained). Returns int32 arrays: ids,
    slots, positions and group [T] (positions count on from the prefix in each branch; group is 1, or 0 for padding),
    branch [blocks, block] (which branch a token belongs to), target_positions, targets and target_branch [targets] (the
    token that predicts each trained token, the trained token, IGNORED where there is none, and its branch, counted from
    1). Raises ValueError when the prefix or every branch is too long.
    """
    if len(prefix) > shape.prefix:
        raise ValueError(f"a prefix of {len(prefix)} tokens does not fit into the {shape.prefix} of a row")
    row = {name: np.zeros(shape.tokens, np.int32) for name in ("ids", "positions", "group", "branch")}
    row["slots"] = np.full(shape.tokens, -1, np.int32)
    row["target_positions"] = np.zeros(shape.targets, np.int32)
    row["targets"] = np.full(shape.targets, IGNORED, np.int32)
    row["target_branch"] = np.zeros(shape.targets, np.int32)
    _place(row, prefix, start=0, position=0, branch=0)
    used = [0] * shape.blocks
    trained = 0
    for number, (branch, labels) in enumerate(branches, start=1):
        block = next((i for i in range(shape.blocks) if used[i] + len(branch) <= shape.block), None)
        where = np.flatnonzero(np.asarray(labels) != IGNORED)
        if block is None or trained + len(where) > shape.targets:
            continue
        start = shape.prefix + block * shape.block + used[block]
        _place(row, branch, start=start, position=len(prefix), branch=number)
        # The token before a target predicts it; before a branch's first token stands the end of the prefix.
        places = slice(trained, trained + len(where))
        row["target_positions"][places] = np.where(where > 0, start + where - 1, len(prefix) - 1)
        row["targets"][places], row["target_branch"][places] = np.asarray(labels)[where], number
        used[block] += len(branch)
        trained += len(where)
    if not trained:
        raise ValueError(f"no branch fits into blocks of {shape.block} tokens, or none has a trained token")
    return row | {"branch": row["branch"][shape.prefix :].reshape(shape.blocks, shape.block)}


def _place(row: dict[str, np.ndarray], tokens: Segment, *, start: int, position: int, branch: int) -> None:
    """Writes a run of tokens into the row at `start`."""
    end = start + len(tokens)
    row["ids"][start:end], row["slots"][start:end] = tokens.ids, tokens.slots
    row["positions"][start:end] = np.arange(position, position + len(tokens))
    row["group"][start:end], row["branch"][start:end] = 1, branch


def collate(rows: list[dict[str, np.ndarray]], queries: int, before: int = 0) -> dict[str, np.ndarray]:
    """A batch: token arrays stacked to [B, ...], pictures of all rows in one [I, ...] array, slots pointing into it.

    before: rows of the batch that stand before these, on other hosts; each has as many pictures as the first here.
    """
    batch = {}
    for name in rows[0]:
        per_picture = name == "pixels" or name.startswith("cell/")
        batch[name] = np.concatenate([r[name] for r in rows]) if per_picture else np.stack([r[name] for r in rows])
    counts = [before * len(rows[0]["pixels"]), *(len(r["pixels"]) for r in rows[:-1])]
    first = np.cumsum(counts)[:, None] * queries
    batch["slots"] = np.where(batch["slots"] >= 0, batch["slots"] + first, -1).astype(np.int32)
    return batch
