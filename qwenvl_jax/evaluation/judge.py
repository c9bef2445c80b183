"""Another model judges predictions: it is asked as any model is, resumed as any run is, and its replies are kept.

NAME.jsonl is judged into NAME.judge.jsonl, the judge's own replies word for word, and NAME.judged.jsonl, the same
predictions with the judgements where their metric reads them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.judgings import JUDGINGS, Judging
from qwenvl_jax.evaluation.predictions import Part, read_predictions, write_predictions
from qwenvl_jax.evaluation.task import Prediction, Sample


@dataclasses.dataclass(frozen=True)
class Judged:
    """What came of it. path: of the judged predictions. raw: of the judge's replies.

    asked: requests. failed and unread: ids of those that got no reply, and of those whose reply cannot be read.
    """

    path: Path
    raw: Path
    asked: int
    failed: tuple[str, ...]
    unread: tuple[str, ...]


def judging_of(task: str, metric: str | None) -> Judging:
    """How a task's predictions are judged. Raises UserError where they are not."""
    if metric not in JUDGINGS:
        raise UserError(f"{task} is scored by rules, a judge has nothing to do: leave out --judge-base")
    return JUDGINGS[metric]


def lacks_judgements(metric: str, predictions: Sequence[Prediction]) -> bool:
    """Whether these have to be judged before they can be scored."""
    if metric not in JUDGINGS or not JUDGINGS[metric].needed:
        return False
    names = JUDGINGS[metric].kept([None])
    return any(one.error is None and not names.keys() <= one.reference.keys() for one in predictions)


def judge(path: Path, name: str, overwrite: bool, ask: Callable[[Sequence[Sample], Part], object]) -> Judged:
    """Has every prediction of a file judged. name: of the judge. ask: has `runner.predict` ask what a part lacks.

    Raises UserError for a file that needs no judge, and Lost, with all replies so far kept.
    """
    manifest, predictions = read_predictions(path)
    judging = judging_of(str(manifest.get("task", path.stem)), manifest.get("metric"))
    if "judge" in manifest:
        raise UserError(f"{path}: is judged already; name the file without .judged to have it judged anew")
    samples = [sample for prediction in predictions for sample in questions(prediction, judging)]
    by = {
        "model": name,
        "prompt": judging.prompt,
        "decoding": dataclasses.asdict(judging.decoding),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    raw = path.with_name(f"{path.stem}.judge.jsonl")
    part = Part(raw, {"judge": by, "judged": path.name, "samples": len(samples)}, overwrite=overwrite)
    if not part.complete:
        with part:
            ask(samples, part)
    part.finish([sample.id for sample in samples])
    replies = {reply.id: reply for reply in read_predictions(raw)[1]}
    done = path.with_name(f"{path.stem}.judged.jsonl")
    write_predictions(done, {**manifest, "judge": by}, (with_replies(one, judging, replies) for one in predictions))
    return Judged(
        done,
        raw,
        len(samples),
        tuple(one.id for one in replies.values() if one.error is not None),
        tuple(one.id for one in replies.values() if one.error is None and not judging.understood(one.reply)),
    )


def questions(prediction: Prediction, judging: Judging) -> list[Sample]:
    """What the judge is asked of a prediction; nothing of one without a reply, which is wrong whatever a judge says."""
    if prediction.error is not None:
        return []
    return [
        Sample(f"{prediction.id}/{number}", prompt, (), {"of": prediction.id, "round": number})
        for number, prompt in enumerate(judging.ask(prediction), 1)
    ]


def with_replies(prediction: Prediction, judging: Judging, replies: dict[str, Prediction]) -> Prediction:
    """The prediction with the judge's replies to its questions in its reference."""
    if prediction.error is not None:
        return prediction
    asked = [replies[sample.id] for sample in questions(prediction, judging)]
    kept = judging.kept([None if one.error is not None else one.reply for one in asked])
    return dataclasses.replace(prediction, reference={**prediction.reference, **kept})
