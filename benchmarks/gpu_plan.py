"""Counts what training and decoding would do on a GPU: kernels, operations of the host, and copies. Needs no GPU.

    python -m benchmarks.gpu_plan
    python -m benchmarks.gpu_plan --names      # and the names of what waits for the GPU

Each function runs once on the CPU, with toy sizes. TensorFlow's own optimised graph of it is then placed as on a GPU:
its builds for CUDA list their kernels for GPUs, with the types of each, and the arguments that it takes from, or leaves
in, the memory of the host. A row of the table is what is outside all loops, or one iteration (a word) of a loop:

    kernels    operations that start kernels on the GPU
    host       operations on numbers in the host's memory, such as shapes
    to host    tensors that are copied to the host, each of which waits for the GPU
    to GPU     tensors that are copied to the GPU, which wait for nothing
    no kernel  operations that GPUs have no kernel for, so that the host computes them

It does not see how many kernels an operation starts, nor what TensorFlow's optimiser would do otherwise for a GPU. The
features of a batch are taken to be on the GPU, where `input_pipeline.copy_ahead` puts them. The last line is
JSON.
"""

import collections
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import model
from benchmarks.training import make_project_step
from captioning.base.cli import InputError, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.decoder import decoding
from captioning.training.input_pipeline import EncodedCaptions, make_dataset

# They start no kernel: they pass a tensor on, look at its shape, or keep a list of tensors, or a variable.
# fmt: off
STARTS_NOTHING = {
    "Const", "Enter", "EnsureShape", "Exit", "ExpandDims", "Identity", "IdentityN", "LoopCond", "Merge",
    "NextIteration", "NoOp", "Rank", "ReadVariableOp", "Reshape", "Shape", "ShapeN", "Size", "Squeeze",
    "StopGradient", "Switch", "TensorListGetItem", "TensorListPopBack", "TensorListPushBack", "TensorListReserve",
    "TensorListSetItem", "VarHandleOp", "_Arg", "_Retval",
}
# fmt: on
METADATA = {"Rank", "Shape", "ShapeN", "Size"}  # TensorFlow computes them where their input is
FUSED_ON_CPUS = "_UnaryOpsComposition"  # of several operations, each of which has a kernel for GPUs


class Counts(NamedTuple):
    """What is done outside all loops, or in one iteration of a loop; nodes and tensors by name."""

    kernels: list[str]
    host: list[str]
    to_host: list[str]
    to_gpu: list[str]
    no_kernel: list[str]


class Kernel(NamedTuple):
    """A kernel for GPUs."""

    types: dict[str, set[int]]  # the types that it takes, by attribute
    host_args: set[str]  # the inputs and outputs that are in the host's memory


class PlacedNode(NamedTuple):
    """A node of a graph as on a GPU."""

    node: Any
    is_on_cpu: bool  # as a whole; other nodes run on the GPU, or are scheduled with it and only see the host's memory
    has_kernel: bool
    inputs: list[tuple[str, int]]  # the node and the number of the output that each comes from
    input_on_host: list[bool]
    output_on_host: list[bool]
    output_types: list[int]


# The kernels.


@functools.cache
def gpu_kernels() -> dict[str, list[Kernel]]:
    """Returns TensorFlow's kernels for GPUs, by operation.

    Raises:
        InputError: this TensorFlow has none.
    """
    from tensorflow.python.framework import kernels  # not a public name of TensorFlow

    by_op = collections.defaultdict(list)
    registered = kernels.get_all_registered_kernels().kernel
    if not any(kernel.device_type == "GPU" and kernel.op == "MatMul" for kernel in registered):
        raise InputError(
            "expected a TensorFlow that is built for CUDA, found one without kernels for GPUs: run this where "
            "`pip install tensorflow` installs one, on Linux on x86-64"
        )
    for kernel in registered:
        if kernel.device_type in ("GPU", "DEFAULT"):
            allowed = {constraint.name: set(constraint.allowed_values.list.type) for constraint in kernel.constraint}
            types = {name: types for name, types in allowed.items() if types}  # others are not about types
            by_op[kernel.op].append(Kernel(types, set(kernel.host_memory_arg)))
    return by_op


def find_kernel(node: Any) -> Kernel | None:
    """Returns the kernel for GPUs that a node has, if any."""
    for kernel in gpu_kernels().get(node.op, []):
        if all(node.attr[name].type in types for name, types in kernel.types.items()):
            return kernel
    return None


