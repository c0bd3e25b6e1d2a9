"""How one engine instance is split over GPUs: derives tensor_parallel and checks the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config.model import Role, RoleSpec
from ..errors import PlanError
from .abilities import ABILITIES
from .explain import Notes, count
from .memory import COMFORTABLE, TIGHT, gib, kv_bytes_per_gpu, weights_per_gpu

if TYPE_CHECKING:
    from ..config.model_facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The part of a site that parallel sizes depend on."""

    slots: int
    """GPUs of a node that one role may use."""
    gpu_bytes: int | None
    device: str
    engine: str

    @property
    def unit(self) -> str:
        return "GPU" if self.device == "cuda" else "worker slot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Parallel sizes of every replica of one role."""

    tensor: int
    pipeline: int
    data: int
    expert: bool
    slots: int
    """GPUs (or worker slots) of a whole node, to count nodes with."""
    copies: bool = False
    """The engine's `expert_copies`."""

    @property
    def width(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline * self.data

    @property
    def span(self) -> int:
        """Nodes of one replica."""
        return -(-self.width // self.slots)

    def spreads(self, facts: ModelFacts) -> bool:
        """Whether data-parallel ranks share the routed experts.

        They do without expert parallelism, too: tensor parallelism of the experts is over all ranks
        (vLLM 0.32: FusedMoEParallelConfig.make; SGLang 0.5.23 with --attn-dp-size; TensorRT-LLM 1.2).
        """
        return self.expert or bool(facts.num_experts and not (self.copies and self.span == 1))

    def formula(self) -> str:
        parts = [f"tensor_parallel {self.tensor}"]
        parts += [f"pipeline_parallel {self.pipeline}"] if self.pipeline > 1 else []
        parts += [f"data_parallel {self.data}"] if self.data > 1 else []
        return " × ".join(parts)


def choose_shape(
    role: Role,
    spec: RoleSpec,
    facts: ModelFacts | None,
    machine: Machine,
    node_slots: int,
    notes: Notes,
    *,
    partner: int | None = None,
) -> Shape:
    """Parallel sizes of a role, with tensor_parallel derived when it is not given.

    `partner` is the tensor_parallel given for the other role when both share one node.
    """
    key = f"{role}.tensor_parallel"
    shape = Shape(
        tensor=1,
        pipeline=spec.pipeline_parallel,
        data=spec.data_parallel,
        expert=spec.expert_parallel,
        slots=node_slots,
        copies=ABILITIES[machine.engine].expert_copies,
    )
    if spec.tensor_parallel is not None:
        tensor = spec.tensor_parallel
        notes.model(key, tensor)
    elif partner is not None:
        tensor = partner
        notes.derived(key, tensor, "as the other role's, which shares the node")
    else:
        tensor, reason = _derive_tensor(shape, facts, machine)
        notes.derived(key, tensor, reason)
    shape = replace(shape, tensor=tensor)
    _check_device(role, shape, machine)
    _check_cpu_experts(role, shape, facts, machine)
    _check_heads(role, shape, facts)
    _check_nodes(role, shape, machine)
    _check_memory(role, shape, facts, machine, notes)
    return shape


def _derive_tensor(shape: Shape, facts: ModelFacts | None, machine: Machine) -> tuple[int, str]:
    if machine.device == "cpu":
        return 1, "one worker per engine on device cpu"
    others = shape.pipeline * shape.data
    sizes = [
        size
        for size in range(1, machine.slots + 1)
        if machine.slots % size == 0 and _heads_fit(size, facts) and _fills(size * others, machine.slots)
    ] or [1]
    weights = facts.weight_bytes if facts is not None else None
    if not weights or machine.gpu_bytes is None:
        unknown = "GPU memory" if weights else "the size of the weights"
        return sizes[-1], f"{unknown} is not known, so as many of {machine.slots} GPUs as the model allows"
    assert facts is not None
    for size in sizes:
        each = _weights_each(replace(shape, tensor=size), facts)
        if size & (size - 1) == 0 and each is not None and each <= COMFORTABLE * machine.gpu_bytes:
            return size, (
                f"smallest power of two whose GPUs hold {gib(weights)} of weights in "
                f"{COMFORTABLE:.0%} of {gib(machine.gpu_bytes)} each"
            )
    return sizes[-1], f"{gib(weights)} of weights want every GPU there is for one replica"


def _fills(width: int, slots: int) -> bool:
    """Whether replicas of `width` GPUs leave none of a node over."""
    return slots % width == 0 or width % slots == 0


def _check_device(role: Role, shape: Shape, machine: Machine) -> None:
    able = ABILITIES[machine.engine]
    if machine.device == "cpu" and shape.width > 1 and not able.cpu_workers:
        raise PlanError(
            f"{role}: {shape.formula()} is {shape.width} workers, but an engine of {able.title} "
            "on device cpu is one",
            hint=f"leave out the parallel sizes of `{role}` and use `replicas` for more engines",
        )


def _check_cpu_experts(role: Role, shape: Shape, facts: ModelFacts | None, machine: Machine) -> None:
    able, experts = ABILITIES[machine.engine], facts is not None and facts.num_experts
    if machine.device == "cpu" and shape.data > 1 and experts and not able.cpu_experts:
        # vLLM 0.32: CpuCommunicator has no all_gatherv and no reduce_scatterv.
        raise PlanError(
            f"{role}.data_parallel is {shape.data}, but on device cpu {able.title} can't divide a model "
            "with experts among ranks",
            hint=f"leave `{role}.data_parallel` out and use `replicas` for more engines",
        )


def _heads_fit(tensor: int, facts: ModelFacts | None) -> bool:
    if facts is None or not facts.num_attention_heads:
        return True
    if facts.num_attention_heads % tensor:
        return False
    shared = facts.num_key_value_heads
    return not shared or shared % tensor == 0 or tensor % shared == 0


def _check_heads(role: Role, shape: Shape, facts: ModelFacts | None) -> None:
    if facts is None:
        return
    if not _heads_fit(shape.tensor, facts):
        heads, shared = facts.num_attention_heads or 1, facts.num_key_value_heads
        what = f"{heads} attention heads" + (f" and {shared} KV heads" if shared else "")
        allowed = [str(size) for size in range(1, heads + 1) if _heads_fit(size, facts)]
        raise PlanError(
            f"{role}.tensor_parallel is {shape.tensor}, but the model has {what}, which do not divide by it",
            hint=f"set `{role}.tensor_parallel` to one of {', '.join(allowed)}",
        )
    layers = facts.num_hidden_layers
    if layers and shape.pipeline > layers:
        raise PlanError(
            f"{role}.pipeline_parallel is {shape.pipeline}, but the model has {layers} layers",
            hint=f"set `{role}.pipeline_parallel` to {layers} or less",
        )
    if shape.expert and not facts.num_experts:
        raise PlanError(
            f"{role}.expert_parallel is true, but the model has no experts",
            hint=f"leave `{role}.expert_parallel` out",
        )


def _check_nodes(role: Role, shape: Shape, machine: Machine) -> None:
    """A replica is part of a node, or a whole number of whole nodes."""
    if shape.width <= machine.slots:
        return
    unit = machine.unit
    if not ABILITIES[machine.engine].spans_nodes:
        raise PlanError(
            f"{role}: {shape.formula()} needs {shape.width} {unit}s, but engine {machine.engine} "
            f"runs inside one node, which has {machine.slots}",
            hint=f"lower the parallel sizes of `{role}` to {count(machine.slots, unit)} in all",
        )
    if machine.slots < shape.slots:
        raise PlanError(
            f"{role}: {shape.formula()} needs {shape.width} {unit}s, but one node holds prefill and decode, "
            f"so at most {machine.slots} of its {shape.slots} are left",
            hint=f"lower the parallel sizes of `{role}`, or use `--nodes 2`",
        )
    ranks = shape.tensor * shape.pipeline
    even = ranks % shape.slots == 0 or shape.slots % ranks == 0
    if shape.width % shape.slots or not even:
        idle = shape.span * shape.slots - shape.width
        wasted = f"{count(idle, unit)} would idle" if idle else "the ranks don't split evenly over them"
        raise PlanError(
            f"{role}: {shape.formula()} needs {shape.width} {unit}s, which is {shape.span} nodes of "
            f"{shape.slots}: {wasted}",
            hint=f"make tensor_parallel × pipeline_parallel × data_parallel of `{role}` a multiple of "
            f"{shape.slots}, or at most {shape.slots}",
        )


def _check_memory(role: Role, shape: Shape, facts: ModelFacts | None, machine: Machine, notes: Notes) -> None:
    each = _weights_each(shape, facts)
    if (
        facts is None
        or each is None
        or machine.gpu_bytes is None
        or machine.device == "cpu"
        or not ABILITIES[machine.engine].weights
    ):
        return
    room = TIGHT * machine.gpu_bytes
    if each <= room:
        notes.derived(f"{role}.gpu_memory", *_use_of_memory(shape, facts, machine.gpu_bytes, each))
        return
    shards = shape.width if shape.spreads(facts) else shape.tensor * shape.pipeline
    raise PlanError(
        f"{role}: {gib(facts.weight_bytes or 0)} of weights over {count(shards, 'GPU')} is "
        f"{gib(each)} each, but a GPU has {gib(machine.gpu_bytes)}",
        hint=_memory_remedy(role, shape, facts, machine, room),
    )


def _weights_each(shape: Shape, facts: ModelFacts | None) -> float | None:
    if facts is None:
        return None
    ranks = shape.tensor * shape.pipeline
    return weights_per_gpu(facts, ranks=ranks, data=shape.data, spread=shape.spreads(facts))


def _use_of_memory(shape: Shape, facts: ModelFacts, gpu_bytes: int, weights: float) -> tuple[str, str]:
    """What a GPU's memory is for, and how it is counted."""
    left = TIGHT * gpu_bytes - weights
    token = kv_bytes_per_gpu(facts, tensor=shape.tensor, pipeline=shape.pipeline)
    kept = "" if token is None else f": at most {left / token:,.0f} tokens of KV cache"
    reason = f"{TIGHT:.0%} of {gib(gpu_bytes)}; activations, buffers and CUDA graphs take some of the rest"
    if token is not None:
        reason += f"; a token is {token / 1024:.1f} KiB on each GPU"
    if shape.spreads(facts) and shape.data > 1 and facts.expert_bytes is not None:
        dense = gib((facts.weight_bytes or 0) - facts.expert_bytes)
        spread = count(shape.tensor * shape.data, "GPU")
        reason += f"; {gib(facts.expert_bytes)} are experts on {spread}; each rank has the other {dense}"
    return f"{gib(weights)} of weights, {gib(left)} left{kept}", reason


def _wide(shape: Shape, facts: ModelFacts, machine: Machine) -> int | None:
    """Data-parallel ranks of one GPU, on whole nodes, over which the experts comfortably fit."""
    if not facts.num_experts or not ABILITIES[machine.engine].spans_nodes or machine.gpu_bytes is None:
        return None
    for nodes in (1, 2, 4, 8, 16):
        wide = replace(shape, tensor=1, pipeline=1, data=nodes * shape.slots, expert=True)
        each = _weights_each(wide, facts)
        if each is not None and each <= COMFORTABLE * machine.gpu_bytes:
            return wide.data
    return None


def _memory_remedy(role: Role, shape: Shape, facts: ModelFacts, machine: Machine, room: float) -> str:
    """What to set so that a GPU's weights take at most `room` bytes."""
    wide = _wide(shape, facts, machine) if facts.kv_latent and not shape.expert else None
    if wide is not None:
        sizes = f"tensor_parallel: 1, data_parallel: {wide}, expert_parallel: true"
        return (
            f"set `{role}: {{{sizes}}}` ({count(wide // shape.slots, 'node')}): more tensor_parallel "
            "would keep the same KV cache on every GPU, as this model's heads share one latent vector"
        )
    fitting = next(
        (
            size
            for size in range(shape.tensor + 1, 1025)
            if (_weights_each(replace(shape, tensor=size), facts) or 0) <= room
            and _heads_fit(size, facts)
            and _fills(size, shape.slots)
        ),
        None,
    )
    if fitting is None:
        return f"raise `{role}.pipeline_parallel`, or use a quantized model"
    if machine.slots < fitting <= shape.slots:
        return (
            f"use `--nodes 2` and `{role}.tensor_parallel: {fitting}`: one node holds prefill and decode here"
        )
    return f"set `{role}.tensor_parallel: {fitting}`"
