"""Serving over HTTP; not part of this release (see `cli.py`)."""
