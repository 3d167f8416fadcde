"""Writes the vocabularies of the cache. Imports TensorFlow."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_jax.core import checksums, files
from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.data import registry, vocabulary
from moe_jax.data.registry import seqio  # not `import seqio`: this import is quiet
from moe_jax.data.request import Request
from moe_jax.data.seqio_tokenizers import SeqioTokenizers
from moe_jax.data.vocabulary_training import train_sentencepiece


def prepare_vocabulary(
    cache_dir: Path,
    request: Request,
    modules: Sequence[ModuleType],
    digest: Callable[[seqio.Task], str],
    tasks: Mapping[str, seqio.Task],
) -> tuple[str, seqio.Vocabulary | None]:
    """Returns the vocabulary's directory name and the vocabulary; None if tasks keep their own.

    Their own are two, where inputs and targets have different ones.

    Args:
        modules: the task modules.
        digest: of the code and data of a task.
    """
    config = request.vocabulary
    parent = cache_dir / "vocabularies"
    if config.kind == "sentencepiece" and not config.path:
        try:
            trainers = registry.find_tasks(config.trained_on, modules)
        except UserError as e:
            raise UserError(f"VocabularyConfig.trained_on: {e}") from e
        digests = [
            [digest(task), request.lengths if registry.reads_lengths(task) else None]
            for task in trainers
        ]
        name = checksums.digest([config.size, config.extra_ids, config.trained_on, digests])
        if not is_whole(parent / name):
            print(f"training a vocabulary on {config.trained_on!r}", file=sys.stderr)
            model = train_sentencepiece(_texts(trainers, request.lengths), config.size)
            _save_vocabulary(parent / name, _sentencepiece(model, config.extra_ids))
        return name, seqio.SentencePieceVocabulary(str(parent / name / vocabulary.MODEL))
    settings = {}
    match config.kind:
        case "bytes":
            seqio_vocabulary = seqio.ByteVocabulary(config.extra_ids)
        case "sentencepiece":
            vocabulary.read_sentencepiece(config.path)  # fails early, with one clear error
            seqio_vocabulary = seqio.SentencePieceVocabulary(config.path, config.extra_ids)
        case "tokenizers":
            seqio_vocabulary = SeqioTokenizers(vocabulary.read_tokenizers(config.path))
        case "seqio":
            settings = {"factory": config.factory}
            seqio_vocabulary = registry.load_vocabulary(settings)
        case "task":
            first = next(iter(tasks.values()))
            settings = {"task": first.name, "task_modules": request.task_modules}
            seqio_vocabulary = registry.own_vocabularies(first)
            for task in tasks.values():
                if registry.own_vocabularies(task) != seqio_vocabulary:
                    raise UserError(
                        f"tasks {first.name!r} and {task.name!r} bring different vocabularies; use"
                        " another VocabularyConfig.kind than 'task'"
                    )
    with tempfile.TemporaryDirectory() as directory:
        _save_vocabulary(Path(directory) / "new", seqio_vocabulary, settings)
        name = files.read_json(Path(directory) / "new" / vocabulary.FILE)["fingerprint"]
    if not is_whole(parent / name):
        _save_vocabulary(parent / name, seqio_vocabulary, settings)
    return name, None if config.kind == "task" else seqio_vocabulary


def is_replaced(task: seqio.Task, tokeniser: seqio.Vocabulary) -> bool:
    """Whether `tokeniser` takes the place of a vocabulary that the task was registered with.

    Plain bytes do not count: a task that leaves the choice to the run has them.
    """
    theirs = registry.own_vocabularies(task)
    return any(own not in (tokeniser, seqio.ByteVocabulary()) for own in theirs)


def _texts(tasks: Sequence[seqio.Task], lengths: Mapping[str, int] | None) -> list[str]:
    """Inputs and targets of the train splits, in order."""
    texts = []
    placeholder = seqio.ByteVocabulary()
    for task in progress(tasks, desc="read text", unit=" tasks"):
        if "train" not in task.splits:
            raise UserError(f"task {task.name!r} has no 'train' split to train a vocabulary on")
        task = registry.with_vocabulary(task, placeholder)
        for _, rows in registry.read(task, ["train"], lengths):
            texts += [registry.text(row, f, placeholder) for row in rows for f in registry.FEATURES]
    return texts


def _sentencepiece(model: bytes, extra_ids: int) -> seqio.SentencePieceVocabulary:
    """`model` as a SeqIO vocabulary, read before the temporary file is deleted."""
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        seqio_vocabulary = seqio.SentencePieceVocabulary(file.name, extra_ids)
        seqio_vocabulary.load_model()
    return seqio_vocabulary


def _save_vocabulary(
    path: Path,
    seqio_vocabulary: seqio.Vocabulary | tuple[seqio.Vocabulary, seqio.Vocabulary],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a vocabulary's directory; of two, that of the inputs and that of the targets.

    Byte, SentencePiece and Hugging Face vocabularies are stored as data, so that reading them needs
    no TensorFlow. Sentinels become part of the model. Other vocabularies are stored as `settings`,
    from which they are made again.
    """
    settings, contents = _stored(seqio_vocabulary, settings)
    with files.new_directory(path) as directory:
        vocabulary.write_vocabulary(directory, settings, contents)
        checksums.seal(directory)


def _stored(
    seqio_vocabulary: seqio.Vocabulary | tuple[seqio.Vocabulary, seqio.Vocabulary],
    settings: Mapping[str, Any] | None,
) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """(settings, contents) for `vocabulary.write_vocabulary`."""
    if isinstance(seqio_vocabulary, tuple):
        if seqio_vocabulary[0] == seqio_vocabulary[1]:
            return _stored(seqio_vocabulary[0], settings)
        sides = {
            feature: _stored(side, {**settings, "feature": feature})
            for feature, side in zip(registry.FEATURES, seqio_vocabulary, strict=True)
        }
        contents = {
            f"{feature}.{name}": content
            for feature, (_, side) in sides.items()
            for name, content in side.items()
        }
        return {"kind": "two"} | {feature: side for feature, (side, _) in sides.items()}, contents
    if type(seqio_vocabulary) is seqio.ByteVocabulary:
        return {"kind": "bytes", "extra_ids": seqio_vocabulary.extra_ids}, {}
    if type(seqio_vocabulary) is seqio.SentencePieceVocabulary:
        return {"kind": "sentencepiece"}, {vocabulary.MODEL: seqio_vocabulary.sp_model}
    if type(seqio_vocabulary) is SeqioTokenizers:
        return seqio_vocabulary.own.settings, seqio_vocabulary.own.contents
    return {"kind": "seqio", **settings}, {}


def is_whole(directory: Path) -> bool:
    """Whether there is such a directory of the cache; one that is damaged is removed."""
    if not directory.is_dir():
        return False
    if checksums.damage(directory) is None:
        return True
    shutil.rmtree(directory)
    return False
