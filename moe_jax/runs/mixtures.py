"""The prepared mixtures of a configuration, in the vocabulary of a run where there is one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_jax.core.errors import UserError, say
from moe_jax.data import mirror, vocabulary
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.prepared import ensure_prepared, look_up
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.runs import directory
from moe_jax.runs.config import DataConfig


def prepare_mixtures(
    data: DataConfig, *others: str, run: str | None = None
) -> dict[str, PreparedMixture]:
    """The mixture of `data` first, then `others` in the same vocabulary; by name.

    Args:
        run: a model directory. What it was trained on may have changed since, and with it the
            vocabulary that `data` stands for: the one that the run carries is taken.
    """
    if data.mixture_or_task_name is None:
        raise UserError("MIXTURE_OR_TASK_NAME is not set: give --gin.MIXTURE_OR_TASK_NAME=...")
    names = list(dict.fromkeys([data.mixture_or_task_name, *others]))
    request = Request.make(
        names, data.task_modules, data.vocabulary, environment=data.environment,
        lengths=data.lengths,
    )  # fmt: skip
    own = None if run is None else run_vocabulary(run)
    if own is not None:
        found = look_up(data.cache_dir, request, quiet=True)
        wanted = _fingerprint(own)
        if all(m is not None and _fingerprint(m.vocabulary_dir) == wanted for m in found.values()):
            return found
        config = _config_of(own) or request.vocabulary
        request = dataclasses.replace(request, vocabulary=config)
    return ensure_prepared(data.cache_dir, request)


def trained_mixture(model_dir: str, data: DataConfig) -> PreparedMixture:
    """What the run in `model_dir` was trained on, in the cache of `data`."""
    own = directory.read_config(directory.root(model_dir)).data
    own = dataclasses.replace(own, cache_dir=data.cache_dir)
    return prepare_mixtures(own, run=model_dir)[own.mixture_or_task_name]


def say_ignored(data: DataConfig, mixture: PreparedMixture) -> None:
    """Says what the tasks and the mixture were registered with, and this run does not use."""
    trained = mixture.with_split("train")
    if left := sorted({*mixture.names} - {task.name for task in trained}):
        say(f"not trained on, without a split 'train': {_some(left)}")
    if mixture.replaced:
        say(
            f"VocabularyConfig.kind {data.vocabulary.kind!r} replaces the vocabulary that these "
            f"were registered with, 'task' keeps it: {_some(mixture.replaced)}"
        )
    # In proportion to the examples, or all equal, as where nothing else was thought of.
    shares = {task.rate / task.examples("train") for task in trained}
    if data.mixing == "examples" and len({t.rate for t in trained}) > 1 and len(shares) > 1:
        shown = [f"{task.name} {task.rate:g}" for task in mixture.tasks]
        say(
            "DataConfig.mixing 'examples' draws tasks by their number of examples, 'seqio' by the "
            f"rates of {mixture.name}: {_some(shown)}"
        )


def say_cut(mixture: PreparedMixture, split: str, lengths: Mapping[str, int]) -> None:
    """Says which tasks have examples in a split that are longer than `lengths`."""
    for column, feature in enumerate(("inputs", "targets")):
        cut = {}
        for task in mixture.with_split(split):
            tokens_N = task.lengths(split)[:, column]
            if longer := int((tokens_N > lengths[feature]).sum()):
                longest, of = int(tokens_N.max()), len(tokens_N)
                cut[f"{task.name} ({longer:,} of {of:,}, up to {longest:,} tokens)"] = longer / of
        if cut:
            worst = sorted(cut, key=cut.get, reverse=True)
            say(
                f"TASK_FEATURE_LENGTHS cuts {feature} of {split} after {lengths[feature]} tokens: "
                f"{_some(worst, 3)}"
            )


def _some(names: Sequence[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def run_vocabulary(model_dir: str | Path) -> Path | None:
    """Where a run carries its vocabulary; None where a directory has none."""
    path = directory.root(model_dir) / vocabulary.DIRECTORY
    return path if (path / vocabulary.FILE).is_file() else None


def check_vocabulary(model_dir: str | Path, mixture: PreparedMixture) -> None:
    """Says so where a model, which another one starts from, has another vocabulary."""
    own = run_vocabulary(model_dir)
    if own is not None and _fingerprint(own) != _fingerprint(mixture.vocabulary_dir):
        say(
            f"{model_dir} has another vocabulary than this run: unless both give the same ids, its"
            " embeddings are of other tokens"
        )


def _fingerprint(path: Path) -> str | None:
    return vocabulary.read_settings(path).get("fingerprint")


def _config_of(own: Path) -> VocabularyConfig | None:
    """What tokenises with a prepared vocabulary; None where SeqIO must be asked for it."""
    settings, own = vocabulary.read_settings(own), mirror.fetch_vocabulary(own)
    match settings["kind"]:
        case "sentencepiece":
            return VocabularyConfig(kind="sentencepiece", path=str(own / vocabulary.MODEL))
        case "tokenizers":
            return VocabularyConfig(kind="tokenizers", path=str(own))
        case "bytes":
            return VocabularyConfig(kind="bytes", extra_ids=settings["extra_ids"])
    return None
