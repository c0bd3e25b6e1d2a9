"""Requests that can't work are refused before sbatch, naming what to change and what would idle."""

# Messages are quoted whole.
# ruff: noqa: E501
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.config.site import Site
from hpcserve.errors import PlanError

from .cases import DEEPSEEK, LLAMA_8B, LLAMA_70B, contained, model, plan, site, tp


class Case(NamedTuple):
    name: str
    spec: ModelSpec
    at: Site
    flags: dict[str, Any]
    message: str
    hint: str


CASES = [
    Case(
        "prefill and decode nodes fall short of --nodes",
        model(), site(), {"nodes": 8, "prefill": 3, "decode": 4},
        "--prefill 3 + --decode 4 is 7 nodes, but the job has 8: 1 node (8 GPUs) would idle",
        "use `--nodes 7`, or --decode 5",
    ),
    Case(
        "a Hub id can't be staged",
        model(model="meta-llama/Llama-3.3-70B-Instruct", stage=True), site(), {},
        "stage is true, but model is meta-llama/Llama-3.3-70B-Instruct: only a model that is an absolute path can be staged",
        "download it to a directory that all nodes can read, and name that as `model`; or leave `stage` out",
    ),
    Case(
        "prefill and decode nodes exceed --nodes",
        model(), site(), {"nodes": 4, "prefill": 3, "decode": 4},
        "--prefill 3 + --decode 4 is 7 nodes, but the job has 4",
        "use `--nodes 7`, or --decode 1",
    ),
    Case(
        "nodes of model.yaml disagree with the flag",
        model(prefill=RoleSpec(nodes=1), decode=RoleSpec(nodes=2)), site(), {"nodes": 2},
        "prefill.nodes 1 + decode.nodes 2 is 3 nodes, but the job has 2",
        "use `--nodes 3`, or --decode 1",
    ),
    Case(
        "both role flags on one node",
        model(), site(), {"nodes": 1, "prefill": 1, "decode": 1},
        "--prefill 1 + --decode 1 is 2 nodes, but the job has 1",
        "leave both out: one node holds prefill and decode on different GPUs; or use `--nodes 2`",
    ),
    Case(
        "prefill takes every node",
        model(), site(), {"nodes": 4, "prefill": 4},
        "--prefill 4 leaves no node for decode: the job has 4",
        "use `--nodes 5`, or fewer nodes for prefill",
    ),
    Case(
        "aggregated with prefill",
        model(aggregated=RoleSpec(), prefill=RoleSpec()), site(), {},
        "`aggregated` is set in model.yaml together with `prefill`: a replica does both or one of the two",
        "remove `aggregated`, or remove `prefill`, `decode` and their flags",
    ),
    Case(
        "aggregated with --decode",
        model(aggregated=RoleSpec()), site(), {"nodes": 2, "decode": 1},
        "`aggregated` is set in model.yaml together with --decode: a replica does both or one of the two",
        "remove `aggregated`, or remove `prefill`, `decode` and their flags",
    ),
    Case(
        "tensor_parallel leaves GPUs of a node over",
        model(aggregated=tp(3)), site(), {"nodes": 2},
        "aggregated: replicas of tensor_parallel 3 leave over 2 of the 8 GPUs of a node: 4 GPUs would idle",
        "make the GPUs of one aggregated replica one of 1, 2, 4, 8",
    ),
    Case(
        "too few replicas for the nodes",
        model(prefill=tp(4, replicas=1), decode=tp(4)), site(), {"nodes": 2},
        "prefill.replicas is 1, but there is room for 2 on 1 node of 8 GPUs: 4 GPUs would idle",
        "set `prefill.replicas` to 2, or leave it out",
    ),
    Case(
        "too many replicas for the nodes",
        model(aggregated=tp(8, replicas=3)), site(), {"nodes": 2},
        "aggregated.replicas is 3, but there is room for 2 of tensor_parallel 8 on 2 nodes of 8 GPUs",
        "set `aggregated.replicas` to 2, or give aggregated more nodes",
    ),
    Case(
        "fewer replicas than nodes",
        model(decode=RoleSpec(nodes=3, replicas=2), device="cpu"), site(engines=2), {"nodes": 4},
        "decode.replicas is 2, but decode has 3 nodes: 1 node (2 worker slots) would idle",
        "set `decode.replicas` to 6, or give decode 2 nodes",
    ),
    Case(
        "weights that no single node holds",
        model(aggregated=tp(8)), site(), {"facts": DEEPSEEK, "nodes": 1},
        "aggregated: 642 GiB of weights over 8 GPUs is 80 GiB each, but a GPU has 80 GiB",
        "set `aggregated.tensor_parallel: 16`",
    ),
    Case(
        "KV heads and tensor_parallel",
        model(aggregated=tp(6)), site(gpus=6), {"facts": LLAMA_8B},
        "aggregated.tensor_parallel is 6, but the model has 32 attention heads and 8 KV heads, "
        "which do not divide by it",
        "set `aggregated.tensor_parallel` to one of 1, 2, 4, 8, 16, 32",
    ),
    Case(
        "more pipeline stages than layers",
        model(aggregated=tp(1, pipeline_parallel=64)), site(), {"facts": LLAMA_8B, "nodes": 8},
        "aggregated.pipeline_parallel is 64, but the model has 32 layers",
        "set `aggregated.pipeline_parallel` to 32 or less",
    ),
    Case(
        "experts of a dense model",
        model(aggregated=tp(8, expert_parallel=True)), site(), {"facts": LLAMA_70B},
        "aggregated.expert_parallel is true, but the model has no experts",
        "leave `aggregated.expert_parallel` out",
    ),
    Case(
        "weights don't fit",
        model(aggregated=tp(1)), site(), {"facts": LLAMA_70B},
        "aggregated: 131 GiB of weights over 1 GPU is 131 GiB each, but a GPU has 80 GiB",
        "set `aggregated.tensor_parallel: 2`",
    ),
    Case(
        "weights don't fit beside the other role",
        model(prefill=RoleSpec(), decode=RoleSpec()), site(memory=24), {"facts": LLAMA_70B},
        "prefill: 131 GiB of weights over 4 GPUs is 33 GiB each, but a GPU has 24 GiB",
        "use `--nodes 2` and `prefill.tensor_parallel: 8`: one node holds prefill and decode here",
    ),
    Case(
        "a replica over part of a node more",
        model(aggregated=tp(4, pipeline_parallel=3)), site(), {"nodes": 3},
        "aggregated: tensor_parallel 4 × pipeline_parallel 3 needs 12 GPUs, which is 2 nodes of 8: "
        "4 GPUs would idle",
        "make tensor_parallel × pipeline_parallel × data_parallel of `aggregated` a multiple of 8, or at most 8",
    ),
    Case(
        "data-parallel ranks that straddle nodes",
        model(aggregated=tp(3, data_parallel=4)), site(gpus=4), {"nodes": 3},
        "aggregated: tensor_parallel 3 × data_parallel 4 needs 12 GPUs, which is 3 nodes of 4: "
        "the ranks don't split evenly over them",
        "make tensor_parallel × pipeline_parallel × data_parallel of `aggregated` a multiple of 4, or at most 4",
    ),
    Case(
        "nodes left over beside replicas of two nodes",
        model(aggregated=tp(16)), site(), {"nodes": 5},
        "aggregated has 5 nodes, but a replica of tensor_parallel 16 takes 2: 1 node (8 GPUs) would idle",
        "use 4 or 6 nodes for aggregated",
    ),
    Case(
        "nodes that no split of wide replicas uses",
        model(prefill=tp(16), decode=tp(16)), site(), {"nodes": 5},
        "5 nodes don't divide into prefill replicas of 2 nodes and decode replicas of 2 nodes: "
        "1 node (8 GPUs) would idle",
        "use `--nodes 4` or `--nodes 6`",
    ),
    Case(
        "fewer nodes than two wide replicas take",
        model(prefill=tp(16), decode=tp(32)), site(), {"nodes": 4},
        "a prefill replica takes 2 nodes and a decode replica 4 nodes, but the job has 4",
        "use `--nodes 6` or more, or an `aggregated:` pool",
    ),
    Case(
        "the fake engine over several nodes",
        model(engine="fake", aggregated=tp(16)), site(), {"nodes": 2},
        "aggregated: tensor_parallel 16 needs 16 GPUs, but engine fake runs inside one node, which has 8",
        "lower the parallel sizes of `aggregated` to 8 GPUs in all",
    ),
    Case(
        "parallel sizes on the CPU",
        model(engine="sglang", device="cpu", aggregated=tp(2)), site(gpus=0), {},
        "aggregated: tensor_parallel 2 is 2 workers, but an engine of SGLang on device cpu is one",
        "leave out the parallel sizes of `aggregated` and use `replicas` for more engines",
    ),
    Case(
        "ranks that share experts on the CPU",
        model(device="cpu", aggregated=tp(1, data_parallel=2)), site(gpus=0, engines=2), {"facts": DEEPSEEK},
        "aggregated.data_parallel is 2, but on device cpu vLLM can't divide a model with experts among ranks",
        "leave `aggregated.data_parallel` out and use `replicas` for more engines",
    ),
    Case(
        "decode with pipeline stages",
        model(prefill=tp(8), decode=tp(4, pipeline_parallel=2)), site(), {"nodes": 2},
        "decode.pipeline_parallel is 2, but vLLM's NIXL connector can't receive KV blocks "
        "with more than one pipeline stage",
        "use `decode: {pipeline_parallel: 1}` and a larger tensor_parallel",
    ),
    Case(
        "prefill with pipeline stages",
        model(prefill=tp(4, pipeline_parallel=2), decode=tp(8)), site(), {"nodes": 2},
        "prefill.pipeline_parallel is 2, but vLLM's NIXL connector can't read KV blocks "
        "of more than one pipeline stage",
        "use `prefill: {pipeline_parallel: 1}` and a larger tensor_parallel",
    ),
    Case(
        "decode on fewer GPUs than the KV heads that prefill repeats",
        model(prefill=tp(16), decode=tp(8)), site(),
        {"nodes": 3, "facts": replace(LLAMA_70B, kv_values=2048)},
        "prefill.tensor_parallel is 16 and decode.tensor_parallel 8, but the model has 8 KV heads, and vLLM's "
        "NIXL connector can't read from more GPUs than that into fewer",
        "set `prefill.tensor_parallel` to 8 or less, or both to 16",
    ),
    Case(
        "tensor_parallel of the roles don't divide one another",
        model(prefill=tp(2, replicas=3), decode=tp(3, replicas=2)), site(gpus=6), {"nodes": 2},
        "prefill.tensor_parallel is 2 and decode.tensor_parallel 3, but for KV transfer one must divide the other",
        "set both to 3, or one to a multiple of the other",
    ),
    Case(
        "one GPU for two roles",
        model(prefill=RoleSpec()), site(gpus=1), {"nodes": 1},
        "prefill and decode need one GPU each, but the job has one node with 1",
        "use `--nodes 2`, or an `aggregated:` pool",
    ),
    Case(
        "roles of one node leave GPUs over",
        model(prefill=tp(4, replicas=1), decode=tp(2, replicas=1)), site(), {"nodes": 1},
        "1 prefill replica of 4 and 1 decode replica of 2 GPUs use 6 of the 8 of the node: 2 would idle",
        "choose `replicas` and `tensor_parallel` of `prefill` and `decode` so that they add up to 8",
    ),
    Case(
        "roles of one node want too many GPUs",
        model(prefill=tp(4, replicas=2), decode=tp(4, replicas=1)), site(), {"nodes": 1},
        "2 prefill replicas of 4 and 1 decode replica of 4 GPUs need 12, but one node has 8",
        "lower `replicas` or `tensor_parallel`, or use `--nodes 2`",
    ),
    Case(
        "more nodes than the site allows",
        model(), site(max_nodes=4), {"nodes": 5},
        "--nodes asks for 5 nodes, but a job at site here may have at most 4",
        "use `--nodes 4` or fewer",
    ),
    Case(
        "a walltime beyond the queue's",
        model(), site(max_walltime=86400), {"walltime": 90000},
        "--walltime is 1-01:00:00, but a job at site here may run at most 1-00:00:00",
        "use `--walltime 1-00:00:00` or less",
    ),
    Case(
        "drain as long as the walltime",
        model(drain=600, walltime=600), site(), {},
        "drain is 600 s, but the walltime is only 600 s: the endpoint would refuse every request",
        "lower `drain` in model.yaml, or raise `--walltime`",
    ),
    Case(
        "ready_timeout beyond the walltime",
        model(ready_timeout=3600), site(), {"walltime": 1800},
        "ready_timeout is 3600 s, but the walltime is only 1800 s",
        "set `ready_timeout` to 1620 s or less, or raise `--walltime`",
    ),
    Case(
        "no account",
        model(), site(account_required=True), {},
        "site here takes no job without an account",
        "add `--account NAME`, or `slurm: {account: NAME}` to your copy of the site config",
    ),
    Case(
        "pyxis without an image",
        model(), contained("pyxis"), {},
        "site here runs programs in pyxis, but container.image is not set",
        "add `container: {image: …}` to the site config, or set `runtime: none`",
    ),
    Case(
        "apptainer without an image",
        model(), contained("apptainer"), {},
        "site here runs programs in apptainer, but container.image is not set",
        "add `container: {image: …}` to the site config, or set `runtime: none`",
    ),
    Case(
        "prefill and decode over Slingshot",
        model(prefill=RoleSpec()), site(network="slingshot"), {"nodes": 2},
        "site here has a Slingshot network, and NIXL's UCX can't use it: KV blocks would not reach the decode nodes",
        "use an `aggregated:` pool in model.yaml; for prefill and decode NIXL would need its LIBFABRIC plugin "
        "in place of UCX, the site's own libfabric with the cxi provider (1.21 or newer), and "
        "`--network=job_vni` in `slurm.extra` of the site, which hpcserve does not set up",
    ),
    Case(
        "cuda where there are no GPUs",
        model(device="cuda"), site(gpus=0), {},
        "device is cuda, but the nodes of site here have no GPU",
        "use `device: cpu`, or another `--site`",
    ),
    Case(
        "a name that can't be a directory",
        model(), site(), {"name": "a/b"},
        "--name is 'a/b'; allowed are up to 64 letters, digits, `.`, `_` and `-`",
        "use a name such as `--name llama-eval`",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_rejected(case: Case) -> None:
    with pytest.raises(PlanError) as caught:
        plan(case.spec, case.at, **case.flags)
    assert caught.value.message == case.message
    assert caught.value.hint == case.hint
    assert caught.value.exit_code == 4
