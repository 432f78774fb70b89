"""The shape of the custom resources that outlets write, and a check of objects against it.

`crd_shapes.json` holds, of each CustomResourceDefinition that its project publishes, the names, types, bounds and
required fields of the specification: no texts, no defaults, no status. A pod's specification is Kubernetes' own and is
checked against Kubernetes' schemas. Rules in CEL are not there. To renew it:

    python -m tests.operations.placement.outlets.crd_shapes REPOSITORY RELEASE FILE…     adds or replaces these kinds
"""

import json
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

SHAPES = Path(__file__).with_name("crd_shapes.json")
KEPT = {"type", "required", "enum", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern"}
POD = {"type": "object", "pod": True}


def check(found, release):
    """Raise ValidationError unless an object has the published shape, and its pods that of a release of Kubernetes."""
    kind = (found["apiVersion"], found["kind"])
    shapes = {(each["apiVersion"], each["kind"]): each["spec"] for each in json.loads(SHAPES.read_text())}
    if kind not in shapes:
        kubernetes_validate.validate(found, release, strict=True)
        return
    assert found.keys() == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.Draft202012Validator(shapes[kind]).validate(found["spec"])
    for pod in pods_in(found["spec"], shapes[kind]):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, release, strict=True)


def pods_in(value, shape):
    """Specifications of pods in an object of a shape."""
    if shape.get("pod"):
        return [value]
    if isinstance(value, list):
        return [pod for each in value for pod in pods_in(each, shape.get("items", {}))]
    if isinstance(value, dict):
        properties = shape.get("properties", {})
        return [pod for key, each in value.items() for pod in pods_in(each, properties.get(key, {}))]
    return []


def shape_of(schema):
    """What is kept of a schema; the server refuses or drops fields that it does not name."""
    properties = schema.get("properties", {})
    if {"containers", "initContainers"} <= properties.keys():
        return POD
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: value for key, value in schema.items() if key in KEPT}
    if properties:
        without = {"status", "volumeClaimTemplates", "volumeClaimPolicies"}  # large, and none is written here
        kept["properties"] = {name: shape_of(each) for name, each in properties.items() if name not in without}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = shape_of(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = shape_of(schema["items"])
    return kept


def add(repository, release, files):
    """Add the kinds that these files define; a file has the text of a CustomResourceDefinition."""
    shapes = json.loads(SHAPES.read_text()) if SHAPES.exists() else []
    for file in files:
        defined = yaml.safe_load(Path(file).read_text())["spec"]
        version = next(each for each in defined["versions"] if each["storage"])
        name = {"apiVersion": f"{defined['group']}/{version['name']}", "kind": defined["names"]["kind"]}
        spec = shape_of(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
        shapes = [each for each in shapes if any(each[key] != value for key, value in name.items())]
        shapes.append({**name, "source": f"https://github.com/{repository}", "release": release, "spec": spec})
    shapes.sort(key=lambda each: (each["apiVersion"], each["kind"]))
    SHAPES.write_text("[\n" + ",\n".join(map(json.dumps, shapes)) + "\n]\n")


if __name__ == "__main__":
    add(sys.argv[1], sys.argv[2], sys.argv[3:])
