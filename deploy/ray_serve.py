"""Many replicas of the refrag server behind one address, with Ray Serve; vLLM servers decode for all of them.

    pip install 'refrag[serve,vllm]' 'ray[serve]'
    serve run deploy.ray_serve:build model=my-model index=my.index vllm_url=http://gpu-1:8001,http://gpu-2:8001 replicas=4

Arguments: `model` (default: bundled), `index` (none: requests bring their passages), `vllm_url` (none: each replica decodes
by itself), `replicas` (2). Replicas share the index's folder and only read it. Clients send the key that the variable
REFRAG_API_KEY holds, if it is set; VLLM_API_KEY is that of vLLM.
"""

import os
from typing import Any

from ray import serve

MAX_ONGOING = 64
"""Requests that Ray gives to one replica at the same time; it holds the others back."""


def build(arguments: dict[str, str]) -> Any:
    """The Ray Serve application for the arguments of `serve run`."""
    known = ("model", "index", "vllm_url", "replicas")
    if unknown := set(arguments) - set(known):
        raise ValueError(f"The arguments are {', '.join(known)}, not {', '.join(sorted(unknown))}.")
    options = dict(arguments)
    replicas = int(options.pop("replicas", "2"))

    def app() -> Any:  # Ray wants a plain function, and calls it in each replica
        return make_app(**options)

    deployment = serve.deployment(serve.ingress(app)(), name="refrag", num_replicas=replicas, max_ongoing_requests=MAX_ONGOING)
    return deployment.bind()


def make_app(model: str = "bundled", index: str | None = None, vllm_url: str | None = None) -> Any:
    """The FastAPI application of one replica."""
    from refrag import Refrag, VllmBackend, VllmSettings
    from refrag.engine.reader import load_reader
    from refrag.model import load_model

    backend = VllmBackend(VllmSettings(vllm_url.split(","))) if vllm_url else None
    engine = Refrag((load_reader if backend else load_model)(model), index=index)
    from refrag.server import create_app

    return create_app(engine, backend=backend, api_key=os.environ.get("REFRAG_API_KEY"))
