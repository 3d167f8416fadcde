"""Templates of CrossFit's tasks: complete, and right on real examples and through SeqIO."""

import json
import os
import re
import string
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_jax.builtin_tasks import crossfit_data as data
from moe_jax.builtin_tasks import crossfit_prompts as templates
from moe_jax.core.errors import UserError
from moe_jax.core.files import read_json
from moe_jax.metrics import label_of_choice

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {task: templates.prompts(task) for task in read_json(templates.FILE)}


def fields(text: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}


def test_every_task_has_prompts_and_every_label_a_word():
    assert len(PROMPTS) >= 25
    written = read_json(templates.FILE)
    for task, prompts in PROMPTS.items():
        assert task in data.TASKS
        assert len(prompts) >= 2, task
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        known = fields(written[task]["input"])
        labels = [set(prompt.labels.values()) for prompt in prompts]
        assert all(found == labels[0] for found in labels), task
        for prompt in prompts:
            given = written[task]["prompts"][prompt.name].get("choices", {})
            assert fields(prompt.text) <= known, (task, prompt.name)
            assert fields(prompt.text) - {"options"}, (task, prompt.name)
            assert (
                (given == "options") == ("options" in known) == ("options" in fields(prompt.text))
            )
            assert len(prompt.labels) == (0 if given == "options" else len(given))  # words differ
            assert data.TASKS[task]["category"] != "classification" or prompt.labels
            assert prompt.name.isidentifier()


def prompt_of(task: str, name: str) -> templates.Prompt:
    return next(prompt for prompt in PROMPTS[task] if prompt.name == name)


def test_rendering_by_hand():
    found = templates.render(
        prompt_of("glue-rte", "conclude"),
        "sentence 1: It {rains}. [SEP] sentence 2: It is wet.",
        ("not_entailment",),
    )
    assert found == (
        'It {rains}.\nReading only this, can one conclude that "It is wet."?', ["no"], ["yes", "no"]
    )  # fmt: skip
    found = templates.render(
        prompt_of("race-middle", "choose"),
        "Tom is _ . (A) at (B or so) home (B) out (C) in [SEP] Tom (A) left. [SEP] He did.",
        ("out", "in"),
    )
    options = "(A) at (B or so) home (B) out (C) in"
    assert found.inputs == (
        "Read the article and choose.\nArticle: Tom (A) left. [SEP] He did.\nQuestion: Tom is _ .\n"
        f"Choices: {options}"
    )
    assert found[1:] == (["out", "in"], ["at (B or so) home", "out", "in"])
    # What is empty has lost the space before it.
    found = templates.render(
        prompt_of("yahoo_answers_topics", "topic"),
        "question_title: Why? [SEP] question_content:",
        ("Health",),
    )
    assert found[:2] == ("Why?\n\nWhich topic is this question about?", ["health"])
    found = templates.render(prompt_of("samsum", "sum_up"), "summarize: A: hi", ("They meet.",))
    assert found == (
        "A: hi\nSum up this chat in a sentence or two.", ["They meet."], []
    )  # fmt: skip
    assert templates.options("(1) a (C) b (2) (A) c (4) d") == ["a (C) b", "(A) c (4) d"]


def test_what_does_not_fit_is_named():
    prompt = prompt_of("glue-rte", "conclude")
    with pytest.raises(UserError, match="an input of 'glue-rte' is not of the form 'sentence 1: "):
        templates.render(prompt, "premise: a", ("entailment",))
    with pytest.raises(UserError, match="'neutral' is no answer choice of 'glue-rte'"):
        templates.render(prompt, "sentence 1: a [SEP] sentence 2: b", ("neutral",))


def test_labels_come_back():
    labels = {"yes": "entailment", "no": "not_entailment"}
    assert label_of_choice(" yes ", labels=labels) == "entailment"
    assert label_of_choice("maybe", labels=labels) == "maybe"
    example = {"answers": [b"no", b"yes"]}
    found = label_of_choice("no", example, is_target=True, labels=labels)
    assert found == ["not_entailment", "entailment"]
    assert label_of_choice("no", is_target=True) == ["no"]


