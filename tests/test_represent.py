"""Task representations: embeddings against second implementations, files, whole commands."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import toy_mixtures
from toy_run import (
    bindings,
    finish,
    flags_of,
    pack_rows,
    random_backbone,
    random_examples,
    start,
    tiny_model,
)
from toy_run import tiny_params as fresh_params

import moe_jax.represent  # noqa: F401  which makes its settings known to gin
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh, replicated
from moe_jax.data.representations import Representations
from moe_jax.interop.hf_read import from_hf
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.task_moe import routes_of
from moe_jax.runs import gin_files
from moe_jax.runs.config import Config, DataConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.load import read_run
from moe_jax.training import grouped_loss as groups
from moe_jax.training.checkpoints import load_params
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.unseen import embedding, representations
from moe_jax.unseen.descriptions import Descriptions

DATA = Path(__file__).with_name("data") / "hf"

# ------------------------------------------------------------------------------ embeddings


def torch_fisher(model, arrays) -> np.ndarray:
    """Mean over examples of squared gradients of log-likelihoods, averaged over units' inputs."""
    import torch

    totals = {}
    rows = len(arrays["inputs"])
    for r in range(rows):
        ids = {}
        for name, side in (
            ("inputs", "input"),
            ("targets", "target"),
            ("decoder_inputs", "target"),
        ):
            real = arrays[f"{side}_segments"][r] > 0
            ids[name] = torch.tensor(arrays[name][r][real]).long()[None]
        model.zero_grad()
        logits = model(input_ids=ids["inputs"], decoder_input_ids=ids["decoder_inputs"]).logits
        chosen = torch.log_softmax(logits, -1).gather(-1, ids["targets"][..., None])
        chosen.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                squares = parameter.grad.double().square().mean(1).numpy()  # [out, in] -> [out]
                totals[name] = totals.get(name, 0) + squares / rows
    return totals


# Ours in the order of the vector: our matrix -> theirs, side by side.
BART = {
    "decoder": [
        ["encoder_attn.k_proj", "encoder_attn.v_proj"], ["encoder_attn.out_proj"],
        ["encoder_attn.q_proj"], ["fc1"], ["fc2"], ["self_attn.out_proj"],
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ],
    "encoder": [
        ["fc1"], ["fc2"], ["self_attn.out_proj"],
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ],
}  # fmt: skip
_SELF = [f"layer.0.SelfAttention.{x}" for x in "qkv"]
_CROSS = [f"layer.1.EncDecAttention.{x}" for x in "kv"]
T5 = {
    side: [
        *cross,
        [f"layer.{last}.DenseReluDense.wi_0", f"layer.{last}.DenseReluDense.wi_1"],
        [f"layer.{last}.DenseReluDense.wo"],
        ["layer.0.SelfAttention.o"],
        _SELF,
    ]
    for side, last, cross in (
        ("decoder", 2, [_CROSS, ["layer.1.EncDecAttention.o"], ["layer.1.EncDecAttention.q"]]),
        ("encoder", 1, []),
    )
}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_fisher_diagonal_is_that_of_pytorch(name, tmp_path):
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models

    theirs = hf_models.bart() if name == "bart" else hf_models.t5()
    if name == "bart":
        source = hf_models.save(
            theirs, tmp_path / "hf", (DATA / "bart" / "tokenizer.json").read_text()
        )
    else:
        source = tmp_path / "hf"
        theirs.save_pretrained(source)
        for file in ("spiece.model", "tokenizer_config.json"):
            (source / file).write_bytes((DATA / "t5" / file).read_bytes())
    from_hf(str(source), tmp_path / "ours")
    run = read_run(str(tmp_path / "ours"), 0)
    batch = hf_models.batch()
    totals = torch_fisher(theirs, batch)
    prefix, middle = ("model.", "layers") if name == "bart" else ("", "block")
    wanted = np.concatenate(
        [
            totals[f"{prefix}{side}.{middle}.{layer}.{module}.weight"]
            for side, depth in (("decoder", 1), ("encoder", 2))
            for modules in (BART if name == "bart" else T5)[side]
            for layer in range(depth)
            for module in modules
        ]
    )
    # A row of padding, as the last batch of a task has, adds nothing.
    batch = {k: np.concatenate([a, np.zeros_like(a[:1])]) for k, a in batch.items()}
    ours = jax.jit(partial(embedding.fisher_sum, run.model))(run.params["backbone"], batch) / 3
    assert ours.shape == wanted.shape
    error = np.abs(ours - wanted).max() / wanted.max()
    print(f"Fisher diagonal of {name}: {len(wanted)} units, largest {wanted.max():.2e},"
          f" error relative to it {error:.1e}")  # fmt: skip
    assert error < 1e-5
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_text_embedding_ignores_padding():
    """The content and amount of padding do not matter, and each example counts the same."""
    rng = np.random.default_rng(0)
    model = tiny_model(experts=1)
    backbone = fresh_params(model)["backbone"]
    examples = [random_examples(rng, 1) for _ in range(3)]
    embed = jax.jit(partial(embedding.text_sum, model))
    short = pack_rows([*examples, []], 5, 5)
    found = np.asarray(embed(backbone, short))

    long = pack_rows([*examples, []], 11, 5)
    padding = long["input_segments"] == 0
    long["inputs"][padding] = rng.integers(2, 24, padding.sum())
    np.testing.assert_allclose(embed(backbone, long), found, rtol=1e-5, atol=1e-5)

    encode = partial(EncoderDecoder(model.config).apply, {"params": backbone}, method="encode")
    means = []
    for ((source, _),) in examples:
        ids = np.array([source], np.int32)
        states = encode(ids, np.ones_like(ids), np.arange(ids.shape[1])[None], None)
        means.append(np.asarray(states[0], np.float64).mean(0))
    np.testing.assert_allclose(found, np.sum(means, 0), rtol=1e-5, atol=1e-5)


