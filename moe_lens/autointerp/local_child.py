"""The process that holds a local model, started by `local.serve` as ``python -P local_child.py SETTINGS``.

It imports nothing of moe-lens. Its first line on stdout is the address; it ends when its stdin does, that is with its
parent, however that one ended.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(path: str, name: str, context: int, parallel: int, threads: int | None) -> None:
    """Serve the GGUF file `path` under `name` until stdin ends."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = path, {name}
    params.n_ctx, params.n_parallel = context * parallel, parallel
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # nobody but this user's processes: no page in a browser, and no endpoint that shows other requests' prompts
    params.hostnames, params.cors_origins = ["127.0.0.1"], "http://127.0.0.1"
    params.ui = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # at once: the server's own end would wait for the reply that it is writing


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
