"""Reading T5X checkpoints: the same model directory as from Hugging Face, refused files, memory."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from flax import serialization
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from t5x_layout import arrays_of, nested, write_t5x

from moe_jax import convert
from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data.vocabulary import load_vocabulary
from moe_jax.interop import hf_weights as weights
from moe_jax.interop import t5x_read
from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.runs.load import read_run

ALL = Path(__file__).with_name("data") / "hf"
DATA = ALL / "t5"


def stored() -> dict[str, np.ndarray]:
    """T5X's parameters of the T5 1.1 that is kept for tests."""
    return arrays_of(load_file(DATA / "model.safetensors"))


# ---- the same as from Hugging Face ----


def flat(tree, prefix: str = "") -> dict[str, np.ndarray]:
    actual = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}"
        actual |= flat(value, name) if isinstance(value, dict) else {name: value}
    return actual


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same parameters, and the same model."""
    runs = [read_run(str(path), 0) for path in (one, other)]
    # The stored T5 distinguishes distances up to 12, which is not visible in shapes.
    configs = [dataclasses.replace(r.model.config, relative_max_distance=128) for r in runs]
    assert configs[0] == configs[1]
    params = [flat(run.params) for run in runs]
    assert params[0].keys() == params[1].keys()
    for name, array in params[0].items():
        assert array.dtype == np.float32
        assert array.tobytes() == params[1][name].tobytes(), name


@pytest.mark.parametrize(
    "name, layout, dtype",
    [
        ("t5", "published", "float32"),
        ("t5", "published", "bfloat16"),
        ("t5", "inline", "float32"),
        ("t5", "inline", "bfloat16"),
        ("t5", "orbax", "float32"),
        ("t5", "early", "bfloat16"),
        ("t5", "today", "float32"),
        ("t5", "today", "bfloat16"),
        ("t5_1_0", "published", "float32"),
        ("t5_1_0", "orbax", "bfloat16"),
    ],
)
def test_same_as_from_hugging_face(name, layout, dtype, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(ALL / name, tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(tensors, source / "model.safetensors")
    # Arrays above a gigabyte are written in pieces.
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    write_t5x(tmp_path / "checkpoint_7", arrays_of(tensors), layout)
    from_hf(str(source), tmp_path / "theirs")
    argv = ["from-t5x", str(tmp_path / "checkpoint_7"), str(tmp_path / "ours")]
    convert.main(argv)
    said = capsys.readouterr().out
    assert f": {name}, d_model 8, 2 + 1 layers" in said and "no tokenizer" in said
    assert_same_run(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "ours" / "vocabulary").exists()
    assert "Vocabulary" not in (tmp_path / "ours" / "config.gin").read_text()


@pytest.mark.parametrize("name, tied", [("t5", False), ("t5", True), ("t5_1_0", True)])
def test_a_model_of_transformers(name, tied, tmp_path):
    """With its tokenizer: the whole directory is that of `from_hf`; and back to `transformers`."""
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models
    import transformers

    settings = {"num_decoder_layers": 3, "relative_attention_max_distance": 128}
    model = (
        hf_models.t5_1_0(**settings) if name == "t5_1_0" else hf_models.t5(tied=tied, **settings)
    )
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    source = tmp_path / "hf"
    model.save_pretrained(source)
    shutil.copy(DATA / "spiece.model", source)
    files.write_json(
        source / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    )
    write_t5x(tmp_path / "checkpoint_7", arrays_of(tensors))
    from_hf(str(source), tmp_path / "theirs")
    argv = ["from-t5x", str(tmp_path / "checkpoint_7"), str(tmp_path / "ours")]
    convert.main([*argv, "--sentencepiece", str(DATA / "spiece.model")])
    assert_same_run(tmp_path / "ours", tmp_path / "theirs")
    for path in (tmp_path / "theirs" / "vocabulary").iterdir():
        ours = tmp_path / "ours" / "vocabulary" / path.name
        assert ours.read_bytes() == path.read_bytes(), path.name
    theirs = (tmp_path / "theirs" / "config.gin").read_text()
    ours = (tmp_path / "ours" / "config.gin").read_text()
    assert ours == theirs.replace(str(tmp_path / "theirs"), str(tmp_path / "ours"))

    to_hf(tmp_path / "ours", tmp_path / "back")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.config.scale_decoder_outputs == tied
    for name, parameter in back.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), tensors[name], err_msg=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    own = load_vocabulary(tmp_path / "ours" / "vocabulary")
    text = "The red cat <extra_id_0> sat."
    assert tokenizer(text).input_ids == [*own.encode(text), own.eos_id]


def with_pieces(path: Path, pieces: list[str]) -> Path:
    """The stored tokenizer with more pieces."""
    model = sentencepiece_model_pb2.ModelProto.FromString((DATA / "spiece.model").read_bytes())
    for piece in pieces:
        kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        model.pieces.add(piece=piece, score=0.0, type=kind)
    path.write_bytes(model.SerializeToString())
    return path


def test_sentinels_within_the_tokenizer(tmp_path):
    """T5X's own files have sentinels at the end, in descending order. The ids are the same either
    way."""
    source = write_t5x(tmp_path / "checkpoint_7", stored())
    sentinels = [f"▁<extra_id_{i}>" for i in reversed(range(100))]
    complete = with_pieces(tmp_path / "complete.model", sentinels)
    own = []
    for path in (complete, DATA / "spiece.model"):
        t5x_read.from_t5x(str(source), tmp_path / path.stem, str(path))
        own.append(load_vocabulary(tmp_path / path.stem / "vocabulary"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(complete))
    assert own[0].size == own[1].size == theirs.get_piece_size()
    text = "The red cat <extra_id_0> sat, <extra_id_99> then left."
    assert own[0].encode(text) == theirs.encode(text)
    assert theirs.get_piece_size() - 1 in own[1].encode(text)


SIZES = {  # d_model, d_ff, heads, head_dim, layers of the published ones
    "small": (512, 1024, 6, 64, 8),
    "base": (768, 2048, 12, 64, 12),
    "large": (1024, 2816, 16, 64, 24),
    "xl": (2048, 5120, 32, 64, 24),
    "xxl": (4096, 10240, 64, 64, 24),
}
SIZES_1_0 = {
    "small": (512, 2048, 8, 64, 6),
    "3b": (1024, 16384, 32, 128, 24),
    "11b": (1024, 65536, 128, 128, 24),
}


@pytest.mark.parametrize(
    "architecture, name",
    [("t5", name) for name in SIZES]
    + [("t5_1_0", name) for name in SIZES_1_0]
    + [("mt5", name) for name in ("small", "xxl")],
)
def test_sizes_are_read_from_shapes(architecture, name):
    sizes = SIZES_1_0 if architecture == "t5_1_0" else SIZES
    d_model, d_ff, heads, head_dim, layers = sizes[name]
    config = ModelConfig(
        architecture=architecture, vocabulary_size=250112 if architecture == "mt5" else 32128,
        d_model=d_model, d_ff=d_ff, heads=heads, head_dim=head_dim, encoder_layers=layers,
        decoder_layers=layers, attention_dropout_rate=0.1, activation_dropout_rate=0.1,
    )  # fmt: skip
    own = shapes_of(TaskMoE(config, RouterConfig(), 0))

    def shape(part) -> tuple[int, ...]:
        return part.shape(tuple(own[f"backbone/{part.path}"]))

    tensors = {p.name: np.broadcast_to(np.float32(0), shape(p)) for p in weights.parts(config)}
    shapes = {name: array.shape for name, array in arrays_of(tensors).items()}
    out = "decoder/layers_1/encoder_decoder_attention/out/kernel"
    assert shapes[out] == (heads * head_dim, d_model)
    assert t5x_read.read_config(shapes, Path("test")) == config
    assert {part.name: shape(part) for part in t5x_read.parts(config)} == shapes


# ---- refusals ----


def fails(capsys, source, out, *flags) -> str:
    """The command's error; checks that it is one line and that no files are left."""
    with pytest.raises(UserError) as error:
        convert.main(["from-t5x", str(source), str(out), *map(str, flags)])
    captured = capsys.readouterr()
    assert not captured.err and "\n" not in str(error.value)
    assert not captured.out and not out.exists() and not list(out.parent.glob(".*.new"))
    return str(error.value)


