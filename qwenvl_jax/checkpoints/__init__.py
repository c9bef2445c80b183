"""Checkpoints in and out: Hugging Face folders, PyTorch pickles without PyTorch, Orbax."""
