"""Multiple choice: ScienceQA, AI2D, MMBench, SEED-Bench, MMStar, RealWorldQA; docs/evaluation.md has each."""

from qwenvl_jax.evaluation.command import main

if __name__ == "__main__":
    raise SystemExit(main("multiple_choice"))
