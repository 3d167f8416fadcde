"""P3 as it is published: names, groups, rates, and what is read of it."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import gin
import pytest

from moe_jax.builtin_tasks import p3_data as data
from moe_jax.core.errors import UserError
from moe_jax.data import cache
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig

ROOT = Path(__file__).resolve().parent.parent
MODULE = "moe_jax.builtin_tasks.p3"
NAMES = ("p3_held_out", "p3_t0pp_train", "p3_super_glue_cb_can_we_infer_score_eval")
RUN = f"""
import json, os, sys
from pathlib import Path
from moe_jax.data.registry import find_tasks, load_task_modules, rates, seqio
import p3_layout
root, cache = Path(sys.argv[1]), sys.argv[2]
p3_layout.write(root)
os.environ["P3_DIR"] = str(root)
modules = load_task_modules([{MODULE!r}])
from moe_jax.builtin_tasks import p3
many = {{name: {{"train": 750_000}} for name in seqio.TaskRegistry.names()}}
def hint(name):
    try:
        find_tasks(name, modules)
    except Exception as e:
        return str(e)
out = {{
    "mixtures": {{
        name: [task.name for task in find_tasks(name, modules)]
        for name in seqio.MixtureRegistry.names()
    }},
    "metrics": {{name: [f.__name__ for f in seqio.TaskRegistry.get(name).metric_fns]
                for name in seqio.TaskRegistry.names()}},
    "ontology": p3.ONTOLOGY,
    "prompts": p3.PROMPTS,
    "rates": rates("p3_t0_train", many),
    "hints": [hint(name) for name in ("p3_held_out_coreference", "p3_imdb_Writer", "p3_t0_trian")],
}}
from toy import prepare
from moe_jax.data.vocabulary import VocabularyConfig
prepare(cache, {NAMES!r}, {MODULE!r}, VocabularyConfig(kind="bytes"),
        environment={{"P3_DIR": str(root)}})
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What one process with SeqIO says of a small P3, and the mixtures that it prepared."""
    directory = tmp_path_factory.mktemp("p3")
    root = directory / "data"
    root.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(RUN), root, directory / "cache"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    request = Request.make(
        NAMES, MODULE, VocabularyConfig(kind="bytes"), environment={"P3_DIR": str(root)}
    )
    mixtures = {name: cache.find(directory / "cache", request, name) for name in NAMES}
    return json.loads(done.stdout.splitlines()[-1]), mixtures, root


def test_datasets_are_told_from_prompts():
    names = {
        "super_glue_wsc.fixed_GPT_3_Style": ("super_glue_wsc.fixed", "GPT_3_Style"),
        "super_glue_cb_MNLI_crowdsource_score_eval": ("super_glue_cb", "MNLI_crowdsource"),
        "anli_GPT_3_style_r1_score_eval": ("anli_r1", "GPT_3_style"),
        "cos_e_v1.11_rationale": ("cos_e_v1.11", "rationale"),
        "ai2_arc_ARC_Challenge_qa_options": ("ai2_arc_ARC_Challenge", "qa_options"),
        "wiki_qa_Is_This_True_": ("wiki_qa", "Is_This_True_"),
        "super_glue_axb_can_we_infer": ("super_glue_axb_can_we_infer", ""),
    }
    assert {name: data.dataset_and_prompt(name) for name in names} == names


def test_groups_have_the_published_sizes():
    """T0's list of datasets: its 11 held-out ones are of four kinds, three parts of ANLI apart."""
    groups = list(data.GROUPS.values())
    assert [sum(name in group for group in groups) for name in ("t0", "t0p", "t0pp")] == [38, 10, 6]
    held_out = [name for name, group in data.GROUPS.items() if "held_out" in group]
    assert len(held_out) == 11
    assert len({data.KINDS[name] for name in held_out}) == 4


def test_folders_become_tasks_and_mixtures(run):
    out, _, _ = run
    assert out["metrics"] == {
        "p3_super_glue_cb_can_we_infer": ["accuracy"],
        "p3_super_glue_cb_can_we_infer_score_eval": ["rank_classification"],
        "p3_super_glue_cb_GPT_3_style": ["accuracy"],
        "p3_anli_must_be_true_r2": ["rouge_l", "exact_match"],
        "p3_anli_must_be_true_r2_score_eval": ["rank_classification"],
        "p3_hellaswag_Reversed_appropriate_continuation_Yes_or_No": ["accuracy"],
        "p3_hellaswag_complete_first_then": ["accuracy"],
        "p3_imdb_Movie_Expressed_Sentiment": ["accuracy"],
        "p3_imdb_Writer_Expressed_Sentiment": ["accuracy"],
        "p3_gigaword_TLDR": ["rouge_l", "exact_match"],
        "p3_super_glue_copa_exercise": ["accuracy"],
        "p3_something_else": ["accuracy"],
    }
    t0 = ["p3_gigaword_TLDR", "p3_imdb_Movie_Expressed_Sentiment",
          "p3_imdb_Writer_Expressed_Sentiment"]  # fmt: skip
    t0p = sorted([*t0, "p3_hellaswag_Reversed_appropriate_continuation_Yes_or_No"])
    nli = ["p3_anli_must_be_true_r2_score_eval", "p3_super_glue_cb_GPT_3_style",
           "p3_super_glue_cb_can_we_infer"]  # fmt: skip
    completion = ["p3_hellaswag_complete_first_then", "p3_super_glue_copa_exercise"]
    assert out["mixtures"] == {
        "p3_t0_train": t0,
        "p3_t0p_train": t0p,
        "p3_t0pp_train": [*t0p, "p3_super_glue_copa_exercise"],
        "p3_held_out": sorted([*nli, *completion]),
        "p3_held_out_natural_language_inference": nli,
        "p3_held_out_sentence_completion": completion,
    }
    assert out["ontology"]["sentiment"] == {"imdb": t0[1:]}
    assert out["ontology"]["other"] == {"something_else": ["p3_something_else"]}
    assert len(out["prompts"]["super_glue_cb"]) == 3 and "something_else" not in out["prompts"]


