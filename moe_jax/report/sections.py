"""What every section of the page is made of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.report import page


@dataclasses.dataclass
class Section:
    """One section of the page: its markup, its findings in words, its numbers, its figures.

    Attributes:
        main: those of the findings that the page begins with.
    """

    name: str
    title: str
    parts: list[str] = dataclasses.field(default_factory=list)
    findings: list[str] = dataclasses.field(default_factory=list)
    main: list[str] = dataclasses.field(default_factory=list)
    numbers: Any = None
    figures: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def find(self, sentence: str, main: bool = False) -> None:
        """Adds a finding, which is also a paragraph of the section."""
        self.findings.append(sentence)
        if main:
            self.main.append(sentence)
        self.add(page.paragraph(sentence))

    def explain(self, text: str) -> None:
        """Adds a paragraph of explanation."""
        self.add(page.soft(text))

    def lack(self, text: str) -> None:
        """Adds a sentence in place of something that is left out."""
        self.add(page.missing(text))

    def table(
        self,
        columns: Sequence[page.Column],
        rows: Iterable[Sequence[Any]],
        bold: Sequence[int | None] = (),
    ) -> None:
        """Adds a sortable table; see `page.table`."""
        self.add(page.table(columns, rows, bold))

    def draw(self, name: str, figure: dict[str, Any], caption: str = "") -> None:
        """Adds a figure made by `figures`."""
        self.figures[name] = figure
        self.add(page.figure(name, caption))


def clearly_best(
    samples: Mapping[str, Sequence[float]],
    interval: Callable[[np.ndarray], Sequence[float] | None],
) -> str | None:
    """The name with the highest mean, if its interval of paired differences from every other
    excludes 0; else None.

    Args:
        samples: {name: values}, paired: the i-th values belong together.
        interval: of the mean of differences; None if there are too few.
    """
    if len(samples) < 2:
        return None
    values = {name: np.asarray(value, np.float64) for name, value in samples.items()}
    best = max(values, key=lambda name: values[name].mean())
    for name, value in values.items():
        found = None if name == best else interval(values[best] - value)
        if name != best and (found is None or found[0] <= 0):
            return None
    return best
