"""The Public Pool of Prompts (P3) on disk: names, groups, files. No TensorFlow here.

P3 (Sanh et al., *Multitask Prompted Training Enables Zero-Shot Task Generalization*, ICLR 2022,
arXiv 2110.08207) is published as SeqIO's own cache, one folder per dataset and prompt:

    P3_DIR/<dataset>_<prompt>/info.<split>.json, <split>.tfrecord-00000-of-00001

Of an example are read `inputs_pretokenized`, `targets_pretokenized` and, where a prompt has them,
`answer_choices`; in a folder `..._score_eval`, a row for every choice, also `idx`, `is_correct` and
`weight`. The token ids, which are T5's, are not. In place of TFRecords a folder may hold
`<split>.jsonl`: one object per line with the same features.

`p3_datasets.json` says which datasets T0, T0+ and T0++ were trained on, and which were held out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gin

from moe_jax.core.errors import UserError, shown
from moe_jax.core.files import read_json, read_jsonl, read_object

from .data_directory import absolute

DATA_DIR = "P3_DIR"
SCORE_EVAL = "_score_eval"
_FACTS = Path(__file__).with_name("p3_datasets.json")
# Dataset -> kind of task, and the groups that it is in.
KINDS: dict[str, str] = {}
GROUPS: dict[str, list[str]] = {}
for _kind, _datasets in read_json(_FACTS).items():
    GROUPS |= _datasets
    KINDS |= dict.fromkeys(_datasets, _kind)
# Prompts that make another task of a held-out dataset; T0 was not evaluated on them.
OTHER_TASKS = {
    "hellaswag": (
        "Appropriate_continuation_Yes_or_No", "Reversed_appropriate_continuation_Yes_or_No",
    ),
    "winogrande_winogrande_xl": ("True_or_False",),
}  # fmt: skip
# What is read of an example, by the names of P3's features.
TEXTS = ("inputs_pretokenized", "targets_pretokenized")
_OPTIONAL = ("answer_choices", "idx", "is_correct", "weight")
_SPLITS = ("train", "validation", "test")


@gin.configurable("p3")
def settings(data_dir: str | None = None) -> dict[str, str]:
    """Environment variables that say what gin says: {"P3_DIR": absolute path}."""
    return absolute(**{DATA_DIR: data_dir})


class Prompt(NamedTuple):
    """One folder of P3.

    Attributes:
        folder: its name.
        dataset: as in `p3_datasets.json`; the folder's name where that has none.
        prompt: the rest of the name, without `_score_eval`.
        files: split -> TFRecords, or one file of JSON lines.
        features: which of an example's features are read.
    """

    folder: str
    dataset: str
    prompt: str
    files: dict[str, list[Path]]
    features: tuple[str, ...]

    @property
    def scored(self) -> bool:
        """Whether a row is one choice, to be scored."""
        return self.folder.endswith(SCORE_EVAL)

    @property
    def json_lines(self) -> bool:
        return next(iter(self.files.values()))[0].suffix == ".jsonl"


def prompts(path: Path) -> list[Prompt]:
    """The folders of `path` that hold data, by kind of task, dataset and name.

    Raises:
        UserError: there is none, or a folder's info file lacks a feature.
    """
    found = [_prompt(folder) for folder in path.iterdir() if folder.is_dir()]
    found = [prompt for prompt in found if prompt is not None]
    if not found:
        raise UserError(
            f"{DATA_DIR}={path}: holds no folder with SPLIT.tfrecord-* and info.SPLIT.json, nor "
            "with SPLIT.jsonl, such as super_glue_cb_can_we_infer/validation.jsonl"
        )
    return sorted(found, key=lambda p: (KINDS.get(p.dataset, "~"), p.dataset, p.folder))


def dataset_and_prompt(folder: str) -> tuple[str, str]:
    """'super_glue_cb_can_we_infer' -> ('super_glue_cb', 'can_we_infer')."""
    name = folder.removesuffix(SCORE_EVAL)
    if anli := re.fullmatch(r"anli_(.+)_(r[123])", name):
        return f"anli_{anli[2]}", anli[1]
    known = [dataset for dataset in KINDS if name.startswith(f"{dataset}_")]
    if not known:
        return name, ""
    dataset = max(known, key=len)
    return dataset, name.removeprefix(f"{dataset}_")


def _prompt(folder: Path) -> Prompt | None:
    names = sorted(file.name for file in folder.iterdir())
    files, features = {}, None
    for split in _SPLITS:
        records = [folder / name for name in names if name.startswith(f"{split}.tfrecord")]
        lines, info = folder / f"{split}.jsonl", folder / f"info.{split}.json"
        if records and info.name in names:
            present, where = read_object(info).get("features"), str(info)
            if not isinstance(present, dict):
                raise UserError(f"{info}: 'features' must be {{name: feature}}")
        elif lines.name in names:
            records, where = [lines], f"{lines}:1"
            present = next(read_jsonl(lines), {})
        else:
            continue
        for name in TEXTS:
            if name not in present:
                raise UserError(f"{where}: no feature {name!r}")
        files[split] = records
        features = features or tuple(n for n in (*TEXTS, *_OPTIONAL) if n in present)
    if features is None:
        return None
    return Prompt(folder.name, *dataset_and_prompt(folder.name), files, features)


def read_lines(prompt: Prompt, split: str) -> Iterator[dict[str, Any]]:
    """Examples of a split in JSON lines, with the prompt's features.

    Raises:
        UserError: a line is not JSON, or lacks a feature or has it in another type.
    """
    (path,) = prompt.files[split]
    for number, row in enumerate(read_jsonl(path), 1):
        for name in prompt.features:
            if not _fits(name, row.get(name)):
                raise UserError(f"{path}:{number}: {name!r} is {shown(row.get(name))}")
        yield {name: row[name] for name in prompt.features}


def _fits(name: str, value: Any) -> bool:
    """Whether a feature of an example can have a value."""
    match name:
        case "answer_choices":
            return isinstance(value, list) and all(isinstance(v, str) for v in value)
        case "idx":  # of the example, and of the choice
            found = isinstance(value, list) and len(value) == 2
            return found and all(type(v) is int and 0 <= v < 2**31 for v in value)
        case "is_correct":
            return isinstance(value, bool)
        case "weight":
            return type(value) in (int, float) and 0 <= value < 1e30
    return isinstance(value, str)
