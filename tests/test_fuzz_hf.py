"""Malformed files of Hugging Face: a second reader agrees, or one line says what is wrong."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from fuzz import changed, changed_text, damaged, fuzz
from safetensors.numpy import save_file
from test_fuzz_data import strict_json

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data.tokenizer_files import special_ids
from moe_jax.data.vocabulary import read_tokenizers
from moe_jax.interop.hf_config import read_config
from moe_jax.interop.hf_directory import INDEX, SINGLE, Weights

DATA = Path(__file__).with_name("data") / "hf"
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": ml_dtypes.bfloat16}


def tensors(content):
    """The arrays of a safetensors file, by its specification."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }


def read_weights(directory):
    weights = Weights(directory)
    return {name: weights.read(name) for name in weights.shapes}


@fuzz("safetensors", 250, 1200)
def test_safetensors(count, tmp_path):
    """One file, or two and their index."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.ones(3, np.float16),
        "c": np.arange(4).astype(ml_dtypes.bfloat16),
    }
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    save_file(arrays, one / SINGLE, metadata={"format": "pt"})
    weight_map = {}
    for number, (name, array) in enumerate(arrays.items(), 1):
        file = f"model-0000{number}-of-00003.safetensors"
        save_file({name: array}, two / file)
        weight_map[name] = file
    good = (one / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", good[:8])
    index = {"metadata": {"total_size": 38}, "weight_map": weight_map}
    for rng in count:
        if rng.randrange(4) == 0:
            content = changed_text(rng, index)
            (two / INDEX).write_bytes(content)
            found = count.outcome(two, content, read_weights, two)
            named = set() if isinstance(found, UserError) else strict_json(content)["weight_map"]
            wanted = {name: arrays[name] for name in arrays if weight_map[name] in named.values()} \
                if named else {}  # fmt: skip
        else:
            if rng.randrange(2):
                header = json.dumps(changed(rng, json.loads(good[8 : 8 + size]))).encode()
                content = struct.pack("<Q", len(header)) + header + good[8 + size :]
            else:
                content = damaged(rng, good)
            (one / SINGLE).write_bytes(content)
            found = count.outcome(one, content, read_weights, one)
            wanted = {} if isinstance(found, UserError) else tensors(content)
        if isinstance(found, UserError):
            continue
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            assert array.dtype == wanted[name].dtype and array.shape == wanted[name].shape
            assert array.tobytes() == wanted[name].tobytes()


# Of ModelConfig, by the documentation of `transformers`.
BART = {
    "vocab_size": "vocabulary_size", "d_model": "d_model", "encoder_ffn_dim": "d_ff",
    "encoder_attention_heads": "heads", "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers", "max_position_embeddings": "max_positions",
    "dropout": "dropout_rate", "attention_dropout": "attention_dropout_rate",
}  # fmt: skip
T5 = {
    "vocab_size": "vocabulary_size", "d_model": "d_model", "d_ff": "d_ff", "num_heads": "heads",
    "d_kv": "head_dim", "num_layers": "encoder_layers", "num_decoder_layers": "decoder_layers",
    "dropout_rate": "dropout_rate", "relative_attention_num_buckets": "relative_buckets",
}  # fmt: skip
IDS = {"pad": "pad_token_id", "eos": "eos_token_id", "decoder_start": "decoder_start_token_id"}


def read_both(directory):
    config, generation = (files.read_object(directory / f"{name}.json") for name in CONFIGS)
    source = directory / "config.json"
    return read_config(config, True, source), special_ids(config, source, generation)


CONFIGS = ("config", "generation_config")


@fuzz("configurations of transformers", 250, 1200)
def test_configurations(count, tmp_path):
    for rng in count:
        name = rng.choice(["bart", "t5", "t5_1_0", "mt5"])
        for file in CONFIGS:
            shutil.copy(DATA / name / f"{file}.json", tmp_path)
        path = tmp_path / f"{rng.choice([*CONFIGS, CONFIGS[0]])}.json"
        value = strict_json(path.read_bytes())
        if path.stem == CONFIGS[0]:  # what is read of it, more often
            keys = [*(BART if name == "bart" else T5), *IDS.values(), "model_type"]
            value = value if rng.randrange(3) else {k: value.get(k) for k in keys} | value
        path.write_bytes(content := changed_text(rng, value))
        found = count.outcome(tmp_path, content, read_both, tmp_path)
        if isinstance(found, UserError):
            continue
        model, ids = found
        value = strict_json((tmp_path / "config.json").read_bytes())
        for key, field in (BART if value["model_type"] == "bart" else T5).items():
            if value.get(key) is not None:
                assert getattr(model, field) == value[key], key
                assert type(value[key]) in (int, float) and 0 <= value[key] < 2**31
        for key, ours in ((IDS[name], ids[name]) for name in IDS):
            given = value.get(key)
            assert type(ours) is int and ours >= 0
            assert given in (None, ours) or (type(given) is list and given[0] == ours)


@fuzz("files of tokenizers", 120, 800)
def test_tokenizers(count, tmp_path):
    """tokenizer.json, BART's older files and SentencePiece's, each with what lies beside it."""
    model = strict_json((DATA / "bart" / "tokenizer.json").read_bytes())["model"]
    settings = {
        "added_tokens_decoder": {"272": {"content": "<sep>", "special": True, "lstrip": False}},
        "extra_ids": 3, "add_prefix_space": False, "unk_token": "<unk>",
    }  # fmt: skip
    special = {"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>", "<y>"]}
    for number, form in enumerate(("json", "merges", "pieces")):
        directory = tmp_path / str(number)
        directory.mkdir()
        shutil.copy(DATA / ("t5" if form == "pieces" else "bart") / "config.json", directory)
        if form == "json":
            shutil.copy(DATA / "bart" / "tokenizer.json", directory)
            (directory / "tokenizer_config.json").write_text('{"a": 1}')
        elif form == "merges":
            (directory / "vocab.json").write_text(json.dumps(model["vocab"] | {"<mask>": 271}))
            merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
            (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
            (directory / "tokenizer_config.json").write_text(json.dumps(settings))
            (directory / "special_tokens_map.json").write_text(json.dumps(special))
        else:
            shutil.copy(DATA / "t5" / "spiece.model", directory)
            (directory / "added_tokens.json").write_text('{"<new>": 61, "<other>": 62}')
            (directory / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    texts = ["", "The cat <sep> sat.", "é\u2028 <x>\n", "<extra_id_1> 日本 </s>"]
    for rng in count:
        directory = tmp_path / rng.choice("012")
        path = rng.choice(sorted(directory.iterdir()))
        good = path.read_bytes()
        is_json = path.suffix == ".json"
        content = changed_text(rng, strict_json(good)) if is_json else damaged(rng, good)
        path.write_bytes(content)
        found = count.outcome(directory, (path, content), read_tokenizers, directory)
        path.write_bytes(good)
        if isinstance(found, UserError):
            continue
        for i in (found.pad_id, found.eos_id, found.unk_id, found.decoder_start_id):
            assert type(i) is int and 0 <= i < found.size
        for text in texts:
            ids = found.encode(text)
            assert all(0 <= i < found.size for i in ids)
            found.decode(ids).encode()
