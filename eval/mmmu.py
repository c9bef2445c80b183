"""MMMU; see qwenvl_jax/evaluation/command.py and docs/evaluation.md."""

from qwenvl_jax.evaluation.command import main

if __name__ == "__main__":
    raise SystemExit(main("mmmu"))
