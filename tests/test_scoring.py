"""Log-likelihoods against the full logits, without a loop over rows."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from toy_run import pack_rows, random_backbone, random_examples, tiny_model

from moe_jax.decoding.rows import RowModel, row_routes
from moe_jax.decoding.scoring import ROWS_AT_ONCE, log_likelihoods
from moe_jax.model.backbone import EncoderDecoder


@pytest.mark.parametrize("architecture", ["bart", "t5", "t5_1_0"])
def test_log_likelihoods(architecture):
    """More rows than are scored at once; several tasks; rows of two examples; an empty row."""
    rng = np.random.default_rng(0)
    rows, experts, tasks = ROWS_AT_ONCE + 3, 3, 4
    packed = [random_examples(rng, 1 + row % 2) for row in range(rows)]
    packed[4] = []
    batch = pack_rows(packed, 12, 12)
    model = tiny_model(tasks, experts, architecture=architecture)
    backbone = random_backbone(model)
    route_TxNxE = rng.dirichlet(np.ones(experts), (tasks, 2)).astype(np.float32)
    task_R = rng.integers(0, tasks, rows)

    @jax.jit
    def score(backbone, routes):
        return log_likelihoods(RowModel(model, backbone, routes), batch)

    sums_R, tokens_R = score(backbone, row_routes(route_TxNxE, task_R, experts))

    weights_NxExR = route_TxNxE[task_R].transpose(1, 2, 0)
    logits = jax.jit(EncoderDecoder(model.config).apply)({"params": backbone}, batch, weights_NxExR)
    scores = log_softmax(np.asarray(logits, np.float64), -1)
    expected = [
        sum(scores[row, place, token] for place, token in enumerate(tokens))
        for row, examples in enumerate(packed)
        for tokens in [[token for _, target in examples for token in target]]
    ]
    np.testing.assert_allclose(sums_R, expected, rtol=1e-5, atol=1e-5)
    wanted = [sum(len(target) for _, target in examples) for examples in packed]
    np.testing.assert_array_equal(tokens_R, wanted)
    assert sums_R[4] == 0 and tokens_R[4] == 0