def expand_args(node: Any, args: Any) -> Iterator[tuple[str, int]]:
    """Yields the name and the type of a node's inputs, or outputs; the definition has one entry for several."""
    for arg in args:
        if arg.type_list_attr:
            types = list(node.attr[arg.type_list_attr].list.type)
        else:
            num = node.attr[arg.number_attr].i if arg.number_attr else 1
            types = [node.attr[arg.type_attr].type if arg.type_attr else arg.type] * num
        yield from ((arg.name, dtype) for dtype in types)


# The graph.


def split_name(text: str) -> tuple[str, int]:
    """Splits the name of a tensor, `node:1` or `node`, into that of the node and the number of the output."""
    name, _, index = text.removeprefix("^").partition(":")
    return name, int(index or 0)


def place(graph_def: Any, pinned: set[str]) -> dict[str, PlacedNode]:
    """Places a graph on a GPU.

    Args:
        graph_def: a GraphDef, whose loops are made of Enter, Switch and so on.
        pinned: the names of nodes that the program itself places on the CPU.
    """
    from tensorflow.python.framework import op_def_registry  # not a public name of TensorFlow

    nodes = {node.name: node for node in graph_def.node}

    def is_on_cpu(node: Any) -> bool:
        if node.op == FUSED_ON_CPUS:
            return False
        if node.name in pinned or find_kernel(node) is None:
            return True
        if node.op == "_Arg":  # functions take int32 from the host
            return node.attr["T"].type == tf.int32.as_datatype_enum
        return node.op in METADATA and is_on_cpu(nodes[split_name(node.input[0])[0]])

    placed = {}
    for name, node in nodes.items():
        kernel, on_cpu, op_def = find_kernel(node), is_on_cpu(node), op_def_registry.get(node.op)
        host_args = kernel.host_args if kernel else set()
        outputs = list(expand_args(node, op_def.output_arg))
        placed[name] = PlacedNode(
            node=node,
            is_on_cpu=on_cpu,
            has_kernel=kernel is not None or node.op == FUSED_ON_CPUS,
            inputs=[split_name(text) for text in node.input if not text.startswith("^")],
            input_on_host=[on_cpu or arg in host_args for arg, _ in expand_args(node, op_def.input_arg)],
            output_on_host=[on_cpu or arg in host_args for arg, _ in outputs],
            output_types=[dtype for _, dtype in outputs],
        )
    return placed


def find_loops(placed: dict[str, PlacedNode]) -> dict[str, str]:
    """Returns the loop that the outputs of each node belong to, by its name; "" outside all loops."""
    users = collections.defaultdict(list)
    loops: dict[str, tuple[str, ...]] = {}
    ready = []
    for name, (node, *_) in placed.items():
        for text in node.input:
            users[split_name(text)[0]].append(name)
        if not node.input:
            loops[name] = ()
            ready.append(name)
    while ready:
        name = ready.pop()
        for user in users[name]:
            if user not in loops:
                node, loop = placed[user].node, loops[name]
                if node.op == "Enter":
                    loop = (*loop, node.attr["frame_name"].s.decode())
                loops[user] = loop[:-1] if node.op == "Exit" else loop
                ready.append(user)
    return {name: "/".join(loop) for name, loop in loops.items()}


def starts_nothing(placed: dict[str, PlacedNode], name: str) -> bool:
    """Tells whether a node passes its input on as it is, or a slice of its first dimension, which is a view of it."""
    if placed[name].node.op != "StridedSlice":
        return placed[name].node.op in STARTS_NOTHING
    begin = placed[placed[name].inputs[1][0]]
    while begin.node.op in ("Enter", "Identity"):
        begin = placed[begin.inputs[0][0]]
    if begin.node.op == "Const":
        return tf.make_ndarray(begin.node.attr["value"].tensor).size == 1
    return begin.node.op == "Pack" and begin.node.attr["N"].i == 1


def count(placed: dict[str, PlacedNode]) -> dict[str, Counts]:
    """Counts what a graph does, by loop; the first entry, "", is outside all loops."""
    loops = find_loops(placed)
    counts = {loop: Counts([], [], [], [], []) for loop in sorted(set(loops.values()) | {""})}
    for name, item in placed.items():
        here = counts[loops[name]]
        if not item.has_kernel:
            here.no_kernel.append(f"{name} ({item.node.op})")
        elif not starts_nothing(placed, name):
            is_host = item.is_on_cpu or (bool(item.output_on_host) and all(item.output_on_host))
            parts = item.node.attr["op_names"].list.s if item.node.op == FUSED_ON_CPUS else [None]
            (here.host if is_host else here.kernels).extend([name] * len(parts))
    copies = {
        (source, output, is_to_host)
        for item in placed.values()
        for (source, output), is_to_host in zip(item.inputs, item.input_on_host, strict=True)
        if is_to_host != placed[source].output_on_host[output]
        and placed[source].output_types[output] != tf.resource.as_datatype_enum  # a handle, not the variable
    }
    for source, _, is_to_host in sorted(copies):
        here = counts[loops[source]]
        (here.to_host if is_to_host else here.to_gpu).append(source)
    return counts


