"""What is wrong with a training record, said so that its owner can mend it."""

import dataclasses

from qwenvl_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong. where: file and line; field: the key inside the record ("" for all); advice: what to do."""

    where: str
    field: str
    wrong: str
    advice: str

    def __str__(self) -> str:
        line = ": ".join(filter(None, (self.where, self.field, "; ".join(filter(None, (self.wrong, self.advice))))))
        return line.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed


class RecordError(UserError):
    """A record, or a file of them, that cannot be read. `problem` says the same in parts."""

    def __init__(self, problem: Problem):
        super().__init__(problem)  # str() of an exception is that of its only argument; pickles as it is
        self.problem = problem


def record_error(field: str, wrong: str, advice: str, where: str = "") -> RecordError:
    """The error to raise; whoever knows the file fills in `where`."""
    return RecordError(Problem(where, field, wrong, advice))


def split_advice(message: str) -> tuple[str, str]:
    """What is wrong and what to do, from an error message of the processor's, which has a semicolon between."""
    wrong, _, advice = message.partition("; ")
    return wrong, advice or "mend it, or remove the record"
