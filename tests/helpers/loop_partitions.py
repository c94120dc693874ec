"""Trains a step on a second CPU device, which stands for a GPU, and prints what its loops send between the devices.

    python tests/helpers/loop_partitions.py

The batch is on the first device, as it is in the memory of a machine with a GPU. TensorFlow cuts a graph where a tensor
goes from one device to another, and a cut within a loop costs time in every iteration. The last line is the number of
loops.
"""

import numpy as np
from tensorflow.python.eager import context

import model
from benchmarks.training import make_project_step
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.training.input_pipeline import EncodedCaptions, make_dataset

TOKENS = np.array([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 5, 6, 7, 3]], np.int32)


def find_frames(nodes):
    """Returns the nodes that are in loops, by the name of the loop's frame."""
    frames = {node.name: node.attr["frame_name"].s.decode() for node in nodes.values() if node.op == "Enter"}
    size = -1
    while size < len(frames):  # until nothing is added
        size = len(frames)
        for node in nodes.values():
            sources = (edge.lstrip("^").split(":")[0] for edge in node.input)
            frame = next((frames[name] for name in sources if name in frames and nodes[name].op != "Exit"), None)
            if frame is not None:
                frames.setdefault(node.name, frame)
    return frames


def main():
    """Runs the step and prints."""
    cpus = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    lengths = np.count_nonzero(TOKENS, axis=1).astype(np.int32)
    captions = EncodedCaptions(np.array(["a", "b"]), np.array([0, 1, 1], np.int32), TOKENS, lengths, lengths)
    features = tf.zeros((2, 64, 2048), tf.float16)
    dataset = make_dataset(captions, [np.arange(3)], lambda _: features)
    batch = next(iter(dataset))
    with tf.device("CPU:1"):
        caption_model = model.build(ModelConfig(vocab_size=20, embedding_dim=6, units=8))
        caption_model.decoder.fused = True
        step = make_project_step(caption_model, TrainConfig(batch_size=3), dataset.element_spec)
        context.context().enable_run_metadata()
        step(batch)
        graphs = context.context().export_run_metadata().function_graphs
    partitions = max((graph.partition_graphs for graph in graphs), key=lambda parts: sum(len(p.node) for p in parts))
    assert len(partitions) == 2, "one device has nothing to do"
    loops = set()
    for partition in partitions:
        nodes = {node.name: node for node in partition.node}
        frames = find_frames(nodes)
        loops.update(frames.values())
        for name in frames:
            if nodes[name].op in ("_Send", "_HostSend"):
                print("sent in a loop:", nodes[name].attr["tensor_name"].s.decode())
    print(len(loops))


if __name__ == "__main__":
    main()
