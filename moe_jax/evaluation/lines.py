"""Lines of text as inputs: how they are read, and a model's answers to them."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax.core import paths
from moe_jax.core.errors import UserError, say
from moe_jax.data.batch import Batch
from moe_jax.data.packing import encode_inputs
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.scores import route_json
from moe_jax.model.experts import Params

Line = tuple[int, str]  # number, from 1, and text


def read_lines(path: str) -> Iterator[Line]:
    """(number, text) of every line, without the byte order mark and carriage returns of Windows.

    Args:
        path: - for standard input.

    Raises:
        UserError: the file cannot be read, or a line is no UTF-8: when that line is reached.
    """
    try:
        with sys.stdin.buffer if path == "-" else paths.parse(path).open("rb") as f:
            for number, line in enumerate(f, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                try:
                    yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: the line is not UTF-8") from e
    except paths.errors() as e:
        raise UserError(f"cannot read {path}: {paths.reason(e)}") from e


def line_answers(
    evaluator: Evaluator,
    params: Params,
    lines: Iterable[Line],
    routes_TxNxE: np.ndarray | None,
    task_id: int,
    of_rows: Callable[[Batch], np.ndarray] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields what `infer` writes of each line, in order; at the end, says which lines were cut.

    Args:
        task_id: the row of `routes_TxNxE` that all lines take.
        of_rows: in its place, makes from inputs [R, L] the route of each row, [R, N, E].

    Raises:
        UserError: as `lines` does; the answers to the lines before come first.
    """
    vocabulary, rows, limit = evaluator.vocabulary, evaluator.rows, evaluator.lengths["inputs"]
    row_R, cut = np.full(rows, task_id), []
    for numbered in _batches(lines, rows):
        texts = [text for _, text in numbered]
        arrays = encode_inputs(vocabulary, [*texts, *[""] * (rows - len(texts))], limit)
        arrays["input_segments"][len(texts) :] = 0
        full_R = arrays["input_segments"].all(1)
        cut += [n for (n, text), full in zip(numbered, full_R, strict=False)
                if full and len(vocabulary.inputs.encode(text)) >= limit]  # fmt: skip
        if of_rows is not None:
            routes_TxNxE, row_R = of_rows(arrays), np.arange(rows)
        # Lines, like examples, are numbered from 0 where they seed sampling.
        line_R = numbered[0][0] - 1 + np.arange(rows)
        predictions = evaluator.predict(params, routes_TxNxE, row_R, arrays, line_R)
        for (number, text), prediction, row in zip(numbered, predictions, row_R, strict=False):
            inputs = {"inputs_pretokenized": text}
            route = None if routes_TxNxE is None else route_json(routes_TxNxE[row])
            yield {"inputs": inputs, "prediction": prediction, "line": number, "route": route}
    if cut:
        more = f", and {len(cut) - 1} more" if len(cut) > 1 else ""
        say(f"TASK_FEATURE_LENGTHS cuts inputs after {limit} tokens: line {cut[0]}{more}")


def _batches(lines: Iterable[Line], rows: int) -> Iterator[list[Line]]:
    """Lists of so many lines; those before a bad one come before its error."""
    batch: list[Line] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == rows:
                yield batch
                batch = []
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
