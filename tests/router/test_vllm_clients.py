"""Clients and load generators that nobody here wrote, unmodified, through a launched run of real vLLM.

Each tool reports what it did. These tests compare that with what the router counted meanwhile, in
/metrics and in the usage ledger: requests, errors, prompt and completion tokens, as equal integers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.models import tiny_llama

from .launched_run import LaunchedRun

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHECKOUT = Path(__file__).parents[2]
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
TOOL_SECONDS = 240
"""Longest that one tool may take; it guards against a hang."""

# Policy `least_load` sends every prompt through both engines; `kv` would let decode compute short ones.
# The compiler would spend half a minute of a core on one small kernel of `logprobs`.
MODEL = """\
model: {model}
served_name: tiny
engine: vllm
device: cpu
dtype: float32
max_model_len: 2048
walltime: 00:30:00
prefill: {{nodes: 1}}
decode: {{nodes: 1}}
engine_args: {{enforce-eager: true, max-num-seqs: 8}}
env: {{TORCH_COMPILE_DISABLE: "1"}}
router: {{policy: least_load}}
"""

CHOICE_TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
WORDS_TASK = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["<never>"], max_gen_toks: 12, temperature: 0.0, ignore_eos: true}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = 20
WRITTEN = 12
"""Tokens of each answer of `tiny_words`."""


@pytest.fixture(scope="module")
def tools() -> Path:
    """The commands of `make clients`, an environment of its own: their pins exclude vLLM's."""
    found = Path(os.environ.get("HPCSERVE_CLIENTS", CHECKOUT / ".venv-clients")) / "bin"
    absent = [name for name in ("aiperf", "guidellm", "lm_eval") if not (found / name).exists()]
    if absent:
        pytest.fail(f"{', '.join(absent)} not in {found}; run `make clients`, or set HPCSERVE_CLIENTS")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedRun]:
    launched = LaunchedRun(tmp_path_factory.mktemp("clients"), MODEL.format(model=model), nodes=2)
    try:
        launched.start()
        yield launched
    finally:
        launched.stop()


def tool(argv: list[str], folder: Path, **env: str) -> None:
    """Run a tool to its end; what it says is shown where it fails."""
    folder.mkdir(exist_ok=True)
    home = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "NO_COLOR": "1", "COLUMNS": "120"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        argv, cwd=folder, env={**kept, **home, **env}, text=True, timeout=TOOL_SECONDS,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{argv[0]} exited with {done.returncode}:\n{done.stdout[-6000:]}"


def test_openai_client(run: LaunchedRun) -> None:
    """The sums of `usage` that the client was handed are what was counted, for each way to ask."""
    told: list[Any] = []
    before = run.counts()
    with openai.OpenAI(base_url=run.url, api_key=run.key, max_retries=0, timeout=120) as client:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0}
        more = {"extra_body": {"ignore_eos": True}}
        chat = {**asked, **more, "messages": [{"role": "user", "content": "A cluster is many computers."}]}
        text = {**asked, **more, "prompt": "Prefill reads the prompt, decode writes"}
        usage = {"stream": True, "stream_options": {"include_usage": True}}

        whole = client.chat.completions.create(**chat)
        parts = list(client.chat.completions.create(**chat, **usage))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == (
            whole.choices[0].message.content
        )
        assert parts[-1].usage.total_tokens == whole.usage.total_tokens
        told += [whole.usage, parts[-1].usage]
        # A stream that didn't ask for its usage is not shown any, and is counted all the same.
        silent = list(client.chat.completions.create(**chat, stream=True))
        assert all(part.usage is None for part in silent)
        told.append(whole.usage)

        written = client.completions.create(**text)
        pieces = list(client.completions.create(**text, **usage))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == written.choices[0].text
        several = client.completions.create(**{**text, "n": 2, "temperature": 1, "seed": 7})
        assert len(several.choices) == 2
        told += [written.usage, pieces[-1].usage, several.usage]
        assert [entry.id for entry in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**chat, "max_tokens": 100_000})

    counted = run.counted_since(before)
    assert counted.answers == {(CHAT, 200): 3, (COMPLETIONS, 200): 3, (CHAT, 400): 1}
    assert counted.prompt == sum(usage.prompt_tokens for usage in told)
    assert counted.completion == sum(usage.completion_tokens for usage in told) == 70
    assert counted.faults == 0
    # The ledger counts what was let in: the request that the engine refused as well.
    used = (7, counted.prompt, counted.completion)
    assert run.ledger_since(before, used) == used


