"""The same replicas as an application of Ray Serve, which starts, replaces, scales and routes to them.

    serve run minilib.serving.ray_serve:application num_replicas=2

    client ──► Serve's proxy ──► Serve's router ──► replica 0: the ASGI application, RemoteEngine ──► engine's process
                                               └──► replica 1

Serve's router chooses between two replicas drawn at random, the one with fewer requests in flight. It sees headers,
and not bodies: it can follow a session (`x-session-id`), and cannot follow the prefix of a prompt, which takes the
router of this library, or a deployment of its own that reads bodies before the replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from minilib.model import tokenizer, weights
from minilib.serving.engine_process.checkpoint_engine import CheckpointEngine
from minilib.serving.engine_process.remote_engine import RemoteEngine
from minilib.serving.server.app import build_app
from minilib.serving.server.openai_api.templates import ChatTemplate
from minilib.serving.server.service import Service

BY_SESSION = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


class ServeOptions(BaseModel):
    """What `serve run` takes behind the name of the application, as name=value.

    Args:
        model: folder of the checkpoint.
        served_model_name: what clients call it; the folder's name if left out.
        num_replicas: how many there are, or at least are.
        max_replicas: how many there are at most; as many as num_replicas if left out.
        target_ongoing_requests: requests of each replica that the autoscaler aims at.
        max_ongoing_requests: most requests of each replica; others wait in Serve's router.
        num_cpus: that Ray sets aside for each.
        num_threads: that compute in each.
        num_pages: of each KV cache.
        drain_seconds: that a replica which is to go has for its requests.
        by_session: send the requests of a session to the same replica, by consistent hashing.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path = weights.PRETRAINED
    served_model_name: str | None = None
    num_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    target_ongoing_requests: float = Field(default=8, gt=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_threads: int | None = Field(default=None, ge=1)
    num_pages: int | None = Field(default=None, ge=1)
    drain_seconds: float = Field(default=60, ge=0)
    by_session: bool = False


@dataclass
class ReplicaApplication:
    """The ASGI application of one replica, whose engine starts and ends with it."""

    options: ServeOptions
    service: Service | None = None
    app: ASGIApp | None = field(default=None, repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or start and stop as Serve asks."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        await receive()
        try:
            await self._start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.engine.drain(self.options.drain_seconds)
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        asked = self.options
        engine_options: dict[str, Any] = {"num_pages": asked.num_pages, "prefix_cache": "hash"}
        engine = RemoteEngine(
            CheckpointEngine(asked.model, num_threads=asked.num_threads, options=engine_options),
            max_waiting=asked.max_ongoing_requests,
        )
        name = serve.get_replica_context().replica_id.unique_id
        texts, template = tokenizer.load(asked.model), ChatTemplate.load(asked.model)
        model = asked.served_model_name or asked.model.resolve().name
        self.service = Service(engine, model, texts, template, name=name)
        self.app = build_app(self.service)
        try:
            await engine.start()
        except BaseException:
            await engine.shutdown()
            raise

    def check(self) -> None:
        """Raise if the engine is dead and will not start again."""
        state = self.service.engine.status().state
        if state == "stopped":
            raise RuntimeError("the engine has stopped; this replica is to be replaced")


def application(options: ServeOptions) -> serve.Application:
    """The application for `serve run` and `serve.run`.

    Raises:
        ValueError: if at most fewer replicas are asked for than at least.
    """
    if (options.max_replicas or options.num_replicas) < options.num_replicas:
        raise ValueError(f"max_replicas={options.max_replicas} is below num_replicas={options.num_replicas}")

    def build() -> ReplicaApplication:
        return ReplicaApplication(options)

    @serve.ingress(build)
    class Replica:
        """What Serve asks beside requests."""

        def check_health(self) -> None:
            self.app.check()

    deployment = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": options.num_cpus},
        graceful_shutdown_timeout_s=options.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        **_how_many(options),
        **_router(options),
    )
    return deployment.bind()


def _how_many(options: ServeOptions) -> dict[str, Any]:
    if options.max_replicas in (None, options.num_replicas):
        return {"num_replicas": options.num_replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.num_replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_ongoing_requests,
    )
    return {"autoscaling_config": scaling}


def _router(options: ServeOptions) -> dict[str, Any]:
    return {"request_router_config": RequestRouterConfig(request_router_class=BY_SESSION)} if options.by_session else {}
