"""What deploy/ holds, read as the programs read it that use it."""

import io
import json
import re
from contextlib import redirect_stderr

import yaml

from minilib.numbers.records import ROOT
from minilib.serving.router import __main__ as router
from minilib.serving.server import __main__ as server

DEPLOY = ROOT / "deploy"
CLOSE_SECONDS = 5  # in which a server's connections may end after its drain: minilib.serving.server.serve


def read(name):
    """The one document of a YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def manifests():
    """All objects of deploy/kubernetes that the kustomization names."""
    names = read("kubernetes/kustomization.yaml")["resources"]
    texts = [(DEPLOY / "kubernetes" / name).read_text(encoding="utf-8") for name in names]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def manifest(kind, name):
    """The one object of this kind and name."""
    (found,) = [each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


class CommandRefused(Exception):
    """A command line that its program does not take."""


# What reads the options of each program that the image has.
PROGRAMS = {
    "minilib.serving.server": lambda options: server.parser().parse_args(options),
    "minilib.serving.router": lambda options: router.options_of(options),
}


def parsed(command):
    """The program's module and its options, for what is started as `python -m MODULE OPTIONS`."""
    module, *options = command
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return module, PROGRAMS[module](options)
    except SystemExit:
        raise CommandRefused(said.getvalue()) from None


def dockerfile():
    """The instructions of the Dockerfile, (word, rest), with continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def exec_form(instruction):
    """The words of the last such instruction, which must be a JSON list: it starts a program without a shell."""
    return json.loads([rest for word, rest in dockerfile() if word == instruction][-1])


def metrics_named_in(text):
    """Names of this library's metrics in PromQL or YAML."""
    return set(re.findall(r"\bminilib_\w+", text))
