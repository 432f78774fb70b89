#!/usr/bin/env bash
# Ray Serve's HTTP proxy keeps the request router of the first application of a name: one that is deleted and run again
# with another request_router_class is routed to as before, though Serve says that it is running. ConsistentHashRouter
# sends all requests of a session to one replica; behind a proxy that has seen another router, they go to both.
# The way round: give the application a new name.
. "$(dirname "$0")/environment.sh" "ray[serve]==2.60.0"

observe <<'EOF'
import os
import secrets
import socket
import urllib.request
from importlib.metadata import version

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error", _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": port})


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1})
class Who:
    def __call__(self, request):
        return serve.get_replica_context().replica_id.unique_id


def replicas_of_a_session(name, **options):
    serve.run(Who.options(**options).bind(), name=name)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"x-session-id": "one"})
    seen = {urllib.request.urlopen(request, timeout=60).read() for _ in range(40)}
    serve.delete(name)
    return len(seen)


by_session = RequestRouterConfig(request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter")
print("ray", version("ray"))
print("replicas that 40 requests of one session go to")
print("by default:", replicas_of_a_session("a"))
print("consistent hashing, application of the same name:", replicas_of_a_session("a", request_router_config=by_session))
print("consistent hashing, application of a new name:", replicas_of_a_session("b", request_router_config=by_session))
ray.shutdown()
EOF
expect <<'EOF'
ray 2.60.0
replicas that 40 requests of one session go to
by default: 2
consistent hashing, application of the same name: 2
consistent hashing, application of a new name: 1
EOF
