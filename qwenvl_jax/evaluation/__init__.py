"""Evaluation: predictions first, scores from the predictions alone."""
