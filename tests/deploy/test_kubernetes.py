"""Kubernetes' manifests: against the published schemas of every version, and against each other and the programs."""

import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor

from tests.deploy.files import CLOSE_SECONDS, DEPLOY, CommandRefused, manifest, manifests, metrics_named_in, parsed

NAMES = [(each["kind"], each["metadata"]["name"]) for each in manifests()]
DEPLOYMENTS = ["replicas", "router"]
VERSIONS = sorted({major_minor(version) for version in all_versions()})  # each is there twice, lenient and strict


def pod_of(deployment):
    return manifest("Deployment", deployment)["spec"]["template"]


def container_of(deployment):
    (container,) = pod_of(deployment)["spec"]["containers"]
    return container


def seconds_of_sleep(hook):
    program, seconds = hook["exec"]["command"]
    assert program == "sleep"
    return int(seconds)


def test_what_is_deployed():
    kinds = {"Deployment": 2, "Service": 2, "HorizontalPodAutoscaler": 1, "PodDisruptionBudget": 1}
    assert len(set(NAMES)) == len(NAMES) == 6
    assert {kind: sum(kind == each for each, _ in NAMES) for kind in kinds} == kinds


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("version", VERSIONS)
def test_published_schemas(version, strict):
    for each in manifests():
        assert kubernetes_validate.validate(each, version, strict=strict) == version


def test_there_are_many_versions():
    assert len(VERSIONS) >= 10


@pytest.mark.parametrize(
    "path, value, lenient",
    [
        (("containers", 0, "ports", 0, "containerPort"), "8000", False),
        (("containers", 0, "livenessProbe", "httpGet"), {"path": "/health"}, False),
        (("terminationGracePeriod",), 90, True),
    ],
    ids=["string for number", "no port", "misspelt"],
)
def test_schemas_refuse_what_is_wrong(path, value, lenient):
    """The check itself; what is misspelt is refused by the strict schemas alone."""
    wrong = manifest("Deployment", "replicas")
    place = wrong["spec"]["template"]["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if lenient:
        assert kubernetes_validate.validate(wrong, "1.34")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=lenient)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_selectors_match_labels(name):
    labels = pod_of(name)["metadata"]["labels"]
    selectors = [
        manifest("Deployment", name)["spec"]["selector"]["matchLabels"],
        manifest("Service", name)["spec"]["selector"],
    ]
    spread = pod_of(name)["spec"].get("topologySpreadConstraints", [])
    selectors += [each["labelSelector"]["matchLabels"] for each in spread]
    if name == "replicas":
        selectors.append(manifest("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector and selector.items() <= labels.items()
    others = [pod_of(other)["metadata"]["labels"] for other in DEPLOYMENTS if other != name]
    assert not any(selector.items() <= other.items() for selector in selectors for other in others)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_ports_are_those_that_the_program_listens_on(name):
    container = container_of(name)
    _, options = parsed(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options.port} and options.host == "0.0.0.0"
    assert [port["targetPort"] for port in manifest("Service", name)["spec"]["ports"]] == ["http"]
    probes = [probe for key, probe in container.items() if key.endswith("Probe")]
    assert len(probes) >= 2 and all(probe["httpGet"]["port"] in ports for probe in probes)


def test_probes_ask_what_they_should(routes):
    """Liveness asks /health alone: an engine that starts again is not ready, and must not be killed for it."""
    for name in DEPLOYMENTS:
        container = container_of(name)
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container_of("replicas")["startupProbe"]["httpGet"]["path"] == "/ready"
    assert {"/health", "/ready", pod_of("replicas")["metadata"]["annotations"]["prometheus.io/path"]} <= routes


def test_a_replica_has_time_to_load_and_to_drain():
    pod, container = pod_of("replicas")["spec"], container_of("replicas")
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 600
    before, drain = seconds_of_sleep(container["lifecycle"]["preStop"]), parsed(container["args"])[1].drain_seconds
    assert pod["terminationGracePeriodSeconds"] >= before + drain + CLOSE_SECONDS
    readiness = container["readinessProbe"]
    noticed = readiness["periodSeconds"] * readiness["failureThreshold"] + readiness["timeoutSeconds"]
    assert before >= noticed, "SIGTERM would come before anybody knows that the pod goes"


def test_a_router_waits_for_what_its_replicas_finish():
    container, replica = container_of("router"), container_of("replicas")
    drain = parsed(container["args"])[1].drain
    assert drain >= parsed(replica["args"])[1].drain_seconds
    grace = pod_of("router")["spec"]["terminationGracePeriodSeconds"]
    assert grace >= seconds_of_sleep(container["lifecycle"]["preStop"]) + drain + CLOSE_SECONDS


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_programs_run_with_the_least_rights(name):
    pod, container = pod_of(name)["spec"], container_of(name)
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert (
        container["resources"]["requests"].keys() == {"cpu", "memory"} and "memory" in container["resources"]["limits"]
    )
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_replicas_are_found_by_dns():
    service = manifest("Service", "replicas")["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    (port,) = service["ports"]
    assert parsed(container_of("router")["args"])[1].replica_dns == f"replicas:{port['port']}"


def test_the_router_has_something_to_prefer():
    """A router that follows prefixes gains nothing where replicas do not keep them."""
    assert parsed(container_of("router")["args"])[1].policy == "prefix_aware"
    assert parsed(container_of("replicas")["args"])[1].prefix_cache


def test_the_autoscaler_reads_a_metric_that_is_served(served_metrics):
    scaler = manifest("HorizontalPodAutoscaler", "replicas")["spec"]
    target = manifest("Deployment", scaler["scaleTargetRef"]["name"])
    assert scaler["scaleTargetRef"]["kind"] == target["kind"] and "replicas" not in target["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert served_metrics[name] == "gauge"
    most, target_value = parsed(container_of("replicas")["args"])[1].max_waiting, metric["pods"]["target"]
    assert 0 < int(target_value["averageValue"]) < most, "the queue must be able to become longer than the target"
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert manifest("PodDisruptionBudget", "replicas")["spec"]["maxUnavailable"] < scaler["minReplicas"]


def test_every_command_line_is_one_of_the_program():
    for name in DEPLOYMENTS:
        args = container_of(name)["args"]
        assert parsed(args)[0] == f"minilib.serving.{'server' if name == 'replicas' else 'router'}"
        with pytest.raises(CommandRefused, match="--no-such-flag"):
            parsed([*args, "--no-such-flag"])


def test_variables_in_arguments_are_set():
    for name in DEPLOYMENTS:
        container = container_of(name)
        used = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
        assert used <= {variable["name"] for variable in container.get("env", [])}


def test_kustomize_builds_what_the_files_say():
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes")]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    objects = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built)}
    assert objects.keys() == set(NAMES)
    for name in DEPLOYMENTS:
        (container,) = objects["Deployment", name]["spec"]["template"]["spec"]["containers"]
        assert container.pop("image") == "minilib:0.1.0"
        assert container == {key: value for key, value in container_of(name).items() if key != "image"}


def test_readme_names_no_metric_that_is_not_there(served_metrics):
    assert metrics_named_in((DEPLOY / "README.md").read_text(encoding="utf-8")) <= served_metrics.keys()
