"""OCRBench: the answer must occur in the reply; a thousand questions, a point each (Liu et al. 2023).

reference: {"answers": [str, ...], "type": the official type of the question}. Reads the reply. Usual group: type.

official: case and line breaks do not count; formulas (type FORMULAS) keep their case, but blanks do not count.
vlmevalkit: the same.
lmms_eval: full-width letters are those of ASCII, but in formulas.
"""

from collections.abc import Callable, Sequence

from qwenvl_jax.evaluation.metrics.metric import Metric, Score, mean
from qwenvl_jax.evaluation.metrics.reading import each, field, texts
from qwenvl_jax.evaluation.task import Prediction

FORMULAS = "Handwritten Mathematical Expression Recognition"
HALF_WIDTH: dict[int, int | str] = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3000: " "}


def occurs(answers: Sequence[str], reply: str, formula: bool = False) -> bool:
    """Whether one of the answers occurs in a reply."""

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return any(plain(answer) in plain(reply) for answer in answers)


def half_width_occurs(answers: Sequence[str], reply: str, formula: bool = False) -> bool:
    """The same with full-width letters read as ASCII."""
    if formula:
        return occurs(answers, reply, formula)
    return occurs([answer.translate(HALF_WIDTH) for answer in answers], reply.translate(HALF_WIDTH))


def _metric(variant: str, right: Callable[[Sequence[str], str, bool], bool], note: str = "") -> Metric:
    def judge(prediction: Prediction) -> float:
        return right(texts(prediction, "answers"), prediction.reply, field(prediction, "type") == FORMULAS)

    scores = (Score("score", mean("right", 1000), 1000), Score("accuracy", mean("right")))
    return Metric("ocrbench", variant, each(judge), scores, note)


VARIANTS = {
    "official": _metric("official", occurs),
    "vlmevalkit": _metric("vlmevalkit", occurs),
    "lmms_eval": _metric("lmms_eval", half_width_occurs, "full-width letters are read as ASCII"),
}
