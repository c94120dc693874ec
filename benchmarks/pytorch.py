"""The training step as people write it in PyTorch, for benchmarks/gpu.py: the same model, sizes and arithmetic.

PyTorch is no requirement of the project: `find_torch` returns None where it is not installed.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.training import TrainingData
from captioning.base.special_tokens import PAD_ID
from captioning.training.input_pipeline import TrainBatches

WARMUP_STEPS = 3  # before a CUDA graph is recorded, as PyTorch asks for


def find_torch() -> Any:
    """Imports PyTorch; None if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def make_model(torch: Any, data: TrainingData) -> Any:
    """Makes the tutorial's encoder, attention and decoder as a module that returns the mean loss of a batch."""
    nn, config = torch.nn, data.config

    class CaptionModel(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(data.cache.shape[1], config.embedding_dim)
            self.W1 = nn.Linear(config.embedding_dim, config.units)
            self.W2 = nn.Linear(config.units, config.units)
            self.V = nn.Linear(config.units, 1)
            self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
            self.gru = nn.GRUCell(2 * config.embedding_dim, config.units)
            self.fc1 = nn.Linear(config.units, config.units)
            self.fc2 = nn.Linear(config.units, config.vocab_size)

        def forward(self, features: Any, image_index: Any, tokens: Any) -> Any:
            encoded = torch.relu(self.encoder(features.float()))  # (images, L, 256)
            keys, encoded = self.W1(encoded)[image_index], encoded[image_index]  # (B, L, 512), (B, L, 256)
            words = self.embedding(tokens[:, :-1])  # (B, T, 256)
            state, outputs = keys.new_zeros(len(tokens), config.units), []
            for t in range(words.shape[1]):
                scores = self.V(torch.tanh(keys + self.W2(state)[:, None]))  # (B, L, 1)
                context = (torch.softmax(scores, 1) * encoded).sum(1)  # (B, 256)
                state = self.gru(torch.cat([context, words[:, t]], 1), state)  # (B, 512)
                outputs.append(state)
            logits = self.fc2(self.fc1(torch.stack(outputs, 1)))  # (B, T, vocab_size)
            targets = tokens[:, 1:].flatten()
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=PAD_ID)

    return CaptionModel()


def make_steps(torch: Any, data: TrainingData, batches: TrainBatches) -> dict[str, Callable[[], Any]]:
    """Makes training steps by name: eager and, on a GPU, as one CUDA graph. Each returns its loss.

    All take a batch of the middle length. Its tokens, and the features of all images, are on the device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = sorted(batches.order(0), key=lambda rows: data.captions.lengths[rows].max())
    rows = order[len(order) // 2]
    tokens = data.captions.tokens[rows, : data.captions.lengths[rows].max()]
    batch = (*np.unique(data.captions.image_index[rows], return_inverse=True), tokens)
    images, image_index, tokens = (torch.tensor(array, dtype=torch.int64, device=device) for array in batch)
    shape = (len(data.captions.feature_paths), *data.cache.shape)
    features = torch.rand(shape, device=device, dtype=torch.float16)
    caption_model = make_model(torch, data).to(device)
    adam = torch.optim.Adam(caption_model.parameters(), 1e-3, capturable=device == "cuda")

    def step() -> Any:
        adam.zero_grad(set_to_none=True)
        loss = caption_model(features[images], image_index, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(caption_model.parameters(), 5.0)
        adam.step()
        return loss.detach()

    return {"eager": step} | ({"one CUDA graph": record_graph(torch, step)} if device == "cuda" else {})


def record_graph(torch: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """Records a step as a CUDA graph, and returns a function that runs it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Any:
        graph.replay()
        return loss.detach()

    return replay


def run_steps(step: Callable[[], Any], num_steps: int) -> float:
    """Runs training steps; returns the last one's loss, and so waits for it."""
    for _ in range(num_steps):
        loss = step()
    return float(loss)
