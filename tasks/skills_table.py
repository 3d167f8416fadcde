"""The whole skills gym as a table, without SeqIO: importing the families fills it."""

from . import (  # noqa: F401
    skills_classification,
    skills_combination,
    skills_extractive,
    skills_generation,
    skills_knowledge,
)
from .skills_base import SKILLS, examples

__all__ = ["ONTOLOGY", "PLANTED", "SKILLS", "SURFACES", "TRAIN", "UNSEEN", "examples"]

TRAIN = [task.name for task in SKILLS.values() if not task.unseen]
UNSEEN = [task.name for task in SKILLS.values() if task.unseen]

# {category: {subcategory: [task names]}}
ONTOLOGY: dict[str, dict[str, list[str]]] = {}
# Tasks that interfere: {surface: [names of tasks with the same inputs and other answers]}
SURFACES: dict[str, list[str]] = {}
for _task in SKILLS.values():
    ONTOLOGY.setdefault(_task.category, {}).setdefault(_task.subcategory, []).append(_task.name)
    if _task.surface:
        SURFACES.setdefault(_task.surface, []).append(_task.name)

# Task -> the indices of its planted skills in alphabetical order: one, or two of a combination.
_planted = {task.name: task.subcategory.split("+") for task in SKILLS.values()}
_skills = sorted(set().union(*_planted.values()))
PLANTED: dict[str, tuple[int, ...]] = {
    name: tuple(map(_skills.index, skills)) for name, skills in _planted.items()
}
