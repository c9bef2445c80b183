"""Readers of the benchmarks' own files: one module per family, every dataset by name in `registry.py`.

The data folder is what the original's scripts call `data`: a folder per benchmark, the COCO pictures in `coco`. Where a
benchmark's official release and the original's converted file hold the same, both are read (docs/evaluation.md).
"""
