"""Speed of a training step, this project beside transformers on torch: same machine, same process, same size, in turns.

Both sides learn the same conversations of one to three turns about a picture each, whose lengths differ by a factor of
five: forward pass, loss, backward pass, AdamW, in float32, the vision tower included. Here records are packed into
rows (`RecordBatches`) and the step is the one of `train.py`; there, Qwen2.5-VL of the same shape takes them in batches
padded to their longest. Batches are made before the clock starts on both sides.

`--full-size` measures LoRA of a model of 9.6B random parameters on a GPU instead, against the GPU's own limit; that
part needs no torch. See README.md.
"""

import dataclasses
import datetime
import importlib.resources
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
import numpy as np
import tyro
from common import described, machine, their_settings
from flax import nnx
from rich.console import Console
from rich.table import Table

from qwenvl_jax.checkpoints.folder import VOCABULARY
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.record_batches import BatchRecipe, RecordBatches
from qwenvl_jax.data.records import Record
from qwenvl_jax.models.qwen_vl import QwenVL, unstack
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED
from qwenvl_jax.processing.tokenizer import Tokenizer
from qwenvl_jax.sharding import param_paths
from qwenvl_jax.training.data import stacked
from qwenvl_jax.training.optimizer import OptimizerRecipe, make_optimizer
from qwenvl_jax.training.recipe import NewModel
from qwenvl_jax.training.record_rows import record_hidden
from qwenvl_jax.training.step import TrainState, make_train_step, named_parameters

OURS = "qwenvl_jax, packed"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. The default shape is that of the tiny model."""

    shape: NewModel = dataclasses.field(default_factory=NewModel)
    records: int = 96
    tokens: tuple[int, int] = (100, 500)  # of a record, picture included; every ratio between them equally likely
    records_per_step: int = 8  # of the padded batches, and about as many in the packed ones
    accumulate: int = 2  # batches whose gradients a step adds up here: half as much memory stays in caches
    repetitions: int = 5  # passes over all records
    torch_threads: tuple[int, ...] = tuple(sorted({1, os.cpu_count() or 1}))  # each is tried; the fastest counts
    full_size: bool = False  # LoRA of the 9.6B model instead, on a GPU
    length: int = 2048  # of its rows
    rows: int = 4  # of its batches
    lora_rank: int = 64
    peak_tflops: float = 989.0  # bfloat16, of the GPU, from its data sheet: H100 and H200
    output: Path | None = None  # a JSON file for the numbers


def conversations(processor: Processor, options: Options) -> list[Record]:
    """Records with a picture and one to three turns, of lengths spread evenly in their logarithm between the bounds."""
    rng = np.random.default_rng(0)
    size = processor.config.visual.image_size
    words = ["a", "red", "circle", "and", "the", "large", "blue", "square", "is", "left", "of", "two", "small", "stars"]
    records = []
    for number in range(options.records):
        wanted = float(np.exp(rng.uniform(*np.log(options.tokens))))
        turns = int(rng.integers(1, 4))
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
        messages: list[dict[str, Any]] = []
        for turn in range(turns):
            asked: list[dict[str, Any]] = [{"type": "text", "text": "What do you see?"}]
            messages.append({"role": "user", "content": [{"type": "image", "image": picture}] * (turn == 0) + asked})
            messages.append({"role": "assistant", "content": "yes"})
        turn = 0
        while len(processor.training_tokens(messages)[0]) < wanted:  # words go to the answers in turns
            messages[2 * turn + 1]["content"] += " " + words[rng.integers(len(words))]
            turn = (turn + 1) % turns
        records.append(Record(messages, f"record {number}"))
    return records


def ours(model: QwenVL, processor: Processor, records: list[Record], packing: bool, options: Options):
    """A function that learns all records once, and (steps, share of padding) of that."""
    average = np.mean([len(processor.training_tokens(record.messages)[0]) for record in records])
    length = options.tokens[1] + 12  # a row as long as the longest record, or attention has more to do
    parts = options.accumulate
    rows = round(options.records_per_step / parts * (average / length if packing else 1))
    batches = RecordBatches(
        BatchRecipe(max_length=length, packing=packing, pictures=options.records_per_step // parts + packing),
        Mixture([records]),
        processor,
        rows,
        epochs=1,
    )
    all_batches = [batches[i] for i in range(len(batches))]
    steps = [stacked(all_batches[i : i + parts]) for i in range(0, len(batches), parts)]
    made = jax.tree.map(jnp.asarray, steps)
    learn = _learner({"model": model}, batches.longest)
    counts = [batches.counts(number) for number in range(len(batches))]
    space = sum(rows * batches.plan[number][0] for number in range(len(batches)))
    padding = 1 - sum(count["tokens"] for count in counts) / space
    return lambda: [learn(batch) for batch in made][-1].block_until_ready(), (len(made), padding)


def _learner(modules: dict[str, nnx.Module], longest: int) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The step of `train.py` for a model in float32: a batch [A, ...] to its loss; the state stays inside."""
    params, rebuild = named_parameters(modules)
    params = jax.tree.map(jnp.copy, params)  # the step uses them up
    optimizer = make_optimizer(OptimizerRecipe(), params, 10_000)
    step = make_train_step(
        rebuild,
        optimizer,
        lambda step: jnp.zeros(()),
        hidden_of=lambda model, batch, remat: record_hidden(model, batch, longest=longest, remat=remat),
    )
    compiled = jax.jit(step, donate_argnums=0)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))

    def learn(batch: dict[str, jax.Array]) -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, {}, batch)
        return metrics["loss"]

    return learn


