"""All metrics by name and variant."""

import difflib

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics import (
    anls,
    captions,
    choices,
    exact_match,
    grounding,
    hallusionbench,
    mathvista,
    mmbench,
    mme,
    mmmu,
    ocrbench,
    pope,
    relaxed_accuracy,
    scenes,
    seed_bench,
    touchstone,
    vqa_accuracy,
)
from qwenvl_jax.evaluation.metrics.metric import Metric

METRICS: dict[str, dict[str, Metric]] = {
    "anls": anls.VARIANTS,
    "captions": captions.VARIANTS,
    "choice_accuracy": choices.CHOICE_ACCURACY,
    "exact_match": exact_match.EXACT_MATCH,
    "gqa": exact_match.GQA,
    "grounding": grounding.VARIANTS,
    "hallusionbench": hallusionbench.VARIANTS,
    "mathvista": mathvista.VARIANTS,
    "mmbench": mmbench.VARIANTS,
    "mme": mme.VARIANTS,
    "mmmu": mmmu.VARIANTS,
    "mmstar": choices.MMSTAR,
    "ocrbench": ocrbench.VARIANTS,
    "pope": pope.VARIANTS,
    "realworldqa": choices.REALWORLDQA,
    "relaxed_accuracy": relaxed_accuracy.VARIANTS,
    "scenes": scenes.VARIANTS,
    "seed_bench": seed_bench.VARIANTS,
    "touchstone": touchstone.VARIANTS,
    "vqa_accuracy": vqa_accuracy.VARIANTS,
}


def metric(name: str, variant: str = "official") -> Metric:
    """A metric by name and variant. Raises UserError with what there is."""
    if name not in METRICS:
        raise UserError(f"no metric {name!r}; {_hint(name, METRICS)}")
    if variant not in METRICS[name]:
        raise UserError(f"metric {name!r} has no variant {variant!r}; {_hint(variant, METRICS[name])}")
    return METRICS[name][variant]


def _hint(name: str, there: dict[str, dict[str, Metric]] | dict[str, Metric]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there)}"
