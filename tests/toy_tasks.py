"""Three tiny SeqIO tasks: mixture `toy_train` (toy_copy, toy_sum) and `toy_unseen` (toy_reverse).

toy_sum has several valid outputs and twice the mixing rate; toy_reverse has few-shot splits for
seeds 13 and 21. Lengths vary, so that packing has something to do.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from moe_jax.metrics import answers_or_target, exact_match

ONTOLOGY = {
    "extractive": {"copy": ["toy_copy"], "reverse": ["toy_reverse"]},
    "arithmetic": {"sum": ["toy_sum"]},
}
DESCRIPTIONS = {
    "toy_copy": "Repeat the words.",
    "toy_sum": "Add the numbers.",
    "toy_reverse": "Give the words from the back.",
}
SIZES = {"train": 60, "validation": 12, "test": 20}
FEW_SHOT = {f"fewshot_{seed}_{part}": 8 for seed in (13, 21) for part in ("train", "validation")}
WORDS = [
    "red",
    "green",
    "blue",
    "white",
    "black",
    "brown",
    "small",
    "large",
    "round",
    "square",
    "early",
    "late",
]


def example(task: str, rng: np.random.Generator) -> tuple[str, list[str]]:
    """One input with its valid outputs."""
    if task == "toy_sum":
        a, b = rng.integers(0, 50, 2)
        return f"sum: {a} plus {b}", [str(a + b), f"{a + b}.0"]
    words = rng.choice(WORDS, rng.integers(1, 6)).tolist()
    answer = words if task == "toy_copy" else words[::-1]
    return f"{task[4:]}: {' '.join(words)}", [" ".join(answer)]


def dataset(split: str, shuffle_files: bool, seed: int | None = None, *, task: str):
    """The split's examples, the same on every call."""
    del shuffle_files, seed
    sizes = SIZES | FEW_SHOT
    rng = np.random.default_rng([len(task), list(sizes).index(split)])
    rows = [example(task, rng) for _ in range(sizes[split])]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [text for text, _ in rows],
            "targets": [outputs[0] for _, outputs in rows],
            "answers": tf.ragged.constant([outputs for _, outputs in rows]),
        }
    )


FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
for name in ("toy_copy", "toy_sum", "toy_reverse"):
    sizes = SIZES | (FEW_SHOT if name == "toy_reverse" else {})
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(dataset, task=name), splits=list(sizes)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        postprocess_fn=answers_or_target,
        metric_fns=[exact_match],
        output_features={"inputs": FEATURE, "targets": FEATURE},
    )

seqio.MixtureRegistry.add("toy_train", [("toy_copy", 1.0), ("toy_sum", 2.0)])
seqio.MixtureRegistry.add("toy_unseen", ["toy_reverse"], default_rate=1.0)