def theirs(config: QwenVLConfig, processor: Processor, records: list[Record], options: Options):
    """The same of transformers, its steps and padding, and its numbers of parameters (language model, vision tower)."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    settings = their_settings(config)
    model = Qwen2_5_VLForConditionalGeneration(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    side, slot = config.visual.grid, config.visual.image_start_id + 2
    batches, tokens, space = [], 0, 0
    order = np.random.default_rng(0).permutation(len(records))
    for start in range(0, len(records), options.records_per_step):
        chosen = [
            processor.training_tokens(records[i].messages) for i in order[start : start + options.records_per_step]
        ]
        longest = max(len(segment) for segment, _, _ in chosen)
        ids, labels = np.zeros((len(chosen), longest), np.int64), np.full((len(chosen), longest), IGNORED, np.int64)
        mask = np.zeros((len(chosen), longest), np.int64)
        for row, (segment, targets, _) in enumerate(chosen):
            found = np.where(np.array(segment.slots) >= 0, slot, segment.ids)
            ids[row, : len(segment)], labels[row, : len(segment)], mask[row, : len(segment)] = found, targets, 1
        batches.append(
            {
                "input_ids": torch.tensor(ids),
                "attention_mask": torch.tensor(mask),
                "labels": torch.tensor(labels),
                "mm_token_type_ids": torch.tensor(ids == slot).int(),
                "pixel_values": torch.randn(len(chosen) * side**2, 3 * 2 * config.visual.patch_size**2),
                "image_grid_thw": torch.tensor([[1, side, side]] * len(chosen)),
            }
        )
        tokens, space = tokens + int(mask.sum()), space + mask.size

    def learn_all() -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    language = sum(p.numel() for p in [*model.model.language_model.parameters(), *model.lm_head.parameters()])
    vision = sum(p.numel() for p in model.model.visual.parameters())
    return learn_all, (len(batches), 1 - tokens / space), (language, vision)


def in_turns(sides: dict[str, Callable[[], object]], repetitions: int) -> tuple[dict, dict]:
    """Of each pass of each side the seconds, and those that processors worked, which other programs change less."""
    for learn_all in sides.values():  # compiles, and warms caches
        learn_all()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    worked: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, learn_all in sides.items():
            time.sleep(0.05)  # threads of the side before come to rest
            start, worked_before = time.perf_counter(), time.process_time()
            learn_all()
            seconds[name].append(time.perf_counter() - start)
            worked[name].append(time.process_time() - worked_before)
    return seconds, worked


def measure(options: Options) -> dict:
    import torch

    shipped = importlib.resources.files("qwenvl_jax") / "assets" / "tiny" / VOCABULARY
    tokenizer = Tokenizer.from_file(Path(options.shape.vocabulary or str(shipped)), options.shape.n_queries)
    config = options.shape.config(tokenizer.image_start_id)
    processor = Processor(tokenizer, config)
    records = conversations(processor, options)
    lengths = [len(processor.training_tokens(record.messages)[0]) for record in records]
    model = unstack(QwenVL(config, rngs=nnx.Rngs(0)))
    sizes = {path: leaf.size for path, leaf in param_paths(model).items()}
    language = sum(size for path, size in sizes.items() if not path.startswith("visual."))
    learn_padded, facts_padded, (their_language, their_vision) = theirs(config, processor, records, options)
    if language != their_language:
        raise AssertionError(f"not the same size: {language} and {their_language} parameters")

    def with_threads(threads: int) -> Callable[[], object]:
        def learn_all() -> None:
            torch.set_num_threads(threads)
            learn_padded()

        return learn_all

    packed, unpacked = (ours(model, processor, records, packing, options) for packing in (True, False))
    sides, facts = {OURS: packed[0], "qwenvl_jax, one record a row": unpacked[0]}, [packed[1], unpacked[1]]
    for threads in options.torch_threads:
        sides[f"transformers, {threads} thread{'s' * (threads > 1)}"] = with_threads(threads)
        facts.append(facts_padded)
    seconds, worked = in_turns(sides, options.repetitions)
    best = min((name for name in sides if "transformers" in name), key=lambda name: statistics.median(seconds[name]))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")),
        "shape": config.to_hf(),
        "parameters": {
            "language": language,
            "vision": sum(sizes.values()) - language,
            "vision of transformers": their_vision,
        },
        "picture_tokens": config.visual.n_queries,
        "records": len(records),
        "tokens": sum(lengths),
        "record_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
        "seconds": seconds,
        "processor_seconds": worked,
        "steps": {name: steps for name, (steps, _) in zip(sides, facts, strict=True)},
        "padding": {name: padding for name, (_, padding) in zip(sides, facts, strict=True)},
        "fastest_transformers": best,
        "times_as_fast": statistics.median(seconds[best]) / statistics.median(seconds[OURS]),
        "times_as_fast_by_repetition": [b / a for a, b in zip(seconds[OURS], seconds[best], strict=True)],
    }


def show(result: dict, console: Console) -> None:
    table = Table(title="Training, float32, AdamW")
    for heading in ("", "samples per second", "spread", "tokens per second", "core seconds", "padding", "steps"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in result["seconds"].items():
        rates = [result["records"] / seconds for seconds in times]
        tokens = result["tokens"] / statistics.median(times)
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        steps, padding = str(result["steps"][name]), f"{result['padding'][name]:.0%}"
        worked = f"{statistics.median(result['processor_seconds'][name]):.2f}"
        table.add_row(name, f"{statistics.median(rates):.1f}", spread, f"{tokens:,.0f}", worked, padding, steps)
    console.print(table)
    pairs, parameters = result["times_as_fast_by_repetition"], result["parameters"]
    least, median, most = result["record_tokens"]
    console.print(
        f"[bold]{result['times_as_fast']:.2f} times as fast[/bold] as {result['fastest_transformers']} "
        f"({min(pairs):.2f} to {max(pairs):.2f} over {len(pairs)} repetitions)\n"
        f"language model: {parameters['language']:,} parameters; vision: {parameters['vision']:,} here, "
        f"{parameters['vision of transformers']:,} there; {result['picture_tokens']} tokens a picture\n"
        f"{result['records']} records of {least} to {most} tokens, median {median:.0f}\n" + described(result["machine"])
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.full_size:
        from full_size import measure_full_size, show_full_size

        result = measure_full_size(options)
        show_full_size(result, Console(width=120))
    else:
        try:
            result = measure(options)
        except ImportError as error:
            sys.exit(f"benchmarks/train_step.py: {error}; run it in the environment that `make parity` makes")
        show(result, Console(width=120))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
