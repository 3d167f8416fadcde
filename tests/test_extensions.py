"""A router, a selection, a family and a metric of one small file each, trained with from gin."""

import json

import pytest
from toy_run import bindings, finish, flags_of, start

FILES = {
    "my_router.py": '''
import flax.linen as nn
from moe_jax.model.router import Router, register

class Affine(Router):
    """One affine map of the representation."""

    @nn.compact
    def __call__(self, representation_TxK):
        T, K = representation_TxK.shape
        axes = ("router_in", "router_out")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), axes)
        kernel = self.param("kernel", init, (K, self.layers * self.experts))
        return (representation_TxK @ kernel).reshape(T, self.layers, self.experts)

register("affine", Affine)
''',
    "my_selection.py": """
import jax
from moe_jax.model.selection import Selection, register

register(Selection("sharp", lambda logits, temperature, noise, k: jax.nn.softmax(4 * logits)))
""",
    "my_family.py": """
import dataclasses
from moe_jax.model.family import family_of, register

register(dataclasses.replace(family_of("bart"), name="bart_silu", activation="silu", norm="rms"))
""",
    "my_metric.py": '''
def first_letter(targets, predictions):
    """Share of predictions that begin as an answer does."""
    hits = [p[:1] in {a[:1] for a in t} for t, p in zip(targets, predictions, strict=True)]
    return {"first_letter": sum(hits) / len(hits)}
''',
    "my_task.py": """
import seqio
import tensorflow as tf
from my_metric import first_letter

def copies(split, shuffle_files=False, seed=None):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "xyz"]
    return tf.data.Dataset.from_tensor_slices({"inputs": words, "targets": words})

feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
seqio.TaskRegistry.add(
    "my_copy", source=seqio.FunctionDataSource(copies, splits=("train", "validation")),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    metric_fns=[first_letter], output_features={"inputs": feature, "targets": feature},
)
""",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory of the files, MODEL_DIR, bindings) of a run that uses all of them."""
    directory = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    extensions = [str(directory / f"my_{n}.py") for n in ("router", "selection", "family")]
    lines = bindings(
        directory / "run", TRAIN_STEPS=2, CHECKPOINT_PERIOD=2, EVAL_PERIOD=2,
        EXTENSIONS=tuple(extensions), MIXTURE_OR_TASK_NAME="my_copy",
        TASK_MODULES=(str(directory / "my_task.py"),), CACHE_DIR=str(directory / "cache"),
        RouterConfig__kind="affine", RouterConfig__selection="sharp",
        RouterConfig__experts_per_layer=0, ModelConfig__architecture="bart_silu",
        VocabularyConfig__kind="bytes",
    )  # fmt: skip
    finish(start("train", flags_of(lines), path=directory))
    return directory, directory / "run", lines


def test_a_run_trains_with_all_of_them(trained):
    _, run, _ = trained
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("score/my_copy" in line for line in metrics)
    config = json.loads((run / "config.json").read_text())
    assert config["RouterConfig.kind"] == "affine"
    assert config["ModelConfig.architecture"] == "bart_silu"


def test_the_run_says_what_to_import(trained):
    """`eval` reads the extensions from the run."""
    directory, run, _ = trained
    out = finish(start("eval", [f"--gin.MODEL_DIR={run}", "--gin.eval.split=validation"],
                       path=directory))  # fmt: skip
    assert "first_letter" in out
