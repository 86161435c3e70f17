"""Notices of a cloud that it will take a machine away: they request a stop, as SIGTERM does."""

import os
import signal
import threading
import types

from llmjax.errors import UserError
from llmjax.parallel import cluster

# Keys of the metadata server of Google Compute Engine and the values that announce the end of the virtual machine,
# https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys. A live migration does not end it.
_GCE_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


def check_notice(source: str) -> None:
    """Raise UserError for an unknown `train.preemption_notice`."""
    if source not in ("", "gce"):
        raise UserError(f"train.preemption_notice={source!r}: expected 'gce' or ''")


class CloudNotice:
    """Asks the cloud from `with` on whether it will stop this machine, and then sends this process SIGTERM, once.

    source        train.preemption_notice: "gce", or "" to ask nobody
    poll_seconds  between two questions; GCE stops a machine 30 s after it says so

    The environment variable GCE_METADATA_HOST replaces the address of the metadata server.
    Raises UserError where the metadata server does not answer at the start.
    """

    def __init__(self, source: str, poll_seconds: float = 5.0):
        self._source, self._poll_seconds = source, poll_seconds
        self._host = os.environ.get("GCE_METADATA_HOST", cluster.METADATA_HOST)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="cloud notice", daemon=True)

    def __enter__(self) -> "CloudNotice":
        if self._source:
            try:
                self._find_notice()
            except OSError as error:
                raise UserError(
                    f"train.preemption_notice={self._source!r}: the metadata server {self._host} does not answer "
                    f"({error}); set it to '' outside Google Compute Engine"
                ) from error
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self._closed.set()

    def _poll(self) -> None:
        fails = False
        while not self._closed.is_set():
            try:
                notice, fails = self._find_notice(), False
            except OSError as error:
                if not fails:
                    print(
                        f"llmjax: the metadata server {self._host} does not answer ({error}); asking again", flush=True
                    )
                notice, fails = "", True
            if notice and not self._closed.is_set():
                print(f"llmjax: Google Compute Engine will stop this machine ({notice}): saving", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self._closed.wait(self._poll_seconds)

    def _find_notice(self) -> str:
        """The notice that the server shows, such as "preempted: TRUE", or "". Raises OSError."""
        for key, announced in _GCE_NOTICES.items():
            if (value := cluster.request_instance_metadata(key, self._host).strip()) == announced:
                return f"{key}: {value}"
        return ""
