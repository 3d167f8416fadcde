"""Drawing tokens: temperature, top-k and top-p."""

import jax
import jax.numpy as jnp


def sample(
    logits_RxV: jax.Array, keys_R: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """One token per row, each drawn from its own key.

    Args:
        temperature: divides the logits, before `top_k` and `top_p`.
        top_k: keeps the k most likely tokens; 0 for all.
        top_p: then keeps the fewest tokens whose probabilities reach this sum (nucleus sampling,
            Holtzman et al. 2020).

    Returns:
        int32 [R].
    """
    values, tokens = logits_RxV / temperature, None
    if top_k or top_p < 1:  # most likely first
        values, tokens = jax.lax.top_k(values, min(top_k or values.shape[-1], values.shape[-1]))
    if top_p < 1:
        probabilities = jax.nn.softmax(values)
        before = jnp.cumsum(probabilities, -1) - probabilities
        values = jnp.where(before < top_p, values, -jnp.inf)
    chosen_R = jax.vmap(jax.random.categorical)(keys_R, values)
    if tokens is not None:
        chosen_R = jnp.take_along_axis(tokens, chosen_R[:, None], -1)[:, 0]
    return chosen_R.astype(jnp.int32)
