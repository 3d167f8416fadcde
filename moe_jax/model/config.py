"""Model and router configurations. Defaults live here; gin files only override them."""

import dataclasses
from typing import Annotated, Literal

from moe_jax.core.configuration import (
    INT32,
    Configuration,
    Known,
    Range,
    Seed,
    Share,
    Size,
    Temperature,
)
from moe_jax.core.errors import UserError
from moe_jax.model.family import FAMILIES, Family
from moe_jax.model.router import ROUTERS
from moe_jax.model.selection import SELECTIONS

Width = Annotated[int, Range(1, 2**18)]
Dropout = Annotated[float, Range(0, 1, below=True)]
Deviation = Annotated[float, Range(0, 100)]
Depth = Annotated[int, Range(1, 1024)]
Layers = Annotated[tuple[Annotated[int, Range(0, 1023)], ...], Size(0, 1024)]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Configuration):
    """An encoder-decoder transformer whose routed layers have `experts` copies.

    Attributes:
        architecture: the name of a `family`, which defines the computation of layers: `bart`, `t5`
            (T5 1.1), `t5_1_0`, `mt5`, or a registered one.
        vocabulary_size: rows of the embedding; 0 uses the size of the data's vocabulary.
        d_model: width of the states between layers.
        d_ff: hidden units of the feed-forward block.
        heads: heads of every attention.
        head_dim: width of a head; 0 for d_model / heads.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        max_positions: maximum row length, if positions are learned.
        relative_buckets: buckets of the relative position bias, if positions are relative.
        relative_max_distance: larger distances share a bucket.
        tie_embeddings: logits use the input embedding; None follows the family.
        scale_tied_logits: divide tied logits by sqrt(d_model); None follows the family.
        init_std: standard deviation of fresh weights.
        dropout_rate: dropout of states.
        attention_dropout_rate: dropout of attention weights.
        activation_dropout_rate: dropout of hidden units.
        experts: E, copies of every routed layer (paper section 4); 1 is the dense model.
        encoder_vanilla_layers: indices of the encoder's layers that are not routed.
        decoder_vanilla_layers: indices of the decoder's layers that are not routed.
        expert_noise: standard deviation of the noise that makes fresh experts differ.
        dtype: of activations; parameters, norms, softmax and loss are float32.
        vocabulary_multiple: the loss widens the matrix of logits to a multiple of this, in memory
            only. GPUs multiply multiples of 128 faster.
        attention: how attention is computed in training: `plain`; or `fused`, whose memory grows
            with the length of rows and not with its square: on TPUs and NVIDIA GPUs by kernels that
            keep the scores on the chip, elsewhere in a loop over blocks of queries.
        attention_rows: rows whose plain attention is computed at once in training, 0 for all. With
            few, a TPU keeps the scores on the chip, and the backward pass computes them again.
        unroll_layers: layers per iteration of the loop over layers; all of them is fastest on CPU.
        kept_activations: what a layer keeps for its backward pass, which computes the rest again:
            `all`; `products` (the inputs of matrix products and norms: a quarter of the memory, and
            no product of weights is repeated); `inputs` (of whole layers).
    """

    architecture: Annotated[str, Known(FAMILIES)] = "bart"
    vocabulary_size: Annotated[int, Range(0, INT32)] = 0
    d_model: Width = 768
    d_ff: Width = 3072
    heads: Annotated[int, Range(1, 4096)] = 12
    head_dim: Annotated[int, Range(0, 2**18)] = 0
    encoder_layers: Depth = 6
    decoder_layers: Depth = 6
    max_positions: Annotated[int, Range(2, 2**20)] = 1024
    relative_buckets: Annotated[int, Range(4, 4096)] = 32
    relative_max_distance: Annotated[int, Range(3, 2**20)] = 128
    tie_embeddings: bool | None = None
    scale_tied_logits: bool | None = None
    init_std: Deviation = 0.02
    dropout_rate: Dropout = 0.1
    attention_dropout_rate: Dropout = 0.0
    activation_dropout_rate: Dropout = 0.0
    experts: Annotated[int, Range(1, 4096)] = 1
    encoder_vanilla_layers: Layers = ()
    decoder_vanilla_layers: Layers = ()
    expert_noise: Deviation = 0.01
    dtype: Literal["float32", "bfloat16"] = "float32"
    vocabulary_multiple: Annotated[int, Range(1, 4096)] = 1
    attention: Literal["plain", "fused"] = "plain"
    attention_rows: Annotated[int, Range(0, INT32)] = 0
    unroll_layers: Depth = 1
    kept_activations: Literal["all", "products", "inputs"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"ModelConfig.relative_max_distance is {self.relative_max_distance}; it is above "
                f"half of relative_buckets {self.relative_buckets}, which count distances exactly"
            )
        if self.attention == "fused" and self.attention_rows:
            raise UserError(
                f"ModelConfig.attention_rows {self.attention_rows} is for ModelConfig.attention "
                "'plain', not for 'fused'"
            )
        if self.head_dim == 0:
            if self.d_model % self.heads:
                raise UserError(
                    f"ModelConfig.d_model {self.d_model} is not a multiple of heads {self.heads}"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.heads)

    @property
    def family(self) -> Family:
        """How the layers compute."""
        return FAMILIES[self.architecture]

    def check_lengths(self, **lengths: int) -> None:
        """Raises a UserError naming a length beyond the positions that the model has learned.

        JAX would take the last position for all beyond it.
        """
        for name, length in lengths.items():
            if self.family.positions == "learned" and length > self.max_positions:
                raise UserError(
                    f"ModelConfig.max_positions is {self.max_positions}, but there are {name} of "
                    f"{length} tokens: lower TASK_FEATURE_LENGTHS (or DecodingConfig.max_length)"
                )

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return self.head_dim**-0.5 if self.family.scale_attention else 1.0

    @property
    def encoder_routed_layers(self) -> int:
        """The number of routed layers in the encoder."""
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


