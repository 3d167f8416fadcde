"""Tasks never trained on are routed as the training tasks whose inputs resemble theirs."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from toy import toy_mixtures
from toy_run import pack_rows, tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.inference import inferences
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.task_moe import parameter_shardings, routes_of
from moe_jax.runs.load import Run, with_tasks
from moe_jax.unseen.descriptions import Descriptions
from moe_jax.unseen.zero_shot import Resemblance, new_tasks, similarities, weighted_route

LENGTHS = {"inputs": 40, "targets": 20}
NEW = "toy_reverse"


def test_similarity_by_hand():
    """All embeddings share a large part, which says nothing."""
    shared = np.array([10.0, 0, 0, 0])
    seen = shared + np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, -1, -1, 0]])
    new = shared + np.array([[0, 0.2, 1, 0.5], [0, 2, 0, 0], [0, -3, -3, 1]])
    for scale in (1, 0.1):  # the length of an embedding makes no difference
        found = similarities(seen / scale, scale * new)
        assert np.argmax(found, 1).tolist() == [1, 0, 2]
        assert found.shape == (3, 3) and np.all(np.abs(found) <= 1)


def described(**descriptions):
    task = toy_mixtures()[0].tasks[0]
    return [
        dataclasses.replace(task, name=name, description=text)
        for name, text in descriptions.items()
    ]


def test_similarity_of_descriptions_by_hand():
    """Words count the more, the fewer descriptions have them."""
    trained = described(a="Find the person.", b="Find the place.", c="Sort the words.")
    index = Descriptions(trained)
    new = described(x="Which PLACE? Find it!", y="the person", z="sort")
    assert index.nearest_of(new) == {"x": "b", "y": "a", "z": "c"}
    # scikit-learn's formula: log((1 + n) / (1 + documents)) + 1, at unit length.
    idf = {"find": np.log(4 / 3) + 1, "place": np.log(2) + 1}
    weight = np.sort(list(idf.values())) / np.hypot(*idf.values())
    found = index.vectors(new)[0]
    np.testing.assert_allclose(np.sort(found[found > 0]), weight, rtol=1e-6)
    with pytest.raises(UserError, match="'none' shares no word with that of a training task"):
        index.nearest("none")
    with pytest.raises(UserError, match="task 'w' has no description"):
        index.nearest_of(described(w=""))
    with pytest.raises(UserError, match="task 'w' has no description"):
        Descriptions(described(a="Find the person.", w=""))
    with pytest.raises(UserError, match="no description of a training task has a word"):
        Descriptions(described(a="!"))


def test_requests_against_regressions_without_the_task():
    """A training task is predicted by a ridge regression on the others."""
    texts = {
        "a": ("Find the person of the story.", ["Anna went to a fair.", "Bob stayed at home."]),
        "b": ("Find the place of the story.", ["Anna went to a lake.", "Bob ran to a fair."]),
        "c": ("Sort the words.", ["pear apple", "lake fair home"]),
        "x": ("Find the person of the list.", ["apple fair lake"]),
    }
    tasks = described(**{name: text for name, (text, _) in texts.items()})
    inputs = {name: inputs for name, (_, inputs) in texts.items()}
    index = Descriptions(tasks[:3])
    found = index.requests(tasks, inputs)
    words = TfidfVectorizer(sublinear_tf=True).fit([" ".join(inputs[name]) for name in "abc"])
    input_TxB = words.transform([" ".join(inputs[name]) for name in "abcx"]).toarray()
    described_TxD = index.vectors(tasks)
    for task in range(4):
        others = [i for i in range(3) if i != task]
        ridge = Ridge(alpha=1.0, fit_intercept=False).fit(input_TxB[others], described_TxD[others])
        wanted = described_TxD[task] - ridge.predict(input_TxB[[task]])[0]
        np.testing.assert_allclose(found[task], wanted, atol=1e-6)
    assert found.dtype == np.float32
    # The stories tell one word of the descriptions, so the other counts.
    assert np.linalg.norm(found[0] - found[3]) < np.linalg.norm(found[0] - found[1])
    with pytest.raises(UserError, match="no input of a training task has a word"):
        index.requests(tasks, dict.fromkeys(texts, "!"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_new_task_takes_the_route_of_its_nearest_task_also_if_that_was_drawn(count):
    model = tiny_model(selection="random_task", experts_per_layer=count)
    run = Run(model, tiny_params(model), {"a": 0, "b": 1, "c": 2}, step=7)
    more = with_tasks(run, ["a", "new"], nearest={"new": "b"})
    before, after = (np.asarray(routes_of(r.model, r.params, 7)) for r in (run, more))
    np.testing.assert_allclose(after, before[[0, 1, 2, 1]])


def test_a_weighted_route_by_hand():
    routes = np.array([[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]], np.float32)
    similarity = 0.1 * np.log([3, 1, 2])  # so the weights are 1/2, 1/6 and 1/3
    for count, wanted in ((3, [1 / 2, 1 / 6, 1 / 3]), (2, [0.6, 0, 0.4]), (1, [1, 0, 0])):
        np.testing.assert_allclose(weighted_route(similarity, routes, count), [wanted], rtol=1e-6)


def placed_run(devices: int = 1, **settings):
    """(run with random parameters on a mesh, mixture it was trained on, unseen mixture, mesh)."""
    trained, unseen = toy_mixtures()
    model = tiny_model(
        tasks=2, max_positions=48, d_model=64, init_std=0.1,
        vocabulary_size=trained.vocabulary.size, **settings,
    )  # fmt: skip
    ids = {name: i for i, name in enumerate(trained.names)}
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    params = jax.device_put(tiny_params(model), parameter_shardings(model, mesh))
    return Run(model, params, ids, step=0), trained, unseen, mesh


@pytest.mark.parametrize("devices", [1, 4])
def test_words_resemble_words_not_numbers(devices):
    run, trained, unseen, mesh = placed_run(devices, selection="argmax")
    with jax.set_mesh(mesh):
        resemblance = Resemblance(run, trained, LENGTHS, 4, mesh)
        new = new_tasks(run.task_ids, [trained, unseen], "test")
        nearest = resemblance.nearest(new, "test")
    assert nearest == {NEW: "toy_copy"}
    table = run.params["representations"]
    for choice, row in ((nearest, table[run.task_ids["toy_copy"]]), (None, table.mean(0))):
        more = with_tasks(run, ["toy_sum", NEW], nearest=choice)
        assert more.model.tasks == 3
        np.testing.assert_array_equal(more.params["representations"][:2], table)
        found = more.params["representations"][more.task_ids[NEW]]
        np.testing.assert_allclose(found, row, rtol=1e-6)


def test_a_mixture_that_was_not_trained_on_says_nothing():
    run, _, unseen, mesh = placed_run()
    with jax.set_mesh(mesh), pytest.raises(UserError, match="was trained on no task of toy_unseen"):
        Resemblance(run, unseen, LENGTHS, 4, mesh)


def mean_states(run, mixture, task, split, route_NxE) -> np.ndarray:
    """Mean encoder state of each example over its tokens: [n, D]."""
    records = mixture.task(task).records(split)
    batch = pack_rows([[(example.inputs.tolist(), [1])] for example in records], 40, 4)
    encode = jax.jit(partial(EncoderDecoder(run.model.config).apply, method="encode"))
    states_nxLxD = encode(
        {"params": run.params["backbone"]}, batch["inputs"], batch["input_segments"],
        batch["input_positions"], route_NxE,
    )  # fmt: skip
    return np.stack([
        states_LxD[: len(example.inputs)].mean(0)
        for example, states_LxD in zip(records, np.asarray(states_nxLxD, np.float64), strict=True)
    ])  # fmt: skip


def test_every_input_takes_the_route_of_its_nearest_task():
    """Against a search written out here: centre, cosine, largest."""
    run, trained, unseen, mesh = placed_run(selection="top_k", experts_per_layer=2)
    routes = np.asarray(routes_of(run.model, run.params, 0))
    seen = np.stack([
        mean_states(run, trained, name, "train", routes.mean(0)).mean(0) for name in run.task_ids
    ])  # fmt: skip
    words = mean_states(run, unseen, NEW, "test", routes.mean(0))
    numbers = mean_states(run, trained, "toy_sum", "test", routes.mean(0))

    def direction(x):
        return x / np.sqrt((x**2).sum(-1, keepdims=True))

    centre = direction(seen).mean(0)

    def nearest(state):
        state = direction(direction(state) - centre)
        return max(range(2), key=lambda t: state @ direction(direction(seen[t]) - centre))

    wanted = [nearest(state) for state in words]
    mixed = [nearest(state) for state in (words[3], numbers[5], words[8])]
    assert mixed == [0, 1, 0]  # so that the test can tell
    with jax.set_mesh(mesh):
        resemblance = Resemblance(run, trained, LENGTHS, 4, mesh)
        new = new_tasks(run.task_ids, [trained, unseen], "test")
        found = resemblance.by_input(new, "test")
        part = resemblance.by_input(new, "test", limit=5)
        inputs = [unseen.task(NEW).records("test")[i].inputs for i in (3, 8)]
        inputs.insert(1, trained.task("toy_sum").records("test")[5].inputs)
        rows = [[(tokens.tolist(), [1])] for tokens in inputs]
        by_row = resemblance.of_rows(pack_rows([*rows, []], 40, 4))
    assert list(found) == [NEW]
    np.testing.assert_allclose(found[NEW], routes[wanted], rtol=1e-6)
    np.testing.assert_array_equal(part[NEW][[0, 4, 8, 12, 16]], found[NEW][[0, 4, 8, 12, 16]])
    assert not part[NEW][1].any()  # not among the five
    np.testing.assert_allclose(by_row[:3], routes[mixed], rtol=1e-6)


def test_rows_of_one_batch_have_routes_of_their_own():
    """Predictions and likelihoods are those of each example alone under its route."""
    run, _, unseen, mesh = placed_run(selection="top_k", experts_per_layer=2)
    n = unseen.task(NEW).examples("test")
    routes = np.asarray(routes_of(run.model, run.params, 0))
    each = routes[np.arange(n) % 3 // 2]
    ids = {**run.task_ids, NEW: 0}
    with jax.set_mesh(mesh):
        evaluator = Evaluator(run.model, unseen.vocabulary, LENGTHS, 8, mesh)

        def scored(**settings):
            (found,) = evaluator.tasks(
                run.params, 0, unseen, ids, "test", show=False, likelihoods=True, **settings
            )
            return found.predictions

        mixed = scored(given={NEW: each})
        alone = [scored(given={NEW: route}) for route in routes]
        answers = list(
            inferences(evaluator, run.params, each, unseen, NEW, np.arange(n), "test",
                       "predict")
        )  # fmt: skip
    assert alone[0] == scored_by_table(evaluator, run, unseen, ids, mesh)
    assert [a["log_likelihood"] for a in alone[0]] != [a["log_likelihood"] for a in alone[1]]
    for i, row in enumerate(mixed):
        own = alone[i % 3 // 2][i]
        assert row["prediction"] == own["prediction"] == answers[i]["prediction"].strip()
        assert row["route"] == own["route"]
        assert row["log_likelihood"] == pytest.approx(own["log_likelihood"], rel=1e-4)


def scored_by_table(evaluator, run, unseen, ids, mesh):
    with jax.set_mesh(mesh):
        (found,) = evaluator.tasks(run.params, 0, unseen, ids, "test", show=False, likelihoods=True)
    return found.predictions


def test_choices_are_ranked_under_each_examples_route():
    run, _, unseen, mesh = placed_run(selection="top_k", experts_per_layer=2)
    routes = np.asarray(routes_of(run.model, run.params, 0))
    records = unseen.task(NEW).records("test")
    examples = {
        i: dataclasses.replace(records[i], choices=("red", "green blue", "late")) for i in range(9)
    }
    with jax.set_mesh(mesh):
        evaluator = Evaluator(run.model, unseen.vocabulary, LENGTHS, 4, mesh)

        def ranked(row_of):
            def score(batch, numbers):
                rows = np.resize([row_of(i) for i in numbers], 4)
                return evaluator.log_likelihoods(run.params, routes, rows, batch)

            return evaluator.choices(score, examples)

        mixed, alone = ranked(lambda i: i % 2), [ranked(lambda i, t=t: t) for t in (0, 1)]
    for i in examples:
        np.testing.assert_allclose(mixed[i], alone[i % 2][i], rtol=1e-4)
        assert abs(alone[0][i][0] - alone[1][i][0]) > 1e-3