def test_example_embedding_reads_inputs_and_targets():
    """The encoder reads each: their embeddings are side by side."""
    rng = np.random.default_rng(0)
    model = tiny_model(experts=1)
    backbone = fresh_params(model)["backbone"]
    examples = [random_examples(rng, 1)[0] for _ in range(3)]
    turned = [(target, source) for source, target in examples]
    here, there = (pack_rows([[pair] for pair in pairs], 11, 11) for pairs in (examples, turned))
    found = embedding.example_sum(model, backbone, here)
    one, other = (embedding.text_sum(model, backbone, batch) for batch in (here, there))
    assert found.shape == (2 * model.config.d_model,)
    np.testing.assert_allclose(found, np.concatenate([one, other]), rtol=1e-6, atol=1e-6)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("kind", ["text", "example", "fisher"])
def test_many_devices_share_the_rows_and_agree_with_one(kind, monkeypatch):
    """Four shards of a mesh that also splits the model; 6 rows are not a multiple of them."""
    mixture, _ = toy_mixtures()
    size = mixture.vocabulary.size
    model = tiny_model(experts=1, max_positions=48, vocabulary_size=size)
    params = {"backbone": random_backbone(model)}
    data = DataConfig(lengths={"inputs": 40, "targets": 20})
    config = Config(RunConfig(), data, optimizer=OptimizerConfig(learning_rate=1e-4))
    settings = {"kind": kind, "split": "train", "examples": 14, "seed": 0}
    settings |= {"steps": 3, "batch_size": 6}
    seen = {"summed": set(), "tuned": set()}  # rows that one device does at a time

    def watch(module, name, key, place):
        function = getattr(module, name)

        def watched(*args, **settings):
            seen[key].add(args[place]["inputs"].shape[0])
            return function(*args, **settings)

        monkeypatch.setattr(module, name, watched)

    watch(embedding, f"{kind}_sum", "summed", 2)
    watch(groups, "group_loss", "tuned", 3)
    found, shares = [], []
    for mesh in (
        make_mesh(MeshConfig(), jax.devices()[:1]),
        make_mesh(MeshConfig(data=2, fsdp=2, model=2)),
    ):
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, replicated(mesh))
            embed = embedding.Embedder(model, placed, config, settings, 6, mesh)
            found.append(embed(mixture, "toy_sum"))
        shares.append({key: rows.copy() for key, rows in seen.items()})
        [rows.clear() for rows in seen.values()]
    tuned = ({6}, {2}) if kind == "fisher" else (set(), set())
    assert shares == [{"summed": {6}, "tuned": tuned[0]}, {"summed": {2}, "tuned": tuned[1]}]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5 * np.abs(found[0]).max())


# ------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """MODEL_DIR of a dense run."""
    model_dir = tmp_path_factory.mktemp("dense") / "run"
    settings = {"TRAIN_STEPS": 4, "ModelConfig__experts": 1}
    finish(start("train", flags_of(bindings(model_dir, **settings))))
    return model_dir


def call(model_dir, **settings) -> None:
    """Runs `represent` in this process; a setting is one of its arguments or a binding."""
    lines = [f"MODEL_DIR = {str(model_dir)!r}"]
    for name, value in settings.items():
        name = name.replace("__", ".") if name.isupper() or "__" in name else f"represent.{name}"
        lines.append(f"{name} = {value!r}")
    gin_files.parse([], lines, [], from_model_dir=True)
    representations.represent(build(Config), build(representations.RepresentConfig))


