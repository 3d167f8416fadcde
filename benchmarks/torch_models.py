"""The baseline: `transformers`' BART in PyTorch, and a mixture on top that computes all experts.

The published mixture computes every expert of every layer for every example and sums them by the
weights of the example's task; so does `Mixture`, except that a task takes one route in a batch.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch.nn import functional

from moe_jax.interop.hf_config import write_config
from moe_jax.interop.hf_weights import parts
from moe_jax.model.config import ModelConfig
from moe_jax.model.task_moe import TaskMoE

IGNORED = -100  # labels of padding


class Ids(NamedTuple):
    """Special ids, as of a vocabulary; BART's own."""

    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    decoder_start_id: int = 2


OWN_IDS = Ids()


class Example(NamedTuple):
    """One example of a batch."""

    task_id: int
    inputs: np.ndarray
    targets: np.ndarray


def bart(config: ModelConfig, ids: Any = OWN_IDS) -> transformers.BartForConditionalGeneration:
    """A BART of the same size with random weights, as `transformers` makes it (SDPA attention)."""
    settings = {k: v for k, v in write_config(config, ids).items() if "dtype" not in k}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**settings))


def load(model: transformers.BartForConditionalGeneration, backbone: Any, config: ModelConfig):
    """Gives a BART the weights of our dense backbone."""
    state = model.state_dict()
    for part in parts(config):
        parameter = backbone
        for key in part.path.split("/"):
            parameter = parameter[key]
        tensor = torch.from_numpy(np.array(part.take(np.asarray(parameter))))
        state[f"model.{part.name}"].copy_(tensor)
    return model


class AllExperts(torch.nn.Module):
    """E layers in place of one. Outputs are summed with the weights of each example."""

    def __init__(self, layer: torch.nn.Module, experts: int):
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(layer) for _ in range(experts))
        self.weights_RxE: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = self.weights_RxE.to(hidden.dtype)[:, :, None, None]
        outputs = (expert(hidden, *args, **kwargs) for expert in self.experts)
        return sum(weights[:, e] * y for e, y in enumerate(outputs))


class Mixture(torch.nn.Module):
    """BART with E experts in every layer, task representations and a linear router."""

    def __init__(self, model: transformers.BartForConditionalGeneration, experts: int, tasks: int):
        super().__init__()
        self.bart = model
        self.layers = []
        for stack in (model.model.encoder, model.model.decoder):
            stack.layers = torch.nn.ModuleList(AllExperts(x, experts) for x in stack.layers)
            self.layers += list(stack.layers)
        self.table = torch.nn.Parameter(torch.randn(tasks, 128))
        self.router = torch.nn.Sequential(
            torch.nn.Linear(128, 128),
            torch.nn.GELU(),
            torch.nn.Linear(128, len(self.layers) * experts),
        )

    def forward(self, task_id: torch.Tensor, **batch: torch.Tensor) -> Any:
        logits = self.router(self.table).view(len(self.table), len(self.layers), -1)
        routes_TxNxE = functional.gumbel_softmax(logits, hard=True)
        for layer, weights_RxE in zip(self.layers, routes_TxNxE[task_id].unbind(1), strict=True):
            layer.weights_RxE = weights_RxE
        return self.bart(**batch)


def mixture(model: TaskMoE, ids: Any = OWN_IDS) -> torch.nn.Module:
    """The PyTorch counterpart of a model: plain BART if there is one expert."""
    plain = bart(model.config, ids)
    experts = model.config.experts
    return Mixture(plain, experts, model.tasks) if experts > 1 else plain


class TorchTraining:
    """Model and AdamW; `run(batches)` is one optimizer step over them, as a user writes it.

    Args:
        bfloat16: under autocast, with float32 parameters.
        compiled: with `torch.compile`.
    """

    def __init__(self, model: torch.nn.Module, bfloat16: bool = False, compiled: bool = False):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).train()
        self.call = torch.compile(self.model) if compiled else self.model
        self.bfloat16 = bfloat16
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, weight_decay=0.01, fused=True
        )

    def run(self, batches: Sequence[Mapping[str, torch.Tensor]], steps: int = 1) -> float:
        """Runs steps, each over all batches, to the end of the last; returns its loss per target
        token."""
        for _ in range(steps):
            loss = self._step(batches)
        return float(loss)

    def _step(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            batch = {k: v.to(self.device) for k, v in batch.items()}
            labels = batch.pop("labels")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                logits = self.call(**batch, use_cache=False).logits
            loss = functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(),
                ignore_index=IGNORED, label_smoothing=0.1, reduction="sum",
            ) / count  # fmt: skip
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def unpack(batch: Mapping[str, np.ndarray]) -> list[Example]:
    """The examples of a packed batch [G, R, L]."""
    result = []
    for g, task_id in enumerate(batch["task_id"]):
        for r in range(batch["inputs"].shape[1]):
            segments = [batch[f"{side}_segments"][g, r] for side in ("input", "target")]
            for segment in range(1, int(segments[1].max(initial=0)) + 1):
                tokens = (batch["inputs"][g, r], batch["targets"][g, r])
                ids = [t[s == segment] for t, s in zip(tokens, segments, strict=True)]
                result.append(Example(int(task_id), *ids))
    return result


def collate(examples: Sequence[Example], ids: Any = OWN_IDS, tasks: bool = False):
    """Tensors of one batch, padded to its longest input and target."""

    def padded(rows: list[np.ndarray], value: int) -> torch.Tensor:
        rows = [torch.from_numpy(np.array(row, np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    starts = [np.concatenate([[ids.decoder_start_id], e.targets[:-1]]) for e in examples]
    batch = {
        "input_ids": padded([e.inputs for e in examples], ids.pad_id),
        "attention_mask": padded([np.ones(len(e.inputs)) for e in examples], 0),
        "decoder_input_ids": padded(starts, ids.pad_id),
        "labels": padded([e.targets for e in examples], IGNORED),
    }
    if tasks:
        batch["task_id"] = torch.tensor([e.task_id for e in examples])
    return batch


def generator(
    config: ModelConfig, backbone: Any, inputs_RxL: Any, length: int, bfloat16: bool = False, **_
):
    """`beams -> int [R, length]`: `generate` with the weights of our dense backbone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(bart(config), backbone, config).to(device).eval()
    model = model.to(torch.bfloat16) if bfloat16 else model
    inputs = torch.from_numpy(np.array(inputs_RxL, np.int64)).to(device)

    def run(beams: int) -> np.ndarray:
        with torch.inference_mode():
            tokens = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), num_beams=beams, do_sample=False,
                max_new_tokens=length, min_new_tokens=length,
            )  # fmt: skip
        return tokens[:, 1:].cpu().numpy()

    return run
