"""`qwenvl-convert`: a checkpoint folder in another format or dtype, or with an adapter merged in.

All the work is in `checkpoints/`, and in `training/export.py` for the checkpoints of a run.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from qwenvl_jax.checkpoints import huggingface, orbax
from qwenvl_jax.checkpoints.folder import check_free, locate, small_files
from qwenvl_jax.checkpoints.peft import load_adapter
from qwenvl_jax.checkpoints.quantised import LAYOUTS
from qwenvl_jax.config import UserError
from qwenvl_jax.models.quantised import form_of, quantised_linears
from qwenvl_jax.nn.lora import merge_adapters
from qwenvl_jax.sharding import param_paths

WRITERS = {"safetensors": huggingface.save_model, "orbax": orbax.save_model}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "safetensors",
    dtype: str | None = None,
    quantize: str | None = None,
    merge_adapter: str | Path | None = None,
) -> Table:
    """Writes the checkpoint `source` (a folder, "tiny" or a hub name) to the folder `destination`.

    format: "safetensors" (the Hugging Face layout) or "orbax"; dtype: "float32", "bfloat16", "float16", default as
    stored; quantize: "int8" or "int4" for the language model's linear maps; merge_adapter: a folder in PEFT's format,
    whose adapter is added into the weights. Needs main memory for the model and no accelerator. Returns a summary to
    print. Raises UserError, among others if `destination` holds something already.
    """
    if quantize is not None and format != "safetensors":
        raise UserError("--quantize writes safetensors; leave out --format orbax")
    if quantize is not None and merge_adapter is not None:
        raise UserError("--merge-adapter changes the weights that --quantize rounds; merge first, then quantize")
    folder, destination = locate(source), Path(destination).expanduser()
    if destination.exists() and destination.samefile(folder):
        raise UserError(f"{destination}: source and destination are the same folder")
    check_free(destination)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        is_stack = format == "orbax"  # as the format has the layers
        model = huggingface.load_model(folder, dtype=dtype, stacked=is_stack, quantize=quantize)
        if merge_adapter is not None:
            model = merge_adapters(load_adapter(model, merge_adapter))
        WRITERS[format](model, destination, **small_files(folder, merge_adapter))
    leaves = param_paths(model).values()
    table = Table("", "", show_header=False)
    table.add_row("from", str(folder))
    table.add_row("to", f"{destination} ({format})")
    if merge_adapter is not None:
        table.add_row("merged", str(merge_adapter))
    tensors = huggingface.checkpoint_tensors(model.config)
    table.add_row("tensors", f"{len(tensors):,}")
    table.add_row("parameters", f"{sum(math.prod(tensor.shape) for tensor in tensors):,}")
    table.add_row("bytes", f"{sum(leaf.nbytes for leaf in leaves):,}")
    quantised = quantised_linears(model)
    if quantised:
        table.add_row("quantised", f"{len(quantised)} linear maps, {form_of(quantised[0][1])}")
    table.add_row("dtype", ", ".join(name for name, _ in Counter(leaf.dtype.name for leaf in leaves).most_common()))
    return table


def _convert_run(given: argparse.Namespace) -> int:
    """A checkpoint of a training run, of which the parameters alone are read."""
    if given.format != "safetensors" or given.dtype or given.quantize or given.merge_adapter:
        raise UserError(f"{given.source}: a run's checkpoint; convert it without other options first, then the result")
    from qwenvl_jax.training.export import export_checkpoint  # the trainer is for this source alone

    export_checkpoint(given.source, given.destination)
    print(f"{given.source} written to {given.destination}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 for a mistake of the user's, explained in one line."""
    parser = argparse.ArgumentParser(prog="qwenvl-convert", description="A checkpoint in another form.")
    parser.add_argument("source", help='a checkpoint folder, "tiny", or a hub name such as Qwen/Qwen-VL-Chat')
    parser.add_argument("destination", help="a folder that does not exist yet or is empty")
    parser.add_argument("--format", choices=sorted(WRITERS), default="safetensors", help="default: %(default)s")
    parser.add_argument("--dtype", choices=huggingface.FLOATS, help="default: as stored")
    parser.add_argument("--merge-adapter", metavar="DIR", help="add the LoRA adapter of this folder into the weights")
    parser.add_argument(
        "--quantize",
        choices=sorted(LAYOUTS),
        help="store the language model's weights in 8 or 4 bits (4: as GPTQ does)",
    )
    given = parser.parse_args(arguments)
    try:
        source = Path(given.source).absolute()
        if source.name.isdigit() and (source.parent.parent / "recipe.yaml").is_file():
            return _convert_run(given)
        table = convert(
            given.source,
            given.destination,
            format=given.format,
            dtype=given.dtype,
            quantize=given.quantize,
            merge_adapter=given.merge_adapter,
        )
    except UserError as error:
        print(f"qwenvl-convert: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