def plan(run: Callable[[], object]) -> dict[str, Counts]:
    """Calls a function that runs one `tf.function` for the first time; returns what that would do on a GPU.

    The caller keeps the `tf.function`: with it TensorFlow would forget what is placed on the CPU. What asks
    `captioning.base.devices.has_gpu` while the graph is made is told that there is one.
    """
    from tensorflow.python.eager import context  # not a public name of TensorFlow

    runtime = context.context()
    old_functions = set(runtime.list_function_names())
    runtime.enable_run_metadata()
    try:
        with mock.patch.object(tf.config, "get_visible_devices", return_value=["GPU"]):
            run()
        graphs = [graph.post_optimization_graph for graph in runtime.export_run_metadata().function_graphs]
    finally:
        runtime.disable_run_metadata()
    pinned = {
        node.name
        for name in set(runtime.list_function_names()) - old_functions
        for node in runtime.get_function_def(name).node_def
        if "device:CPU" in node.device
    }
    return count(place(max(graphs, key=lambda graph: len(graph.node)), pinned))


# What is planned.


def build_model(attention: str = "soft", fused: bool = False, mixed_precision: bool = False) -> model.CaptionModel:
    """Builds a small model for features (4, 12)."""
    config = ModelConfig(vocab_size=30, embedding_dim=8, units=16, attention=attention)
    caption_model = model.build(config, (4, 12), mixed_precision)
    caption_model.decoder.fused = fused
    return caption_model


def plan_training(attention: str = "soft", fused: bool = False, mixed_precision: bool = False) -> dict[str, Counts]:
    """Plans a step of train.py."""
    caption_model = build_model(attention, fused, mixed_precision)
    config = TrainConfig(mixed_precision=mixed_precision, jit="off")
    tokens = np.array([[2, 5, 6, 3, 0, 0], [2, 9, 8, 7, 6, 3], [2, 8, 3, 0, 0, 0]], np.int32)
    lengths = np.count_nonzero(tokens, axis=1).astype(np.int32)
    captions = EncodedCaptions(np.array(["a", "b"]), np.array([0, 1, 1], np.int32), tokens, lengths, lengths)
    dataset = make_dataset(captions, [np.arange(3)], lambda paths: tf.zeros((tf.shape(paths)[0], 4, 12), tf.float16))
    train_step = make_project_step(caption_model, config, dataset.element_spec)
    return plan(lambda: train_step(next(iter(dataset))))


def plan_search(beam_size: int) -> dict[str, Counts]:
    """Plans greedy search, or a beam search."""
    caption_model, features = build_model(), tf.zeros((2, 4, 12))
    if beam_size == 1:
        return plan(lambda: decoding.greedy_search(caption_model, features))
    return plan(lambda: decoding.beam_search(caption_model, features, beam_size))


PLANS: dict[str, Callable[[], dict[str, Counts]]] = {
    "training step": functools.partial(plan_training, fused=True),
    "training step, float16": functools.partial(plan_training, fused=True, mixed_precision=True),
    "training step, plain loop": plan_training,
    "training step, hard attention": functools.partial(plan_training, attention="hard"),
    "greedy search": functools.partial(plan_search, 1),
    "beam search": functools.partial(plan_search, 3),
}


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = make_parser(__doc__, prog="python -m benchmarks.gpu_plan")
    parser.add_argument("--names", action="store_true", help="print the names of the nodes that wait for the GPU")
    args = parser.parse_args(argv)
    gpu_kernels()
    result: dict[str, dict[str, dict[str, int]]] = {}
    print(f"{'':60} {'kernels':>9} {'host':>9} {'to host':>9} {'to GPU':>9} {'no kernel':>9}")
    for name, make_plan in PLANS.items():
        result[name] = {}
        for loop, counts in make_plan().items():
            sizes = {field: len(names) for field, names in counts._asdict().items()}
            result[name][loop or "outside"] = sizes
            place_name = f"  a word of {loop[-45:]}" if loop else name
            print(f"{place_name:60} " + " ".join(f"{size:>9}" for size in sizes.values()))
            for waiting in (counts.to_host + counts.no_kernel) * args.names:
                print(f"    {waiting}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