NORM = "decoder/decoder_norm/scale"
KEY = "encoder/layers_1/attention/key/kernel"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop(KEY), f"no {KEY}"),
        (lambda a: a.pop(NORM), f"no {NORM}"),
        (lambda a: a.pop("token_embedder/embedding"), "no token_embedder/embedding"),
        (lambda a: a.update({KEY: np.ones((8, 10), np.float32)}), "shape [8, 10], the others say"),
        (lambda a: a.update({NORM: np.ones((9,), np.float32)}), "shape [9], the others say [8]"),
        (
            lambda a: a.update({"encoder/relpos_bias/rel_embedding": np.ones(4, np.float32)}),
            "has shape [4], it is not a matrix",
        ),
        (
            lambda a: a.update({"decoder/decoder_norm/bias": np.ones(8, np.float32)}),
            "decoder/decoder_norm/bias belongs to no T5 1.1; did you mean 'decoder/decoder_norm/s",
        ),
        (
            lambda a: a.update({"encoder/layers_0/mlp/wi/kernel": np.ones((8, 12), np.float32)}),
            "encoder/layers_0/mlp/wi/kernel belongs to no T5 1.1",
        ),
        (
            lambda a: a.update({"encoder/encoder/mlp/wo/kernel": np.ones((12, 2, 8), np.float32)}),
            "stacked (scan_layers)",
        ),
        (lambda a: a.update({KEY: np.ones((8, 12), np.uint16)}), f"{KEY} has dtype uint16"),
    ],
)
def test_other_models_are_refused(change, message, tmp_path, capsys):
    arrays = stored()
    change(arrays)
    write_t5x(tmp_path / "checkpoint_7", arrays)
    assert message in fails(capsys, tmp_path / "checkpoint_7", tmp_path / "out")


