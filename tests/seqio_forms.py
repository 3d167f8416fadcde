"""Tasks in the forms in which T5X's users register them, from files beside this one.

The test that uses them copies this file into a directory with `SPLIT.tsv`, `sp.model` and `tfds/`.
"""

import functools
import os

import flax
import numpy as np
import seqio
import tensorflow as tf

HERE = os.path.dirname(os.path.abspath(__file__))
FILES = {split: os.path.join(HERE, f"{split}.tsv") for split in ("train", "validation", "test")}
VOCABULARY = seqio.SentencePieceVocabulary(os.path.join(HERE, "sp.model"), extra_ids=10)
FEATURES = {
    "inputs": seqio.Feature(VOCABULARY, required=False),
    "targets": seqio.Feature(VOCABULARY),
}
LANGUAGE = seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False, required=False)
Output = seqio.metrics.ModelOutputType


@seqio.map_over_dataset
def parse(line):
    parts = tf.strings.split(line, "\t")
    return {
        "inputs": tf.strings.join(["plural: ", parts[0]]),
        "targets": parts[1],
        "kind": parts[2],
        "weight": tf.strings.to_number(parts[3]),
    }


TAIL = [
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
]


def accuracy(targets, predictions):
    hits = [t == p for t, p in zip(targets, predictions, strict=True)]
    return {"accuracy": 100.0 * sum(hits) / len(hits)}


def add(name, preprocessors=(parse, *TAIL), features=FEATURES, splits=tuple(FILES), **settings):
    source = seqio.TextLineDataSource({split: FILES[split] for split in splits})
    settings = {"metric_fns": [accuracy], "source": source, **settings}
    return seqio.TaskRegistry.add(
        name, preprocessors=list(preprocessors), output_features=features, **settings
    )


# Metrics of predictions, and none.
add("standard")
add("without_metrics", metric_fns=[], splits=("train",))


# Metrics of scores, beside one of predictions.
def mean_score(targets, scores):
    return {"mean_score": sum(scores) / len(scores), "first": float(scores[0])}


add("scores", metric_fns=[mean_score, accuracy])


# Metrics that are closures, and a postprocess function that is a lambda.
def length_over(limit):
    def closure(targets, predictions):
        return {f"over_{limit}": float(np.mean([len(p) > limit for p in predictions]))}

    return closure


add("closures", metric_fns=[length_over(3), length_over(6)], postprocess_fn=lambda t, **_: t + "!")


# SeqIO's metric values.
def values(targets, predictions):
    lengths = np.array([len(p) for p in predictions])
    return {
        "sample": seqio.metrics.Text(predictions[0]),
        "length": seqio.metrics.Scalar(np.float32(lengths.mean())),
        "lengths": seqio.metrics.Histogram(lengths),
    }


add("metric_values", metric_fns=[values])


# Metrics of predictions with the model's auxiliary values.
def sharpness(targets, predictions, aux_values):
    return {"sharpness": float(np.mean(aux_values["scores"])), "n": len(predictions)}


add("aux_values", metric_fns=[sharpness])


# Metric objects, of tokens and of scores.
@flax.struct.dataclass
class Tokens(seqio.metrics.Metric):
    model_output_type: Output = Output.PREDICTION
    count: int = 0
    weight: float = 0.0

    @classmethod
    def from_model_output(
        cls, inputs, model_output, features, target_field_name="targets", mask=None, indices_2d=None
    ):
        vocabulary = features[target_field_name].vocabulary
        texts = [vocabulary.decode([int(i) for i in row]) for row in model_output]
        weight = sum(example["weight"] for example in inputs)
        return cls(count=sum(map(len, texts)), weight=float(weight))

    def compute(self):
        return {"characters": self.count, "weight": self.weight}


@flax.struct.dataclass
class WorstScore(seqio.metrics.CollectingMetric):
    model_output_type: Output = Output.SCORE

    def actual_compute(self, dataset, features, target_field_name="targets", cached_targets=None):
        scores = np.asarray(self.values["model_output"])
        return {"worst": float(scores.min())}, {"targets": [e["kind"] for e in dataset]}


legacy = seqio.metrics.PassthroughLegacyMetric.from_metric_fn(accuracy)
add("metric_objects", metric_fns=[], metric_objs=[Tokens, WorstScore, legacy.empty()])


# A postprocess function that looks at further features of a prediction's example.
def by_kind(text, example, is_target):
    return f"{example['kind'].decode()}:{text}"


def kinds(targets, predictions):
    return {"same_kind": np.mean([t[:4] == p[:4] for t, p in zip(targets, predictions)])}  # noqa: B905


add("example", metric_fns=[kinds, accuracy], postprocess_fn=by_kind)


# A postprocess function with arguments.
def to_class(text, label_classes, example=None, is_target=False):
    return label_classes.index(text) if text in label_classes else -1


classes = functools.partial(to_class, label_classes=["cats", "dogs"])
add("partial", postprocess_fn=classes)


# A preprocessor that reads the lengths of features.
def first_half(dataset, sequence_length, output_features):
    half = sequence_length["inputs"] // 2
    return dataset.map(lambda example: {**example, "inputs": example["inputs"][:half]})


tokenize, append = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
add("lengths", preprocessors=[parse, tokenize, first_half, append])


# A TensorFlow dataset in a local directory.
def rename(dataset):
    return seqio.preprocessors.rekey(dataset, {"inputs": "word", "targets": "plural"})


data_dir = os.path.join(HERE, "tfds")
add(
    "tfds",
    preprocessors=[rename, *TAIL],
    source=seqio.TfdsDataSource(tfds_name="plurals:1.0.0", tfds_data_dir=data_dir),
)

# Tasks that are only evaluated.
add("test_only", splits=("test",))
add("no_train", splits=("validation", "test"))

# Mixtures of mixtures; rates that are numbers, functions, and 0.
at_most = functools.partial(seqio.mixing_rate_num_examples, maximum=20)
seqio.MixtureRegistry.add("inner", ["standard", "scores", "closures", "lengths"], at_most)
seqio.MixtureRegistry.add("other", [("metric_values", 3), ("tfds", lambda task: 1.5)])
seqio.MixtureRegistry.add(
    "forms",
    [("inner", 2), ("other", 1), ("example", 0), ("no_train", at_most),
     "aux_values", "metric_objects", "partial", "without_metrics", ("standard", 1)],
    default_rate=0.5,
)  # fmt: skip
seqio.MixtureRegistry.add("held_out", ["test_only", "no_train", "standard"], at_most)

# Two vocabularies, and a further output feature.
TWO = {
    "inputs": seqio.Feature(VOCABULARY),
    "targets": seqio.Feature(seqio.ByteVocabulary(extra_ids=3)),
    "language": LANGUAGE,
}


@seqio.map_over_dataset
def language(example):
    return {**example, "language": tf.constant([1, 2, 3])}


add("two_vocabularies", features=TWO)
add("extra_feature", features=TWO, preprocessors=[parse, language, *TAIL])
seqio.MixtureRegistry.add("pair", ["two_vocabularies", "extra_feature"], 1.0)