def test_anthropic_client(run: LaunchedRun) -> None:
    """Messages, whole and streamed: `input_tokens` and `output_tokens` as told are what was counted."""
    before = run.counts()
    base = run.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=base, api_key=run.key, max_retries=0, timeout=120) as client:
        asked: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": 10,
            "extra_body": {"temperature": 0},
            "messages": [{"role": "user", "content": "Queues are long on Monday morning."}],
        }
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        counting = client.messages.count_tokens(model="tiny", messages=asked["messages"])
    assert whole.type == "message"
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert counting.input_tokens == whole.usage.input_tokens == streamed.usage.input_tokens > 0
    assert whole.usage.output_tokens == streamed.usage.output_tokens > 0

    counted = run.counted_since(before)
    assert counted.answers == {(MESSAGES, 200): 2, (f"{MESSAGES}/count_tokens", 200): 1}
    assert counted.prompt == 2 * whole.usage.input_tokens
    assert counted.completion == 2 * whole.usage.output_tokens
    assert counted.faults == 0
    # The ledger counts each request that went to an engine: the one that had tokens counted as well.
    used = (3, counted.prompt, counted.completion)
    assert run.ledger_since(before, used) == used


@pytest.mark.clients
def test_aiperf(run: LaunchedRun, tools: Path, model: Path, tmp_path: Path) -> None:
    """30 streamed chats, 4 at once: aiperf's request count, errors and usage totals are the router's."""
    before = run.counts()
    argv = [str(tools / "aiperf"), "profile", "--model", "tiny", "--url", run.url.removesuffix("/v1")]
    argv += ["--api-key", run.key, "--endpoint-type", "chat", "--streaming", "--tokenizer", str(model)]
    argv += ["--request-count", "30", "--concurrency", "4", "--isl", "64", "--isl-stddev", "16"]
    argv += ["--osl", "16", "--extra-inputs", "ignore_eos:true", "--use-server-token-count"]
    argv += ["--random-seed", "7", "--workers-max", "2", "--ui", "none", "--no-gpu-telemetry"]
    # It would read /metrics as well, without the key, and give up on the 401: that is not to be counted.
    argv += ["--no-server-metrics"]
    # With HF_HUB_OFFLINE aiperf takes a path for the name of a model on the hub; without, for a path.
    tool([*argv, "--output-artifact-dir", str(tmp_path / "out")], tmp_path)

    report = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert report["is_complete"] and not report["was_cancelled"]
    assert report["request_count"]["avg"] == report["completed_request_count"]["avg"] == 30
    assert report["request_error_rate"]["avg"] == 0 and report["error_summary"] == []
    counted = run.counted_since(before)
    assert counted.answers == {(CHAT, 200): 30}
    assert counted.prompt == report["total_usage_prompt_tokens"]["avg"]
    assert counted.completion == report["total_usage_completion_tokens"]["avg"] == 30 * 16
    assert counted.faults == 0
    assert counted.transferred == 30
    used = (30, counted.prompt, counted.completion)
    assert run.ledger_since(before, used) == used


