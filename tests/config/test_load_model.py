"""model.yaml is read strictly, and every value knows its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcserve.config.load import load_model
from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.errors import ConfigError

from .files import Files

FULL = """\
# What to serve.
model: /models/Llama-3.3-70B
served_name: llama
engine: vllm
engine_args:
  gpu-memory-utilization: 0.9
  enable-chunked-prefill: true
  compilation-config: {level: 3, sizes: [1, 2]}
walltime: 04:00:00
drain: 90
prefill:
  nodes: 2
  tensor_parallel: 8
decode: {replicas: 3, env: {OMP_NUM_THREADS: 010}}
env:
  NCCL_DEBUG: INFO
  RATIO: 1e3
workload:
  input_tokens: 4000
  requests_per_second: 2
router:
  auth: false
  first_byte_timeout: 1:30
"""


def message(files: Files, text: str, *overrides: str) -> ConfigError:
    files.write("model.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_model("model.yaml", overrides)
    assert caught.value.exit_code == 3
    assert caught.value.hint, "every error says what to do"
    return caught.value


def test_reads_every_kind_of_value(files: Files) -> None:
    files.write("model.yaml", FULL)
    spec = load_model("model.yaml").value
    assert spec.model == "/models/Llama-3.3-70B"
    assert spec.engine_args == {
        "gpu-memory-utilization": 0.9,
        "enable-chunked-prefill": True,
        "compilation-config": {"level": 3, "sizes": [1, 2]},
    }
    assert (spec.walltime, spec.drain, spec.router.first_byte_timeout) == (4 * 3600, 90, 90)
    assert spec.prefill == RoleSpec(nodes=2, tensor_parallel=8)
    assert spec.decode is not None and spec.decode.replicas == 3
    assert spec.workload.requests_per_second == 2.0
    assert isinstance(spec.workload.requests_per_second, float)
    assert spec.router.auth is False
    assert spec.aggregated is None and spec.max_model_len is None


def test_keeps_numbers_in_an_environment_as_they_are_written(files: Files) -> None:
    files.write("model.yaml", FULL)
    spec = load_model("model.yaml").value
    assert spec.env == {"NCCL_DEBUG": "INFO", "RATIO": "1e3"}
    assert spec.decode is not None and spec.decode.env == {"OMP_NUM_THREADS": "010"}


def test_every_given_key_has_its_line_and_a_default_has_none(files: Files) -> None:
    files.write("model.yaml", FULL)
    loaded = load_model("model.yaml")
    assert loaded.origins["model"] == "model.yaml:2"
    assert loaded.origins["engine_args.compilation-config"] == "model.yaml:8"
    assert loaded.origins["prefill"] == "model.yaml:11"
    assert loaded.origins["prefill.tensor_parallel"] == "model.yaml:13"
    assert loaded.origins["decode.env.OMP_NUM_THREADS"] == "model.yaml:14"
    assert loaded.file == "model.yaml"
    assert "dtype" not in loaded.origins and "router.port" not in loaded.origins


def test_only_the_model_is_required(files: Files) -> None:
    files.write("model.yaml", "model: org/name\n")
    assert load_model("model.yaml").value == ModelSpec(model="org/name")


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(files: Files) -> None:
    Path("model.yaml").write_bytes(b"\xef\xbb\xbfmodel: a\r\nnodes: 2\r\n")
    assert load_model("model.yaml").value.nodes == 2


def test_anchors_repeat_a_value(files: Files) -> None:
    files.write("model.yaml", "model: a\nprefill: &pool {replicas: 2}\ndecode: *pool\n")
    loaded = load_model("model.yaml")
    assert loaded.value.decode == loaded.value.prefill == RoleSpec(replicas=2)
    assert loaded.origins["decode"] == "model.yaml:3"


@pytest.mark.parametrize("text", ["null", "~", "Null", ""])
def test_null_leaves_an_optional_value_unset(files: Files, text: str) -> None:
    files.write("model.yaml", f"model: a\nmax_model_len: {text}\n")
    assert load_model("model.yaml").value.max_model_len is None


def test_an_explicit_null_removes_a_pool(files: Files) -> None:
    files.write("model.yaml", "model: a\ndecode: {replicas: 2}\n")
    assert load_model("model.yaml", ["decode=null"]).value.decode is None


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("3600", 3600), ("12:30:00", 45000), ("90:00", 5400), ("1-00:00:00", 86400), ('"00:10:00"', 600)],
)
def test_a_walltime_is_not_read_in_base_sixty(files: Files, written: str, seconds: int) -> None:
    files.write("model.yaml", f"model: a\nwalltime: {written}\n")
    assert load_model("model.yaml").value.walltime == seconds


def test_words_that_old_yaml_takes_for_booleans_stay_text(files: Files) -> None:
    files.write("model.yaml", "model: a\nquantization: no\nserved_name: on\nenv: {A: yes}\n")
    spec = load_model("model.yaml").value
    assert (spec.quantization, spec.served_name, spec.env) == ("no", "on", {"A": "yes"})


# --set


def test_set_wins_over_the_file_and_the_last_one_over_the_others(files: Files) -> None:
    files.write("model.yaml", "model: a\ndecode: {replicas: 2, nodes: 1}\n")
    loaded = load_model("model.yaml", ["decode.replicas=3", "decode.replicas=4", "router.auth=false"])
    assert loaded.value.decode == RoleSpec(replicas=4, nodes=1)
    assert loaded.value.router.auth is False
    assert loaded.origins["decode.replicas"] == "--set decode.replicas"
    assert loaded.origins["decode.nodes"] == "model.yaml:2"


def test_set_takes_whole_values_and_engine_flags(files: Files) -> None:
    files.write("model.yaml", "model: a\n")
    spec = load_model(
        "model.yaml",
        ["prefill={replicas: 2}", "engine_args.max-num-seqs=8", "engine_args.cudagraph=[1, 2]", "env.X=a=b"],
    ).value
    assert spec.prefill == RoleSpec(replicas=2)
    assert spec.engine_args == {"max-num-seqs": 8, "cudagraph": [1, 2]}
    assert spec.env == {"X": "a=b"}


def test_loading_does_not_change_what_an_earlier_load_gave(files: Files) -> None:
    files.write("model.yaml", "model: a\nenv: {A: b}\n")
    first = load_model("model.yaml")
    load_model("model.yaml", ["env.A=c"])
    assert first.value.env == {"A": "b"}


# Bad input: (text of model.yaml, message, part of the hint)

POOL_KEYS = (
    "nodes, node_type, replicas, tensor_parallel, pipeline_parallel, data_parallel, expert_parallel, "
    "engine_args, env"
)

BAD = {
    "a misspelt key": (
        "model: a\ndecode:\n  nodes: 1\n  replicsa: 2\n",
        f"model.yaml:4: key 'decode.replicsa' is unknown; allowed here: {POOL_KEYS}",
        "Did you mean 'decode.replicas'?",
    ),
    "a key with dashes": (
        "model: a\ndecode: {tensor-parallel: 2}\n",
        f"model.yaml:2: key 'decode.tensor-parallel' is unknown; allowed here: {POOL_KEYS}",
        "Did you mean 'decode.tensor_parallel'?",
    ),
    "a key of another section": (
        "model: a\nprefill: {policy: round_robin}\n",
        f"model.yaml:2: key 'prefill.policy' is unknown; allowed here: {POOL_KEYS}",
        "'policy' belongs at 'router.policy'.",
    ),
    "a key like no other": (
        "model: a\nrouter: {xyzzy: 1}\n",
        "model.yaml:2: key 'router.xyzzy' is unknown; "
        "allowed here: port, policy, processes, queue_seconds, auth, max_body_mib, first_byte_timeout,"
        " retries",
        "Remove the key",
    ),
    "a key given twice": (
        "model: a\nnodes: 1\nmodel: b\n",
        "model.yaml:3: key 'model' is given twice, first at model.yaml:1",
        "Keep one",
    ),
    "no model": ("nodes: 2\n", "model.yaml:1: key 'model' is missing", "/models/Llama-3.3-70B"),
    "an empty model": ("model:\n", "model.yaml:1: key 'model' must be text, not empty", "Hub id"),
    "a model without characters": ('model: ""\n', "model.yaml:1: key 'model' must not be empty", "Hub id"),
    "a number for text": (
        "model: 7\n",
        "model.yaml:1: key 'model' must be text, not '7'",
        'Put the value in quotes: "7".',
    ),
    "a boolean for text": (
        "model: true\n",
        "model.yaml:1: key 'model' must be text, not 'true'",
        'in quotes: "true"',
    ),
    "a list for text": ("model: [a]\n", "model.yaml:1: key 'model' must be text, not a list", "Hub id"),
    "a line break in a name": (
        'model: "a\\nb"\n',
        "model.yaml:1: key 'model' must be one line of printable characters, not 'a\\nb'",
        "Remove the line break",
    ),
    "a word for a number": (
        "model: a\nnodes: two\n",
        "model.yaml:2: key 'nodes' must be an integer, not 'two'",
        "Nodes of the job",
    ),
    "a quoted number": (
        'model: a\nnodes: "2"\n',
        "model.yaml:2: key 'nodes' must be an integer, not the text '2'",
        "Remove the quotes.",
    ),
    "a fraction for an integer": (
        "model: a\nnodes: 2.0\n",
        "model.yaml:2: key 'nodes' must be an integer, not '2.0'",
        "Nodes of the job",
    ),
    "an octal number": (
        "model: a\nnodes: 010\n",
        "model.yaml:2: key 'nodes' must be an integer, not '010'",
        "decimal number without leading zeros",
    ),
    "an underscore in a number": (
        "model: a\nmax_model_len: 32_768\n",
        "model.yaml:2: key 'max_model_len' must be an integer, not '32_768'",
        "decimal number",
    ),
    "an endless number": (
        f"model: a\nnodes: {'9' * 5000}\n",
        "model.yaml:2: key 'nodes' has more than 18 digits",
        "smaller",
    ),
    "too small": (
        "model: a\nprefill: {replicas: 0}\n",
        "model.yaml:2: key 'prefill.replicas' must be at least 1, not 0",
        "Engine instances",
    ),
    "outside a range": (
        "model: a\nrouter: {port: 70000}\n",
        "model.yaml:2: key 'router.port' must be from 1 to 65535, not 70000",
        "Port of the endpoint",
    ),
    "a number that is not finite": (
        "model: a\nworkload: {requests_per_second: 1e999}\n",
        "model.yaml:2: key 'workload.requests_per_second' must be a finite number, not 1e999",
        "smaller",
    ),
    "infinity": (
        "model: a\nworkload: {requests_per_second: .inf}\n",
        "model.yaml:2: key 'workload.requests_per_second' must be a number, not '.inf'",
        "arrival rate",
    ),
    "yes for true": (
        "model: a\nrouter: {auth: yes}\n",
        "model.yaml:2: key 'router.auth' must be true or false, not 'yes'",
        "API key",
    ),
    "a misspelt choice": (
        "model: a\nengine: vlm\n",
        "model.yaml:2: key 'engine' must be one of vllm, sglang, tensorrt-llm, fake, not 'vlm'",
        "Did you mean 'vllm'?",
    ),
    "a choice like no other": (
        "model: a\nrouter: {policy: 5}\n",
        "model.yaml:2: key 'router.policy' must be one of kv, round_robin, least_load, power_of_two,"
        " consistent_hash, prefix, not '5'",
        "How replicas are chosen.",
    ),
    "a pattern missed": (
        "model: a\nserved_name: my model\n",
        r"model.yaml:2: key 'served_name' must match [\w.\-/:]+, not 'my model'",
        "Name clients put",
    ),
    "a duration in words": (
        "model: a\nwalltime: 4h\n",
        "model.yaml:2: key 'walltime' must be seconds, MM:SS, HH:MM:SS or D-HH[:MM[:SS]], not '4h'",
        "04:00:00",
    ),
    "a duration with 61 minutes": (
        "model: a\nwalltime: 1:61:00\n",
        "model.yaml:2: key 'walltime' must be seconds, MM:SS, HH:MM:SS or D-HH[:MM[:SS]], not '1:61:00'",
        "04:00:00",
    ),
    "bare digits in quotes, which Slurm reads as minutes": (
        'model: a\nwalltime: "30"\n',
        "model.yaml:2: key 'walltime' must be seconds, MM:SS, HH:MM:SS or D-HH[:MM[:SS]], not the text '30'",
        "04:00:00",
    ),
    "too short a walltime": (
        "model: a\nwalltime: 0:30\n",
        "model.yaml:2: key 'walltime' must be at least 60 seconds, not 0:30",
        "How long",
    ),
    "a pool without keys": (
        "model: a\ndecode:\n",
        "model.yaml:2: key 'decode' must be a mapping, not empty",
        "write {} for its defaults",
    ),
    "a pool that is a number": (
        "model: a\ndecode: 2\n",
        "model.yaml:2: key 'decode' must be a mapping, not '2'",
        "The pool that writes answers.",
    ),
    "a boolean in the environment": (
        "model: a\nenv: {DEBUG: true}\n",
        "model.yaml:2: key 'env.DEBUG' must be text or a number, not 'true'",
        "quotes",
    ),
    "nothing in the environment": (
        "model: a\nenv:\n  DEBUG:\n",
        "model.yaml:3: key 'env.DEBUG' must be text or a number, not empty",
        'an empty one is ""',
    ),
    "a list in the environment": (
        "model: a\nenv: {DEBUG: [1]}\n",
        "model.yaml:2: key 'env.DEBUG' must be text or a number, not a list",
        "quotes",
    ),
    "no variable's name": (
        "model: a\nenv: {MY-VAR: 1}\n",
        "model.yaml:2: key 'env.MY-VAR' must be a variable's name: letters, digits and _, "
        "not starting with a digit",
        "Correct the name.",
    ),
    "yes for an engine flag": (
        "model: a\nengine_args: {enforce-eager: yes}\n",
        "model.yaml:2: key 'engine_args.enforce-eager' has the value yes, which YAML readers disagree on",
        "Write true, false or a decimal number, or 'yes' in quotes",
    ),
    "an octal engine flag": (
        "model: a\nengine_args:\n  cfg: {seed: 0777}\n",
        "model.yaml:3: key 'engine_args.cfg.seed' has the value 0777, which YAML readers disagree on",
        "'0777' in quotes",
    ),
    "engine flags as a list": (
        "model: a\nengine_args: [--enforce-eager]\n",
        "model.yaml:2: key 'engine_args' must be a mapping, not a list",
        "Flags handed to the engine",
    ),
    "an empty file": ("", "model.yaml:1: the file is empty", "key: value"),
    "nothing but a comment": ("# model: a\n", "model.yaml:1: the file is empty", "key: value"),
    "nothing but a document's start": ("---\n", "model.yaml:1: the file is empty", "key: value"),
    "a list": ("- model: a\n", "model.yaml:1: the file must be a mapping, not a list", "key: value"),
    "a word": ("model\n", "model.yaml:1: the file must be a mapping, not 'model'", "key: value"),
    "two documents": (
        "model: a\n---\nmodel: b\n",
        "model.yaml:2: a second document begins here",
        "Keep one document",
    ),
    "a tab": (
        "model: a\ndecode:\n\treplicas: 2\n",
        "model.yaml:3: not YAML: the line is indented with a tab",
        "Indent with spaces.",
    ),
    "an open bracket": (
        "model: a\nprefill: {replicas: 2\nnodes: 3\n",
        "model.yaml:3: not YAML: did not find expected ',' or '}' (column 6)",
        "this line and the one before it",
    ),
    "a colon in a value": (
        "model: a: b\n",
        "model.yaml:1: not YAML: mapping values are not allowed in this context (column 9)",
        "colon, quote or bracket",
    ),
    "a control character": (
        "model: a\nsite: \x01\n",
        "model.yaml:2: not YAML: it has a control character",
        "plain text",
    ),
    "a tag": ("model: !!str 7\n", "model.yaml:1: the tag 'tag:yaml.org,2002:str' is not supported", "quotes"),
    "a Python object": (
        "model: !!python/object/apply:os.system [id]\n",
        "model.yaml:1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not supported",
        "Remove it",
    ),
    "a merge key": (
        "model: a\nprefill: &p {nodes: 1}\ndecode:\n  <<: *p\n",
        "model.yaml:4: merge keys (`<<`) are not supported",
        "Write the keys out.",
    ),
    "an unknown alias": (
        "model: *name\n",
        "model.yaml:1: the alias '*name' has no anchor '&name' that ends before it",
        "Write the value out.",
    ),
    "an alias within itself": (
        "model: a\nengine_args: &a {x: *a}\n",
        "model.yaml:2: the alias '*a' has no anchor '&a' that ends before it",
        "Write the value out.",
    ),
    "a key that is a list": ("[a, b]: 1\n", "model.yaml:1: a key must be a plain word", "key: value"),
    "too deep": (
        "model: a\nengine_args: {x: " + "[" * 40 + "]" * 40 + "}\n",
        "model.yaml:2: nested more than 32 deep",
        "Flatten",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(files: Files, name: str) -> None:
    text, expected, hint = BAD[name]
    error = message(files, text)
    assert error.message == expected
    assert hint in str(error.hint)


def test_refuses_a_bomb_of_aliases_quickly(files: Files) -> None:
    lines = ["model: a", "engine_args:", "  l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    error = message(files, "\n".join(lines))
    assert error.message == "model.yaml:7: more than 20000 values, aliases counted in full"


BAD_SET = {
    "no equals sign": ("nodes", "--set nodes: must be KEY=VALUE"),
    "no key": ("=3", "--set =3: must be KEY=VALUE"),
    "an empty part": ("decode..nodes=3", "--set decode..nodes=3: must be KEY=VALUE"),
    "an unknown key": (
        "decode.replica=3",
        f"--set decode.replica: key 'decode.replica' is unknown; allowed here: {POOL_KEYS}",
    ),
    "a wrong type": (
        "decode.replicas=many",
        "--set decode.replicas: key 'decode.replicas' must be an integer, not 'many'",
    ),
    "a value out of range": ("nodes=0", "--set nodes: key 'nodes' must be at least 1, not 0"),
    "a key below a value": (
        "model.name=x",
        "--set model.name: key 'model' at model.yaml:1 is 'a', not a mapping",
    ),
    "broken YAML": ("decode={", "--set decode: not YAML: did not find expected node content (column 1)"),
    "nothing after the equals sign": ("model=", "--set model: key 'model' must be text, not empty"),
    "two lines": ("nodes=1\n---\n2", "--set nodes: a second document begins here"),
}


@pytest.mark.parametrize("name", BAD_SET)
def test_refuses_a_set_with(files: Files, name: str) -> None:
    override, expected = BAD_SET[name]
    assert message(files, "model: a\n", override).message == expected


# Files that can't be read


def test_refuses_a_missing_file(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"^model\.yaml: there is no such file"):
        load_model("model.yaml")


def test_refuses_a_directory(files: Files) -> None:
    Path("model.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^model\.yaml: a directory, not a model\.yaml$"):
        load_model("model.yaml")


def test_refuses_a_path_through_a_file(files: Files) -> None:
    files.write("model.yaml", "model: a\n")
    with pytest.raises(ConfigError, match=r"^model\.yaml/x: can't be read: Not a directory$"):
        load_model("model.yaml/x")


def test_refuses_what_is_not_utf8(files: Files) -> None:
    Path("model.yaml").write_bytes("model: a\nsite: Z\u00fcrich\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^model\.yaml:2: byte 0xfc is not UTF-8 text$"):
        load_model("model.yaml")


def test_refuses_a_huge_file_without_reading_all_of_it(files: Files) -> None:
    with Path("model.yaml").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ConfigError, match=r"^model\.yaml: larger than 1 MiB, so it is no model\.yaml$"):
        load_model("model.yaml")
