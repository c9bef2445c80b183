"""Every dataset by its name, as `--dataset` has it."""

import dataclasses
import difflib

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import Task
from qwenvl_jax.evaluation.tasks import (
    captions,
    grounding,
    mme,
    mmmu,
    multiple_choice,
    scenes,
    seed_bench,
    tables,
    touchstone,
    vqa,
)
from qwenvl_jax.evaluation.tasks.files import unique

FAMILIES = (captions, vqa, grounding, multiple_choice, seed_bench, mme, touchstone, mmmu, tables, scenes)
TASKS = {task.name: dataclasses.replace(task, read=unique(task.read)) for family in FAMILIES for task in family.TASKS}


def task(name: str, family: str | None = None) -> Task:
    """The task of that name, of any family or only of one. Raises UserError with the name that was perhaps meant."""
    names = [task.name for task in TASKS.values() if family in (None, task.family)]
    if name in names:
        return TASKS[name]
    if name in TASKS:
        raise UserError(f"{name} is no {family} dataset; evaluate it with eval/{TASKS[name].family}.py")
    near = difflib.get_close_matches(name, names, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise UserError(f"{name!r} is no dataset; {hint}")
