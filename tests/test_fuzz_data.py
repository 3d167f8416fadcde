"""Malformed data of tasks: what is read agrees with a second reader, or one line says why not."""

import io
import json
import math

import ni_layout
import numpy as np
import p3_layout
from fuzz import changed, changed_text, damaged, fuzz

from moe_jax.builtin_tasks import crossfit_data, natural_instructions_data, p3_data
from moe_jax.core.errors import UserError
from moe_jax.data.representations import Projection, Representations, read_representations

TSV = "some question?\tanswer\tother answer\r\nsecond é\tb\n\n third\t c \t\t d\nlast\tone".encode()


def strict_json(text):
    """What JSON is here: no key twice, no number that is not finite, no half of a pair."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def finite(text):
        assert math.isfinite(float(text))
        return float(text)

    value = json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@fuzz("CrossFit's lines", 300, 1500)
def test_tsv(count, tmp_path):
    path = tmp_path / "a.tsv"
    for rng in count:
        content = damaged(rng, TSV.replace(b"\n\n", b"\n") if rng.randrange(2) else TSV)
        path.write_bytes(content)
        found = count.outcome(path, content, crossfit_data.read_tsv, path)
        content = content.removeprefix(b"\xef\xbb\xbf")
        lines = [line.split(b"\t") for line in content.removesuffix(b"\n").split(b"\n")]
        fields = [[field.decode(errors="replace").strip() for field in line] for line in lines]
        bad = [n for n, f in enumerate(fields, 1) if len(f) < 2 or not f[0] or not f[1]]
        if isinstance(found, UserError):
            try:
                content.decode()
            except UnicodeDecodeError:
                assert "UTF-8" in str(found)
            else:
                assert not content or f"{path}:{bad[0]}: " in str(found)
        else:
            assert not bad
            assert found == [(*f[:2], *(x for x in f[2:] if x)) for f in fields]


@fuzz("partitions", 150, 800)
def test_partitions(count, tmp_path):
    names = list(crossfit_data.TASKS)
    path = tmp_path / "mine.json"
    for rng in count:
        good = {"train": rng.sample(names, 5), "dev": names[:0], "test": names[3:5]}
        content = json.dumps(good).encode() if not rng.randrange(9) else changed_text(rng, good)
        path.write_bytes(content)
        found = count.outcome(path, content, crossfit_data._checked_partition, str(path))
        if not isinstance(found, UserError):
            assert found == {part: strict_json(content)[part] for part in good}
            tasks = [task for part in found.values() for task in part]
            assert len(set(tasks)) == len(tasks) and set(tasks) <= set(names)


def read_lines(path):
    (prompt,) = p3_data.prompts(path)
    return prompt, list(p3_data.read_lines(prompt, "validation"))


@fuzz("P3's folders", 200, 1200)
def test_p3(count, tmp_path):
    """JSON lines, and info files beside TFRecords that are not opened."""
    rows = p3_layout.nli_rows(2)
    ranked = [row | {"idx": [0, 1], "is_correct": True, "weight": 1.0} for row in rows]
    info = {"features": {name: {"dtype": "string", "shape": []} for name in rows[0]}}
    folder = tmp_path / "super_glue_cb_can_we_infer"
    folder.mkdir()
    lines, described = folder / "validation.jsonl", folder / "info.validation.json"
    for rng in count:
        described.unlink(missing_ok=True)
        (folder / "validation.tfrecord-0").unlink(missing_ok=True)
        if rng.randrange(4) == 0:
            (folder / "validation.tfrecord-0").touch()
            content = changed_text(rng, info)
            described.write_bytes(content)
            found = count.outcome(tmp_path, content, p3_data.prompts, tmp_path)
            if not isinstance(found, UserError):
                features = strict_json(content)["features"]
                assert set(found[0].features) <= set(features) and isinstance(features, dict)
            continue
        good = rng.choice([rows, ranked])
        content = b"\n".join(
            changed_text(rng, row).replace(b"\n", b" ") if rng.randrange(2)
            else json.dumps(row).encode()
            for row in good
        )  # fmt: skip
        lines.write_bytes(content)
        found = count.outcome(tmp_path, content, read_lines, tmp_path)
        if isinstance(found, UserError):
            continue
        prompt, found = found
        wanted = [strict_json(line) for line in content.split(b"\n") if line.strip()]
        assert found == [{name: row[name] for name in prompt.features} for row in wanted]
        for row in found:
            for name, value in row.items():
                match name:
                    case "answer_choices":
                        assert all(type(choice) is str for choice in value)
                    case "idx":
                        assert all(type(index) is int and 0 <= index < 2**31 for index in value)
                    case "is_correct":
                        assert type(value) is bool
                    case "weight":
                        assert type(value) in (int, float) and abs(value) < 1e30
                    case _:
                        assert type(value) is str


@fuzz("Natural Instructions' files", 200, 1500)
def test_natural_instructions(count, tmp_path):
    data = natural_instructions_data
    ni_layout.write(tmp_path)
    good = ni_layout.task(12, "Question Generation", outputs=2)
    path = tmp_path / "tasks" / "task001_quoref_words.json"
    names = tmp_path / "splits" / "default" / "test_tasks.txt"
    listed = names.read_bytes()
    for rng in count:
        if rng.randrange(6) == 0:
            names.write_bytes(content := damaged(rng, listed))
            found = count.outcome(names, content, data.lists, tmp_path)
            if not isinstance(found, UserError):
                assert found["test"] == content.decode().split()
            names.write_bytes(listed)
            continue
        path.write_bytes(content := changed_text(rng, good))
        category = count.outcome(path, content, data.category, path)
        found = count.outcome(path, content, data.read, path, "test", "test", 2)
        if isinstance(found, UserError):
            continue
        task = strict_json(content)
        assert isinstance(category, UserError) or (
            type(category) is str and category == np.ravel(task["Categories"])[0].strip()
        )
        assert len(found) == len(task["Instances"])
        for example, instance in zip(found, task["Instances"], strict=True):
            (text, *_), outputs = (
                value if isinstance(value, list) else [value]
                for value in (instance["input"], instance["output"])
            )
            assert example[0].endswith(f"Input: {text.strip()}\nOutput:")
            assert list(example[1:]) == [output.strip() for output in outputs] != []
            assert example[0].startswith("Definition: ") and type(example[0]) is str


@fuzz("representations", 300, 1500)
def test_representations(count, tmp_path):
    raw_TxD = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    written = tmp_path / "written.npz"
    projection = Projection(raw_TxD.mean(0), np.eye(2, 4), np.float64(2))
    rows_TxK = projection(raw_TxD)
    Representations(("a", "b", "c"), rows_TxK, raw_TxD, projection, {"kind": "text"}).write(written)
    with np.load(written) as archive:
        arrays = dict(archive)
    good = {name: row.tolist() for name, row in zip("abc", rows_TxK, strict=True)}
    for rng in count:
        kind = rng.randrange(3)
        path = tmp_path / ("f.json" if kind == 0 else "f.npz")
        if kind == 0:
            content = changed_text(rng, good)
        elif kind == 1:
            content = damaged(rng, written.read_bytes())
        else:
            with np.errstate(all="ignore"):  # of what becomes too large
                content = npz(changed_arrays(rng, arrays))
        path.write_bytes(content)
        dim = rng.choice([None, 2])
        found = count.outcome(path, content, read_representations, path, ["a", "c"], dim)
        if not isinstance(found, UserError):
            assert found.dtype == np.float32 and found.ndim == 2 and len(found) == 2
            assert np.isfinite(found).all() and (dim is None or found.shape[1] == dim)
            if kind == 0:
                value = strict_json(content)
                np.testing.assert_allclose(found, [value["a"], value["c"]], rtol=1e-6)
            else:
                with np.load(path) as archive:
                    at = [archive["tasks"].tolist().index(name) for name in "ac"]
                    assert np.array_equal(found, archive["representations"][at].astype("f4"))
        if kind == 0:
            continue
        found = count.outcome(path, content, Representations.read, path)
        if not isinstance(found, UserError):  # and a new task can be put beside its tasks
            T, D = found.raw_TxD.shape
            assert T == len(found.tasks) == len(found.rows_TxK)
            new = found.projection(np.ones((2, D), np.float32))
            assert new.shape == (2, found.rows_TxK.shape[1]) and np.isfinite(new).all()
            assert isinstance(found.settings, dict)


def changed_arrays(rng, arrays):
    arrays = dict(arrays)
    for name in rng.sample(sorted(arrays), rng.randrange(1, 3)):
        array = arrays.pop(name)
        match rng.randrange(8):
            case 0:
                arrays[name.upper()] = array
            case 1:
                arrays[name] = array[..., None]
            case 2:
                arrays[name] = array[:-1] if array.ndim else array
            case 3:
                arrays[name] = array.astype(
                    rng.choice(["U", "f8", "f2"]) if array.dtype.kind == "f" else "U"
                )
            case 4 if array.dtype.kind == "f":
                arrays[name] = array * rng.choice([np.nan, np.inf, 1e300, 1j, 0])
            case 5:
                arrays[name] = np.array(rng.choice([0, "", "x", True, [], [["a"]], b"\xff"]))
            case 6:
                arrays[name] = array.T if array.ndim else array[None]
            case _:
                arrays[name] = np.array(json.dumps(changed(rng, {"kind": "text"}), allow_nan=True))
    return arrays


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
