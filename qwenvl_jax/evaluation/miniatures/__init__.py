"""What `qwenvl_jax.evaluation.miniature` draws: small copies of the benchmarks' files, about this project's scenes."""
