"""Model and router configurations. Defaults live here; gin files only override them."""

import dataclasses
from typing import Literal

import gin

from moe_jax.core.errors import UserError, check_fields
from moe_jax.model.family import Family, family_of
from moe_jax.model.router import router_class
from moe_jax.model.selection import selection_of


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An encoder-decoder transformer whose routed layers have `experts` copies.

    `architecture` names a `family`, which fixes how its layers compute: `bart`, `t5` (T5 1.1),
    `t5_1_0`, `mt5`, or one registered elsewhere. `vocabulary_size` 0 takes the size of the data's
    vocabulary; `tie_embeddings` and `scale_tied_logits` are the family's unless they are set.
    """

    architecture: str = "bart"
    vocabulary_size: int = 0
    d_model: int = 768
    d_ff: int = 3072
    heads: int = 12
    head_dim: int = 0  # 0: d_model / heads
    encoder_layers: int = 6
    decoder_layers: int = 6
    max_positions: int = 1024  # learned positions
    relative_buckets: int = 32  # relative positions
    relative_max_distance: int = 128  # likewise
    tie_embeddings: bool | None = None
    scale_tied_logits: bool | None = None  # divide tied logits by sqrt(d_model)
    init_std: float = 0.02
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    activation_dropout_rate: float = 0.0
    # Experts (paper section 4).
    experts: int = 1
    encoder_vanilla_layers: tuple[int, ...] = ()
    decoder_vanilla_layers: tuple[int, ...] = ()
    expert_noise: float = 0.01  # standard deviation of the noise that tells experts apart
    # Execution.
    dtype: Literal["float32", "bfloat16"] = "float32"
    unroll_layers: int = 1  # layers per iteration of the scan over layers
    remat: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tie_embeddings", "scale_tied_logits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.family, name))
        for name in ("encoder", "decoder"):
            depth = getattr(self, f"{name}_layers")
            vanilla = tuple(sorted(set(getattr(self, f"{name}_vanilla_layers"))))
            object.__setattr__(self, f"{name}_vanilla_layers", vanilla)
            if any(not 0 <= layer < depth for layer in vanilla):
                raise UserError(
                    f"ModelConfig.{name}_vanilla_layers is {vanilla}, "
                    f"but the {name} has layers 0 to {depth - 1}"
                )
        if self.experts < 1:
            raise UserError(f"ModelConfig.experts must be at least 1, not {self.experts}")
        if self.head_dim == 0:
            if self.d_model % self.heads:
                raise UserError(
                    f"ModelConfig.d_model {self.d_model} is no multiple of heads {self.heads}"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.heads)

    @property
    def family(self) -> Family:
        """How the layers compute."""
        return family_of(self.architecture)

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied with."""
        return self.head_dim**-0.5 if self.family.scale_attention else 1.0

    @property
    def encoder_routed_layers(self) -> int:
        """How many of the N routed layers are the encoder's."""
        return self.encoder_layers - len(self.encoder_vanilla_layers)

    @property
    def routed_layers(self) -> tuple[str, ...]:
        """Names of the N routed layers, encoder first: `encoder.0` ... `decoder.5`."""
        return tuple(
            f"{stack}.{layer}"
            for stack in ("encoder", "decoder")
            for layer in range(getattr(self, f"{stack}_layers"))
            if layer not in getattr(self, f"{stack}_vanilla_layers")
        )


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a task's representation becomes one distribution over experts per routed layer.

    Kinds (`model.router`) are the ten published routers, and `free`: no network, the representation
    (N * E numbers) is the route logits.

    Selections (`model.selection`): `softmax`, `gumbel_softmax`, `gumbel_softmax_st`
    (straight-through), `argmax` (straight-through, no noise), `top_k`, and the baselines `average`,
    `random_task` (random experts per task and layer, fixed by `seed`) and `random_instance` (drawn
    anew for every group; use one example per group). The random ones mix max(1,
    `experts_per_layer`) experts.

    `experts_per_layer` = k gathers only each layer's k largest experts (0: all). With a hard
    selection and k < experts, the router's gradient comes from the selected experts only.

    The temperature starts at `temperature` and falls to `temperature_floor` at
    `temperature_rate`: see `selection.temperature_at`. In training, `exploration_epsilon` is the
    probability that a task's route in a layer is replaced by one of the kind `exploration_route`.
    """

    kind: str = "linear"
    hidden_dim: int = 128
    representation_dim: int = 128
    selection: str = "softmax"
    experts_per_layer: int = 0
    temperature: float = 1.0
    temperature_schedule: Literal["exponential", "linear", "constant"] = "exponential"
    temperature_rate: float = 0.0
    temperature_floor: float = 0.1
    exploration_epsilon: float = 0.0
    exploration_route: Literal["one_hot", "uniform"] = "one_hot"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        selection = selection_of(self.selection)
        if self.experts_per_layer and not selection.gathers:
            raise UserError(
                f"RouterConfig.selection '{self.selection}' uses every expert; experts_per_layer "
                f"{self.experts_per_layer} needs 'top_k', 'argmax' or 'gumbel_softmax_st'"
            )
        if selection.needs_k and not self.experts_per_layer:
            raise UserError(f"RouterConfig.selection '{self.selection}' needs experts_per_layer")
        if not 0.0 <= self.exploration_epsilon <= 1.0:
            raise UserError(
                f"RouterConfig.exploration_epsilon is {self.exploration_epsilon}; "
                "it is a probability"
            )
        if self.exploration_epsilon and not selection.learned:
            raise UserError(
                f"RouterConfig.exploration_epsilon {self.exploration_epsilon} is for routes that "
                f"the router chooses, not for selection '{self.selection}'"
            )
        if (
            self.exploration_epsilon
            and self.exploration_route == "uniform"
            and self.experts_per_layer
        ):
            raise UserError(
                "RouterConfig.exploration_route 'uniform' uses every expert, but "
                f"experts_per_layer is {self.experts_per_layer}; take 'one_hot'"
            )
        router_class(self.kind).check(self)
