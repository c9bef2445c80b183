"""Yes or no: POPE, HallusionBench; docs/evaluation.md has each."""

from qwenvl_jax.evaluation.command import main

if __name__ == "__main__":
    raise SystemExit(main("yes_no"))
