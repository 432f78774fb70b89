"""The official client against the server: answers are those of the bare engine, errors have the client's classes."""

import asyncio

import openai
import pytest

from minilib.serving.request import SamplingParams
from tests.serving.server import api
from tests.serving.server.api import MODEL, alone, parts

PROMPT = "def f(x):\n"
CHAT = [{"role": "system", "content": "a module"}, {"role": "user", "content": "import os\n\ndef f("}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def test_a_completion_is_the_bare_engines(server):
    tokens, text, _ = alone(PROMPT, max_tokens=12, temperature=0)
    answer = server.client().completions.create(prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == text
    assert answer.object == "text_completion" and answer.model == MODEL and answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    prompt = len(parts()[1].encode(PROMPT).ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(tokens) == 12 and 12)
    assert answer.usage.total_tokens == prompt + 12


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_makes_the_bare_engines_samples(server, seed):
    options = {"max_tokens": 10, "temperature": 1.3, "top_p": 0.9, "seed": seed, "n": 3, "top_k": 50}
    outputs = alone(PROMPT, **options)[2]
    texts = ["".join(output.text for output in outputs if output.sample == k) for k in range(3)]
    sent = {key: value for key, value in options.items() if key != "top_k"}
    answer = server.client().completions.create(model=MODEL, prompt=PROMPT, extra_body={"top_k": 50}, **sent)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_stream_adds_up_to_the_whole_answer(server):
    text = alone(PROMPT, max_tokens=12, temperature=0)[1]
    stream = server.client().completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].choices == []


def test_the_usage_so_far_is_in_every_chunk_that_asks_for_it(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = server.client().completions.create(prompt=PROMPT, stream=True, stream_options=options, **GREEDY)
    so_far = [chunk.usage.completion_tokens for chunk in stream]
    assert so_far == sorted(so_far) and so_far[0] >= 1 and so_far[-1] == so_far[-2] == GREEDY["max_tokens"]


def test_prompts_of_a_list_are_choices_in_order(server):
    ids = parts()[1].encode("import").ids
    client, texts = server.client(), [alone(prompt, max_tokens=12, temperature=0)[1] for prompt in (PROMPT, "import")]
    for prompts in ([PROMPT, "import"], [parts()[1].encode(PROMPT).ids, ids]):
        whole = client.completions.create(prompt=prompts, n=2, **GREEDY)
        assert [choice.text for choice in whole.choices] == [texts[0], texts[0], texts[1], texts[1]]
        pieces = [""] * 4
        for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **GREEDY):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
        assert pieces == [texts[0], texts[0], texts[1], texts[1]]
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == texts[1]


def test_echo_begins_with_the_prompt(server):
    client = server.client()
    for prompt in (PROMPT, parts()[1].encode(PROMPT).ids):
        plain = client.completions.create(prompt=prompt, **GREEDY).choices[0].text
        assert client.completions.create(prompt=prompt, echo=True, **GREEDY).choices[0].text == PROMPT + plain
        chunks = client.completions.create(prompt=prompt, echo=True, stream=True, **GREEDY)
        assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


def test_stop_strings_are_cut_and_end_the_text(server):
    text = alone(PROMPT, max_tokens=12, temperature=0)[1]
    stop = text[5:8]
    answer = server.client().completions.create(prompt=PROMPT, stop=[stop, "\0"], **GREEDY)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_engines(server):
    outputs = alone(PROMPT, max_tokens=12, temperature=0, logprobs=3)[2]
    client = server.client()
    told = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    assert told.logprobs.token_logprobs == [output.logprob for output in outputs]
    assert "".join(told.logprobs.tokens) == told.text
    for place, output in enumerate(outputs):
        assert sorted(told.logprobs.top_logprobs[place].values()) == sorted(p for _, p in output.top_logprobs)
        assert told.text[told.logprobs.text_offset[place] :].startswith(told.logprobs.tokens[place])
    streamed = list(client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY))
    assert sum((chunk.choices[0].logprobs.token_logprobs for chunk in streamed), []) == told.logprobs.token_logprobs
    assert sum((chunk.choices[0].logprobs.text_offset for chunk in streamed), []) == told.logprobs.text_offset