@dataclasses.dataclass(frozen=True)
class RouterConfig(Configuration):
    """How a task's representation becomes one distribution over experts per routed layer.

    With a hard selection and fewer than E experts per layer, the router's gradient comes from the
    selected experts only.

    Attributes:
        kind: the router (`model.router`): one of the ten published ones; `centroid`, whose logits
            are cosines with a centroid for every expert, at first those of k-means; or `free`,
            which has no network: the representation (N * E numbers) is the route logits.
        hidden_dim: width of the router.
        representation_dim: K, numbers per task in the task table.
        selection: how logits become routes (`model.selection`): `softmax`, `gumbel_softmax`,
            `gumbel_softmax_st` (straight-through), `argmax` (straight-through, no noise), `top_k`,
            and the baselines `average`, `random_task` (random experts per task and layer, fixed by
            `seed`) and `random_instance` (drawn again for every group; use one example per group).
        experts_per_layer: k: only the k experts with the largest weights are computed in each
            layer. 0 computes all, or one if routes are random.
        temperature: temperature of the softmax at step 0.
        temperature_schedule: how the temperature falls, see `selection.temperature_at`.
        temperature_rate: how fast it falls.
        temperature_floor: the lowest temperature.
        exploration_epsilon: in training, the probability that a task's route in a layer is replaced
            by another.
        exploration_route: the replacement: a random expert (`one_hot`) or all experts equally
            (`uniform`).
        seed: seed of routes that are random per task.
    """

    kind: Annotated[str, Known(ROUTERS)] = "linear"
    hidden_dim: Annotated[int, Range(1, 2**16)] = 128
    representation_dim: Annotated[int, Range(1, 2**20)] = 128
    selection: Annotated[str, Known(SELECTIONS)] = "softmax"
    experts_per_layer: Annotated[int, Range(0, 4096)] = 0
    temperature: Temperature = 1.0
    temperature_schedule: Literal["exponential", "linear", "constant"] = "exponential"
    temperature_rate: Annotated[float, Range(0, 1e6)] = 0.0
    temperature_floor: Annotated[float, Range(1e-6, 1e6)] = 0.1
    exploration_epsilon: Share = 0.0
    exploration_route: Literal["one_hot", "uniform"] = "one_hot"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        selection = SELECTIONS[self.selection]
        if self.experts_per_layer and not selection.gathers:
            raise UserError(
                f"RouterConfig.selection '{self.selection}' uses every expert; experts_per_layer "
                f"{self.experts_per_layer} needs 'top_k', 'argmax' or 'gumbel_softmax_st'"
            )
        if selection.needs_k and not self.experts_per_layer:
            raise UserError(f"RouterConfig.selection '{self.selection}' needs experts_per_layer")
        if self.exploration_epsilon and not selection.learned:
            raise UserError(
                f"RouterConfig.exploration_epsilon {self.exploration_epsilon} is for routes that "
                f"the router chooses, not for selection '{self.selection}'"
            )
        if self.temperature_schedule != "constant" and self.temperature < self.temperature_floor:
            raise UserError(
                f"RouterConfig.temperature {self.temperature} is below temperature_floor "
                f"{self.temperature_floor}"
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
        ROUTERS[self.kind].check(self)
