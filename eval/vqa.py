"""Questions with short answers: VQAv2, OK-VQA, TextVQA, VizWiz, DocVQA, InfographicVQA, ChartQA, GQA, OCR-VQA, AI2D,
OCRBench, MathVista; docs/evaluation.md has each."""

from qwenvl_jax.evaluation.command import main

if __name__ == "__main__":
    raise SystemExit(main("vqa"))
