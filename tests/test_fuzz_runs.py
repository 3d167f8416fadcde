"""Malformed settings, files of a run and lines: as written, or one line that says what is wrong."""

import ast
import importlib
import json
import math
import string
from pathlib import Path

import numpy as np
from fuzz import VALUES, changed_text, damaged, fuzz
from report_runs import make_disabling, make_finetune, make_run, ontology
from test_checkpoints import saved
from test_fuzz_data import strict_json

from moe_jax.core.configuration import hints
from moe_jax.core.errors import UserError
from moe_jax.data.packing import encode_inputs
from moe_jax.data.vocabulary import ByteVocabulary, read_tokenizers
from moe_jax.evaluation.lines import read_lines
from moe_jax.report import inputs
from moe_jax.runs import configurables, directory, gin_files
from moe_jax.runs.config import BASE_BINDINGS, Config, DataConfig, RunConfig
from moe_jax.training import checkpoint_files
from moe_jax.training.checkpoints import load_params

for command in ("prepare", "train", "eval", "infer", "finetune", "represent", "experiment"):
    importlib.import_module(f"moe_jax.{command}")
DATA = DataConfig(lengths={"inputs": 8, "targets": 4})
# Paths, which become absolute; layers, each of which is listed once; the mixture's name by default.
CHANGED = (
    "DataConfig.task_modules", "VocabularyConfig.path", "VocabularyConfig.trained_on",
    "ModelConfig.encoder_vanilla_layers", "ModelConfig.decoder_vanilla_layers",
)  # fmt: skip
BART = Path(__file__).with_name("data") / "hf" / "bart"


def sensible(value):
    """Whether someone may have meant a setting, whatever its range."""
    match value:
        case None | bool():
            return True
        case int() | float():
            return math.isfinite(value) and abs(value) < 1e10
        case str():
            return (
                len(value) < 70_000 and all(c >= " " for c in value) and bool(value.encode() or 1)
            )
        case list() | tuple():
            return len(value) <= 4096 and all(map(sensible, value))
    return isinstance(value, dict) and all(map(sensible, (*value, *value.values())))


def same(found, given):
    """Whether a setting is what was given: of the same type, but a list may be a tuple."""
    if isinstance(given, list | tuple):
        return len(found) == len(given) and all(map(same, found, given))
    return found == given and (type(found) is type(given) or type(found) is float)


TEXTS = [
    *map(repr, VALUES), "", "'", '"', "[1", "(", "{'a': ", "{1: 2}", "{1, 2}", "1e400", "0x10",
    "1_0", "010", "--1", "1 if 1 else 2", "lambda: 1", "b'x'", "1j", "...", "@", "@ModelConfig",
    "%", "%SEED", "@RouterConfig()", "@RunConfig()", "%NO_SUCH", "$x", "#", "\\", "\\n", "a=b",
    "a b", "é", "7b-moe", "2024-06-01/run", "gs://", "gs://bucket/x", "s3://bucket/x", "http://x",
    "~", "..", "tasks.", ".x", "no_such.py", "tasks.skills_gym", "test", "sentencepiece", "bytes",
    "bfloat16", "dense", "softmax", "[0.1, 0.2]", "[1]", "(0,)", "{'inputs': 8, 'targets': 8}",
    "{'inputs': 8}", "[" * 3000, "(" * 300 + ")" * 300, "-" * 3000 + "1", "9" * 5000, "x" * 5000,
]  # fmt: skip
MACROS = [line.partition(" =")[0] for line in BASE_BINDINGS.splitlines() if line[:1].isupper()]


def built(name, text):
    """Every configuration class with a flag of the command line, by its name."""
    _, *lines = gin_files.rewrite_flags(["train", f"--gin.{name}={text}"])
    lines = [line.removeprefix("--gin_bindings=") for line in lines]
    gin_files.parse([], [f"DataConfig.lengths = {DATA.lengths}", *lines], [])
    return {key: configurables.build(cls) for key, cls in configurables.CLASSES.items()}


@fuzz("bindings", 250, 3000)
def test_bindings_of_every_field(count, tmp_path):
    del tmp_path
    classes = configurables.CLASSES
    fields = [f"{name}.{field}" for name, cls in classes.items() for field in hints(cls)]
    names = [*fields, *(m for m in MACROS if "." not in m)]
    for number, rng in enumerate(count):
        name = names[number % len(names)] if rng.randrange(9) else noise(rng, rng.choice(names))
        text = rng.choice(TEXTS) if rng.randrange(4) else noise(rng, rng.choice(TEXTS))
        text = text.replace("\0", "")  # which no argument can hold
        found = count.outcome("", (name, text), built, name, text)
        if isinstance(found, UserError):
            continue
        assert all(sensible(v) for c in found.values() for v in directory.config_lines(c).values())
        cls, _, field = name.strip().rpartition(".")
        if cls in found and f"{cls}.{field}" not in CHANGED and text[:1] not in ("@", "%"):
            try:
                given = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                given = text if text.strip("()") else ()  # too many brackets for Python
            assert same(getattr(found[cls], field), given), (name, text)


