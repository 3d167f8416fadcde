"""SeqIO tasks with answer choices: chosen by the evaluator, or by metrics of scores.

rank_chosen   examples carry `answer_choices`, two to four of them
rank_rows     the same questions in the form of T5's rank classification: a row for every choice
rank_mixed    only every other question has choices; the rest is decoded
rank_both     metrics of predictions and of scores
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from moe_jax.metrics import accuracy, answers_or_target, choice_target, rank_classification

QUESTIONS = 13
FEW_SHOT = ("fewshot_13_train", "fewshot_13_validation")  # the questions of the test split again
WORDS = ["red", "green", "blue and white", "a", "rather small", "round"]


def questions():
    """[(question, choices, the correct one, weight)], the same on every call."""
    rng = np.random.default_rng(7)
    for number in range(QUESTIONS):
        choices = rng.permutation(WORDS)[: 2 + number % 3].tolist()
        text = f"which? {' '.join(rng.choice(WORDS, 1 + number % 8))}"
        yield text, choices, choices[int(rng.integers(len(choices)))], 1.0 + number % 2


def of_questions(split, shuffle_files, seed=None):
    """A row for every question."""
    texts, choices, targets, _ = zip(*questions(), strict=True)
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": list(texts),
            "targets": list(targets),
            "answer_choices": tf.ragged.constant(choices),
        }
    )


def of_some_questions(split, shuffle_files, seed=None):
    """The same, where every second question has no choices."""
    texts, choices, targets, _ = zip(*questions(), strict=True)
    some = [found if number % 2 == 0 else [] for number, found in enumerate(choices)]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": list(texts),
            "targets": list(targets),
            "answer_choices": tf.ragged.constant(some, tf.string),
        }
    )


def of_choices(split, shuffle_files, seed=None):
    """A row for every choice, as T5's `preprocessors.rank_classification` makes them."""
    rows = [
        {
            "idx": (number, place),
            "inputs": text,
            "targets": choice,
            "is_correct": choice == target,
            "weight": weight,
        }
        for number, (text, choices, target, weight) in enumerate(questions())
        for place, choice in enumerate(choices)
    ]
    return tf.data.Dataset.from_tensor_slices({key: [r[key] for r in rows] for key in rows[0]})


def mean_score(targets, scores):
    """A metric of scores that any task can have."""
    return {"mean": float(np.mean(scores))}


def add(name, source, postprocess_fn, metric_fns):
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["test", *FEW_SHOT]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        postprocess_fn=postprocess_fn,
        metric_fns=metric_fns,
        output_features={"inputs": feature, "targets": feature},
    )


summed = functools.partial(rank_classification, length_penalty=0.0)
add("rank_chosen", of_questions, answers_or_target, [accuracy])
add("rank_rows", of_choices, choice_target, [rank_classification])
add("rank_rows_summed", of_choices, choice_target, [summed])
add("rank_mixed", of_some_questions, answers_or_target, [accuracy])
add("rank_both", of_questions, answers_or_target, [accuracy, mean_score])
NAMES = ("rank_both", "rank_chosen", "rank_mixed", "rank_rows", "rank_rows_summed")
seqio.MixtureRegistry.add("rank", list(NAMES), default_rate=1.0)
