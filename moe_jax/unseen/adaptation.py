"""Few-shot adaptation of every starting point to every new task."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.core import files, paths, processes
from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.core.sharding import MeshConfig, device_per_core, make_mesh
from moe_jax.evaluation import gains, paired
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.functions import try_functions
from moe_jax.model.experts import Params
from moe_jax.runs import directory
from moe_jax.runs.config import FewShotConfig
from moe_jax.runs.mixtures import check_vocabulary, prepare_mixtures, say_cut
from moe_jax.unseen.samples import FewShotData, Sample
from moe_jax.unseen.side_by_side import SideBySide, runs_per_device
from moe_jax.unseen.starts import Start, check_file, check_starts, read_starts

RUNS = "runs.jsonl"
# The fields that identify a run in runs.jsonl.
KEY = ("task", "start", "seed", "learning_rate", "batch_size")
# Training examples of a sample by which `nearest` chooses a route, whatever the batch size.
NEAREST_ROWS = 16


class Grid(NamedTuple):
    """A point of the grid that is searched on dev."""

    learning_rate: float
    batch_size: int


class Learner(NamedTuple):
    """What trains and scores the runs of starts of one form.

    Attributes:
        runner: trains runs, and decodes their answers.
        evaluator: scores one run at a time, on tasks whose metrics need more than decoded answers.
        searched: the part whose learning rate is searched, the backbone if it is trained.
        peaks: learning rates of the other parts.
    """

    runner: SideBySide
    evaluator: Evaluator
    searched: str
    peaks: Mapping[str, float]

    def rates(self, searched: Sequence[float]) -> dict[str, np.ndarray]:
        """Peaks [U] of every part, where the grid gives those of the first runs."""
        rates = {part: np.full(self.runner.runs, p, np.float32) for part, p in self.peaks.items()}
        rates[self.searched][: len(searched)] = searched
        return rates


def new_learner(
    start: Start,
    frozen: tuple[str, ...],
    config: FewShotConfig,
    mesh: Mesh,
    data: FewShotData,
    samples: int,
) -> Learner:
    """A `Learner` for starts of this form, as many runs a call as fit.

    Args:
        frozen: the parts that are not trained.
        samples: of all tasks.
    """
    few, c, devices = config.finetune, start.model.config, mesh.devices.size
    tokens = max(few.batch_sizes) * max(map(sum, data.widths.values()))
    width = (c.encoder_layers + c.decoder_layers) * (12 * c.d_model + 3 * c.d_ff)
    # Of each batch size its results; between two parts also moments, and the best so far.
    kept = len(few.batch_sizes) + (3 if few.eval_period else 0)
    each = few.runs_at_once or runs_per_device(
        start.run.params, tokens, width + c.vocabulary_size, kept, mesh.devices.flat[0]
    )
    runs = min(each, -(-samples * len(few.learning_rates) // devices)) * devices
    optimizer = dataclasses.replace(config.optimizer, frozen=frozen)
    evaluator = Evaluator(
        start.model, data.mixture.vocabulary, config.data.lengths, config.run.eval_batch_rows,
        mesh, config.decoding,
    )  # fmt: skip
    runner = SideBySide(
        start.model, optimizer, config.step, mesh, steps=few.steps, runs=runs,
        rows=evaluator.rows, length=evaluator.length, decoding=config.decoding, ids=evaluator.ids,
    )  # fmt: skip
    searched = "representations" if "backbone" in frozen else "backbone"
    return Learner(runner, evaluator, searched, optimizer.learning_rates)


class Dev(NamedTuple):
    """What a run scored on dev, and after how many steps."""

    metric: str
    score: float
    step: int


class Trained(NamedTuple):
    """Runs of one batch size that were trained together, each as it was when dev was best."""

    runs: list[tuple[Sample, Grid]]
    params: Params
    dev: list[Dev]

    def or_later(self, later: "Trained") -> "Trained":
        """Each run as it is later if its dev score is higher then, else as it was."""
        pairs = list(zip(self.dev, later.dev, strict=True))
        higher = np.array([new.score > old.score for old, new in pairs])
        if not higher.any():
            return self

        def chosen(old_Ux: jax.Array, new_Ux: jax.Array) -> jax.Array:
            # Runs come first; the places that are left have none.
            higher_U = np.pad(higher, (0, len(old_Ux) - len(higher)))
            return jnp.where(higher_U.reshape(-1, *[1] * (old_Ux.ndim - 1)), new_Ux, old_Ux)

        dev = [max(pair, key=lambda found: found.score) for pair in pairs]
        return Trained(self.runs, jax.tree.map(chosen, self.params, later.params), dev)


def search(
    learner: Learner,
    start: Start,
    own: Params,
    todo: Mapping[Sample, Sequence[Grid]],
    data: FewShotData,
    test_examples: int | None,
    period: int = 0,
) -> list[dict[str, Any]]:
    """Trains the runs of some samples, and scores them: dev all, test the best of each sample.

    Args:
        own: of each sample in turn, the parts in which it starts apart.
        period: steps between scores on dev, of which a run's best counts; 0 for the last one.

    Returns:
        What runs.jsonl says of each run, the best of a sample after its others.
    """
    runner, samples = learner.runner, list(todo)
    calls = []
    for size in dict.fromkeys(p.batch_size for points in todo.values() for p in points):
        runs = [(s, p) for s in samples for p in todo[s] if p.batch_size == size]
        calls += [runs[at : at + runner.runs] for at in range(0, len(runs), runner.runs)]
    trained = []
    for runs in calls:
        idle = runner.runs - len(runs)
        at = [samples.index(sample) for sample, _ in runs] + [0] * idle
        order = np.stack([data.order(sample, point.batch_size) for sample, point in runs])
        order = np.pad(order, ((0, idle), (0, 0), (0, 0)), constant_values=-1)
        rates = learner.rates([point.learning_rate for _, point in runs])
        wanted = {i: (s, s.dev) for i, (s, _) in enumerate(runs)}
        best, step = None, 0
        for params in runner.train(
            start.shared, {part: tree[at] for part, tree in own.items()},
            data.training([samples[i] for i in at]), order, rates, period,
        ):  # fmt: skip
            step = min(step + (period or order.shape[1]), order.shape[1])
            found = _scores(learner, start, params, data, wanted)
            now = Trained(runs, params, [Dev(*found[i], step) for i in range(len(runs))])
            best = now if best is None else best.or_later(now)
        trained.append(best)
    place = {run: (c, i) for c, call in enumerate(trained) for i, run in enumerate(call.runs)}
    dev = {run: trained[c].dev[i] for run, (c, i) in place.items()}
    # The best of each sample; of equals, the first in the grid's order.
    best = {s: max(todo[s], key=lambda point, s=s: dev[s, point].score) for s in samples}
    test = {}
    for c, call in enumerate(trained):
        mine = {place[s, p][1]: (s, "test") for s, p in best.items() if place[s, p][0] == c}
        if mine:
            scores = _scores(learner, start, call.params, data, mine, test_examples)
            test |= {mine[i][0]: score for i, (_, score) in scores.items()}
    rows = []
    for sample in samples:
        # The best run comes last: if writing is interrupted, it is the one that is trained again.
        for point in sorted(todo[sample], key=lambda p, s=sample: p == best[s]):
            found = dev[sample, point]
            rows.append(
                {
                    "task": sample.task,
                    "start": start.name,
                    "seed": sample.seed,
                    **point._asdict(),
                    "metric": found.metric,
                    "step": found.step,
                    "dev_score": found.score,
                    "test_score": test[sample] if point == best[sample] else None,
                }
            )
    return rows


def _scores(
    learner: Learner,
    start: Start,
    params: Params,
    data: FewShotData,
    wanted: Mapping[int, tuple[Sample, str]],
    limit: int | None = None,
) -> dict[int, tuple[str, float]]:
    """run -> (metric, score) of its sample's task on a split, for the runs of one call."""
    jobs, scores = {}, {}
    for run, (sample, split) in wanted.items():
        if data.all_decoded(sample.task, split, limit):
            jobs[run] = data.blocks(sample.task, split, limit, learner.runner.rows)
        else:
            own = jax.tree.map(lambda array, run=run: array[run], params)
            score = _score_alone(learner.evaluator, start.shared | own, data, sample, split, limit)
            scores[run] = score
    answers = learner.runner.decode(start.shared, params, jobs) if jobs else {}
    for run, blocks in answers.items():
        sample, split = wanted[run]
        scores[run] = data.score(sample.task, split, limit, np.concatenate(blocks))
    return scores


