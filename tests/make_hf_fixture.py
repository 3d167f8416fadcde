"""Writes tests/data/hf: a tiny `transformers` model of each family, and its outputs.

    python tests/make_hf_fixture.py [FAMILY ...]

Needs the extra `hf`. Tests that read the files do not, so that parity is always checked.
"""

import io
import json
import shutil
import sys
from pathlib import Path

import hf_models
import numpy as np
import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DATA = Path(__file__).with_name("data") / "hf"
TEXTS = [
    "",
    " ",
    "a",
    "The red cat no. 12 sat,\nthen  left.",
    " leading and trailing ",
    "naïve café",
    "日本語のテキスト",
    "smile 🙂 family 👩\u200d👩\u200d👧\u200d👦 flag 🇫🇷",
    "tab\tcontrol\x00\x07\x1b[0m\x7f end",
    "ﬁ ① Ⅳ ½ …",
    "a\u200bb\u200dc\ufeffd\u00a0e\u3000f\u2028g\u0301",
    "x" * 700,
    "ab " * 200,
    "don't WON'T 3.14e-9",
    "it ends </s> not <pad> here",
    "<mask> and <extra_id_3> too",
    "\r\n\r\n",
]
CORPUS = [f"The {c} cat no. {n} sat, then left." for c in ("red", "old") for n in range(300)]


def byte_level() -> str:
    """A `tokenizer.json` like BART's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=hf_models.VOCABULARY - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer.to_str()


def unigram(size: int, **settings) -> bytes:
    """A SentencePiece model like T5's, with identity normalisation (T5's own takes 240 kB)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def bart_tokenizer(directory: Path) -> None:
    """The files of a fast tokenizer."""
    (directory / "tokenizer.json").write_text(byte_level())
    settings = {"tokenizer_class": "BartTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def t5_tokenizer(directory: Path, extra_ids: int = 10, **settings) -> None:
    """A SentencePiece model; its sentinels come after its pieces."""
    model = unigram(90, normalization_rule_name="identity", **settings)
    (directory / "spiece.model").write_bytes(model)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}
    (directory / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def mt5_tokenizer(directory: Path) -> None:
    """A SentencePiece model that has the sentinels itself, as mT5's has."""
    sentinels = [f"▁<extra_id_{i}>" for i in reversed(range(10))]
    t5_tokenizer(directory, 0, user_defined_symbols=sentinels)


TOKENIZERS = {
    "bart": bart_tokenizer,
    "t5": t5_tokenizer,
    "t5_1_0": t5_tokenizer,
    "mt5": mt5_tokenizer,
}


def write(name: str) -> None:
    """Writes one family's directory: model, tokenizer, and outputs of `transformers`."""
    directory = DATA / name
    shutil.rmtree(directory, ignore_errors=True)
    model = hf_models.MODELS[name]()
    model.save_pretrained(directory)
    TOKENIZERS[name](directory)
    arrays = hf_models.batch()
    reference = hf_models.reference(model, arrays)
    arrays = {f"batch/{key}": array for key, array in arrays.items()}
    np.savez_compressed(directory / "reference.npz", **arrays, **reference)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [[text, tokenizer(text).input_ids] for text in TEXTS]
    (directory / "ids.json").write_text(json.dumps(ids) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or TOKENIZERS:
        write(name)
