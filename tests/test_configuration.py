"""Every field of every configuration declares what it may hold, and holds nothing else."""

import dataclasses
import importlib
import json
import math
import typing
from collections.abc import Sequence
from typing import Annotated

import pytest

from moe_jax.core.configuration import Configuration, Known, Range, Size, Text, describe, hints
from moe_jax.core.errors import UserError
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs import configurables, directory, gin_files
from moe_jax.runs.config import Config, DataConfig, FewShotConfig, FinetuneConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

for command in ("prepare", "train", "eval", "infer", "finetune", "represent", "experiment"):
    importlib.import_module(f"moe_jax.{command}")
TREES = [Config, FewShotConfig]
CLASSES = [*configurables.CLASSES.values(), *TREES]
FIELDS = [(cls, field) for cls in CLASSES for field in hints(cls)]
LENGTHS = {"inputs": 8, "targets": 8}
# What a class cannot be made without.
NEEDED = {DataConfig: {"lengths": LENGTHS}}
NEEDED |= {tree: {"run": RunConfig(), "data": DataConfig(lengths=LENGTHS)} for tree in TREES}
# Of no field's type, or beyond all ranges.
NEVER = [
    math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, -(10**400), 10**5000, "\0", "a\nb",
    "\ud800", "x" * 10**5, b"x", 1j, object(), ModelConfig, [[]], [None], [math.nan], {"x": {}},
    {1: 2}, [1] * 10**5, [10**400], [True], {"inputs": 8, "targets": math.inf},
]  # fmt: skip


def make(cls, **values):
    return cls(**NEEDED.get(cls, {}) | values)


def refused(cls, field, value):
    """Asserts that a value is refused in one line which names the field and its range."""
    with pytest.raises(UserError) as error:
        make(cls, **{field: value})
    message = str(error.value)
    assert message.startswith(f"{cls.called}.{field} is "), message
    assert describe(hints(cls)[field]) in message and message.isprintable(), message
    assert len(message) < 600, message


