"""A model of the user's own: any GGUF file behind an OpenAI-compatible server on loopback, by ``moe-lens[local]``.

    server = local.serve(Path("model.gguf"))
    with server as base_url:
        client = Client(server.model, base_url, cache=file, concurrency=server.parallel, timeout=600)

A prompt of 1,500 tokens takes a small model some 20 s on one core, and a request that waits for another one is
already on its client's clock: hence the long timeout, and no more requests at a time than the server answers.
The server (llama.cpp, by the package ``xllamacpp``) runs in a process of its own: what a large model does to memory,
and a crash in native code, end that process and not the run. It takes ``json_schema`` reply formats.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from moe_lens.autointerp import local_child
from moe_lens.errors import BadConfig, MoELensError

MODULE = "xllamacpp"
CONTEXT = 8192
_MAGIC = b"GGUF"
_DIGESTED = 1 << 20
_ERROR_LINE = re.compile(r"^[\d.]+ E +(?:.*?: )?(.+)$", re.MULTILINE)  # "0.00.007.578 E where: what"


class LocalServerFailed(MoELensError):
    """The server of a local model ended by itself."""

    exit_code = 1


def serve(path: str | Path, *, context: int = CONTEXT, parallel: int = 1, threads: int | None = None) -> LocalServer:
    """Load the GGUF file `path` and serve it on a free port of 127.0.0.1; returns once it answers.

    Args:
        context: tokens of one request and its reply together. A longer request fails, nothing is cut.
        parallel: requests that are answered at the same time. More than these wait, and their client's timeout runs.
        threads: CPU threads, None for llama.cpp's own choice (the physical cores).

    Raises:
        BadConfig: no such file, no GGUF file, an impossible setting, or the extra is not installed.
        LocalServerFailed: the model could not be loaded.
    """
    path = Path(path).expanduser()
    if context < 1 or parallel < 1 or (threads is not None and threads < 1):
        raise BadConfig("context, parallel and threads of a local model must be above 0")
    check_gguf(path)
    name = model_name(path)
    settings = {"path": str(path), "name": name, "context": context, "parallel": parallel, "threads": threads}
    return LocalServer(path, name, settings)


def check_gguf(path: str | Path) -> None:
    """Complain about a model that cannot be served, without loading it.

    Raises:
        BadConfig: no such file, no GGUF file, or the extra ``moe-lens[local]`` is not installed.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise BadConfig(f"cannot read the model {path}: {error.strerror or error}; give a GGUF file") from error
    if magic != _MAGIC:
        raise BadConfig(f"{path} is not a GGUF file: give one, such as a download that ends in .gguf")
    if importlib.util.find_spec(MODULE) is None:
        raise BadConfig(f"serving {path.name} needs the package {MODULE}: run pip install 'moe-lens[local]'")


def model_name(path: Path) -> str:
    """The file's name and the start of a digest of its size and its ends.

    Cached replies are found by it, so two files of one name must not share it. The whole file would take a minute to
    digest; its ends hold the metadata and weights.
    """
    with path.open("rb") as file:
        head = file.read(_DIGESTED)
        size = file.seek(0, 2)
        file.seek(max(0, size - _DIGESTED))
        tail = file.read()
    return f"{path.name}@{hashlib.sha256(head + tail + str(size).encode()).hexdigest()[:12]}"


class LocalServer:
    """A running local model. Stops at the end of ``with``, by `stop`, and with the process that started it.

    Attributes:
        base_url: what `Client` takes, and what ``with`` yields; it needs no API key.
        model: `model_name` of the file, for `Client`; the server itself answers to any name.
        parallel: requests that are answered at the same time.
    """

    def __init__(self, path: Path, model: str, settings: dict[str, str | int | None]) -> None:
        self.path, self.model, self.parallel = path, model, int(settings["parallel"] or 1)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed in stop()
        command = [sys.executable, "-P", local_child.__file__, json.dumps(settings)]  # -P: no module of this folder
        # in a session of its own, so that Ctrl-C reaches this process alone, which then decides
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )
        try:
            self.base_url = f"{self._address()}/v1"
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Complain if the server has ended by itself; requests to it fail from then on.

        Raises:
            LocalServerFailed: it has.
        """
        if self._process.poll() is not None and not self._log.closed:
            raise LocalServerFailed(f"the server of {self.path.name} ended: {self._reason()}")

    def stop(self) -> None:
        """End the server now. A request on its way fails. Does nothing the second time."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> str:
        return self.base_url

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"http://"):
                return line.decode().strip()
        self._process.wait()
        raise LocalServerFailed(
            f"could not load {self.path}: {self._reason()}; download the file again, or give one that this version "
            f"of {MODULE} reads and that fits into memory"
        )

    def _reason(self) -> str:
        """What ended it: the kernel, the first error that llama.cpp wrote (it names the cause), or its last line."""
        code = self._process.returncode
        if code == -9:  # SIGKILL, which nobody but `stop` sends
            return "the system killed it, as it does when memory runs out"
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        if found := _ERROR_LINE.search(text):
            return found[1].strip()
        return text.splitlines()[-1].strip() if text else f"exit status {code}"
