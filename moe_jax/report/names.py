"""What the page calls the arms of an experiment and the starts of few-shot adaptation."""

from collections.abc import Mapping
from typing import Any

DIRECT, DENSE, MIXTURE = "direct fine-tuning", "dense", "mixture of experts"
_NAMES = {"direct": DIRECT, "untrained": DIRECT, "routed": MIXTURE, "moe": MIXTURE}


def named(name: str) -> str:
    """The name on the page of an arm or a start; of others, their own."""
    return _NAMES.get(name, name)


def comparison(found: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a `paired.Comparison` whose arms have their names on the page."""
    arms = {named(arm): gain for arm, gain in found["arms"].items()}
    return {**found, "baseline": named(found["baseline"]), "arms": arms}
