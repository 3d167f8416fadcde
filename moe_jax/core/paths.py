"""Paths on this machine, or in a bucket of Google Cloud Storage: gs://BUCKET/PATH.

A bucket holds objects, each written whole or not at all. It has no directories of its own, cannot
rename and cannot append: what needs one of these asks `in_bucket`.
"""

import errno
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import sys
from typing import Any

from etils import epath

from moe_jax.core import outages
from moe_jax.core.errors import UserError

Path = pathlib.Path | epath.Path
BUCKET = "gs://"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash is what `pathlib` leaves of two
_OBJECT = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/.*)?")
_HAS_CLIENT = importlib.util.find_spec("gcsfs") is not None
if _HAS_CLIENT:
    # Read later, and once. etils would take TensorFlow's client, and gcsfs ask a second service
    # about kinds of buckets that need nothing else here.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def parse(path: str | os.PathLike) -> Path:
    """The path of a file or directory.

    Raises:
        UserError: it is a URL of another kind than gs://BUCKET/PATH, or gcsfs is not installed.
    """
    text = os.fspath(path)
    if not text.startswith(BUCKET):
        if is_url(text):
            raise UserError(f"{text}: it is neither a path of this machine nor gs://BUCKET/PATH")
        return pathlib.Path(text)
    if not _OBJECT.fullmatch(text):
        raise UserError(f"{text}: a path in a bucket is gs://BUCKET/PATH")
    if not _HAS_CLIENT:
        raise UserError(f"{text}: buckets need gcsfs: pip install 'moe_jax[gcs]'")
    bucket = text.removeprefix(BUCKET).partition("/")[0]
    outages.watch(f"{BUCKET}{bucket}", f"{_client().base}b/{bucket}")
    return epath.Path(text)


def local(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file or directory of this machine.

    Raises:
        UserError: it is a URL.
    """
    text = os.fspath(path)
    if is_url(text):
        raise UserError(f"{text}: only a path of this machine is possible here")
    return pathlib.Path(text)


def is_url(text: str) -> bool:
    """Whether a path names a place that is not a file system's."""
    return _URL.match(text) is not None


def is_usable(text: str) -> bool:
    """Whether `parse` can make something of it."""
    return _OBJECT.fullmatch(text) is not None or not is_url(text)


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path: str | os.PathLike) -> Path:
    """`parse`, and from the root."""
    path = parse(path)
    return path if in_bucket(path) else path.absolute()


def put(path: Path, data: bytes) -> None:
    """Writes an object of a bucket; the one that was there stays until all has arrived."""
    _client().pipe_file(os.fspath(path), data)


def remove_tree(path: Path) -> None:
    """Removes a directory. In a bucket: the object of this name and all below it."""
    if in_bucket(path):
        path.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path)


def objects(path: Path) -> dict[str, str]:
    """The objects below a path of a bucket: name from there -> checksum that the bucket keeps."""
    top = os.fspath(path).removeprefix(BUCKET).rstrip("/") + "/"
    found = _client().find(top, detail=True)
    # Of a file that ends with its own CRC, as TensorStore's do, the CRC alone tells nothing.
    return {
        name.removeprefix(top): "{size} bytes, crc32c {crc32c}, md5 {md5}".format(
            md5=facts.get("md5Hash"), **facts
        )
        for name, facts in found.items()
    }


def errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise; beside OSError, what a bucket's client does."""
    if "gcsfs" not in sys.modules:
        return (OSError,)
    import aiohttp
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, HttpError, aiohttp.ClientError, GoogleAuthError)


def reason(error: Exception) -> str:
    """One of `errors` in a few words."""
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)  # gcsfs says only which URL it asked
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _client() -> Any:
    import fsspec

    # It logs a traceback where it gives up; the error that it raises is enough.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Other processes write to the bucket too: a list is never taken from memory.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # as etils does: the same client