def test_offsets_of_tokens_whose_text_is_held_back(server):
    """Text that may begin a stop string is held back; where a token stands does not change by that."""
    client = server.client()
    plain = client.completions.create(prompt=PROMPT, logprobs=0, **GREEDY).choices[0]
    held = [plain.text[end - 1] + "\0" for end in (3, 6, 9, 12)]
    streamed = client.completions.create(prompt=PROMPT, logprobs=0, stop=held, stream=True, **GREEDY)
    offsets = sum((chunk.choices[0].logprobs.text_offset for chunk in streamed), [])
    assert offsets == plain.logprobs.text_offset
    whole = client.completions.create(prompt=PROMPT, logprobs=0, stop=held, **GREEDY).choices[0]
    assert whole.logprobs.text_offset == plain.logprobs.text_offset


def test_a_chat_is_the_completion_of_what_its_template_writes(server):
    written = "# a module\nimport os\n\ndef f(\n"
    text = alone(written, max_tokens=12, temperature=0)[1]
    client = server.client()
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == text
    assert bytes(sum((token.bytes for token in content), [])) == text.encode()
    assert [len(token.top_logprobs) for token in content] == [2] * 12
    chunks = list(client.chat.completions.create(messages=CHAT, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_fills_the_context_unless_told_otherwise(server):
    client, options = server.client(), {"model": MODEL, "messages": CHAT, "extra_body": {"ignore_eos": True}}
    prompt = client.chat.completions.create(max_completion_tokens=3, **options).usage
    assert prompt.completion_tokens == 3
    whole = client.chat.completions.create(**options)
    assert whole.usage.total_tokens == 1024 and whole.choices[0].finish_reason == "length"


def test_text_parts_are_lines(server):
    parts_of = [{"type": "text", "text": "import os"}, {"type": "text", "text": "x = "}]
    answers = [
        server.client().chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)
        for content in (parts_of, "import os\nx = ")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_async_clients_at_once_get_what_each_gets_alone(server):
    prompts = [f"def f{k}(x):\n" for k in range(12)]
    texts = [alone(prompt, max_tokens=12, temperature=0)[1] for prompt in prompts]

    async def ask(client, prompt):
        stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=api.PATIENCE) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == texts


def test_models(server):
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL) == model
    said = server.engine.description
    assert (model.max_model_len, model.page_size, model.fingerprint) == (1024, said.page_size, said.fingerprint)


def test_errors_have_the_clients_classes(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(prompt="a", **(GREEDY | {"model": "other"}))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="unknown_path|not found|Not Found"):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.BadRequestError, match="1024 tokens") as caught:
        client.completions.create(prompt="x " * 3000, **GREEDY)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(messages=CHAT, tools=[tool], **GREEDY)


def test_what_the_client_may_always_send_is_taken(server):
    nothing = dict.fromkeys(("logit_bias", "suffix", "best_of", "seed", "stop", "user", "logprobs"))
    server.client().completions.create(
        prompt="a", frequency_penalty=0, presence_penalty=0, n=1, echo=False, top_p=1, extra_body=nothing, **GREEDY
    )
    server.client().chat.completions.create(
        messages=CHAT, response_format={"type": "text"}, tools=[], logit_bias={}, user="me", store=False, **GREEDY
    )


def test_pages_that_were_kept_are_told():
    with api.running(api.new_engine(prefix_cache="hash")) as server:
        prompt = list(range(5, 5 + 70))
        told = [server.client().completions.create(prompt=prompt, **GREEDY).usage for _ in range(2)]
        salted = server.client().completions.create(prompt=prompt, extra_body={"cache_salt": "other"}, **GREEDY).usage
    assert [usage.prompt_tokens_details.cached_tokens for usage in (*told, salted)] == [0, 64, 0]


def test_default_values_are_openais(server):
    tokens = alone(PROMPT, **{"seed": 3, "max_tokens": 16})[1]
    assert server.client().completions.create(model=MODEL, prompt=PROMPT, seed=3).choices[0].text == tokens
    assert SamplingParams().temperature == 1
