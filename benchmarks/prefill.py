"""Time of reading a prompt, and the least that the FLOPs and bytes of it would take: `python benchmarks/prefill.py`.

For prompts of several lengths, at batch size 1: prefill (the compiled call that fills the cache and chooses the first
token), encoding one picture, and the time to first token of a text and of a picture with text, from token ids and
pixels on the host to the token on the host. A prompt is padded to the next power of two; the limit counts its own
tokens alone. `--compare` has transformers' Qwen2.5-VL of the same shape do the same in turns in the same process, from
token ids and pixels too; that part needs torch (requirements/parity.txt). `--full-size` takes a model of 9.6B random
parameters in bfloat16, for a GPU.

The limit is the larger of FLOPs over FLOP/s and bytes over bytes/s: products with weights and of attention, the head
for one token; the weights once, the embeddings of the tokens, their keys and values. Peaks are those of the data
sheet where there is one, else those of a large product and of repeated reads, measured here.
"""

import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from common import Peaks, described, machine, peaks, their_settings, timed
from flax import nnx
from full_size import RELEASED
from rich.console import Console
from rich.table import Table

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.checkpoints.huggingface import load_model
from qwenvl_jax.config import QwenVLConfig, UserError
from qwenvl_jax.inference.decode import Generator, length_bucket
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.sharding import param_paths
from qwenvl_jax.training.flops import step_cost

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEFORE_PICTURE = 10  # tokens
OURS = "qwenvl_jax"
PROMPTS = {"text": "text", "picture": "picture and text"}  # of the same length, the picture's tokens included
KINDS = tuple(PROMPTS)
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=2)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    checkpoint: str = "tiny"
    full_size: bool = False  # 9.6B random parameters instead, on a GPU
    dtype: str | None = None  # by default as stored, and float32 on CPUs
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # tokens of the prompts
    repetitions: int = 9
    compare: bool = False  # with transformers on torch
    torch_threads: tuple[int, ...] = tuple(sorted({1, os.cpu_count() or 1}))  # each is tried; the fastest counts
    output: Path | None = None  # a file name without its ending, for .json and .png


def loaded(options: Options) -> QwenVL:
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    if options.full_size:
        return QwenVL(RELEASED, dtype=jnp.dtype(options.dtype or "bfloat16"), rngs=nnx.Rngs(0))
    return load_model(locate(options.checkpoint), dtype=dtype)


def prompt(config: QwenVLConfig, length: int, kind: str) -> Prompt:
    """Random tokens; with a picture of random pixels among them, which takes n_queries + 2 of them."""
    rng, visual = np.random.default_rng(0), config.visual
    ids = rng.integers(0, visual.image_start_id, length).astype(np.int32)
    slots = np.full(length, -1, np.int32)
    pixels = rng.standard_normal((int(kind == "picture"), 3, visual.image_size, visual.image_size), np.float32)
    if kind == "picture":
        start, end = BEFORE_PICTURE + 1, BEFORE_PICTURE + 1 + visual.n_queries
        ids[start - 1], ids[start:end], ids[end] = visual.image_start_id + np.array([0, 2, 1])
        slots[start:end] = np.arange(visual.n_queries)
    return Prompt(ids, slots, pixels, [])


def kinds(config: QwenVLConfig, length: int) -> list[str]:
    """The kinds of prompts that may have this length."""
    return [kind for kind in KINDS if kind == "text" or length > BEFORE_PICTURE + config.visual.n_queries + 2]


def ours(generator: Generator, lengths: tuple[int, ...]) -> dict[tuple, Callable[[], object]]:
    """What is timed, by (what, length, side): each returns when its result is there."""
    config = generator.config
    pixels = prompt(config, 2 * BEFORE_PICTURE + config.visual.n_queries, "picture").pixels
    calls: dict[tuple, Callable[[], object]] = {
        ("encode", 1, OURS): lambda: generator.encode_images(pixels).block_until_ready()
    }
    chosen = controls([GREEDY], [], config.vocab_size)
    for length in lengths:
        batch = generator.batch([prompt(config, length, "text")])
        calls["prefill", length, OURS] = lambda batch=batch: jax.block_until_ready(generator.prefill(batch, chosen))
        for kind in kinds(config, length):
            asked = prompt(config, length, kind)
            calls[kind, length, OURS] = lambda asked=asked: Generation(generator, [asked], [GREEDY]).advance()
    return calls


