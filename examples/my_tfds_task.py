"""A task from a TensorFlow dataset: Roman numerals. See README.md in this directory."""

import random

import seqio
import tensorflow_datasets as tfds

from moe_jax.metrics import answers_or_target, exact_match

ENVIRONMENT = ("TFDS_DATA_DIR",)  # variables that change what this module reads
ONTOLOGY = {"rewriting": {"numbers": ["my_roman_numerals"]}}

TENS = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"]
ONES = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"]


def roman(number: int) -> str:
    """Roman numeral of 1..399."""
    hundreds, rest = divmod(number, 100)
    return "C" * hundreds + TENS[rest // 10] + ONES[rest % 10]


class RomanNumerals(tfds.core.GeneratorBasedBuilder):
    """Numbers 1 to 399. An example of any dataset that TFDS can build or load."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"number": text, "roman": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        numbers = random.Random(0).sample(range(1, 400), 399)
        slices = {"train": numbers[:300], "validation": numbers[300:350], "test": numbers[350:]}
        return {split: self._generate_examples(part) for split, part in slices.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            yield number, {"number": str(number), "roman": roman(number)}


def to_text(dataset):
    """Dataset fields -> text fields. SeqIO preprocessors are functions from dataset to dataset."""
    return dataset.map(lambda x: {"inputs": "in Roman: " + x["number"], "targets": x["roman"]})


SPLITS = {split: split for split in ("train", "validation", "test")}
# For few-shot adaptation, by the name of a sample: FinetuneConfig.seeds.
SPLITS |= {"fewshot_13_train": "train[:16]", "fewshot_13_validation": "train[16:32]"}

# Every output feature is tokenised. A run replaces this vocabulary by the one it chooses.
feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

seqio.TaskRegistry.add(
    "my_roman_numerals",
    # Built in TFDS_DATA_DIR (default ~/tensorflow_datasets) when first read, here without network.
    source=seqio.TfdsDataSource("roman_numerals:1.0.0", splits=SPLITS),
    preprocessors=[to_text, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    postprocess_fn=answers_or_target,
    metric_fns=[exact_match],
    output_features={"inputs": feature, "targets": feature},
)
