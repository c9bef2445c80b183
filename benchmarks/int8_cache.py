"""What a cache in 8 bits saves and costs: the same questions about scenes, through an engine with and without it.

Prints bytes per token, the share of right answers of both, and how many replies differ. The scenes are those of the
test split, about ten questions each, answered greedily. Needs no torch; the numbers do not depend on what else runs.
"""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import qwenvl_jax as qv
from qwenvl_jax.evaluation import scenes
from qwenvl_jax.inference.engine import CacheForm, Engine, EngineOptions
from qwenvl_jax.inference.requests import Request, Update
from qwenvl_jax.inference.steps import Past
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.processing.boxes import Box


@dataclasses.dataclass(frozen=True)
class Options:
    """Which model is asked what."""

    checkpoint: str = "tiny"
    scenes: int = 200
    slots: int = 16  # replies in progress at once
    max_length: int = 256  # of a prompt and its reply
    predictions: Path | None = None  # a folder for every reply of both, as `eval/scenes.py` writes them


class Reply(NamedTuple):
    """What `evaluate` reads of a reply."""

    text: str
    boxes: list[Box]


class EngineModel:
    """A model that answers through an engine, as `evaluate` asks it."""

    def __init__(self, options: Options, cache: CacheForm):
        vlm = qv.load(options.checkpoint)
        self.processor, self.defaults = vlm.processor, vlm.defaults
        tokenizer = vlm.processor.tokenizer
        self.stops = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
        chosen = EngineOptions(options.slots, options.max_length, cache=cache)
        self.engine = Engine(vlm.generator, token_bytes(tokenizer), chosen)
        self.engine.warm_up()
        self.engine.start()

    def batch(self, conversations: Sequence, max_new_tokens: int) -> list[Reply]:
        prompts = [self.processor.chat(messages) for messages in conversations]
        option = dataclasses.replace(self.defaults, temperature=0.0, max_new_tokens=max_new_tokens)
        updates: list[list[Update]] = [[] for _ in prompts]
        ended = threading.Semaphore(0)

        def listener(heard: list[Update]):
            def hear(update: Update) -> None:
                heard.append(update)
                if update.finish_reason is not None:
                    ended.release()

            return hear

        for prompt, heard in zip(prompts, updates, strict=True):
            self.engine.submit(Request(prompt, option, self.stops, strip=True), listener(heard))
        for _ in prompts:
            ended.acquire()
        if failed := [heard[-1].error for heard in updates if heard[-1].finish_reason == "error"]:
            raise RuntimeError(failed[0])
        texts = ["".join(update.text for update in heard) for heard in updates]
        boxes = [self.processor.boxes(text, prompt.sources) for text, prompt in zip(texts, prompts, strict=True)]
        return [Reply(*reply) for reply in zip(texts, boxes, strict=True)]


def bytes_per_token(past: Past) -> int:
    """Keys and values of all layers."""
    rows, slots = past.shape
    return sum(leaf.nbytes for leaf in jax.tree.leaves(past)) // (rows * slots)


def differences(plain: list[dict], int8: list[dict]) -> str:
    """What the replies of the second lines of predictions have that the first have not."""
    pairs = list(zip(plain, int8, strict=True))
    other = [pair for pair in pairs if pair[0]["reply"] != pair[1]["reply"]]
    right = [
        [scenes.score(scenes.question_of(line), line["reply"], line["boxes"])["right"] for line in pair]
        for pair in other
    ]
    moved = [
        np.max(np.abs(np.subtract(a["boxes"], b["boxes"])))
        for a, b in other
        if a["boxes"] and np.shape(a["boxes"]) == np.shape(b["boxes"])
    ]
    text = f"{len(other)} of {len(pairs)} replies differ: {right.count([True, False])} are right no more, "
    text += f"{right.count([False, True])} have become right"
    return text + (
        f"; boxes moved by {np.median(moved):.1f} pixels (median), {max(moved):.1f} at most" if moved else ""
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table(title=f"Cache of keys and values, {options.scenes} scenes of the test split")
    for heading in ("cache", "bytes per token", "right", "of", "percent", "95%"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    predictions = []
    for cache in get_args(CacheForm):
        model = EngineModel(options, cache)
        file = options.predictions and options.predictions / f"{cache}.predictions.jsonl"
        lines = scenes.evaluate(model, options.scenes, batch_size=128, predictions=file)
        size = bytes_per_token(model.engine._batches.batches[0]._past)
        model.engine.stop()
        found = [scenes.score(scenes.question_of(line), line["reply"], line["boxes"])["right"] for line in lines]
        low, high = scenes.wilson(sum(found), len(found))
        share = f"{100 * sum(found) / len(found):.2f}", f"{100 * low:.1f}-{100 * high:.1f}"
        table.add_row(cache, f"{size:,}", str(sum(found)), str(len(found)), *share)
        predictions.append(lines)
    console = Console(width=120)
    console.print(table)
    console.print(differences(*predictions))


if __name__ == "__main__":
    main()
