"""The scores among what a metric gives."""

from collections.abc import Mapping
from typing import Any

from moe_jax.core.errors import UserError


def add_scores(scores: dict[str, float], found: Mapping[str, Any], task: str) -> None:
    """Adds the numbers that a metric gave: plain ones, and SeqIO's `Scalar`.

    Its texts, histograms, images and the like are no scores: they are left out.

    Raises:
        UserError: a name is taken.
    """
    for name, value in found.items():
        if type(value).__module__ == "seqio.metrics":
            value = getattr(value, "value", None)
        if value is None:
            continue
        if name in scores:
            raise UserError(f"task {task!r}: two metrics are called {name!r}")
        scores[name] = float(value)