def _score_alone(
    evaluator: Evaluator,
    params: Params,
    data: FewShotData,
    sample: Sample,
    split: str,
    limit: int | None,
) -> tuple[str, float]:
    """(metric, score) of one run, where answers are ranked or scored."""
    routes = evaluator.routes(params, jnp.int32(0)) if evaluator.model.routed else None
    found = evaluator.task(params, routes, data.mixture, sample.task, 0, split, limit)
    return found.metric, found.score


def adapt_all(config: FewShotConfig) -> None:
    """Adapts every starting point to every task, and writes the average relative gain.

    Raises:
        UserError: this is one of several processes; or see the parts of the configuration.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError("finetune runs in one process, on all its local devices")
    config.run.require("model_dir")
    with processes.lock(config.run.model_dir):
        _adapt_all(config)


def _adapt_all(config: FewShotConfig) -> None:
    # ---------------------------------------------------------------- configuration
    run, few = config.run, config.finetune
    model_dir = paths.parse(run.model_dir)
    directory.check_config(model_dir, config)
    check_starts(few)
    first, *others = dict.fromkeys(few.adapted.values())
    mixture = prepare_mixtures(config.data, run=first)[config.data.mixture_or_task_name]
    for other in others:
        check_vocabulary(other, mixture)
    # Before the work, not in the middle of it.
    check_file(few, mixture.names)
    try_functions(mixture, mixture.names, "test")
    say_cut(mixture, "test", config.data.lengths)
    rows = _read_rows(model_dir / RUNS)
    done = {tuple(row[k] for k in KEY) for row in rows}
    # In CrossFit's order, since of equal scores on dev the first counts.
    grid = [Grid(*point) for point in itertools.product(few.learning_rates, few.batch_sizes)]
    samples = [Sample(*pair) for pair in itertools.product(mixture.names, few.seeds)]
    data = FewShotData(mixture, samples, config)
    directory.write_config(model_dir, config)
    directory.write_origin(model_dir)
    # ---------------------------------------------------------------- runs
    device_per_core()
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    with jax.set_mesh(mesh):
        learners: dict[tuple, Learner] = {}
        total = len(samples) * len(grid) * len(few.adapted)
        bar = progress(total=total, initial=len(done), desc="few-shot", unit="run")
        for start in read_starts(few, mixture.vocabulary.size, run.seed, mesh):
            todo = {
                s: left
                for s in samples
                if (left := [p for p in grid if (s.task, start.name, s.seed, *p) not in done])
            }
            if not todo:
                continue
            bar.set_postfix_str(start.name, refresh=False)
            frozen = tuple(dict.fromkeys((*config.optimizer.frozen, *start.frozen)))
            form = (start.model, frozen)  # starts of one form train in the same programs
            if form not in learners:
                learners[form] = new_learner(start, frozen, config, mesh, data, len(samples))
            learner = learners[form]
            own = start.own(
                [sample.task for sample in todo],
                [data.first_batch(sample, NEAREST_ROWS) for sample in todo],
            )
            each = max(1, learner.runner.runs // len(few.learning_rates))
            runs_of = list(todo.items())
            for at in _alike(list(todo), data.widths, each):
                found = search(
                    learner, start, {name: tree[at] for name, tree in own.items()},
                    dict(runs_of[i] for i in at), data, few.test_examples, few.eval_period,
                )  # fmt: skip
                files.append_jsonl(model_dir / RUNS, found)
                rows += found
                bar.update(len(found))
        bar.close()
    # ---------------------------------------------------------------- results
    if "untrained" not in few.adapted:
        return
    found_gains = gains.relative_gains(rows)
    gains.write(model_dir, found_gains)
    print(gains.text_table(found_gains))
    if "dense" not in few.adapted:
        return
    over_dense = paired.compare(gains.score_rows(found_gains))
    files.write_json(model_dir / "gains.json", dataclasses.asdict(over_dense))
    print(paired.text_table(over_dense))


def _alike(
    samples: Sequence[Sample], widths: Mapping[str, tuple[int, int]], count: int
) -> Iterator[list[int]]:
    """The numbers of samples whose arrays have the same widths, `count` at a time."""
    for width in dict.fromkeys(widths.values()):
        alike = [i for i, sample in enumerate(samples) if widths[sample.task] == width]
        for at in range(0, len(alike), count):
            yield alike[at : at + count]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Finished runs. An incomplete last line of a killed run is removed from the file."""
    if not path.exists():
        return []
    lines = files.read_bytes(path).splitlines(keepends=True)
    files.write_bytes(path, b"".join(line for line in lines if line.endswith(b"}\n")))
    return gains.read_rows(path)
