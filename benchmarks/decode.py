"""Speed of decoding, this project beside transformers on torch: same machine, same process, same size, in turns.

Both sides answer a prompt with one picture, greedily and at batch size 1, through the call that a user makes:
`vlm.chat` here, `Qwen2_5_VLForConditionalGeneration.generate` there. Weights are random float32, both language models
have the same shape and number of parameters, and nothing stops a reply. The time per token is that of a long reply
minus that of a one-token reply, so that pictures, tokenizer and prefill do not count.

Needs torch and transformers (requirements/parity.txt), which nothing else in the project does. See README.md.
"""

import dataclasses
import datetime
import importlib.resources
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from common import Peaks, described, machine, peaks, their_settings, timed
from flax import nnx
from rich.console import Console
from rich.table import Table

import qwenvl_jax as qv
from qwenvl_jax.checkpoints.folder import VOCABULARY
from qwenvl_jax.checkpoints.huggingface import save_model
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.sharding import param_paths
from qwenvl_jax.training.flops import step_cost
from qwenvl_jax.training.recipe import NewModel

try:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
except ImportError as error:
    sys.exit(f"benchmarks/decode.py: {error}; run it in the environment that `make parity` makes")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. The default shape is that of the tiny model."""

    shape: NewModel = dataclasses.field(default_factory=NewModel)
    tokens: int = 128  # of a reply
    prompt_tokens: int = 100  # at least; the picture's included
    repetitions: int = 9
    torch_threads: tuple[int, ...] = tuple(sorted({1, os.cpu_count() or 1}))  # each is tried; the fastest counts
    output: Path | None = None  # a JSON file for the numbers


def ours(config: QwenVLConfig, vocabulary: Path, prompt_tokens: int) -> tuple[Callable[[int], object], int]:
    """A function that generates a reply of so many tokens, and the length of its prompt."""
    model = QwenVL(config, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random"
        save_model(model, checkpoint, tokenizer_file=vocabulary)
        vlm = qv.load(checkpoint, dtype="float32")
    picture = np.random.default_rng(0).integers(
        0, 256, (config.visual.image_size, config.visual.image_size, 3), np.uint8
    )
    question = "What do you see?"
    while True:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        length = len(vlm.processor.chat(messages).input_ids)
        if length >= prompt_tokens:
            break
        question += " And what else?"

    def reply(tokens: int) -> None:
        answer = vlm.chat(messages, temperature=0.0, min_new_tokens=tokens, max_new_tokens=tokens)
        assert answer.usage.completion_tokens == tokens

    return reply, length


def theirs(config: QwenVLConfig, prompt_tokens: int) -> tuple[Callable[[int], object], int]:
    """The same of Qwen2.5-VL in transformers, and its language model's number of parameters.

    A picture takes as many patches and tokens as ours; the vision tower has the width and depth of ours.
    """
    visual, side = config.visual, config.visual.grid  # patches per side
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(their_settings(config)).eval()
    start = visual.image_start_id
    ids = torch.randint(1, start, (1, prompt_tokens))
    ids[0, 10], ids[0, 11 + visual.n_queries] = start, start + 1
    ids[0, 11 : 11 + visual.n_queries] = start + 2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == start + 2).int(),
        "pixel_values": torch.randn(side * side, 3 * 2 * visual.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }

    @torch.inference_mode()
    def reply(tokens: int) -> None:
        made = model.generate(**inputs, do_sample=False, use_cache=True, max_new_tokens=tokens, pad_token_id=0)
        assert made.shape[1] == prompt_tokens + tokens

    parameters = sum(p.numel() for p in [*model.model.language_model.parameters(), *model.lm_head.parameters()])
    return reply, parameters


def in_turns(
    sides: dict[str, Callable[[int], object]], options: Options
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds to the first token and seconds per further token, of each side and repetition."""
    for reply in sides.values():  # compiles, and warms caches
        for tokens in (1, options.tokens + 1):
            reply(tokens)
    first: dict[str, list[float]] = {name: [] for name in sides}
    per_token: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repetitions):
        for name, reply in sides.items():
            time.sleep(0.05)  # threads of the side before come to rest
            first[name].append(timed(reply, 1))
            per_token[name].append((timed(reply, options.tokens + 1) - first[name][-1]) / options.tokens)
    return first, per_token


