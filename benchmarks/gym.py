"""A CrossFit directory as a prepared mixture, with a byte-level BPE trained on it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import CACHE
from moe_jax.core import files
from moe_jax.core.errors import UserError

if TYPE_CHECKING:
    from moe_jax.data.cache import PreparedMixture

MIXTURE = "crossfit_train"
DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "gym" / "crossfit"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def add_flags(arguments) -> None:
    """Adds flags for the data's directories."""
    default = os.environ.get("CROSSFIT_DIR", DEFAULT)
    arguments.add_argument("--crossfit_dir", default=default, help="default: $CROSSFIT_DIR")
    arguments.add_argument(
        "--cache_dir", default=str(CACHE / "benchmarks"), help="of the prepared mixture"
    )


def mixture(crossfit_dir: str, cache_dir: str, vocabulary_size: int) -> "PreparedMixture":
    """The few-shot training mixture; prepared if it is not in `cache_dir`.

    Without a CrossFit directory, a prepared mixture in `cache_dir` is used.

    Raises:
        UserError: there is neither.
    """
    # Here, because a benchmark that has flags for data may run where none can be read.
    from moe_jax.data.cache import digest, read_mixture
    from moe_jax.data.prepared import ensure_prepared
    from moe_jax.data.request import Request
    from moe_jax.data.vocabulary import VocabularyConfig

    directory = Path(crossfit_dir)
    if not directory.is_dir():
        prepared = sorted(Path(cache_dir, str(vocabulary_size)).glob(f"mixtures/{MIXTURE}-*.json"))
        if not prepared:
            raise UserError(
                f"no CrossFit directory at {directory}, no prepared mixture in {cache_dir}; "
                "give --crossfit_dir or CROSSFIT_DIR"
            )
        return read_mixture(Path(cache_dir, str(vocabulary_size)), prepared[0])
    cache = Path(cache_dir, str(vocabulary_size))
    tokenizer = cache / f"tokenizer-{digest(str(directory.resolve()))}"
    if not (tokenizer / "config.json").exists():
        _train(directory, tokenizer, vocabulary_size)
    request = Request.make(
        MIXTURE, "moe_jax.builtin_tasks.crossfit",
        VocabularyConfig(kind="tokenizers", path=str(tokenizer)), ("train",),
        {"CROSSFIT_DIR": str(directory.resolve())},
    )  # fmt: skip
    return ensure_prepared(cache, request)[MIXTURE]


def _train(directory: Path, out: Path, size: int) -> None:
    """A tokenizer like BART's, of all training files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = (path.read_text() for path in sorted(directory.glob("*/*_train.tsv")))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    files.write_text(out / "tokenizer.json", tokenizer.to_str())
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = {"model_type": "bart", "vocab_size": tokenizer.get_vocab_size(), **ids}
    files.write_json(out / "config.json", config)
