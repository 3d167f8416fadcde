"""Artificial run directories for tests of the report, and its pages as they are read back."""

import html.parser
import json
from pathlib import Path

import numpy as np

from moe_jax.core import files

DATE, COMMIT = "2026-11-29T12:00:00+00:00", "0123456789abcdef"
NAMES = ("copy_span", "topic_of_news", "capital_of", "reorder_words", "is_entailed", "fill")


def ontology(tasks: int, categories: int = 4, subcategories: int = 3) -> dict[str, tuple]:
    """{task: (category, subcategory)}, categories of equal size."""
    result = {}
    for t in range(tasks):
        category = ("classification", "extractive", "generation", "world knowledge")[t % categories]
        sub = f"{category[:5]} kind {t // categories % subcategories}"
        result[f"{NAMES[t % len(NAMES)]}_{t}"] = (category, sub)
    return result


def make_run(
    path: Path,
    places: dict[str, tuple],
    layers: int = 4,
    experts: int = 3,
    planted: float = 3.0,
    seed: int = 0,
    level: float = 0.5,
) -> Path:
    """Writes a run whose routes follow the category with strength `planted`; E=0: no routes."""
    rng = np.random.default_rng(seed)
    steps = range(10, 1001, 10)
    lines = [
        {"step": s, "kind": "train", "loss": 3 * np.exp(-s / 300) + rng.uniform(0.5, 0.8)}
        for s in steps
    ]
    lines += [{"step": s, "kind": "eval", "mean_score": s / 2000} for s in steps if s % 200 == 0]
    files.write_jsonl(path / "metrics.jsonl", lines)
    files.write_json(path / "origin.json", {"date": DATE, "version": "0.1.0", "commit": COMMIT})
    config = {"RunConfig.seed": seed, "ModelConfig.experts": max(1, experts)}
    files.write_json(path / "config.json", config)
    if experts:
        preferred = {c: rng.normal(size=(layers, experts)) for c in dict(places.values())}
        routes = {}
        for task, (category, sub) in places.items():
            logits = planted * preferred[category] + rng.normal(size=(layers, experts))
            route = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            routes[task] = {"route": route.tolist(), "category": category, "subcategory": sub}
        half = layers // 2
        names = [f"encoder.{i}" for i in range(half)]
        names += [f"decoder.{i}" for i in range(layers - half)]
        value = {"step": 1000, "experts": experts, "layers": names, "tasks": routes}
        files.write_json(path / "routes.json", value)
        for step in (200, 400, 600, 800):
            files.write_json(path / "routes" / f"{step}.json", value | {"step": step})
    files.write_jsonl(path / "eval" / "test" / "predictions.jsonl", predictions(places))
    for split in ("test", "validation"):
        files.write_jsonl(
            path / "eval" / split / "scores.jsonl",
            [
                {
                    "task": task,
                    "split": split,
                    "metric": "accuracy",
                    "examples": 100,
                    "score": float(np.clip(level + rng.normal(0, 0.2), 0, 1)),
                    "category": category,
                    "subcategory": sub,
                    "experts": [0] * layers,
                }
                for task, (category, sub) in places.items()
            ],
        )
    return path


def predictions(places: dict[str, tuple], examples: int = 8) -> list[dict]:
    """Lines whose answers are a word of the input for extractive tasks, else one of two labels."""
    lines = []
    for t, (task, (category, _)) in enumerate(places.items()):
        for i in range(examples):
            answer = f"w{i}" if category == "extractive" else f"label{i % 2}"
            text = " ".join(f"w{j}" for j in range(10 + t % 3))
            lines.append({"task": task, "split": "test", "index": i, "input": text,
                          "prediction": "w1", "references": answer})  # fmt: skip
    return lines


def make_disabling(run: Path, needed: str = "extractive", expert: int = 0) -> None:
    """Writes disabling.json: without an expert of the first layer, one category loses 1 nat."""
    routes = files.read_json(run / "routes.json")
    shape = (len(routes["layers"]), routes["experts"])
    tasks = {}
    for task, row in routes["tasks"].items():
        without = np.full(shape, 2.0)
        without[0, expert] += row["category"] == needed
        tasks[task] = {"category": row["category"], "subcategory": row["subcategory"],
                       "examples": 4, "loss": 2.0,
                       "without": without.tolist()}  # fmt: skip
    value = {"step": 1000, "layers": routes["layers"], "experts": shape[1], "tasks": tasks}
    files.write_json(run / "eval" / "test" / "disabling.json", value)


def make_finetune(path: Path, tasks: int, seeds: int = 3, starts=("untrained", "dense", "moe")):
    """Writes runs.jsonl; direct fine-tuning of the last task scores 0."""
    rng = np.random.default_rng(5)
    rows = []
    for t in range(tasks):
        for i, start in enumerate(starts):
            for seed in range(seeds):
                for rate in (1e-4, 3e-4):
                    score = 0.4 + 0.05 * i + rng.uniform(-0.02, 0.02)
                    score *= not (t == tasks - 1 and start == "untrained")
                    rows.append(
                        {
                            "task": f"unseen_{t}",
                            "metric": "accuracy",
                            "start": start,
                            "seed": seed,
                            "learning_rate": rate,
                            "batch_size": 8,
                            "dev_score": score,
                            "test_score": score,
                        }
                    )
    files.write_jsonl(path / "runs.jsonl", rows)
    return path


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects ids, links, figures, rows and text."""

    VOID = ("meta", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.references, self.figures = [], [], [], []
        self.rows, self.text = 0, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.references += [attributes[k] for k in ("href", "src", "action") if k in attributes]
        if tag == "figure":
            self.figures.append(attributes["data-figure"])
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def drawings(text: str) -> dict[str, dict]:
    """The figures in a page as values."""
    _, _, rest = text.partition('<script type="application/json" id="figures">')
    return json.loads(rest.partition("</script>")[0])


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert not any(mark in text for mark in ("://", 'src="//', "@import", "url("))
    actual = Page(text)
    assert all(r.startswith("#") and r[1:] in actual.ids for r in actual.references)
    drawn = drawings(text)
    assert sorted(drawn) == sorted(actual.figures)
    for figure in drawn.values():
        assert all(not link or link[1:] in actual.ids for link in figure.get("links", ()))
    return actual
