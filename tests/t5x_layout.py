"""Writes checkpoints in T5X's published layout from the tensors of a `transformers` T5."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import serialization


def arrays_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """T5X's parameters by name, from the tensors of a `transformers` T5."""
    t = dict(tensors)
    arrays = {"token_embedder/embedding": t.pop("shared.weight")}
    if "lm_head.weight" in t:
        arrays["decoder/logits_dense/kernel"] = t.pop("lm_head.weight").T
    for side in ("encoder", "decoder"):
        first = f"{side}.block.0.layer.0.SelfAttention"
        bias = t.pop(f"{first}.relative_attention_bias.weight")
        arrays[f"{side}/relpos_bias/rel_embedding"] = bias.T
        arrays[f"{side}/{side}_norm/scale"] = t.pop(f"{side}.final_layer_norm.weight")
        layer = 0
        while f"{side}.block.{layer}.layer.0.layer_norm.weight" in t:
            theirs, ours = f"{side}.block.{layer}.layer", f"{side}/layers_{layer}"
            if side == "encoder":
                blocks = [("SelfAttention", "attention", "pre_attention")]
            else:
                blocks = [
                    ("SelfAttention", "self_attention", "pre_self_attention"),
                    ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention"),
                ]
            for i, (block, attention, norm) in enumerate(blocks):
                arrays[f"{ours}/{norm}_layer_norm/scale"] = t.pop(f"{theirs}.{i}.layer_norm.weight")
                for short, long in zip("qkvo", ("query", "key", "value", "out"), strict=True):
                    kernel = t.pop(f"{theirs}.{i}.{block}.{short}.weight")
                    arrays[f"{ours}/{attention}/{long}/kernel"] = kernel.T
            i = len(blocks)
            arrays[f"{ours}/pre_mlp_layer_norm/scale"] = t.pop(f"{theirs}.{i}.layer_norm.weight")
            gated = f"{theirs}.{i}.DenseReluDense.wi_0.weight" in t
            for which in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
                kernel = t.pop(f"{theirs}.{i}.DenseReluDense.{which}.weight")
                arrays[f"{ours}/mlp/{which}/kernel"] = kernel.T
            layer += 1
    assert not t.keys() - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    return arrays


def write_zarr(path: Path, array: np.ndarray) -> dict:
    """Writes `array` in several chunks; returns T5X's reference to it."""
    chunks = [-(-n // 2) for n in array.shape]
    metadata = {"compressor": {"id": "gzip"}, "shape": array.shape, "chunks": chunks}
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    kvstore = {"driver": "file", "path": str(path)}
    store = tensorstore.open(spec | {"kvstore": kvstore}, create=True).result()
    store.write(array).result()
    return store.spec().to_json() | {"kvstore": {"driver": "gfile", "path": f"{path.name}/"}}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_t5x(path: Path, arrays: dict[str, np.ndarray], layout: str = "published") -> Path:
    """Writes a checkpoint with the state of Adafactor in front of the parameters.

    Layouts: `published`, matrices in zarr and vectors inline; `inline`; `orbax`, T5X's later
    form, in which all are in zarr, named by a string; `early`, in which the path lies elsewhere;
    `today`, one database of Orbax, as T5X at commit cc342d4 saves.
    """
    path.mkdir(parents=True)
    if layout == "today":
        moments = nested({f"{name}/v_row": np.ones(3, np.float32) for name in arrays})
        state = {"step": np.int32(7), "param_states": moments}
        tree = {"target": nested(arrays), "state": state}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
            checkpointer.save(path.absolute() / "state", args=ocp.args.PyTreeSave(tree))
        return path
    target: dict = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        target[name] = array
        if layout == "inline" or (layout == "published" and array.ndim == 1):
            continue
        dotted = "target." + name.replace("/", ".")
        reference = write_zarr(path / dotted, array)
        if layout == "orbax":
            reference = f"PLACEHOLDER://{dotted}"
        elif layout == "early":
            reference |= {"kvstore": {"driver": "gfile"}, "path": dotted}
        target[name] = reference
    rows = {f"{name}/v_row": np.ones(3, np.float32) for name in arrays}
    state = {"step": np.int32(7), "param_states": nested(rows)}
    content: dict = {"state": state, "target": nested(target)}
    if layout != "orbax":
        content = {"version": 3, "optimizer": content}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return path