def noise(rng, text):
    """The text with a character put in or taken out."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice([*string.printable, "é", "\u2028", ""]) + text[at + 1 :]


# Of these lines of gin are not to be made.
NO_SETTINGS = [
    "import x", "import x\nx.y", "EXTENSIONS", "TASK_MODULES", "x.y/macro", "@x",
    "include 'x'\na.b", "RunConfig.seed = 1\nimport x #", "a/b/RunConfig.seed",
]  # fmt: skip


def by_gin(path):
    gin_files.parse([], [f"MODEL_DIR = {str(path)!r}"], [], from_model_dir=True)
    return configurables.build(Config)


@fuzz("config.json", 200, 1500)
def test_configurations_of_runs(count, tmp_path):
    """By both ways in which commands read them: without gin, and as what flags change."""
    directory.write_config(tmp_path, Config(RunConfig(), DATA))
    good = (tmp_path / "config.json").read_text()
    for rng in count:
        content = changed_text(rng, strict_json(good))
        if rng.randrange(4) == 0:
            more = {rng.choice(NO_SETTINGS): rng.choice([*VALUES[:4], [f"{tmp_path}/x.py"]])}
            content = json.dumps(strict_json(good) | more).encode()
        (tmp_path / "config.json").write_bytes(content)
        found = count.outcome(tmp_path, content, directory.read_config, tmp_path)
        other = count.outcome("", content, by_gin, tmp_path)
        if isinstance(found, UserError):
            continue
        lines = directory.config_lines(found)
        assert all(map(sensible, lines.values()))
        for name, value in strict_json(content).items():
            assert name in CHANGED or same(lines[name], value), name
        if not isinstance(other, UserError):
            lines |= {"RunConfig.model_dir": str(tmp_path)}
            assert directory.config_lines(other) == lines


def read_all(run):
    return {
        "run": inputs.read_run("run", run),
        "routes": inputs.read_history(run, inputs.read_routes(run / "routes.json")),
        "predictions": list(inputs.read_predictions(run)),
        "disabling": inputs.read_disabling(run),
        "runs": inputs.read_finetune(run),
        "single": inputs.read_single(run.parent),
        "tasks": directory.read_task_table(run),
    }


@fuzz("files for the report", 250, 1500)
def test_files_of_runs(count, tmp_path):
    """Metrics, routes, scores, predictions, losses without experts, few-shot runs, task table."""
    run, places = tmp_path / "run", ontology(3)
    make_disabling(make_run(run, places, layers=2))
    make_finetune(run, 2, seeds=1)
    directory.write_task_table(run, list(places))
    for path in run.rglob("*.jsonl"):  # a few lines of each
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:12]))
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    for rng in count:
        path = rng.choice(paths)
        good = path.read_bytes()
        if path.suffix == ".json":
            content = changed_text(rng, strict_json(good))
        else:
            lines = good.split(b"\n")
            at = rng.randrange(len(lines) - 1)
            lines[at] = changed_text(rng, strict_json(lines[at])).replace(b"\n", b"")
            content = b"\n".join(lines)
        path.write_bytes(content)
        found = count.outcome(tmp_path, (path, content), read_all, run)
        path.write_bytes(good)
        if isinstance(found, UserError):
            continue
        for route_TxNxE in found["routes"].values():
            np.testing.assert_allclose(route_TxNxE.sum(-1), 1, atol=1e-2)
            assert route_TxNxE.min() >= 0
        lines = found["run"].train + found["run"].eval
        assert all(type(line["step"]) is int and line["step"] >= 0 for line in lines)
        numbers = [v for line in lines for k, v in line.items() if k not in ("kind", "step")]
        numbers += [row["dev_score"] for row in found["runs"]]
        numbers += [s["score"] for scores in found["run"].scores.values() for s in scores.values()]
        assert all(type(v) in (int, float) and math.isfinite(v) for v in numbers), content
        assert all(type(name) is str for name in found["tasks"])
        assert len(set(found["tasks"])) == len(found["tasks"])
        names = [line["task"] for _, line in found["predictions"]]
        assert all(type(name) is str for name in names)


@fuzz("a checkpoint's meta data", 25, 300)
def test_meta_data(count, tmp_path):
    """Of a checkpoint whose checksums say that it is what was written."""
    saved(tmp_path)
    place = tmp_path / "checkpoints" / "5"
    path = place / "meta" / "metadata"
    meta = strict_json(path.read_text())
    for rng in count:
        content = changed_text(rng, meta)
        path.write_bytes(content)
        checkpoint_files.seal(place)
        found = count.outcome(path, content, load_params, tmp_path)
        if not isinstance(found, UserError):
            _, said = found
            assert said == strict_json(content) and said["step"] == 5
            assert all(type(name) is str for name in said["tasks"])
            assert len(set(said["tasks"])) == len(said["tasks"])


LINES = (
    "What is it?\r\nnaïve \u2028 text\n\n  \ttabs\rcarriage\x85 return\nlast \U0001f600".encode()
)


@fuzz("lines of infer", 150, 1500)
def test_lines_of_infer(count, tmp_path):
    """As many lines as line feeds, each encoded within the length; or the line that is no text."""
    path = tmp_path / "lines"
    vocabularies = [ByteVocabulary(), read_tokenizers(BART)]
    for rng in count:
        content = damaged(rng, LINES if rng.randrange(5) else LINES * 40)
        path.write_bytes(content)
        found = count.outcome(path, content, lambda path: list(read_lines(path)), str(path))
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        if isinstance(found, UserError):
            number = int(str(found).removeprefix(f"{path}:").split(":")[0])
            assert "\ufffd" in lines[number - 1].decode(errors="replace")
            continue
        assert found == list(enumerate((x.removesuffix(b"\r").decode() for x in lines), 1))
        texts = [text for _, text in found][:50] or [""]
        for vocabulary in vocabularies:
            arrays = encode_inputs(vocabulary, texts, 16)
            assert {a.shape for a in arrays.values()} == {(len(texts), 16)}
            assert arrays["inputs"].min() >= 0 and arrays["inputs"].max() < vocabulary.size
            assert (arrays["inputs"] == vocabulary.eos_id).any(-1).all()
        text = rng.choice(texts)
        assert ByteVocabulary().decode(ByteVocabulary().encode(text)) == text