def test_large_datasets_are_capped(run):
    """750,000 examples a task: the cap of 500,000 is shared by the two prompts of IMDB."""
    assert run[0]["rates"] == {
        "p3_gigaword_TLDR": 500_000,
        "p3_imdb_Movie_Expressed_Sentiment": 250_000,
        "p3_imdb_Writer_Expressed_Sentiment": 250_000,
    }


def test_what_is_missing_is_explained(run):
    out, _, root = run
    assert out["hints"][0] == f"no prompt of 'p3_held_out_coreference' is present in {root}"
    assert "did you mean 'p3_imdb_Writer_Expressed_Sentiment'" in out["hints"][1]
    assert "did you mean 'p3_t0_train'" in out["hints"][2]


def test_examples_are_texts_and_choices(run):
    _, mixtures, _ = run
    held_out, train, scored = (mixtures[name] for name in NAMES)
    for name, count in (("can_we_infer", 5), ("GPT_3_style", 4)):
        task = held_out.task(f"p3_super_glue_cb_{name}")
        found = list(task.records("validation"))
        assert task.dataset == "super_glue_cb"
        assert [e.inputs_text for e in found] == [
            f"premise {i}, can we infer it?" for i in range(count)
        ]
        answers = [["Yes", "Maybe", "No"][i % 3] for i in range(count)]
        assert [e.references for e in found] == [[answer] for answer in answers]
        assert {e.choices for e in found} == {("Yes", "Maybe", "No")}
        encode = held_out.vocabulary.encode
        assert found[1].targets.tolist() == [*encode("Maybe"), 1]  # no space, own tokens
    assert train.task("p3_gigaword_TLDR").records("train")[2].inputs_text == "é 2"
    assert train.task("p3_gigaword_TLDR").records("train")[2].choices == ()
    task = scored.tasks[0]
    assert task.questions("validation").tolist() == [i for i in range(5) for _ in range(3)]
    tokens = [len(choice) + 1 for choice in ("Yes", "Maybe", "No")]
    assert [e.references for e in task.records("validation")] == [
        [[i, j], i % 3 == j, 1.0, tokens[j]] for i in range(5) for j in range(3)
    ]


# ------------------------------------------------------------------------------ without TensorFlow


def test_gin_gives_the_directory(tmp_path):
    gin.bind_parameter("p3.data_dir", os.path.relpath(tmp_path))
    assert data.settings() == {"P3_DIR": str(tmp_path)}


def prompt_of(tmp_path: Path, *lines) -> data.Prompt:
    folder = tmp_path / "imdb_x"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.prompts(tmp_path)[0]


GOOD = {"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": ["b", "c"]}


def test_bad_lines_are_named(tmp_path):
    prompt = prompt_of(tmp_path, GOOD, {**GOOD, "answer_choices": "b"})
    with pytest.raises(UserError, match=r"test\.jsonl:2: 'answer_choices' is 'b'"):
        list(data.read_lines(prompt, "test"))
    ranked = GOOD | {"idx": [0, 1], "is_correct": True, "weight": 1}
    for name, value in {
        "answer_choices": ["b", 3], "idx": [0], "is_correct": 1, "weight": True,
        "targets_pretokenized": ["b"],
    }.items():  # fmt: skip
        (tmp_path / "imdb_x" / "test.jsonl").write_text(json.dumps(ranked | {name: value}))
        (prompt,) = data.prompts(tmp_path)
        with pytest.raises(
            UserError, match=rf"test\.jsonl:1: '{name}' is {re.escape(repr(value))}"
        ):
            list(data.read_lines(prompt, "test"))


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"P3_DIR=.*: holds no folder with"):
        data.prompts(tmp_path)
    with pytest.raises(UserError, match=r"test\.jsonl:1: no feature 'targets_pretokenized'"):
        prompt_of(tmp_path, {"inputs_pretokenized": "a"})
    (tmp_path / "imdb_x" / "test.tfrecord-0").touch()
    for info in ({"features": "inputs_pretokenized"}, {}, []):
        (tmp_path / "imdb_x" / "info.test.json").write_text(json.dumps(info))
        with pytest.raises(UserError, match=r"info\.test\.json: .*must be \{name: "):
            data.prompts(tmp_path)
