"""Every search against an implementation in plain Python, and against `transformers`."""

import functools

import jax
import numpy as np
import pytest
from searches import Answer, Logits, beams, greedy, padded
from toy_run import (
    EOS,
    PAD,
    START,
    decoder,
    pack_rows,
    random_backbone,
    random_examples,
    tiny_model,
)

from moe_jax.core.errors import UserError
from moe_jax.decoding import search as decoding
from moe_jax.decoding.cache import CachedDecoder
from moe_jax.decoding.rows import row_routes
from moe_jax.decoding.search import DecodingConfig, DecodingIds
from moe_jax.evaluation.evaluator import INPUTS
from moe_jax.interop.hf_weights import parts
from moe_jax.interop.squeeze import squeeze
from moe_jax.model.backbone import EncoderDecoder

LENGTH = 8
ROWS, TASKS, E, EMPTY = 12, 3, 4, 5
TASK_OF_ROW = np.array([0, 2, 1, 1, 2, 0, 2, 2, 1, 0, 2, 1])


@functools.cache
def inputs() -> dict[str, np.ndarray]:
    """Rows [R, L] of 2 to 5 tokens, padded; one is empty."""
    rng = np.random.default_rng(5)
    examples = [[example] for example in random_examples(rng, ROWS)]
    examples[EMPTY] = []
    arrays = pack_rows(examples, 6, 6)
    return {name: arrays[name] for name in INPUTS}


def routes(kind: str) -> np.ndarray:
    """[T, N, E]: "hard" of one expert, "two" of two, or "soft" of all."""
    rng = np.random.default_rng(3)
    route_TxNxE = rng.dirichlet(np.ones(E), (TASKS, 2)).astype(np.float32)
    kept = {"hard": 1, "two": 2, "soft": E}[kind]
    least = np.sort(route_TxNxE, -1)[..., -kept, None]
    route_TxNxE = np.where(route_TxNxE >= least, route_TxNxE, 0)
    return route_TxNxE / route_TxNxE.sum(-1, keepdims=True)


