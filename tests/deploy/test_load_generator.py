"""A load generator that others use, against a server: guidellm, wherever it is installed."""

import json
import os
import shutil
import subprocess

import pytest

from minilib.model import weights

REQUESTS, OUTPUT_TOKENS, STREAMS, PATIENCE = 12, 16, 4, 240


@pytest.fixture
def guidellm():
    found = shutil.which("guidellm")
    if found is None:
        pytest.skip("guidellm is not installed")
    return found


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_counts_what_the_server_counts(guidellm, path, server, tmp_path):
    report = tmp_path / "report.json"
    options = {
        "backend": f"kind=openai_http,target={server.url},model=tiny,request_format={path}",
        "profile": f"kind=concurrent,streams={STREAMS}",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "tokenizer": f"kind=huggingface_auto,model={weights.PRETRAINED}",
        "data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}",
        "output": f"kind=json,path={report}",
    }
    command = [
        guidellm,
        "run",
        "--disable-console",
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    names = (
        "minilib_generation_tokens_total",
        "minilib_request_success_total",
        "minilib_time_to_first_token_seconds_count",
    )
    before = [server.metric(name) for name in names]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0)
    tokens = [request["output_tokens"] for request in benchmark["requests"]["successful"]]
    assert tokens == [OUTPUT_TOKENS] * REQUESTS
    server.until_idle()
    made, ended, first = (server.metric(name) - earlier for name, earlier in zip(names, before, strict=True))
    assert (ended, first) == (REQUESTS, REQUESTS) and made == REQUESTS * OUTPUT_TOKENS
