"""Prepares the mixtures of a configuration."""

from moe_jax.core.errors import UserError
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.prepared import ensure_prepared
from moe_jax.runs.config import DataConfig


def prepare_mixtures(data: DataConfig, *more: str) -> dict[str, PreparedMixture]:
    """Returns {name: mixture}: the mixture of `data`, then `more` with the same vocabulary."""
    if data.mixture_or_task_name is None:
        raise UserError("MIXTURE_OR_TASK_NAME is not set: give --gin.MIXTURE_OR_TASK_NAME=...")
    names = list(dict.fromkeys([data.mixture_or_task_name, *more]))
    return ensure_prepared(
        data.cache_dir, names, data.task_modules, data.vocabulary, environment=data.environment
    )
