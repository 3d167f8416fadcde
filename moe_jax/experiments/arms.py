"""The arms of an experiment: the mixture of experts, what it is compared with, and controls."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

DIRECT = "direct"
DENSE = "dense"
ROUTED = "routed"
ORACLE = "oracle"
RANDOM = "random"
DESCRIBED = "dense_described"
COMPUTE = "dense_compute"
PARAMETERS = "dense_parameters"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the tables.

    Attributes:
        what: what it is, in a few words.
        made: how its model comes to be: `trained` by a run's gin file, `derived` from the mixture
            without training, or `untrained`, which is only adapted.
        dense: it is one plain model, without routes.
        given: where its tasks' routes come from, if the router does not learn them: `planted` by
            the ontology, `drawn` at random, or `exchanged` among the mixture's tasks.
    """

    what: str
    made: Literal["trained", "derived", "untrained"]
    dense: bool
    given: Literal["", "planted", "drawn", "exchanged"] = ""

    @property
    def route_of_new(self) -> bool:
        """A new task's route is given as well; otherwise it is found as in the mixture."""
        return self.given in ("planted", "exchanged")


ARMS: dict[str, Arm] = {
    DIRECT: Arm("the dense model before its training: direct fine-tuning", "untrained", True),
    DENSE: Arm("one model for all tasks: the baseline", "trained", True),
    ROUTED: Arm("the mixture of experts, which learns its routes", "trained", False),
    ORACLE: Arm("the routes that the ontology gives", "trained", False, "planted"),
    RANDOM: Arm("a random route for each training task", "trained", False, "drawn"),
    "average": Arm("the mixture's experts averaged into one", "derived", True),
    "shuffled": Arm("the mixture, tasks on each other's routes", "derived", False, "exchanged"),
    COMPUTE: Arm("dense, with the training compute of the mixture", "trained", True),
    DESCRIBED: Arm("dense, with each task's description in its inputs", "trained", True),
    PARAMETERS: Arm("dense, with as many parameters as the mixture", "trained", True),
}


def with_needed(arms: Iterable[str]) -> tuple[str, ...]:
    """The arms in the order of `ARMS`; with both baselines, and with what some are derived from."""
    arms = {DIRECT, DENSE, *arms}
    if any(ARMS[arm].made == "derived" for arm in arms):
        arms.add(ROUTED)
    return tuple(arm for arm in ARMS if arm in arms)