def bytes_per_token(config: QwenVLConfig, sizes: dict[str, int], context: float) -> int:
    """What one step must read in float32: all weights but the embeddings, of which one row, and keys and values."""
    weights = sum(sizes.values()) - sizes["embedding.table"] + config.hidden_size
    return int(4 * (weights + 2 * config.num_hidden_layers * config.hidden_size * context))


def measure(options: Options) -> dict:
    shipped = importlib.resources.files("qwenvl_jax") / "assets" / "tiny" / VOCABULARY
    vocabulary = Path(options.shape.vocabulary or str(shipped))
    config = options.shape.config(Tokenizer.from_file(vocabulary, options.shape.n_queries).image_start_id)
    our_reply, prompt_tokens = ours(config, vocabulary, options.prompt_tokens)
    their_reply, parameters = theirs(config, prompt_tokens)
    shapes = param_paths(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    sizes = {path: leaf.size for path, leaf in shapes.items() if not path.startswith("visual.")}
    if sum(sizes.values()) != parameters:
        raise AssertionError(f"not the same size: {sum(sizes.values())} and {parameters} parameters")

    def with_threads(threads: int) -> Callable[[int], object]:
        def reply(tokens: int) -> None:
            torch.set_num_threads(threads)
            their_reply(tokens)

        return reply

    sides = {"qwenvl_jax": our_reply}
    for threads in options.torch_threads:
        sides[f"transformers, {threads} thread{'s' * (threads > 1)}"] = with_threads(threads)
    first, per_token = in_turns(sides, options)
    best = min((name for name in sides if name != "qwenvl_jax"), key=lambda name: statistics.median(per_token[name]))
    context, cost = prompt_tokens + options.tokens / 2, step_cost(config, {})
    read, flops = bytes_per_token(config, sizes, context), cost.flops(1, context, 1, 0)
    peak = peaks("float32", read)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(("jax", "jaxlib", "flax", "torch", "transformers", "numpy")),
        "shape": config.to_hf(),
        "language_model_parameters": parameters,
        "prompt_tokens": prompt_tokens,
        "reply_tokens": options.tokens,
        "seconds_per_token": per_token,
        "seconds_to_first_token": first,
        "fastest_transformers": best,
        "times_as_fast": statistics.median(per_token[best]) / statistics.median(per_token["qwenvl_jax"]),
        "times_as_fast_by_repetition": [b / a for a, b in zip(per_token["qwenvl_jax"], per_token[best], strict=True)],
        "bytes_read_per_token": read,
        "flops_per_token": flops,
        "peaks": dataclasses.asdict(peak),
        "limit_seconds_per_token": peak.limit(flops, read),
        "limited_by": peak.bound(flops, read),
    }


def show(result: dict, console: Console) -> None:
    table = Table(title="Decoding, batch size 1, float32, greedy")
    for heading in ("", "ms per token", "spread", "tokens per second", "first token, ms"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in result["seconds_per_token"].items():
        median = statistics.median(times)
        spread = f"{1e3 * min(times):.3f} to {1e3 * max(times):.3f}"
        first = 1e3 * statistics.median(result["seconds_to_first_token"][name])
        table.add_row(name, f"{1e3 * median:.3f}", spread, f"{1 / median:,.0f}", f"{first:.1f}")
    limit = result["limit_seconds_per_token"]
    row = {"bytes": "reading the weights alone", "FLOPs": "the FLOPs alone"}[result["limited_by"]]
    table.add_row(row, f"{1e3 * limit:.3f}", "", f"{1 / limit:,.0f}", "")
    console.print(table)
    pairs = result["times_as_fast_by_repetition"]
    megabytes, megaflops = result["bytes_read_per_token"] / 1e6, result["flops_per_token"] / 1e6
    reached = limit / statistics.median(result["seconds_per_token"]["qwenvl_jax"])
    console.print(
        f"[bold]{result['times_as_fast']:.1f} times as fast[/bold] as {result['fastest_transformers']} "
        f"({min(pairs):.1f} to {max(pairs):.1f} over {len(pairs)} repetitions)\n"
        f"language model: {result['language_model_parameters']:,} parameters; prompt {result['prompt_tokens']} tokens, "
        f"one picture; reply {result['reply_tokens']} tokens\n"
        f"limit: {megabytes:.1f} MB and {megaflops:.1f} MFLOP per token at {Peaks(**result['peaks']).described()}; "
        f"{reached:.0%} of it reached\n" + described(result["machine"])
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    result = measure(options)
    show(result, Console(width=120))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