@pytest.mark.clients
def test_guidellm(run: LaunchedRun, tools: Path, model: Path, tmp_path: Path) -> None:
    """24 streamed chats, 4 at once: guidellm's totals by status, and its token sums, are the router's."""
    before = run.counts()
    backend = f"kind=openai_http,target={run.url.removesuffix('/v1')},model=tiny,api_key={run.key}"
    argv = [str(tools / "guidellm"), "run", "--backend", backend, "--profile", "kind=concurrent,streams=4"]
    argv += ["--constraint", "kind=max_requests,count=24"]
    argv += ["--tokenizer", f"kind=hf_auto,model={model}"]
    argv += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"]
    argv += ["--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console-interactive"]
    tool(argv, tmp_path, HF_HUB_OFFLINE="1")

    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = {name: count for name, count in metrics["request_totals"].items() if name != "total"}
    assert totals == {"successful": 24, "incomplete": 0, "errored": 0}
    counted = run.counted_since(before)
    assert counted.answers == {(CHAT, 200): 24}
    assert counted.prompt == metrics["prompt_token_count"]["successful"]["total_sum"]
    assert counted.completion == metrics["output_token_count"]["successful"]["total_sum"] == 24 * 16
    assert counted.faults == 0
    assert counted.transferred == 24
    used = (24, counted.prompt, counted.completion)
    assert run.ledger_since(before, used) == used


@pytest.mark.clients
def test_lm_eval(run: LaunchedRun, tools: Path, model: Path, tmp_path: Path) -> None:
    """`local-completions`: 20 questions of 2 choices by log-likelihood (echo and logprobs), 20 generated.

    lm-eval reports no tokens. It logs what it sent, which is counted here with the model's tokenizer; each
    log-likelihood asks for one token more, each answer for exactly 12.
    """
    rows = [
        {
            "question": f"Node {row} asks for {row + 2} blocks. The queue is",
            "choices": ["short", "long at night"],
            "answer": row % 2,
        }
        for row in range(ROWS)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(CHOICE_TASK.format(data=data))
    (tmp_path / "tiny_words.yaml").write_text(WORDS_TASK.format(data=data))

    before = run.counts()
    endpoint = f"model=tiny,base_url={run.url}/completions,tokenizer={model},tokenizer_backend=huggingface"
    argv = [str(tools / "lm_eval"), "run", "--model", "local-completions"]
    argv += ["--model_args", f"{endpoint},num_concurrent=4,max_retries=1,max_length=2048"]
    argv += ["--tasks", "tiny_choice", "tiny_words", "--include_path", str(tmp_path)]
    argv += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    tool(argv, tmp_path, HF_HUB_OFFLINE="1", OPENAI_API_KEY=run.key)

    [results] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    sizes = {name: size["effective"] for name, size in results["n-samples"].items()}
    assert sizes == {"tiny_choice": ROWS, "tiny_words": ROWS}
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
    sent = logged(tmp_path / "out", "tiny_choice")
    assert len(sent) == 2 * ROWS
    generated = logged(tmp_path / "out", "tiny_words")
    assert len(generated) == ROWS
    counted = run.counted_since(before)
    assert counted.answers == {(COMPLETIONS, 200): 3 * ROWS}
    assert counted.prompt == sum(tokens(model, [*sent, *generated]))
    assert counted.completion == 2 * ROWS * 1 + ROWS * WRITTEN
    assert counted.faults == 0
    used = (3 * ROWS, counted.prompt, counted.completion)
    assert run.ledger_since(before, used) == used


def logged(out: Path, task: str) -> list[str]:
    """The prompts of a task as lm-eval logged them, a choice behind each where it has some."""
    [path] = out.rglob(f"samples_{task}_*.jsonl")
    prompts = []
    for line in path.read_text().splitlines():
        for argument in json.loads(line)["arguments"].values():
            second = argument["arg_1"]
            prompts.append(argument["arg_0"] + (second if isinstance(second, str) else ""))
    return prompts


def tokens(model: Path, texts: list[str]) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [len(tokenizer.encode(text).ids) for text in texts]