def rules(hint, path=()):
    """(what leads to it, type, rule) of every rule in a type, those of elements included."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield path, args[0], args[1]
        yield from rules(args[0], path)
    elif origin is not typing.Literal:
        for arg in args:
            yield from rules(arg, (*path, origin))


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda v: getattr(v, "called", v))
def test_every_field(cls, field):
    hint = hints(cls)[field]
    assert describe(hint)  # a field without a range fails here
    values = {type(v): v for v in (True, 1, 1.5, "x", [], {}, None)}
    allowed = describe(hint)
    for value in NEVER:
        refused(cls, field, value)
    # Types: what the words say, and nothing else.
    words = {bool: "True or False", int: "int", float: "float", str: "str", list: "list", dict: "{",
             type(None): "None"}  # fmt: skip
    for kind, value in values.items():
        named = words[kind] in allowed.split("list of")[0] or (kind is list and "list" in allowed)
        if kind is int:
            named |= "float" in allowed
        if not named:
            refused(cls, field, value)
    for path, kind, rule in rules(hint):
        if path and not all(step is typing.Union for step in path):
            continue  # of elements: below
        if isinstance(rule, Known):
            refused(cls, field, "no such name")
            for name in rule.names:
                accepted(cls, field, name)
        elif kind in (int, float):
            check_range(cls, field, kind, rule, lambda v: v)
        elif isinstance(rule, Text):
            refused(cls, field, "x" * (rule.high + 1))
            if rule.low:
                refused(cls, field, "")
        elif isinstance(rule, Size) and typing.get_origin(kind) in (Sequence, tuple):
            check_elements(cls, field, kind, rule)


def check_elements(cls, field, kind, size):
    (element, *_) = typing.get_args(kind)
    for _, inner, rule in rules(element):
        if inner in (int, float):
            check_range(cls, field, inner, rule, lambda v: [v])
    if size.low:
        refused(cls, field, [])


def check_range(cls, field, kind, rule, wrap):
    step = 1 if kind is int else 0
    for end, way in ((rule.low, -1), (rule.high, 1)):
        outside = end + way * step if step else math.nextafter(end, way * math.inf)
        refused(cls, field, wrap(outside))
        if way == 1 and rule.below:
            refused(cls, field, wrap(end))
            end = math.nextafter(end, -math.inf)
        accepted(cls, field, wrap(kind(end)))
    if kind is int:
        refused(cls, field, wrap(float(rule.high)))


def accepted(cls, field, value):
    """Asserts that the range is not what a value is refused for; relations of fields may be."""
    try:
        made = make(cls, **{field: value})
    except UserError as e:
        assert "; it is " + describe(hints(cls)[field]) not in str(e)
    else:
        assert getattr(made, field) is not None


def test_a_field_without_a_range_fails():
    for hint in (int, str | None, Sequence[str], tuple[Annotated[int, Range(0, 1)], ...]):
        cls = dataclasses.make_dataclass("Bare", [("x", hint)], bases=(Configuration,), frozen=True)
        with pytest.raises(TypeError, match="declares no range"):
            cls(x=[])


# What trained to the end, or ended in a traceback, before ranges were declared.
@pytest.mark.parametrize(("cls", "values", "message"), [
    (OptimizerConfig, {"learning_rate": -0.003}, "learning_rate is -0.003; it is float from 0"),
    (OptimizerConfig, {"learning_rate": 1e400}, "is inf"),
    (OptimizerConfig, {"clip_norm": -1}, "clip_norm is -1"),
    (OptimizerConfig, {"b1": 2}, "b1 is 2; it is float from 0 to below 1"),
    (OptimizerConfig, {"b2": 1.0}, "to below 1"),
    (OptimizerConfig, {"weight_decay": -1}, "weight_decay is -1"),
    (OptimizerConfig, {"warmup_fraction": 5}, "warmup_fraction is 5; it is float from 0 to 1"),
    (OptimizerConfig, {"alternate_every": -1}, "alternate_every is -1"),
    (StepConfig, {"label_smoothing": 2}, "label_smoothing is 2"),
    (StepConfig, {"groups_at_once": -1}, "groups_at_once is -1"),
    (RouterConfig, {"temperature": 0}, "temperature is 0"),
    (RouterConfig, {"temperature": -1}, "temperature is -1"),
    (ModelConfig, {"encoder_layers": 0}, "encoder_layers is 0; it is int from 1"),
    (ModelConfig, {"dropout_rate": 1.5}, "dropout_rate is 1.5; it is float from 0 to below 1"),
    (ModelConfig, {"heads": 0}, "heads is 0"),
    (ModelConfig, {"experts": 10**9}, "experts is 1000000000"),
    (ModelConfig, {"experts": True}, "experts is True; it is int"),
    (ModelConfig, {"relative_buckets": 64, "relative_max_distance": 32}, "above half of relative"),
    (RunConfig, {"seed": -1}, "seed is -1"),
    (RunConfig, {"keep_checkpoints": -1}, "keep_checkpoints is -1"),
    (VocabularyConfig, {"size": 0}, "size is 0"),
    (VocabularyConfig, {"extra_ids": -1}, "extra_ids is -1"),
    (VocabularyConfig, {"kind": "sentencepeice"}, "did you mean 'sentencepiece'"),
    (FinetuneConfig, {"seeds": [-1]}, "seeds is [-1]; it is list of 1 to 1,000 values, each int"),
    (FinetuneConfig, {"batch_sizes": ()}, "batch_sizes is ()"),
])  # fmt: skip
def test_nonsense_is_refused(cls, values, message):
    with pytest.raises(UserError) as error:
        make(cls, **values)
    assert f"{cls.called}." in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(("lines", "message"), [
    (["ModelConfig.experts = 3", "RouterConfig.selection = 'top_k'",
      "RouterConfig.experts_per_layer = 5"],
     "RouterConfig.experts_per_layer is 5, but ModelConfig.experts 3"),
    (["ModelConfig.experts = 1", "OptimizerConfig.alternate_every = 2"],
     "OptimizerConfig.alternate_every is set, but the model has no router"),
    (["ModelConfig.max_positions = 20", "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 8}"],
     "ModelConfig.max_positions is 20, but there are inputs of 64 tokens"),
    (["ModelConfig.max_positions = 20", "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 64}"],
     "targets of 64 tokens"),
    (["DecodingConfig.min_length = 9"], "min_length is 9, above the length of targets 8"),
    (["DecodingConfig.min_length = 9", "DecodingConfig.max_length = 8"], "above max_length 8"),
    (["DataConfig.vocabulary = @DataConfig()"], "DataConfig is nested in itself"),
    (["RunConfig.extensions = @RunConfig"], "RunConfig.extensions is "),
    (["SEED = @ModelConfig()"], "RunConfig.seed is "),
    (["OptimizerConfig.learning_rate = 1e400"], "OptimizerConfig.learning_rate is inf"),
    (["SEED = " + "9" * 4000], "RunConfig.seed is 9"),
])  # fmt: skip
def test_relations_and_references(lines, message):
    gin_files.parse([], ["TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}", *lines], [])
    with pytest.raises(UserError) as error:
        build(Config)
    assert message in str(error.value).splitlines()[0]


def test_relative_positions_have_no_longest_row():
    gin_files.parse([], ["ModelConfig.architecture = 't5'", "ModelConfig.max_positions = 20"], [])
    assert build(Config).data.lengths["inputs"] == 512


def test_what_a_run_holds_is_checked_when_it_is_read(tmp_path):
    """Each value of config.json replaced by one that cannot be; each name by one that is none."""
    directory.write_config(tmp_path, Config(RunConfig(), DataConfig(lengths=LENGTHS)))
    path = tmp_path / directory.CONFIG_JSON
    whole = json.loads(path.read_text())
    for name in whole:
        for value in (10**400, {"x": 1}, [[1]], "\0"):
            path.write_text(json.dumps(whole | {name: value}))
            with pytest.raises(UserError, match=rf"config\.json: {name} is .*; it is "):
                directory.read_config(tmp_path)
        path.write_text(json.dumps({**whole, f"{name}x": whole[name]}))
        with pytest.raises(UserError, match=f"no setting '{name}x'; did you mean .*'{name}'"):
            directory.read_config(tmp_path)
    path.write_text(json.dumps(whole))
    assert directory.read_config(tmp_path).data.lengths == LENGTHS
