"""Evaluate a model on scenes it has not seen, or score predictions made before; see qwenvl_jax/evaluation/scenes.py.

    python eval/scenes.py [--checkpoint DIR] [--adapter DIR] [--limit SCENES] [--blind] [--output scenes.json]
    python eval/scenes.py --predictions scenes.predictions.jsonl [--output scenes.json]

Predictions are written first, beside the scores, one JSON object per line.
"""

import argparse
import json
import pathlib
import sys

import rich.console
import rich.progress

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import scenes


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate a model on drawn scenes.")
    parser.add_argument("--checkpoint", default="tiny", help="folder, hub name, or the model that ships (default)")
    parser.add_argument("--adapter", help="folder of a LoRA adapter of that checkpoint, in PEFT's format")
    parser.add_argument("--quantize", choices=("int8", "int4", "nf4"), help="load the weights in 8 or 4 bits")
    parser.add_argument("--limit", type=int, default=1000, help="number of scenes, about ten questions each")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="show grey noise instead of each picture")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--predictions", type=pathlib.Path, help="score this file; no model is loaded")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the scores (default: only printed)")
    options = parser.parse_args()
    try:
        predictions = scenes.read_predictions(options.predictions) if options.predictions else predict(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    scores = scenes.report(predictions)
    rich.console.Console(width=140).print(scenes.table(scores, title="Scenes, blind" if options.blind else "Scenes"))
    if options.output:
        options.output.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return 0


def predict(options: argparse.Namespace) -> list[dict]:
    import qwenvl_jax  # scoring alone needs no model

    vlm = qwenvl_jax.load(options.checkpoint, adapter=options.adapter, quantize=options.quantize)
    output = options.output or pathlib.Path("scenes.json")
    with rich.progress.Progress() as progress:
        task = progress.add_task("questions")
        return scenes.evaluate(
            vlm,
            options.limit,
            blind=options.blind,
            batch_size=options.batch_size,
            seed=options.seed,
            split=options.split,
            predictions=output.with_suffix(".predictions.jsonl"),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    raise SystemExit(main())
