"""Writes a small P3 as SeqIO's cache publishes it, and one folder of JSON lines."""

import json
from pathlib import Path

_STORED = {"int32": "int64_list", "bool": "int64_list", "float32": "float_list"}
_TOKENS = {"inputs": [3, 4, 1], "targets": [5, 1]}  # of T5's vocabulary; nothing should read them


def write_folder(folder: Path, split: str, rows: list[dict], features: dict[str, tuple]) -> None:
    """info.SPLIT.json, stats.SPLIT.json and one shard.

    Args:
        features: name -> (type, shape), beside the texts and their tokens.
    """
    import tensorflow as tf  # slow, and most of this module does not need it

    features = {
        **{name: ("int32", [None]) for name in _TOKENS},
        **{f"{name}_pretokenized": ("string", []) for name in _TOKENS},
        **features,
    }
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: {"dtype": d, "shape": shape} for name, (d, shape) in features.items()}
    info = {"features": described, "num_shards": 1, "seqio_version": "0.0.6"}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            example = tf.train.Example()
            for name, (dtype, _) in features.items():
                value = {**_TOKENS, **row}[name]
                values = value if isinstance(value, list | tuple) else [value]
                stored = getattr(
                    example.features.feature[name], _STORED.get(dtype, "bytes_list")
                ).value
                stored.extend(v.encode() if isinstance(v, str) else v for v in values)
            writer.write(example.SerializeToString())


def row(inputs: str, target: str, **more) -> dict:
    return {"inputs_pretokenized": inputs, "targets_pretokenized": target, **more}


CHOICES = {"answer_choices": ("string", [None])}
RANKED = {"idx": ("int32", [2]), "is_correct": ("bool", []), "weight": ("float32", [])}
NLI = ["Yes", "Maybe", "No"]


def nli_rows(count: int) -> list[dict]:
    """Targets begin with a space, as published."""
    return [
        row(f"premise {i}, can we infer it?", f" {NLI[i % 3]}", answer_choices=NLI)
        for i in range(count)
    ]


def choice_rows(count: int) -> list[dict]:
    return [
        row(f"premise {i}", choice, idx=[i, j], is_correct=int(i % 3 == j), weight=1.0)
        for i in range(count)
        for j, choice in enumerate(NLI)
    ]


def write(root: Path) -> None:
    """Folders of NLI (held out), completion, sentiment and summarisation (trained on)."""
    cb = root / "super_glue_cb_can_we_infer"
    write_folder(cb, "train", nli_rows(7), CHOICES)
    write_folder(cb, "validation", nli_rows(5), CHOICES)
    write_folder(Path(f"{cb}_score_eval"), "validation", choice_rows(5), RANKED)
    lines = root / "super_glue_cb_GPT_3_style"
    lines.mkdir()
    (lines / "validation.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in nli_rows(4))
    )
    anli = root / "anli_must_be_true_r2"
    write_folder(anli, "validation", [row("a", " Yes")] * 3, {})
    write_folder(Path(f"{anli}_score_eval"), "validation", choice_rows(3), RANKED)
    other = root / "hellaswag_Reversed_appropriate_continuation_Yes_or_No"
    for split in ("train", "validation"):
        write_folder(other, split, nli_rows(3), CHOICES)
    write_folder(root / "hellaswag_complete_first_then", "validation", nli_rows(3), CHOICES)
    for prompt, count in (("Movie_Expressed_Sentiment", 6), ("Writer_Expressed_Sentiment", 4)):
        write_folder(root / f"imdb_{prompt}", "train", nli_rows(count), CHOICES)
    write_folder(root / "imdb_Movie_Expressed_Sentiment", "validation", nli_rows(2), CHOICES)
    write_folder(root / "gigaword_TLDR", "train", [row(f"é {i}", f"n {i}") for i in range(8)], {})
    write_folder(root / "super_glue_copa_exercise", "train", nli_rows(3), CHOICES)
    write_folder(root / "something_else", "train", nli_rows(2), CHOICES)
    (root / "data_split_sizes.csv").write_text("x\n")
    (root / "no_data").mkdir()