def theirs(config: QwenVLConfig, options: Options) -> dict[tuple, Callable[[], object]]:
    """The same first tokens by transformers, whose pictures have as many patches and tokens as ours."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    visual, side = config.visual, config.visual.grid  # patches per side
    model = Qwen2_5_VLForConditionalGeneration(their_settings(config)).eval()
    calls: dict[tuple, Callable[[], object]] = {}

    def call(inputs: dict[str, Any], threads: int) -> Callable[[], object]:
        @torch.inference_mode()
        def first_token() -> None:
            torch.set_num_threads(threads)
            model.generate(**inputs, do_sample=False, max_new_tokens=1, pad_token_id=0)

        return first_token

    for length in options.lengths:
        for kind in kinds(config, length):
            ids = torch.tensor(prompt(config, length, kind).input_ids, dtype=torch.int64)[None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if kind == "picture":
                inputs |= {
                    "mm_token_type_ids": (ids == visual.image_start_id + 2).int(),
                    "pixel_values": torch.randn(side * side, 3 * 2 * visual.patch_size**2),
                    "image_grid_thw": torch.tensor([[1, side, side]]),
                }
            for threads in options.torch_threads:
                calls[kind, length, f"transformers, {threads} thread{'s' * (threads > 1)}"] = call(inputs, threads)
    return calls


def in_turns(calls: dict[tuple, Callable[[], object]], repetitions: int) -> dict[tuple, list[float]]:
    """Seconds of each call: all of one length in turns, so that what they are compared with ran in the same moment."""
    seconds: dict[tuple, list[float]] = {key: [] for key in calls}
    for length in dict.fromkeys(key[1] for key in calls):
        chosen = {key: call for key, call in calls.items() if key[1] == length}
        for call in chosen.values():  # compiles, and warms caches
            call()
        for _ in range(repetitions):
            for key, call in chosen.items():
                time.sleep(0.02)  # threads of the call before come to rest
                seconds[key].append(timed(call))
    return seconds


def work(config: QwenVLConfig, weights: dict[str, int], item: int, length: int) -> dict[str, tuple[float, int]]:
    """FLOPs and bytes of reading so many tokens ("text") and of encoding a picture ("encode").

    weights: bytes of each parameter. item: bytes of a number.
    """
    cost, visual = step_cost(config, {}), config.visual
    vision = sum(size for path, size in weights.items() if path.startswith("visual."))
    language = sum(weights.values()) - vision - weights["embedding.table"]
    token = config.hidden_size + 2 * config.num_hidden_layers * config.num_attention_heads * config.kv_channels
    pixels, features = 4 * 3 * visual.image_size**2, visual.n_queries * config.hidden_size * item
    return {
        "text": (cost.flops(length, length * (length + 1) / 2, 1, 0), language + length * token * item),
        "encode": (cost.picture, vision + pixels + features),
    }


def measure(options: Options) -> dict:
    model = loaded(options)
    config, leaves = model.config, param_paths(model)
    weights, dtype = {path: leaf.nbytes for path, leaf in leaves.items()}, leaves["embedding.table"].dtype
    generator = Generator(model)
    del model, leaves
    calls = ours(generator, options.lengths)
    if options.compare:
        calls |= theirs(config, options)
    seconds = in_turns(calls, options.repetitions)
    works = {length: work(config, weights, dtype.itemsize, length) for length in options.lengths}
    peak = peaks(dtype.name, works[options.lengths[0]]["text"][1])
    limits = {length: {what: peak.limit(*cost) for what, cost in costs.items()} for length, costs in works.items()}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(("jax", "jaxlib", "flax", "numpy") + ("torch", "transformers") * options.compare),
        "model": "9.6B random parameters" if options.full_size else options.checkpoint,
        "dtype": dtype.name,
        "parameters": sum(leaf.size for leaf in generator.leaves),
        "picture_tokens": config.visual.n_queries,
        "peaks": dataclasses.asdict(peak),
        "padded": {length: length_bucket(length) for length in options.lengths},
        "work": works,
        "limited_by": {
            length: {what: peak.bound(*cost) for what, cost in costs.items()} for length, costs in works.items()
        },
        "limits": {length: limit | {"picture": sum(limit.values())} for length, limit in limits.items()},
        "seconds": [
            {"what": what, "tokens": length, "side": side, "seconds": times}
            for (what, length, side), times in seconds.items()
        ],
    }


def found(result: dict, what: str) -> dict[int, dict[str, list[float]]]:
    """Seconds of one kind of call, by length and side."""
    times: dict[int, dict[str, list[float]]] = {}
    for one in result["seconds"]:
        if one["what"] == what:
            times.setdefault(one["tokens"], {})[one["side"]] = one["seconds"]
    return times


def milliseconds(times: list[float]) -> tuple[str, str]:
    """Median and spread."""
    return f"{1e3 * statistics.median(times):.2f}", f"{1e3 * min(times):.2f} to {1e3 * max(times):.2f}"


def times_as_long(sides: dict[str, list[float]], other: str) -> str:
    """How many times as long another side took, repetition by repetition; nothing for ours."""
    pairs = [b / a for a, b in zip(sides[OURS], sides[other], strict=True)]
    return "" if other == OURS else f"{statistics.median(pairs):.1f} ({min(pairs):.1f} to {max(pairs):.1f})"


def prefill_table(result: dict) -> Table:
    table = Table(title=f"Reading a prompt, {result['model']}, {result['dtype']}, batch size 1")
    for heading in ("", "padded to", "ms", "spread", "tokens per second", "limit, ms", "set by", "reached"):
        table.add_column(heading, justify="right")

    def add(name: str, padded: str, tokens: int, times: list[float], limit: float, by: str) -> None:
        median = statistics.median(times)
        rate, share = f"{tokens / median:,.0f}", f"{limit / median:.0%}"
        table.add_row(name, padded, *milliseconds(times), rate, f"{1e3 * limit:.3f}", by, share)

    for length, sides in found(result, "prefill").items():
        limit, by = result["limits"][length]["text"], result["limited_by"][length]["text"]
        add(f"{length:,} tokens", f"{result['padded'][length]:,}", length, sides[OURS], limit, by)
    table.add_section()
    limit, by = result["limits"][length]["encode"], result["limited_by"][length]["encode"]
    add("a picture", "", result["picture_tokens"], found(result, "encode")[1][OURS], limit, by)
    return table


def first_token_table(result: dict) -> Table:
    table = Table(title="Time to first token")
    for heading in ("prompt", "tokens", "", "ms", "spread", "limit, ms", "times as long"):
        table.add_column(heading, justify="left" if heading in ("prompt", "") else "right", no_wrap=True)
    for kind in KINDS:
        for length, sides in found(result, kind).items():
            limit = f"{1e3 * result['limits'][length][kind]:.3f}"
            for side, times in sides.items():
                where = (PROMPTS[kind], f"{length:,}") if side == OURS else ("", "")
                ratio = times_as_long(sides, side)
                table.add_row(*where, side, *milliseconds(times), limit * (side == OURS), ratio)
        table.add_section()
    return table


def show(result: dict, console: Console) -> None:
    console.print(prefill_table(result))
    console.print(first_token_table(result))
    console.print(
        f"{result['parameters']:,} parameters; {result['picture_tokens']} tokens a picture\n"
        f"limit: {Peaks(**result['peaks']).described()}\n" + described(result["machine"])
    )


def draw(result: dict, file: Path) -> None:
    """Times to first token over lengths, beside their limits."""
    figure, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.5), layout="constrained", sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        times = found(result, kind)
        for side in dict.fromkeys(side for sides in times.values() for side in sides):
            axis.plot(list(times), [1e3 * statistics.median(sides[side]) for sides in times.values()], "o-", label=side)
        axis.plot(list(times), [1e3 * result["limits"][length][kind] for length in times], "k--", label="limit")
        axis.set(xscale="log", yscale="log", xlabel=f"{PROMPTS[kind]}, tokens")
        axis.set_xticks([], minor=True)
        axis.set_xticks(list(times), [str(length) for length in times])
        axis.legend()
    axes[0].set_ylabel("time to first token, ms")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        result = measure(options)
    except UserError as error:
        sys.exit(f"benchmarks/prefill.py: {error}")
    except ImportError as error:
        sys.exit(f"benchmarks/prefill.py: {error}; run it in the environment that `make parity` makes")
    show(result, Console(width=128))
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