def test_every_template_renders_every_example_of_the_gym(gym):
    """All few-shot lines: no text is lost, the choices hold every answer, labels are all there."""
    folder = gym / "crossfit"
    tasks = [task for task in data.present(folder) if task in PROMPTS]
    assert len(tasks) >= 25
    for task in tasks:
        splits = data.few_shot_splits(folder, task)
        examples = [e for split in ("train", "test") for e in data.read_few_shot(splits, split)]
        for prompt in PROMPTS[task]:
            frame = prompt.text.format_map(dict.fromkeys(fields(prompt.text), ""))
            for inputs, *outputs in examples:
                found = templates.render(prompt, inputs, tuple(outputs))
                for piece in re.split(r"\[SEP\]| \([A-H1-4]\) ", inputs):
                    value = re.sub(r"^\s*(\w+( \d)?:|span1_text|solution \d)", "", piece).strip()
                    assert value in found.inputs, (task, prompt.name, value)
                assert len(found.inputs) > len(frame)
                assert not found.choices or set(found.answers) <= set(found.choices)
        labels = {output for _, *outputs in examples for output in outputs}
        if PROMPTS[task][0].labels:
            assert labels == set(PROMPTS[task][0].labels.values()), task


def test_prompts_through_seqio(tmp_path):
    """Names, mixtures, choices, and CrossFit's own metric on the labels."""
    few = tmp_path / "few"
    for task, lines in {
        "glue-cola": "He go.\tunacceptable\nHe goes.\tacceptable\n",
        "squad-no_context": "question: who\tme\tI\n",
        "circa": "a\tYes\n",
    }.items():
        (few / task).mkdir(parents=True)
        for part in ("train", "dev", "test"):
            (few / task / f"{task}_16_13_{part}.tsv").write_text(lines)
    code = """
        import json, seqio
        from moe_jax.builtin_tasks import crossfit
        from moe_jax.data import registry, task_functions
        out = {"tasks": sorted(seqio.TaskRegistry.names()), "prompts": crossfit.PROMPTS}
        out["mixtures"] = {n: sorted(t.name for t in seqio.MixtureRegistry.get(n).tasks)
                           for n in ("crossfit_train", "crossfit_prompts_train")}
        out["rows"], out["scores"], out["post"] = {}, {}, {}
        for name in ("crossfit_glue_cola:grammar", "crossfit_squad_no_context:answer"):
            task = seqio.TaskRegistry.get(name)
            rows = [row for _, part in registry.read(task, ["test"]) for row in part]
            text = [registry.text(row, "targets", seqio.ByteVocabulary()) for row in rows]
            out["rows"][name] = [
                [row["inputs_pretokenized"].decode(), target, registry.choices(row),
                 task.postprocess_fn(target, example=row, is_target=True)]
                for row, target in zip(rows, text)]
            references = [row[-1] for row in out["rows"][name]]
            answers = [task.postprocess_fn(t, is_target=False) for t in text]
            out["scores"][name] = task.metric_fns[0](references, answers)
            out["post"][name] = task_functions.reference(task.postprocessor, task, "it")
        out["files"] = crossfit.data_files("crossfit_glue_cola:grammar")
        out["hint"] = crossfit.missing_hint("crossfit_glue_cola:gramar")
        print(json.dumps(out))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CROSSFIT_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"CROSSFIT_DIR": str(few), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    cola = ["crossfit_glue_cola:grammar", "crossfit_glue_cola:teacher"]
    squad = ["crossfit_squad_no_context:answer", "crossfit_squad_no_context:quiz"]
    plain = ["crossfit_circa", "crossfit_glue_cola", "crossfit_squad_no_context"]
    assert out["tasks"] == sorted([*plain, *cola, *squad])
    assert out["prompts"] == {"crossfit_glue_cola": cola, "crossfit_squad_no_context": squad}
    random = data.PUBLISHED["random"]["train"]
    names = {"glue-cola": cola, "squad-no_context": squad, "circa": []}
    wanted = [p for task, prompts in names.items() if task in random for p in prompts]
    assert out["mixtures"]["crossfit_prompts_train"] == sorted(wanted)
    assert not any(":" in name for name in out["mixtures"]["crossfit_train"])
    question = "\nIs this a well-formed English sentence?"
    assert out["rows"] == {
        cola[0]: [
            [f"He go.{question}", "no", ["yes", "no"], ["unacceptable"]],
            [f"He goes.{question}", "yes", ["yes", "no"], ["acceptable"]],
        ],
        squad[0]: [["Answer in a few words: who?", "me", [], ["me", "I"]]],
    }
    # CrossFit's Matthews correlation takes these two labels only.
    assert out["scores"] == {cola[0]: {"Matthew-Correlation": 1.0}, squad[0]: {"EM": 1.0}}
    assert out["post"][squad[0]] == "moe_jax.metrics:answers_or_target"
    assert "label_of_choice(labels={'yes': 'acceptable'" in out["post"][cola[0]]
    assert out["files"][-1] == str(templates.FILE) and len(out["files"]) == 5
    assert out["hint"] == ("'crossfit_glue_cola' has no prompt 'gramar'; did you mean 'grammar'?")
