"""A bucket on loopback: PyPI's gcp-storage-emulator, served by a thread.

The emulator lacks what locks need: it is told here to look at the generation of the object that is
written over (`ifGenerationMatch`), and to tell that of an object that is read.
"""

import functools
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus, server
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

NAME = "toys"


class Bucket:
    """The bucket `gs://toys` for processes with this environment.

    Attributes:
        environment: variables that lead clients here in place of Google's servers.
        before: called with the number of every request, from 1, before it is answered.
    """

    def __init__(self):
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        logging.getLogger("api.object").setLevel(logging.CRITICAL)
        self.before: Callable[[int], Any] = lambda number: None
        self._storage = Storage(use_memory_fs=True)
        # It keeps a list of its objects in a file, which it would write with every request.
        self._storage._write_config_to_file = lambda: None
        buckets.create_bucket(NAME, self._storage)
        self._storage.buckets[NAME].pop("softDeletePolicy", None)
        self._server = self._listening(port=0)
        address = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": NAME,
            "FSSPEC_GCS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _listening(self, port: int) -> server.HTTPServer:
        found = server.HTTPServer(("127.0.0.1", port), functools.partial(_Handler, self))
        found.handle_error = lambda *_: None  # a client that was killed
        return found

    def stop(self) -> None:
        """Goes out of reach; what it holds stays."""
        self._server.shutdown()
        self._server.server_close()

    def start(self) -> None:
        """Answers again, at the same address."""
        self._server = self._listening(self._server.server_port)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def names(self, below: str = "") -> set[str]:
        """The objects below a path of the bucket, named from there."""
        found = self._storage.objects.get(NAME, {})
        return {name.removeprefix(below) for name in found if name.startswith(below)}

    def content(self, name: str) -> bytes:
        """What an object holds."""
        return self._storage.get_file(NAME, name)


class _Handler(emulator.RequestHandler):
    number = 0

    def __init__(self, bucket: Bucket, *args: Any):
        self._bucket = bucket
        super().__init__(bucket._storage, *args)

    def parse_request(self) -> bool:
        _Handler.number += 1
        self._bucket.before(_Handler.number)
        return super().parse_request()


def _insert(request, response, storage) -> None:
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != _generation(request, storage, request.query["name"][0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        objects.insert(request, response, storage)


def _get(request, response, storage) -> None:
    response["x-goog-generation"] = _generation(request, storage, request.params["object_id"])
    objects.get(request, response, storage)


def _generation(request, storage, name: str) -> str:
    found = storage.objects.get(request.params["bucket_name"], {}).get(name)
    return found["generation"] if found else "0"


for _, _methods in emulator.HANDLERS:
    for _method, _handler in _methods.items():
        _methods[_method] = {objects.insert: _insert, objects.get: _get}.get(_handler, _handler)
