"""Records of families: `config.json` round trips, refused settings, a family added from outside."""

import dataclasses
from pathlib import Path

import pytest
from test_hf_parity import check, compute, load

from moe_jax.core.errors import UserError
from moe_jax.data.tokenizer_files import special_ids
from moe_jax.data.vocabulary import read_tokenizers
from moe_jax.interop import hf_families
from moe_jax.interop.hf_config import read_config, write_config
from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf
from moe_jax.model.config import ModelConfig
from moe_jax.model.family import FAMILIES

DATA = Path(__file__).with_name("data") / "hf"
SIZES = {"vocabulary_size": 272, "d_model": 8, "d_ff": 12, "heads": 2}


@pytest.fixture
def silu(monkeypatch):
    """A T5 with SwiGLU: its family record and its Hugging Face record."""
    t5 = dataclasses.replace(FAMILIES["t5"], name="t5_silu", activation="silu")
    monkeypatch.setitem(FAMILIES, "t5_silu", t5)
    monkeypatch.setattr(hf_families, "_FAMILIES", dict(hf_families._FAMILIES))
    plain = hf_families.of_architecture("t5")
    hf_families.register(
        dataclasses.replace(
            plain,
            architecture="t5_silu",
            title="T5 with SiLU",
            fixed=dict(plain.fixed) | {"feed_forward_proj": "gated-silu"},
            written={"is_gated_act": True, "dense_act_fn": "silu"},
        )
    )


def test_a_family_from_outside(silu, tmp_path):
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models

    model = hf_models.t5(feed_forward_proj="gated-silu")
    tokenizer = (DATA / "bart" / "tokenizer.json").read_text()
    source = hf_models.save(model, tmp_path / "hf", tokenizer)
    config, backbone = load(source, tmp_path / "out")
    assert config.architecture == "t5_silu"
    batch = hf_models.batch()
    check("silu", compute(config, backbone, batch), hf_models.reference(model, batch), batch)
    to_hf(tmp_path / "out", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


def test_the_others_are_as_they_were(silu, tmp_path):
    assert from_hf(str(DATA / "t5"), tmp_path / "out").architecture == "t5"


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("architecture", ["bart", "t5", "t5_1_0", "mt5"])
def test_configs_there_and_back(architecture, tied):
    """Round trips keep all settings that affect the output; `None` is the family's default."""
    head_dim = {} if architecture == "bart" else {"head_dim": 6}
    config = ModelConfig(
        architecture=architecture, tie_embeddings=tied, encoder_layers=2, decoder_layers=3,
        max_positions=30, relative_buckets=8, relative_max_distance=20, dropout_rate=0.2,
        attention_dropout_rate=0.2, activation_dropout_rate=0.2, **SIZES, **head_dim,
    )  # fmt: skip
    vocabulary = read_tokenizers(DATA / architecture)
    if architecture == "bart" and tied is False:
        with pytest.raises(UserError, match="BART has tied embeddings"):
            write_config(config, vocabulary)
        return
    back = read_config(write_config(config, vocabulary), config.tie_embeddings, "test")
    # Settings without effect: positions of the other kind, scaling of untied logits.
    for field in ("max_positions", "relative_buckets", "relative_max_distance"):
        if getattr(back, field) == getattr(ModelConfig(), field):
            back = dataclasses.replace(back, **{field: getattr(config, field)})
    if not config.tie_embeddings:
        back = dataclasses.replace(back, scale_tied_logits=config.scale_tied_logits)
    assert back == config


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"architecture": "bart", "head_dim": 6}, "BART of this size has head_dim 4, not 6"),
        ({"architecture": "bart", "scale_tied_logits": True}, "scale_tied_logits False, not True"),
        (
            {"architecture": "mt5", "tie_embeddings": True, "scale_tied_logits": True},
            "mT5 of this size has scale_tied_logits False, not True",
        ),
    ],
)
def test_models_that_transformers_lacks_are_refused(settings, message):
    config = ModelConfig(**SIZES, **settings)
    with pytest.raises(UserError, match=message):
        write_config(config, read_tokenizers(DATA / config.architecture))


def test_a_family_without_a_record_is_named(monkeypatch):
    monkeypatch.setitem(FAMILIES, "t6", dataclasses.replace(FAMILIES["t5"], name="t6"))
    with pytest.raises(UserError, match=r"architecture 't6'; it has bart, .*did you mean 't5'"):
        write_config(ModelConfig(architecture="t6", **SIZES), read_tokenizers(DATA / "t5"))


OLDEST = {
    "vocab_size": 272, "d_model": 8, "d_kv": 6, "d_ff": 12, "num_heads": 2, "num_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, tied, architecture, scaled", [("t5", True, "t5_1_0", True), ("mt5", False, "mt5", False)]
)
def test_absent_keys(kind, tied, architecture, scaled):
    """The first published files hold only sizes: `t5-small` names no activation."""
    config = read_config({"model_type": kind, **OLDEST}, tied, "test")
    assert config.architecture == architecture
    assert (config.decoder_layers, config.head_dim, config.relative_buckets) == (2, 6, 32)
    assert (config.relative_max_distance, config.dropout_rate) == (128, 0.1)
    assert config.scale_tied_logits == scaled
    # Files of transformers 4 say by tie_word_embeddings whether logits are scaled.
    settings = {"model_type": "t5", "tie_word_embeddings": False, **OLDEST}
    assert not read_config(settings, False, "test").scale_tied_logits


@pytest.mark.parametrize("rate", [1e30, float("inf"), -0.1, 1.0, "0.1", True])
def test_a_dropout_that_is_none(rate):
    settings = {"model_type": "t5", "dropout_rate": rate, **OLDEST}
    with pytest.raises(UserError, match=r"^test: ModelConfig\.dropout_rate is .*; it is float"):
        read_config(settings, True, "test")


def test_ids_of_absent_keys():
    """The ids that `transformers` uses if a `config.json` leaves them out."""
    for kind in ("t5", "mt5"):
        ids = special_ids({"model_type": kind}, "test")
        assert ids == {"pad": 0, "bos": None, "eos": 1, "decoder_start": 0}
    assert special_ids({"model_type": "bart", "eos_token_id": [2, 5]}, "test")["eos"] == 2
    bart = {"model_type": "bart", "eos_token_id": 2, "decoder_start_token_id": None}
    more = {"eos_token_id": [5, 2], "decoder_start_token_id": 0}
    assert special_ids(bart, "test", more) == {"pad": 1, "bos": 0, "eos": 2, "decoder_start": 0}
    said = "test: eos_token_id is 2, but 5 in generation_config.json beside it"
    with pytest.raises(UserError, match=said):
        special_ids(bart, "test", {"eos_token_id": 5})
    with pytest.raises(UserError, match=r"test: model_type is 'mt6'.*did you mean 'mt5'"):
        special_ids({"model_type": "mt6"}, "test")
    with pytest.raises(UserError, match=r"test: model_type is \['t5'\]"):
        special_ids({"model_type": ["t5"]}, "test")
    for wrong in (-1, 1.0, "1", True, [], [2, "x"]):
        with pytest.raises(UserError, match=r"test: eos_token_id is .*; it is an id"):
            special_ids(bart | {"eos_token_id": wrong}, "test")
