"""Rank classification and metrics of scores, against SeqIO's evaluation of NumPy likelihoods."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from toy import prepare
from toy_run import pack_rows, random_backbone, tiny_model

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.calls import task_metrics
from moe_jax.data.modules import load_module
from moe_jax.data.pipeline import eval_batches
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.evaluation.choices import choice_likelihoods
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.inference import inferences
from moe_jax.evaluation.scores import write_scores
from moe_jax.metrics import choice_target, rank_classification
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.report.build import report
from moe_jax.runs.config import DataConfig, FewShotConfig, RunConfig
from moe_jax.unseen import adaptation
from moe_jax.unseen.samples import FewShotData, Sample

MODULE = str(Path(__file__).with_name("rank_tasks.py"))
LENGTHS = {"inputs": 96, "targets": 32}
TASK, QUESTIONS = 1, 13


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> PreparedMixture:
    cache = tmp_path_factory.mktemp("cache")
    return prepare(cache, "rank", MODULE, VocabularyConfig(kind="bytes"))["rank"]


@pytest.fixture(scope="module")
def run(mixture):
    """(model, parameters, routes, {penalty: evaluator}, mesh) of random weights."""
    model = tiny_model(
        tasks=2, experts=2, vocabulary_size=mixture.vocabulary.size, max_positions=96
    )
    params = {"backbone": random_backbone(model)}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluators = {
            penalty: Evaluator(
                model, mixture.vocabulary, LENGTHS, 4, mesh,
                DecodingConfig(choice_length_penalty=penalty),
            )
            for penalty in (1.0, 0.0)
        }  # fmt: skip
    routes = np.random.default_rng(3).dirichlet(np.ones(2), (2, 2)).astype(np.float32)
    return model, params, routes, evaluators, mesh


@pytest.fixture(scope="module")
def likelihood(mixture, run):
    model, params, routes, _, _ = run
    return likelihood_of(mixture, model, params["backbone"], jnp.asarray(routes[TASK]))


def likelihood_of(mixture, model, backbone, route_NxE):
    """(input, target) -> (sum of log-likelihoods, tokens): one row at a time, in NumPy."""
    apply = jax.jit(EncoderDecoder(model.config).apply)

    def of(source: str, target: str) -> tuple[float, int]:
        source, target = ([*mixture.vocabulary.encode(t), 1] for t in (source, target))
        batch = pack_rows([[(source, target)]], LENGTHS["inputs"], LENGTHS["targets"])
        batch["decoder_inputs"][0, 0] = mixture.vocabulary.decoder_start_id
        logits_LxV = np.asarray(apply({"params": backbone}, batch, route_NxE))[0]
        scores_LxV = log_softmax(logits_LxV.astype(np.float64), -1)
        return float(scores_LxV[np.arange(len(target)), target].sum()), len(target)

    return of


def score(run, mixture, name, penalty=1.0, **kwargs):
    _, params, routes, evaluators, mesh = run
    with jax.set_mesh(mesh):
        return evaluators[penalty].task(params, routes, mixture, name, TASK, "test", **kwargs)


@pytest.fixture(scope="module")
def rank_tasks():
    return load_module(MODULE)


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_the_likeliest_choice_is_the_prediction(penalty, mixture, run, likelihood, rank_tasks):
    found = score(run, mixture, "rank_chosen", penalty)
    right = []
    for row, (text, choices, target, _) in zip(
        found.predictions, rank_tasks.questions(), strict=True
    ):
        wanted = [t / n**penalty for t, n in (likelihood(text, choice) for choice in choices)]
        assert list(row["choices"]) == choices and row["references"] == [target]
        np.testing.assert_allclose(list(row["choices"].values()), wanted, rtol=1e-4)
        assert row["prediction"] == choices[int(np.argmax(wanted))]
        right.append(row["prediction"] == target)
    assert 0 < np.mean(right) < 1  # so that the test can tell
    assert found.metrics == {"ACC": pytest.approx(np.mean(right))}


def test_an_answer_is_scored_as_it_was_decoded(mixture, run):
    """Also one that is longer than targets, or did not come to its end."""
    model, params, routes, _, mesh = run
    vocabulary, lengths = mixture.vocabulary, {"inputs": LENGTHS["inputs"], "targets": 4}
    apply = jax.jit(EncoderDecoder(model.config).apply)
    for length in (3, 12):
        with jax.set_mesh(mesh):
            sampling = DecodingConfig(sample=True, temperature=4.0, max_length=length)
            evaluator = Evaluator(model, vocabulary, lengths, QUESTIONS, mesh, sampling)
            answers = inferences(
                evaluator, params, routes, mixture, "rank_chosen", TASK, "test", "predict_with_aux"
            )
            found = [line["aux"]["scores"] for line in answers]
            ((batch, examples),) = eval_batches(
                mixture, "rank_chosen", "test", lengths=lengths, rows=QUESTIONS
            )
            rows = evaluator.tokens(params, routes, TASK, batch).tolist()
            # None comes to its end by itself.
            assert all(1 not in row for row in rows)
            ends, (index, example) = np.array([70, 1, 0, 1], np.int32)[:length], examples[0]
            scorer = evaluator.scorer(params, routes, TASK)
            found += evaluator.answer_likelihoods(scorer, {index: example}, {index: ends}).values()
        rows, examples = [*rows, [70, 1]], [*examples, examples[0]]
        for tokens, (_, example), total in zip(rows, examples, found, strict=True):
            alone = pack_rows([[(example.inputs.tolist(), tokens)]], LENGTHS["inputs"], length)
            alone["decoder_inputs"][0, 0] = vocabulary.decoder_start_id
            logits_LxV = np.asarray(apply({"params": params["backbone"]}, alone, routes[TASK]))[0]
            scores_LxV = log_softmax(logits_LxV.astype(np.float64), -1)
            wanted = scores_LxV[np.arange(len(tokens)), tokens].sum()
            assert total == pytest.approx(wanted, rel=1e-4)


def test_a_task_that_is_only_scored_has_a_report(mixture, run, tmp_path):
    found = score(run, mixture, "rank_rows")
    write_scores(tmp_path / "run/eval/rank_test", [found])
    made = report(tmp_path / "report", {"run": tmp_path / "run"})
    assert made.findings == [f"Mean score on “rank_test” (1 task): run {found.score:.3f}."]


@pytest.mark.parametrize("name", ["rank_rows", "rank_rows_summed", "rank_both"])
def test_metrics_of_scores_equal_seqios(name, mixture, run, likelihood, rank_tasks):
    """SeqIO's metric objects, given likelihoods that NumPy computed from the same weights."""
    seqio = rank_tasks.seqio
    task = seqio.get_mixture_or_task(name)
    data = list(
        task.get_dataset(split="test", sequence_length=None, shuffle=False).as_numpy_iterator()
    )
    scores = np.array(
        [
            likelihood(row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())[0]
            for row in data
        ]
    )
    found = score(run, mixture, name)
    np.testing.assert_allclose([r["log_likelihood"] for r in found.predictions], scores, rtol=1e-4)
    wanted = {}
    for metric in task.score_metric_fns:
        metric = seqio.metrics.LegacyMetric.empty(metric, task.postprocess_fn)
        wanted |= metric.from_model_output(data, scores, task.output_features).compute()
    assert {key: found.metrics[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    if name == "rank_both":
        # Metrics of predictions come first; here the prediction is the likeliest choice.
        assert list(found.metrics) == ["ACC", "mean"] and found.metric == "ACC"
        assert found.score == score(run, mixture, "rank_chosen").score
    else:
        assert "prediction" not in found.predictions[0]  # nothing was decoded
        alike = score(run, mixture, "rank_chosen", 1.0 if name == "rank_rows" else 0.0)
        right = [row["prediction"] in row["references"] for row in alike.predictions]
        weights = [weight for *_, weight in rank_tasks.questions()]
        assert found.score == pytest.approx(np.average(right, weights=weights))


def test_examples_without_choices_are_decoded(mixture, run):
    mixed = score(run, mixture, "rank_mixed").predictions
    ranked = score(run, mixture, "rank_chosen").predictions
    assert [row["index"] for row in mixed] == list(range(len(ranked)))
    for row, other in zip(mixed[::2], ranked[::2], strict=True):
        assert row["prediction"] == other["prediction"]
        assert row["choices"] == pytest.approx(other["choices"], rel=1e-5)
    assert all("choices" not in row and isinstance(row["prediction"], str) for row in mixed[1::2])
    # A random model says no choice.
    assert not {row["prediction"] for row in mixed[1::2]} & {
        c for r in ranked for c in r["choices"]
    }


def test_few_shot_runs_are_ranked_too(mixture, rank_tasks):
    """Two runs that were trained in one call: each is scored with its own parameters."""
    model = tiny_model(
        tasks=1, experts=1, vocabulary_size=mixture.vocabulary.size, max_positions=96
    )
    backbones = [random_backbone(model, seed) for seed in (1, 3)]
    trained = {"backbone": jax.tree.map(lambda *a: np.stack(a), *backbones)}
    whole = FewShotConfig(RunConfig(eval_batch_rows=4), DataConfig(lengths=LENGTHS))
    samples = [Sample("rank_chosen", 13), Sample("rank_both", 13)]
    data = FewShotData(mixture, samples, whole)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, mixture.vocabulary, LENGTHS, 4, mesh)
        learner = types.SimpleNamespace(runner=None, evaluator=evaluator)  # nothing is decoded
        start = types.SimpleNamespace(shared={"backbone": None})
        wanted = {run: (sample, sample.dev) for run, sample in enumerate(samples)}
        found = adaptation._scores(learner, start, trained, data, wanted)
    right = []
    for backbone in backbones:
        likelihood = likelihood_of(mixture, model, backbone, None)
        means = [
            [total / n for total, n in (likelihood(text, choice) for choice in choices)]
            for text, choices, _, _ in rank_tasks.questions()
        ]
        questions = zip(means, rank_tasks.questions(), strict=True)
        right.append(
            np.mean([c[int(np.argmax(m))] == target for m, (_, c, target, _) in questions])
        )
    assert right[0] != right[1]  # so that the test can tell
    assert found == {run: ("ACC", pytest.approx(value)) for run, value in enumerate(right)}


def test_choices_of_one_question_stay_together(mixture, rank_tasks):
    """A limit counts questions; those taken are spread over the split, with all their choices."""
    task = mixture.task("rank_rows")
    counts = [len(choices) for _, choices, _, _ in rank_tasks.questions()]
    numbers = np.repeat(np.arange(rank_tasks.QUESTIONS), counts)
    np.testing.assert_array_equal(task.questions("test"), numbers)
    np.testing.assert_array_equal(
        mixture.task("rank_chosen").questions("test"), np.arange(rank_tasks.QUESTIONS)
    )
    batches = eval_batches(mixture, "rank_rows", "test", lengths=LENGTHS, rows=4, limit=5)
    found = [example.references[0][0] for _, examples in batches for _, example in examples]
    assert found == [n for n in numbers if n in (0, 2, 5, 7, 10)]


def test_choices_are_flattened_and_batched_by_length(mixture):
    examples = dict(enumerate(mixture.task("rank_chosen").records("test")))
    seen = []

    def tokens(batch, numbers):
        assert set(numbers) <= set(examples)
        segments = batch["target_segments"] > 0
        seen.append((batch["input_segments"] > 0).sum(1))
        return -np.arange(len(segments), dtype=np.float32), segments.sum(1)

    found = choice_likelihoods(tokens, examples, LENGTHS, 8, mixture.vocabulary)
    assert {i: len(values) for i, values in found.items()} == {
        i: len(example.choices) for i, example in examples.items()
    }
    lengths = np.concatenate(seen)
    pairs = sum(len(example.choices) for example in examples.values())
    assert len(lengths) == 8 * len(seen) and np.count_nonzero(lengths) == pairs
    assert len(seen) == -(-pairs // 8)
    assert (np.diff(lengths[:pairs]) >= 0).all()


# ------------------------------------------------------------------------------ the metric


def test_rank_classification_by_hand():
    example = {"idx": np.array([3, 1]), "is_correct": np.True_, "targets": np.arange(4)}
    assert choice_target("text", example=example, is_target=True) == ((3, 1), True, 1.0, 4)
    assert choice_target(-2.5, example=example) == -2.5
    targets = [
        ((0, 0), True, 1.0, 4), ((0, 1), False, 1.0, 1),  # -4 / 4 beats -2 / 1; the sum does not
        ((7, 1), False, 3.0, 1), ((7, 0), True, 3.0, 1),  # equal: the first choice, correct
        ((8, 0), False, 1.0, 2), ((8, 1), False, 1.0, 2),  # none is correct
    ]  # fmt: skip
    scores = [-4.0, -2.0, -1.0, -1.0, -3.0, -2.0]
    assert rank_classification(targets, scores) == {"ACC": pytest.approx(4 / 5)}
    assert rank_classification(targets, scores, length_penalty=0.0) == {"ACC": pytest.approx(3 / 5)}
    with pytest.raises(ValueError, match="6 targets but 5 scores"):
        rank_classification(targets, scores[:-1])


def test_two_metrics_of_one_name(mixture):
    class Twice:
        name = "rank_both"

        def metric_fns(self):
            return [lambda targets, predictions: {"mean": 0.0}]

        def score_metric_fns(self):
            return [lambda targets, scores: {"mean": 1.0}]

    rows = [{"references": ["a"], "prediction": "a", "log_likelihood": -1.0}]
    with pytest.raises(UserError, match="'rank_both': two metrics are called 'mean'"):
        task_metrics(Twice(), rows)