def test_damaged_files_are_named(tmp_path, capsys):
    source, out = write_t5x(tmp_path / "model" / "checkpoint_7", stored()), tmp_path / "out"
    file, zarr = source / "checkpoint", source / ("target." + KEY.replace("/", "."))

    def damaged(path: Path, content: bytes | None) -> str:
        """The error if `path` has other content or is absent."""
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        said = fails(capsys, source, out)
        path.write_bytes(before)
        return said

    chunk = (zarr / "0.1").read_bytes()
    for content in (chunk[: len(chunk) // 2], b"no gzip", None):
        said = damaged(zarr / "0.1", content)
        assert f"cannot read {KEY}" in said and "0.1" in said
    for content in (b"{", None):
        assert f"cannot read {KEY}" in damaged(zarr / ".zarray", content)
    content = file.read_bytes()
    assert "cannot read checkpoint" in damaged(file, content[:-20])
    for other in (b"", b'model_checkpoint_path: "model.ckpt-0"', b"\xc1"):
        assert "cannot read checkpoint" in damaged(file, other)
    assert "holds no parameters" in damaged(file, serialization.msgpack_serialize({"version": 3}))
    at = content.index(b"\xa7float32", content.index(b"decoder_norm", content.index(b"\xa6target")))
    other = content[:at] + b"\xa7int1024" + content[at + 8 :]
    assert f"cannot read {NORM}" in damaged(file, other)
    assert "has no file 'checkpoint'" in damaged(file, None)
    assert "did you mean 'checkpoint_7'" in fails(capsys, source.parent, out)

    tree = serialization.msgpack_restore(content)
    for kernel, message in (
        ("PLACEHOLDER://../elsewhere", "out of the directory"),
        ("PLACEHOLDER:///elsewhere", "out of the directory"),
        (None, "neither an array nor refers to one"),
        ({"driver": "n5", "kvstore": "memory://"}, "neither an array nor refers to one"),
    ):
        tree["optimizer"]["target"]["encoder"]["layers_1"]["attention"]["key"]["kernel"] = kernel
        said = damaged(file, serialization.msgpack_serialize(tree))
        assert message in said and KEY in said

    model = ["--sentencepiece", tmp_path / "spiece.model"]
    assert "cannot read" in fails(capsys, source, out, *model)
    model[1].write_bytes(b"something else")
    assert "not a SentencePiece model" in fails(capsys, source, out, *model)
    with_pieces(model[1], [f"x{i}" for i in range(200)])
    assert "tokens, the model 272" in fails(capsys, source, out, *model)
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(UserError, match="exists"):
        convert.main(["from-t5x", str(source), str(out)])
    (out / "file").unlink()
    convert.main(["from-t5x", str(source), str(out)])  # it is whole again


def test_damaged_databases_are_named(tmp_path, capsys):
    source, out = write_t5x(tmp_path / "checkpoint_7", stored(), "today"), tmp_path / "out"
    (manifest,) = source.glob("state/manifest.ocdbt")
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    assert "cannot read state/manifest.ocdbt" in fails(capsys, source, out)
    manifest.unlink()
    assert "no file 'checkpoint' nor state/manifest.ocdbt" in fails(capsys, source, out)
    manifest.write_bytes(content)
    for path in source.glob("state/ocdbt.process_0/d/*"):
        path.unlink()
    assert "cannot read" in fails(capsys, source, out)


# ---- memory ----

_CONVERT = """
import re, sys
from moe_jax.interop.t5x_read import from_t5x

def peak():  # getrusage's would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
from_t5x(sys.argv[1], sys.argv[2])
print(peak() - before, *sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layout", ["published", "inline"])
def test_conversion_streams(layout, tmp_path):
    """Memory for a model of 100 MB plus 200 MB of optimizer state, beside Python's libraries."""
    config = ModelConfig(
        architecture="t5", vocabulary_size=512, d_model=512, d_ff=1024, heads=8,
        encoder_layers=6, decoder_layers=4, tie_embeddings=False,
    )  # fmt: skip
    shapes = shapes_of(TaskMoE(config, RouterConfig(), 0))
    rng = np.random.default_rng(0)
    block = rng.random(1000, np.float32)  # repeated: quickly compressed
    tensors = {
        part.name: np.resize(block, part.shape(tuple(shapes[f"backbone/{part.path}"])))
        for part in weights.parts(config)
    }
    arrays = arrays_of(tensors)
    source = write_t5x(tmp_path / "checkpoint_7", arrays, layout)
    content = serialization.msgpack_restore((source / "checkpoint").read_bytes())
    content["optimizer"]["state"]["param_states"] = nested(
        {f"{name}/{moment}": array for name, array in arrays.items() for moment in "mv"}
    )
    (source / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    model = sum(array.nbytes for array in arrays.values())
    assert model > 100e6
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(tmp_path / "out")],
        env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kilobytes, *modules = done.stdout.split()
    took = int(kilobytes) * 1024
    print(f"{layout}: {took / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB")
    assert took < 1.3 * model
    assert not {"torch", "transformers", "tensorflow", "seqio"} & set(modules)