@pytest.fixture(scope="module")
def fisher(dense, tmp_path_factory):
    """(file, output) of the command, with the unseen task among the others."""
    path = tmp_path_factory.mktemp("fisher") / "f.npz"
    values = {
        "MODEL_DIR": str(dense), "represent.kind": "fisher", "represent.output": str(path),
        "represent.mixtures": ("toy_unseen",), "represent.steps": 3, "represent.examples": 10,
        "represent.batch_size": 4,
    }  # fmt: skip
    out = finish(start("represent", flags_of([f"{k} = {v!r}" for k, v in values.items()])))
    return path, out


def test_fisher_command(fisher):
    path, out = fisher
    assert [p.name for p in path.parent.iterdir()] == ["f.npz"]
    found = Representations.read(path)
    assert found.tasks == ("toy_copy", "toy_reverse", "toy_sum")
    # Units of one encoder layer (3 x 16 + 16 + 32 + 16) and one decoder layer (64 more).
    assert found.raw_TxD.shape == (3, 112 + 112 + 64)
    assert (found.raw_TxD > 0).all()
    assert found.settings["steps"] == 3
    # Fitted on the two tasks trained on: one component, their rows opposite.
    copy, _, total = found.rows_TxK
    np.testing.assert_allclose(copy, -total, atol=1e-4)
    assert np.mean(np.square([copy, total])) == pytest.approx(1, rel=1e-4)
    assert not found.rows_TxK[:, 1:].any()
    assert "3 tasks, 8 numbers each" in out
    assert "3 tasks of 2 categories: mean cosine" in out


def test_text_command_and_a_new_task_later(dense, tmp_path):
    everything, later = tmp_path / "all.npz", tmp_path / "later.npz"
    call(dense, mixtures=("toy_unseen",), output=str(everything))
    whole = Representations.read(everything)
    call(
        dense, MIXTURE_OR_TASK_NAME="toy_unseen", pca_from=str(everything), output=str(later),
    )  # fmt: skip
    found = Representations.read(later)
    assert found.tasks == ("toy_reverse",)
    np.testing.assert_array_equal(found.raw_TxD, whole.raw_TxD[1:2])
    np.testing.assert_array_equal(found.rows_TxK, whole.rows_TxK[1:2])
    assert whole.raw_TxD.shape == (3, 16)


def test_description_command(dense, tmp_path):
    """Words are those of the training tasks; `from`, `give` and `back` are not among them."""
    path = tmp_path / "d.npz"
    call(dense, kind="description", mixtures=("toy_unseen",), output=str(path))
    found = Representations.read(path)
    assert found.tasks == ("toy_copy", "toy_reverse", "toy_sum")
    # `words` is in one of two descriptions; `the` in both, and here twice.
    wanted = np.array([np.log(3 / 2) + 1, 2.0])
    wanted /= np.linalg.norm(wanted)
    reverse_D = found.raw_TxD[1]
    np.testing.assert_allclose(np.sort(reverse_D[reverse_D > 0]), wanted, rtol=1e-6)
    assert found.raw_TxD.shape == (3, len({"repeat", "the", "words", "add", "numbers"}))
    # So `toy_reverse` lies on the side of `toy_copy`.
    copy, reverse, total = found.rows_TxK
    assert np.linalg.norm(reverse - copy) < np.linalg.norm(reverse - total)


@pytest.mark.parametrize("kind", ["description", "request"])
def test_words_need_no_model(dense, tmp_path, kind):
    """A mixture of experts without a checkpoint gives the file that a dense run gives."""
    mixture = tmp_path / "mixture"
    shutil.copytree(dense, mixture, ignore=shutil.ignore_patterns("checkpoints"))
    found = []
    for model_dir, experts in ((dense, 1), (mixture, 2)):
        path = tmp_path / f"{experts}.npz"
        call(model_dir, kind=kind, ModelConfig__experts=experts, output=str(path))
        found.append(Representations.read(path))
    np.testing.assert_array_equal(found[0].rows_TxK, found[1].rows_TxK)
    assert found[0].settings == found[1].settings


def test_request_command(dense, tmp_path):
    """Its examples decide: a description less what their inputs tell."""
    found = {}
    for name, settings in {"all": {}, "few": {"examples": 1}}.items():
        path = tmp_path / f"{name}.npz"
        call(dense, kind="request", mixtures=("toy_unseen",), output=str(path), **settings)
        found[name] = Representations.read(path)
    trained, unseen = toy_mixtures()
    tasks = [*trained.tasks, *unseen.tasks]
    inputs = {task.name: [e.inputs_text for e in task.records("train")] for task in tasks}
    wanted = Descriptions(trained.tasks).requests(sorted(tasks, key=lambda t: t.name), inputs)
    np.testing.assert_allclose(found["all"].raw_TxD, wanted, atol=1e-6)
    assert not np.allclose(found["few"].raw_TxD, wanted, atol=1e-3)


