"""Writes a small copy of the repository natural-instructions."""

import json
from pathlib import Path


def task(count: int, category: str, *, outputs: int = 1, positive: int = 3) -> dict:
    """Keys in the order of the published files."""
    return {
        "Contributors": ["somebody"],
        "Source": ["quoref"],
        "URL": ["https://example.org"],
        "Categories": [category],
        "Reasoning": [],
        "Definition": ["Given a number, write it in words. "],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Domains": ["Wikipedia"],
        "Positive Examples": [
            {"input": f"{i} ", "output": f"word {i}", "explanation": "It is."}
            for i in range(positive)
        ],
        "Negative Examples": [{"input": "1", "output": "1", "explanation": "No word."}],
        "Instances": [
            {
                "id": f"task001-{i}",
                "input": f"number {i}",
                "output": [f"Word {i}.", f"the word {i}", f"{i}"][:outputs],
            }
            for i in range(count)
        ],
        "Instance License": ["Unknown"],
    }


def write(root: Path) -> None:
    """Two training tasks, a test task; lists that also name what is absent."""
    lists = {
        "train": ["task001_quoref_words", "task003_words", "task004_absent"],
        "test": ["task002_unseen_words", "task005_absent"],
        "excluded": ["task006_other_language"],
    }
    for part, names in lists.items():
        file = root / "splits" / "default" / f"{part}_tasks.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names) + "\n")
    (root / "tasks").mkdir()
    tasks = {
        "task001_quoref_words": task(40, "Question Generation"),
        "task002_unseen_words": task(107, "Textual Entailment", outputs=3, positive=1),
        "task003_words": task(20, "Question Generation", outputs=2),
        "task006_other_language": task(20, "Translation"),
    }
    for name, content in tasks.items():
        (root / "tasks" / f"{name}.json").write_text(json.dumps(content, indent=4))
