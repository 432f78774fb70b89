"""The OpenAPI document is true: schemathesis sends what it allows and what it forbids, and reads every answer by it."""

import json

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from minilib.serving.server.openai_api import answers, protocol
from tests.serving.server.api import PATIENCE, running

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]  # what the document allows may still be refused: it cannot say that a prompt and its answer fit the context together
EXAMPLES = 12  # of each operation


BOUNDED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


def call_by(operation, statuses):
    """A test that sends cases of an operation, and checks and notes what comes back."""

    @BOUNDED
    @given(case=operation.as_strategy())
    def call(case):
        for field in ("max_tokens", "max_completion_tokens"):
            if isinstance(case.body, dict) and type(case.body.get(field)) is int and case.body[field] > 8:
                case.body[field] = 8  # what is random is mostly longer than the context
        response = case.call(timeout=PATIENCE)
        case.validate_response(response, checks=CHECKS)
        statuses.append(response.status_code)

    return call


def test_every_answer_is_as_the_document_says():
    with running(max_model_len=40) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        answered = {}
        for result in schema.get_all_operations():
            operation = result.ok()
            call_by(operation, answered.setdefault(operation.label, []))()
        assert len(answered) == 10
        good = {label for label, statuses in answered.items() if 200 in statuses}
        assert good >= answered.keys() - {"GET /v1/models/{model}"}, answered
        server.until_idle()


def test_the_document_names_every_field_and_nothing_of_the_frameworks_own(server):
    document = json.loads(server.ask("/openapi.json")[2])
    schemas = document["components"]["schemas"]
    for request in (protocol.CompletionRequest, protocol.ChatRequest, protocol.DetokenizeRequest):
        shape = schemas[request.__name__]
        assert shape["properties"].keys() == request.model_fields.keys()
        assert shape["additionalProperties"] is False
    assert schemas["CompletionRequest"]["properties"]["model"]["enum"] == ["tiny"]
    assert "HTTPValidationError" not in json.dumps(document) and '"422"' not in json.dumps(document)
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                shapes = json.dumps(response)
                assert int(status) < 400 or "ErrorBody" in shapes or "HealthBody" in shapes
    assert {name for name in vars(answers) if name.endswith("Body")} - {"ErrorBody"} <= schemas.keys()
