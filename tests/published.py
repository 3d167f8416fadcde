"""Maps weights of the published PyTorch code to this project's parameter tree."""

import jax
import jax.numpy as jnp

from moe_jax.model.config import ModelConfig

ROUTER = "router.model."
Published = dict[str, jax.Array]  # PyTorch name -> array; linear weights are [out, in]


def backbone(params: Published, config: ModelConfig) -> dict:
    """Parameters of `EncoderDecoder`; a vanilla layer takes block 0. Linear in `params`.

    Being linear, its transpose maps gradients back to PyTorch's names and shapes.
    """
    sides = {}
    for side in ("encoder", "decoder"):
        depth = getattr(config, f"{side}_layers")
        vanilla = getattr(config, f"{side}_vanilla_layers")
        groups = {
            "routed": ([i for i in range(depth) if i not in vanilla], config.experts),
            "vanilla": (list(vanilla), 1),
        }
        sides[side] = {
            "position": params[f"model.{side}.embed_positions.weight"],
            "norm": _norm(params, f"model.{side}.layernorm_embedding"),
            "layers": {
                kind: _stack(
                    [
                        _stack(
                            [
                                _layer(params, f"model.{side}.layers.{i}.blocks.{e}", config)
                                for e in range(experts)
                            ]
                        )
                        for i in layers
                    ]
                )
                for kind, (layers, experts) in groups.items()
                if layers
            },
        }
    return {"embedding": params["model.shared.weight"], **sides}


def _stack(trees: list) -> dict:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def _norm(params: Published, name: str) -> dict:
    return {"scale": params[f"{name}.weight"], "bias": params[f"{name}.bias"]}


def _layer(params: Published, name: str, config: ModelConfig) -> dict:
    def project(attention: str, parts: str) -> tuple[jax.Array, jax.Array]:
        """Kernel [D, parts, H * K] and bias [parts, H * K] of several projections."""
        kernels = [params[f"{name}.{attention}.{p}_proj.weight"].T for p in parts]
        biases = [params[f"{name}.{attention}.{p}_proj.bias"] for p in parts]
        return (
            jnp.stack(kernels, axis=1),
            jnp.stack(biases),
        )

    def attend(attention: str, groups: tuple[str, ...]) -> dict:
        result = {
            "out_kernel": params[f"{name}.{attention}.out_proj.weight"].T,
            "out_bias": params[f"{name}.{attention}.out_proj.bias"],
        }
        for parts in groups:
            result[f"{parts}_kernel"], result[f"{parts}_bias"] = project(attention, parts)
        return result

    layer = {
        "self_attention": attend("self_attn", ("qkv",)),
        "self_attention_norm": _norm(params, f"{name}.self_attn_layer_norm"),
        "feed_forward": {
            "in_kernel": params[f"{name}.fc1.weight"].T[:, None],
            "in_bias": params[f"{name}.fc1.bias"][None],
            "out_kernel": params[f"{name}.fc2.weight"].T,
            "out_bias": params[f"{name}.fc2.bias"],
        },
        "feed_forward_norm": _norm(params, f"{name}.final_layer_norm"),
    }
    if f"{name}.encoder_attn.q_proj.weight" in params:
        layer["cross_attention"] = attend("encoder_attn", ("q", "kv"))
        layer["cross_attention_norm"] = _norm(params, f"{name}.encoder_attn_layer_norm")
    return layer


def router(params: Published, kind: str, layers: int) -> dict:
    """Parameters of `Router`; linear in `params`, like `backbone`."""
    params = {name.removeprefix(ROUTER): p for name, p in params.items()}
    family = kind.removesuffix("_layer_specific")
    if family == "linear":
        if kind == family:
            return {"hidden": _affine(params, "linear1"), "output": _affine(params, "linear2")}
        return {
            ours: _stack([_affine(params, f"router_units.{i}.{name}") for i in range(layers)])
            for ours, name in (("hidden", "linear1"), ("output", "linear2"))
        }
    result = {"output": _affine(params, "proj")}
    if kind == family:
        result["position"] = params["pos_embed.weight"]
    else:
        hidden = params["layer_specific_proj.bias"].shape[0] // layers
        kernel = params["layer_specific_proj.weight"].reshape(layers, hidden, -1)
        result["hidden"] = {
            "kernel": kernel.swapaxes(1, 2),
            "bias": params["layer_specific_proj.bias"].reshape(layers, hidden),
        }
    if family == "transformer":
        names = {
            "qkv": "transformer.self_attn.in_proj_",
            "out": "transformer.self_attn.out_proj.",
            "mlp_in": "transformer.linear1.",
            "mlp_out": "transformer.linear2.",
        }
        result["transformer"] = {
            **{
                ours: {"kernel": params[f"{name}weight"].T, "bias": params[f"{name}bias"]}
                for ours, name in names.items()
            },
            "attention_norm": _norm(params, "transformer.norm1"),
            "mlp_norm": _norm(params, "transformer.norm2"),
        }
        return result
    hidden = params["rnn.weight_hh_l0"].shape[1]

    def both(name: str) -> jax.Array:
        """[directions, gates, H, ...]; PyTorch concatenates the gates of all units in one axis."""
        arrays = [params[f"rnn.{name}_l0{suffix}"] for suffix in ("", "_reverse")]
        return jnp.stack([a.reshape(-1, hidden, *a.shape[1:]) for a in arrays])

    result["recurrent"] = {
        "input_kernel": both("weight_ih").transpose(0, 3, 1, 2),
        "hidden_kernel": both("weight_hh").transpose(0, 3, 1, 2),
        "input_bias": both("bias_ih"),
        "hidden_bias": both("bias_hh"),
    }
    return result


def _affine(params: Published, name: str) -> dict:
    return {"kernel": params[f"{name}.weight"].T, "bias": params[f"{name}.bias"]}
