"""What to prepare, which is the key of the cache."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.core import paths
from moe_jax.core.checksums import digest
from moe_jax.data.vocabulary import VocabularyConfig

FORMAT = 4  # version of the cache's files; a change makes all caches stale


@dataclasses.dataclass(frozen=True)
class Request:
    """What to prepare: every choice of the user. Serves as the key of the cache.

    Attributes:
        names: mixtures or tasks.
        task_modules: dotted names or .py files that register them.
        vocabulary: how they are tokenised.
        splits: the splits to prepare; None for all splits of a task.
        lengths: what preprocessors get as `sequence_length`. Tasks that do not read it are the same
            for all lengths.
        environment: variables to set before the modules are imported.
    """

    names: tuple[str, ...]
    task_modules: tuple[str, ...]
    vocabulary: VocabularyConfig
    splits: tuple[str, ...] | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lengths: Mapping[str, int] | None = None

    @classmethod
    def make(
        cls,
        names: str | Sequence[str],
        task_modules: str | Sequence[str],
        vocabulary: VocabularyConfig,
        splits: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> "Request":
        """Makes a request with absolute paths and the vocabulary's training mixture filled in.

        A SentencePiece vocabulary with neither `path` nor `trained_on` is trained on the first of
        `names`.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        modules = (task_modules,) if isinstance(task_modules, str) else task_modules
        if vocabulary.kind == "sentencepiece" and not (vocabulary.path or vocabulary.trained_on):
            vocabulary = dataclasses.replace(vocabulary, trained_on=names[0])
        return cls(
            names,
            tuple(os.path.abspath(m) if m.endswith(".py") else m for m in modules),
            vocabulary,
            None if splits is None else tuple(splits),
            dict(environment or {}),
            None if lengths is None else dict(lengths),
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Request":
        return cls.make(**{**value, "vocabulary": VocabularyConfig(**value["vocabulary"])})

    def path(self, cache_dir: str | os.PathLike, name: str) -> Path:
        """File of the prepared mixture `name`, which is one of `names`.

        One for all lengths: the file says for which it is, where a task reads them.
        """
        key = digest({**self.to_json(), "names": name, "lengths": None, "format": FORMAT})
        return paths.parse(cache_dir) / "mixtures" / f"{name}-{key}.json"
