"""The settings of an experiment."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from moe_jax.core.configuration import (
    INT32,
    Configuration,
    Examples,
    Known,
    Range,
    Seed,
    Size,
    Text,
)
from moe_jax.experiments import controls
from moe_jax.experiments.arms import ARMS, DENSE, DIRECT, ROUTED
from moe_jax.unseen.representations import Kind
from moe_jax.unseen.zero_shot import Unseen

Setting = Annotated[str, Text(0, 4096)]


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Configuration, called="experiment"):
    """Settings of the command `experiment`.

    Attributes:
        model: gin file of the model, read first by every stage.
        pretrain: gin file of a dense model's training on plain text, once for all seeds. All other
            models, and direct fine-tuning, start from it; '' for fresh weights.
        dense: gin file of the dense baseline.
        stage1: gin file of the mixture's first stage.
        stage2: gin file of its second stage; '' if the mixture has only one.
        finetune: gin file of the few-shot adaptation.
        unseen: the mixture of unseen tasks.
        arms: what is compared, see `moe_jax/experiments/arms.py`. `direct` and `dense`, the
            baselines, always are; `routed` is added for what is derived from it.
        seeds: of initialisation, data order, dropout, and of routes that are drawn; all arms are
            made once for each.
        oracle: the routes of the arm `oracle`: an expert for every `category` of the ontology, or
            for every `subcategory`.
        upcycle_step: the experts of stage 1 start as copies of the dense model at this step, of
            which there must be a checkpoint (RunConfig.checkpoint_period). With as many steps in
            stage 1 as the dense model has left, both see the same number of examples. With 0, stage
            1 starts from fresh weights.
        represent: the representations of tasks that the router starts with: of this kind, as
            `represent` computes them, from the dense model (at `upcycle_step`, if there is one)
            where it takes a model; '' for random ones. They are learned further, unless
            OptimizerConfig.frozen has them.
        zero_shot: the route of an unseen task, as `eval.unseen`, in arms that have none for it.
        described: the setting, such as skills_gym.descriptions, that is True for the arm
            `dense_described`: every input begins with the description of its task.
        stage2_from_dense: stage 2 starts its experts from the dense model, not from fresh weights.
        eval_examples: at most this many test examples of each task, evenly spaced, in the scores of
            the trained models; None for all. (Few-shot: FinetuneConfig.test_examples.)
        disable_examples: with each expert of the mixture off in turn, the loss on at most this many
            test examples of each task; 0 for none.
    """

    model: Setting = ""
    pretrain: Setting = ""
    dense: Setting = ""
    stage1: Setting = ""
    stage2: Setting = ""
    finetune: Setting = ""
    unseen: Setting = ""
    arms: Annotated[Sequence[Annotated[str, Known(ARMS)]], Size(1, 100)] = (
        DIRECT,
        DENSE,
        ROUTED,
    )
    seeds: Annotated[Sequence[Seed], Size(1, 1000)] = (0,)
    oracle: controls.Level = "category"
    upcycle_step: Annotated[int, Range(0, INT32)] = 0
    represent: Literal["", Kind] = ""
    zero_shot: Unseen = "nearest"
    described: Setting = ""
    stage2_from_dense: bool = False
    eval_examples: Examples = None
    disable_examples: Annotated[int, Range(0, INT32)] = 32
