"""Files are whole or absent, whoever else writes them and wherever a writer is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.core import checksums, files
from moe_jax.core.errors import UserError

# Is killed where a part is written.
KILLED = """
import os, signal, sys
from moe_jax.core import files
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(sys.argv[1], b"half")
"""
# Writes a file of a million equal letters many times.
OFTEN = """
import sys
from moe_jax.core import files
for _ in range(40):
    files.write_bytes(sys.argv[1], sys.argv[2].encode() * 10**6)
"""
# Writes a part of a directory, and says so.
DIRECTORY = """
import sys
from moe_jax.core import files
with files.new_directory(sys.argv[1]) as new:
    files.write_text(new / "part", "half")
    files.write_text(new / "inner" / "part", "half")
    print("made", flush=True)
    sys.stdin.readline()
"""
APPEND = """
import resource, sys
from moe_jax.core import files
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    files.append_jsonl(sys.argv[1], [{"a": "x" * 20}, {"a": "y" * 40}])
except files.UserError as e:
    print(e)
"""


def python(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_writer_leaves_is_not_seen_and_is_written_over(tmp_path):
    for name in ("a.json", checksums.FILE):
        killed = python(KILLED, tmp_path / name)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL and not (tmp_path / name).exists()
    assert len(os.listdir(tmp_path)) == 2
    files.write_json(tmp_path / "a.json", 1)
    checksums.seal(tmp_path)
    assert {*os.listdir(tmp_path)} == {"a.json", checksums.FILE}
    assert checksums.damage(tmp_path) is None and {*checksums.read(tmp_path)} == {"a.json"}
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_several_processes_write_one_file(tmp_path):
    """A reader finds what one of them wrote, whole; two at once would mix."""
    path = tmp_path / "a"
    writers = [python(OFTEN, path, letter) for letter in "xyz"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 10**6 and len(set(content)) == 1
            seen.add(content[:1])
    assert [writer.communicate() and writer.returncode for writer in writers] == [0] * 3
    assert len(seen) > 1 and os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/directory: Is a directory"):
        files.write_bytes(tmp_path / "directory", b"")
    with pytest.raises(UserError, match=r"cannot write \.: "):
        files.write_bytes(Path("."), b"")
    assert os.listdir(tmp_path) == ["directory"]


def test_a_directory_is_made_by_one_process_and_again_after_a_kill(tmp_path):
    path = tmp_path / "out"
    writer = python(DIRECTORY, path)
    assert writer.stdout.readline() == "made\n"
    with (
        pytest.raises(UserError, match=r"out: another process is writing it"),
        files.new_directory(path),
    ):
        pass
    writer.kill()
    writer.communicate()
    assert not path.exists() and os.listdir(tmp_path) == [".out.new"]
    with files.new_directory(path) as new:
        (new / "whole").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(path) == ["whole"]
    with pytest.raises(UserError, match="out: Directory not empty"), files.new_directory(path):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_lines_for_which_there_is_no_room_are_an_error(tmp_path):
    """The disk takes a part of what is written; a limit on sizes does the same."""
    out, _ = python(APPEND, tmp_path / "a.jsonl").communicate()
    assert out == f"cannot write {tmp_path}/a.jsonl: File too large\n"
    assert (tmp_path / "a.jsonl").stat().st_size == 64


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
