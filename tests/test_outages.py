"""A bucket that is out of reach: lines while a command waits, and one when it ends."""

import threading
import time
from http import server

import pytest
from toy_run import bindings, flags_of, free_port, start

from moe_jax.core import outages

# A command that loses patience sooner.
IMPATIENT = """
import runpy
from moe_jax.core import outages
outages.PERIOD, outages.PATIENCE = 1.0, 4.0
runpy.run_module("moe_jax.%s", run_name="__main__", alter_sys=True)
"""


class Answering(server.BaseHTTPRequestHandler):
    """Answers everything with the code of its server."""

    def do_GET(self):
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *_):
        pass


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_said_and_when_it_ends(monkeypatch, capsys):
    monkeypatch.setattr(outages, "PERIOD", 1.0)
    monkeypatch.setattr(outages, "PATIENCE", 3.0)
    lines: list[str] = []
    asked: list[str] = []

    def end(line):
        lines.append(line)
        threading.Event().wait()  # as a process that is gone

    def problem(url):
        asked.append(url)
        return find(url)

    find = outages._problem
    monkeypatch.setattr(outages, "_problem", problem)
    there = server.HTTPServer(("127.0.0.1", 0), Answering)
    there.code = 403  # it refuses, but it is there
    threading.Thread(target=there.serve_forever, args=(0.05,), daemon=True).start()
    watch = outages.Watch("gs://b", f"http://127.0.0.1:{there.server_port}/b", end)
    wait_for(lambda: len(asked) == 2)
    assert not watch.out_of_reach and capsys.readouterr().err == ""
    there.code = 503
    said = ""
    while not said:
        wait_for(lambda: watch.out_of_reach)
        said = capsys.readouterr().err
    assert said == "gs://b is out of reach, waiting (1 s): 503 Service Unavailable\n"
    there.code = 404
    wait_for(lambda: not watch.out_of_reach)
    assert capsys.readouterr().err.splitlines()[-1] == "gs://b answers again"
    there.shutdown()
    there.server_close()
    wait_for(lambda: lines)
    assert lines == [
        "error: gs://b has been out of reach for 3 s: Connection refused; the same command goes on"
        " from what is saved"
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"gs://b is out of reach, waiting ({seconds} s): Connection refused" for seconds in (1, 2)
    ]


@pytest.mark.parametrize(
    ("command", "patient"),
    [("train", False), ("report", False), pytest.param("train", True, marks=pytest.mark.slow)],
)
def test_a_command_whose_bucket_is_nowhere_ends_with_one_line(
    command, patient, tmp_path, monkeypatch
):
    pytest.importorskip("gcsfs", reason="buckets need gcsfs: the extra `gcs`")
    address = f"http://127.0.0.1:{free_port()}"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    arguments = flags_of(bindings("gs://nowhere/run"))
    if command == "report":
        arguments = ["--run=it=gs://nowhere/run", f"--output={tmp_path}"]
    process = start(command, arguments, code=None if patient else IMPATIENT % command)
    begin = time.monotonic()
    _, err = process.communicate(timeout=300)
    *lines, last = err.splitlines()
    period, seconds = (10, 60) if patient else (1, 4)
    assert process.returncode == 75
    assert time.monotonic() - begin > seconds
    # TensorStore adds a line about credentials.
    assert [line for line in lines if line.startswith("gs://")] == [
        f"gs://nowhere is out of reach, waiting ({said} s): Connection refused"
        for said in range(period, seconds, period)
    ]
    assert last == (
        f"error: gs://nowhere has been out of reach for {seconds} s: Connection refused;"
        " the same command goes on from what is saved"
    )