def test_an_interrupted_command_goes_on(dense, tmp_path, monkeypatch):
    done = []
    embed = representations.Embedder.__call__

    def counted(self, mixture, task, fail=True):
        if fail and len(done) == 1:
            raise KeyboardInterrupt
        done.append(task)
        return embed(self, mixture, task)

    monkeypatch.setattr(representations.Embedder, "__call__", counted)
    path = tmp_path / "f.npz"
    with pytest.raises(KeyboardInterrupt):
        call(dense, output=str(path))
    assert not path.exists()
    monkeypatch.setattr(
        representations.Embedder, "__call__", lambda self, m, t: counted(self, m, t, fail=False)
    )
    call(dense, output=str(path))
    assert done == ["toy_copy", "toy_sum"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]


WRONG = {
    "kind": (
        {"kind": "txt"},
        "represent.kind is 'txt'; it is one of text, example, fisher, description, request; did",
    ),
    "output": ({"output": "f.json"}, "must end in .npz"),
    "split": ({"split": "tarin"}, "'toy_copy' has no split 'tarin'"),
    "one task": ({"MIXTURE_OR_TASK_NAME": "toy_unseen"}, "two tasks that differ, here is one"),
    "components": ({"pca_from": "FISHER"}, "another kind: there fisher, here text"),
    "words": ({"kind": "description", "pca_from": "FISHER"}, "by the words of one mixture"),
    "dim": ({"dim": 0}, "represent.dim is 0; it is int from 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case, dense, fisher, tmp_path):
    settings, message = WRONG[case]
    settings = {"output": str(tmp_path / "f.npz"), **settings}
    settings = {k: str(fisher[0]) if v == "FISHER" else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message):
        call(dense, **settings)
    assert not (tmp_path / "f.npz").exists()


def test_trained_from_a_file_and_routed_without_training(fisher, tmp_path):
    """Frozen rows keep the values of the file; an unseen task is routed by its row."""
    path, _ = fisher
    model_dir = tmp_path / "run"
    settings = {
        "TRAIN_STEPS": 3,
        "RunConfig__representations_path": str(path),
        "OptimizerConfig__frozen": ("representations",),
    }
    finish(start("train", flags_of(bindings(model_dir, **settings))))
    rows = Representations.read(path).rows_TxK
    params, meta = load_params(model_dir)
    assert meta["tasks"] == ["toy_copy", "toy_sum"]
    np.testing.assert_array_equal(params["representations"], rows[[0, 2]])

    values = {
        "MODEL_DIR": str(model_dir), "MIXTURE_OR_TASK_NAME": "toy_unseen", "eval.examples": 4,
        "eval.representations": str(path),
    }  # fmt: skip
    finish(start("eval", flags_of([f"{k} = {v!r}" for k, v in values.items()])))
    predictions = model_dir / "eval" / "toy_unseen_test" / "predictions.jsonl"
    route = json.loads(predictions.read_text().splitlines()[0])["route"]
    model = tiny_model(tasks=2, experts=2)
    both = np.stack([rows[1], rows[[0, 2]].mean(0)])
    wanted, mean = routes_of(model, {**params, "representations": both}, 3)
    np.testing.assert_allclose(route, wanted, atol=2e-6)
    assert np.abs(wanted - mean).max() > 1e-3
    with pytest.raises(UserError, match="mixture of experts"):
        call(model_dir)


@pytest.mark.slow
def test_real_tasks_of_a_category_lie_closer(gym, tmp_path):
    """The gym's tasks, by a small dense model; prints the figures."""
    files = ["--gin_file=models/tiny.gin", "--gin_file=runs/crossfit_dense.gin"]
    settings = {
        "MODEL_DIR": str(tmp_path / "dense"),
        "CACHE_DIR": str(tmp_path / "cache"),
        "CROSSFIT_DIR": str(gym / "crossfit"),
    }
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    finish(start("train", [*files, *flags_of(lines)]), timeout=1200)
    for kind, examples in (("text", 256), ("fisher", 16)):
        path = tmp_path / f"{kind}.npz"
        values = {
            "MODEL_DIR": settings["MODEL_DIR"], "represent.kind": kind,
            "represent.output": str(path), "represent.mixtures": ("crossfit_test",),
            "represent.steps": 5, "represent.examples": examples,
        }  # fmt: skip
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        print(kind, finish(start("represent", flags_of(lines)), timeout=1200))
        found = Representations.read(path).settings["affinity"]
        assert found["within"] > found["between"] + 0.1
        assert found["p"] < 0.01