CASES = {
    "dense greedy": ("bart", None, {}),
    "hard greedy": (
        "bart", "hard", {"min_length": 3, "forced_bos_id": 7, "forced_eos_id": EOS}
    ),
    "soft greedy": ("t5", "soft", {"min_length": 2}),
    "hard beams": ("bart", "hard", {"num_beams": 4}),
    "soft beams": (
        "bart", "soft", {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0}
    ),
    "two beams": (
        "t5", "two",
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5, "min_length": 2,
         "forced_bos_id": 9, "forced_eos_id": EOS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whole_models(name):
    """A batch of mixed tasks, against logits of the whole answer computed without a cache."""
    architecture, kind, settings = CASES[name]
    config = DecodingConfig(**settings)
    model = tiny_model(
        architecture=architecture, experts=1 if kind is None else E, relative_buckets=8,
        relative_max_distance=6,
    )  # fmt: skip
    backbone = random_backbone(model, seed=2)
    route_TxNxE = None if kind is None else routes(kind)
    used = {None: 0, "hard": 1, "two": 2, "soft": E}[kind]
    by_row = None if kind is None else row_routes(route_TxNxE, TASK_OF_ROW, used)
    actual = np.asarray(decoder(model, config, LENGTH)(backbone, by_row, inputs()))

    whole = jax.jit(EncoderDecoder(model.config).apply)

    def logits_of(row: int) -> Logits:
        weights = None if kind is None else route_TxNxE[TASK_OF_ROW[row]]

        def logits(decoded):
            tokens = np.array([padded([(START, *decoded)], LENGTH)[0]], np.int32)
            places = np.arange(LENGTH, dtype=np.int32)[None]
            batch = {name: array[row : row + 1] for name, array in inputs().items()}
            batch |= {"decoder_inputs": tokens, "target_positions": places}
            batch["target_segments"] = np.ones_like(tokens)
            return np.asarray(whole({"params": backbone}, batch, weights))[0, len(decoded)]

        return logits

    def answer(row: int) -> Answer:
        if row == EMPTY:
            return ()
        if config.num_beams == 1:
            return greedy(logits_of(row), LENGTH, config)
        return beams(logits_of(row), LENGTH, config)[0]

    wanted = [answer(row) for row in range(ROWS)]
    np.testing.assert_array_equal(actual, padded(wanted, LENGTH))
    check_variety([answer for answer in wanted if answer])


def check_variety(answers: list[Answer]) -> None:
    """Answers and their lengths differ, so that the comparison tests something."""
    assert len(set(answers)) > len(answers) / 2
    assert len({len(answer) for answer in answers}) > 1


def test_ended_rows_hold_nothing_up(monkeypatch):
    """A batch takes as many steps as its longest answer has tokens; empty rows take none."""
    steps = []

    class Counted(CachedDecoder):
        def step(self, *args):
            jax.debug.callback(lambda: steps.append(1))
            return super().step(*args)

    monkeypatch.setattr(decoding, "CachedDecoder", Counted)
    model = tiny_model(experts=1)
    backbone = random_backbone(model)
    run = decoder(model, DecodingConfig(min_length=2), LENGTH)
    answers = np.asarray(run(backbone, None, inputs()))
    length_R = np.where(np.any(answers == EOS, 1), np.argmax(answers == EOS, 1) + 1, LENGTH)
    assert len(set(length_R)) > 2
    for kept_R in (length_R <= LENGTH, length_R < LENGTH, length_R < 4, length_R < 0):
        steps.clear()
        arrays = inputs() | {"input_segments": inputs()["input_segments"] * kept_R[:, None]}
        actual = np.asarray(run(backbone, None, arrays))
        jax.effects_barrier()
        np.testing.assert_array_equal(actual, np.where(kept_R[:, None], answers, PAD))
        kept_R = kept_R & (np.arange(ROWS) != EMPTY)
        assert len(steps) == max(length_R[kept_R], default=0)
    assert run._cache_size() == 1


def test_few_shapes_compile():
    """Compiled shapes depend only on the number of used experts (1, 2 or 4), not on tasks or
    parameters."""
    model = tiny_model(experts=E)
    run = decoder(model, DecodingConfig(), LENGTH)
    rng = np.random.default_rng(0)
    route_TxNxE = np.eye(E)[[[0, 1], [1, 3], [2, 1]]]
    shapes = set()
    for seed, tasks in enumerate(([0], [1], [0, 1], [2], [1, 2], [0, 1, 2], [2, 0], [2, 1, 0])):
        by_row = row_routes(route_TxNxE, rng.permutation(np.resize(tasks, ROWS)), 1)
        shapes.add(by_row.experts_NxS.shape)
        run(random_backbone(model, seed), by_row, inputs())
    assert shapes == {(2, 1), (2, 2), (2, 4)}
    assert run._cache_size() == len(shapes)


@pytest.mark.parametrize(
    "wrong",
    [{"num_beams": 0}, {"early_stopping": "always"}, {"early_stopping": 1}, {"temperature": 0.0},
     {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_length": -1}, {"min_length": -1},
     {"num_beams": 2, "sample": True}],
)  # fmt: skip
def test_refusals(wrong):
    with pytest.raises(UserError, match=f"DecodingConfig.{next(iter(wrong))} is "):
        DecodingConfig(**wrong)


# ------------------------------------------------------------------------- `transformers`

SETTINGS = {
    "greedy": {},
    "greedy, all": {"min_length": 4, "forced_bos_id": 7, "forced_eos_id": 2},
    "4 beams": {"num_beams": 4},
    "4 beams, 0": {"num_beams": 4, "length_penalty": 0.0},
    "4 beams, 2": {"num_beams": 4, "length_penalty": 2.0},
    "2 beams, early": {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    "4 beams, early": {"num_beams": 4, "early_stopping": True, "min_length": 2},
    "4 beams, never, 2": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    "4 beams, all": {
        "num_beams": 4, "early_stopping": "never", "length_penalty": 0.5, "min_length": 3,
        "forced_bos_id": 9, "forced_eos_id": 2,
    },
}  # fmt: skip


def load(theirs, config, backbone) -> None:
    """Our dense model's parameters into theirs."""
    import torch

    state = {}
    for part in parts(config):
        parameter = functools.reduce(lambda tree, key: tree[key], part.path.split("/"), backbone)
        prefix = "model." if config.architecture == "bart" else ""
        state[prefix + part.name] = torch.tensor(part.take(parameter))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    aliases = ("embed_tokens.weight", "lm_head.weight", "final_logits_bias")
    assert all(name.endswith(aliases) for name in missing)


def generate(theirs, arrays, config: DecodingConfig, length: int, eos: int) -> list[Answer]:
    """Answers up to the end of sequence, without padding."""
    import torch

    settings = {
        "num_beams": config.num_beams,
        "min_new_tokens": config.min_length or None,
        "forced_bos_token_id": config.forced_bos_id,
        "forced_eos_token_id": config.forced_eos_id,
    }
    if config.num_beams > 1:
        settings |= {
            "length_penalty": config.length_penalty,
            "early_stopping": config.early_stopping,
        }
    tokens = theirs.generate(
        input_ids=torch.tensor(arrays["inputs"]).long(),
        attention_mask=torch.tensor(arrays["input_segments"]).long(),
        max_new_tokens=length,
        do_sample=False,
        **settings,
    )[:, 1:].tolist()
    return [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in tokens]


@functools.cache
def pair(kind: str):
    """(our model, their model with the same shapes, its token ids) for a family or "routed"."""
    import hf_models

    sizes = {"vocab_size": 40, "d_model": 16}
    ours = {"vocabulary_size": 40, "max_positions": 24}
    if kind in ("t5", "t5_1_0", "mt5"):
        theirs = hf_models.MODELS[kind](num_layers=1, d_kv=8, d_ff=32, **sizes)
        ours |= {"architecture": kind, "relative_buckets": 8, "relative_max_distance": 12}
        return tiny_model(experts=1, **ours), theirs, DecodingIds(0, 1, 0)
    theirs = hf_models.bart(encoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    return tiny_model(experts=E if kind == "routed" else 1, **ours), theirs, DecodingIds(2, 2, 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bart", name) for name in SETTINGS]
    + [("routed", name) for name in ("greedy", "4 beams", "4 beams, all")]
    + [(t5, name) for t5 in ("t5", "t5_1_0", "mt5") for name in ("4 beams", "greedy")],
)
def test_transformers(kind, name):
    """Equal tokens. For the routed model, each task is compared with its squeezed dense model."""
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models

    model, theirs, ids = pair(kind)
    config = DecodingConfig(**SETTINGS[name])
    run = decoder(model, config, 10, ids)
    arrays = hf_models.batch(vocabulary=40, rows=ROWS)
    arrays = {name: arrays[name] for name in INPUTS}
    everything = []
    for seed in range(4):
        backbone = random_backbone(model, seed)
        # The end of sequence has the long embedding.
        backbone["embedding"][[EOS, ids.eos]] = backbone["embedding"][[ids.eos, EOS]]
        if kind == "t5_1_0":  # otherwise most answers would end at once
            backbone["embedding"][ids.eos] *= 0.4
        if kind == "routed":
            route_TxNxE = routes("hard")
            actual = run(backbone, row_routes(route_TxNxE, TASK_OF_ROW, 1), arrays)
            wanted = [()] * ROWS
            for task, route_NxE in enumerate(route_TxNxE):
                load(theirs, model.config, squeeze(backbone, model.config, route_NxE))
                mine = task == TASK_OF_ROW
                part = {name: array[mine] for name, array in arrays.items()}
                answers = generate(theirs, part, config, 10, ids.eos)
                for row, answer in zip(np.flatnonzero(mine), answers, strict=True):
                    wanted[row] = answer
        else:
            actual = run(backbone, None, arrays)
            load(theirs, model.config, backbone)
            wanted = generate(theirs, arrays, config, 10, ids.eos)
        np.testing.assert_array_equal(actual, padded(wanted, 10, ids.pad))
        everything += wanted
    check_variety(everything)
