"""The whole skills gym as a table, without SeqIO: importing the families fills it."""

from . import (  # noqa: F401
    skills_classification,
    skills_combination,
    skills_extractive,
    skills_generation,
    skills_knowledge,
)
from .skills_base import SKILLS, examples

__all__ = ["ONTOLOGY", "SKILLS", "TRAIN", "UNSEEN", "examples"]

TRAIN = [task.name for task in SKILLS.values() if not task.unseen]
UNSEEN = [task.name for task in SKILLS.values() if task.unseen]

ONTOLOGY: dict[str, dict[str, list[str]]] = {}
for _task in SKILLS.values():
    ONTOLOGY.setdefault(_task.category, {}).setdefault(_task.subcategory, []).append(_task.name)
