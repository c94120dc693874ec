"""The decoder's recurrence over all words of a batch, with its gradient written out.

`RNNDecoder.cell` in model.py says what one step is. Here are the same steps for teacher forcing, several times
faster than TensorFlow's own gradient of a loop over `cell`:

- The words' half of the GRU's input is computed for all words at once, before the loop.
- Captions are sorted by length, and one that has ended takes no part in the steps after it.
- The gradient of every weight is one large product after the loop, not a sum of small ones inside it.
- tanh(keys + query), by far the largest value of a step, is the only one of its size that is kept.

In the comments B is the batch size, T the number of steps, N the words of the batch, L the 64 locations. Rows of N
are in the order of the loop: the first words of all captions, longest caption first, then the second words.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Weights(NamedTuple):
    """The weights inside the loop; the sizes are the defaults, 512 for the state and 256 for the context."""

    query_kernel: tf.Tensor  # (512, 512), the attention's W2
    query_bias: tf.Tensor  # (512,)
    score_kernel: tf.Tensor  # (512, 1), the attention's V
    score_bias: tf.Tensor  # (1,)
    context_kernel: tf.Tensor  # (256, 1536), the GRU's for the context, with the gates in Keras's order
    state_kernel: tf.Tensor  # (512, 1536), the GRU's for the state
    state_bias: tf.Tensor  # (1536,)


class Order(NamedTuple):
    """How the words of a batch are laid out in N rows."""

    counts: tf.Tensor  # (T,), the captions that take part in every step
    starts: tf.Tensor  # (T,), the first row of every step
    place: tf.Tensor  # (N, 2), every row's caption, counted from the longest, and step


def order_of(lengths: tf.Tensor) -> Order:
    """The order for captions of so many words, (B,), the longest first."""
    counts = tf.reduce_sum(tf.cast(lengths > tf.range(lengths[0])[:, tf.newaxis], tf.int32), 1)
    steps = tf.repeat(tf.range(tf.size(counts)), counts)  # (N,)
    starts = tf.cumsum(counts, exclusive=True)
    return Order(counts, starts, tf.stack([tf.range(tf.size(steps)) - tf.gather(starts, steps), steps], axis=1))


def even_order(captions: int, steps: int) -> Order:
    """The order for captions that all have so many steps, known before anything runs."""
    place = np.stack(np.meshgrid(range(captions), range(steps)), axis=-1).reshape(-1, 2)
    return Order(np.full(steps, captions), np.arange(steps) * captions, place)


def unroll(
    words: tf.Tensor,
    features: tf.Tensor,
    keys: tf.Tensor,
    weights: Weights,
    order: Order,
    look: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
    expected: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Runs the recurrence from a state of zeros.

    Args:
        words: (N, 1536), the words' half of the GRU's input, its bias included.
        features: (B, L, 256), of every caption's picture, longest caption first.
        keys: (B, L, 512), the attention's view of them.
        weights: of the attention and the GRU.
        order: of the rows.
        look: where hard attention looks, from scores (n, L), weights (n, L) and the number of the first row;
            None looks everywhere, as much as the weights say.
        expected: (B, 1), with `look`: 1 for captions that look as the weights say, 0 for those that draw. What
            is drawn has no gradient.

    Returns:
        For every row the GRU's new state (N, 512), the attention weights (N, L), and where it looked (N, L).
    """
    units, locations, channels = weights.state_bias.shape[0] // 3, keys.shape[1], features.shape[2]
    counts, starts, place = order
    steps, first, last = tf.size(counts), counts[0], counts[-1]
    zeros = lambda *shape: tf.zeros(shape, words.dtype)

    def run_loop(going, body, step, carried: list[tf.Tensor], sizes: list[tuple]) -> tuple[list, list[tf.TensorArray]]:
        """Runs `body`, which returns the next step, what it carries, and a tensor of each size to be collected."""

        def collecting(step, carried, found):
            following, carried, values = body(step, *carried)
            return following, carried, [array.write(step, value) for array, value in zip(found, values, strict=True)]

        kind = {"dtype": words.dtype, "size": steps, "infer_shape": False, "clear_after_read": False}
        found = [tf.TensorArray(**kind, element_shape=(None, *size)) for size in sizes]
        free = [tf.TensorShape((None, *tensor.shape[1:])) for tensor in carried]
        shapes = tf.TensorShape(()), free, [tf.TensorShape(None)] * len(sizes)
        return tf.while_loop(lambda step, *_: going(step), collecting, (step, carried, found), shapes)[1:]

    def joined(found: list[tf.TensorArray], sizes: list[tuple]) -> list[tf.Tensor]:
        return [tf.ensure_shape(array.concat(), (None, *size)) for array, size in zip(found, sizes, strict=True)]

    @tf.custom_gradient
    def run(words: tf.Tensor, features: tf.Tensor, keys: tf.Tensor, *weights: tf.Tensor):
        w = Weights(*weights)
        # The state meets two kernels: in one product.
        kernel = tf.concat([w.state_kernel, w.query_kernel], 1)  # (512, 2048)
        bias = tf.concat([w.state_bias, w.query_bias], 0)

        def forward(step, state):
            n, start = counts[step], starts[step]
            state = state[:n]
            recalled = tf.nn.bias_add(tf.matmul(state, kernel), bias)  # (n, 2048)
            candidate, query = recalled[:, 2 * units : 3 * units], recalled[:, 3 * units :]
            energy = tf.tanh(keys[:n] + query[:, tf.newaxis])  # (n, L, 512)
            scores = tf.matmul(tf.reshape(energy, (-1, units)), w.score_kernel) + w.score_bias  # (n L, 1)
            scores = tf.reshape(scores, (-1, locations))
            attention = tf.nn.softmax(scores)
            looks = look(scores, attention, start) if look else attention
            context = tf.squeeze(tf.matmul(looks[:, tf.newaxis], features[:n]), 1)  # (n, 256)
            inputs = tf.matmul(context, w.context_kernel) + words[start : start + n]  # (n, 1536)
            gates = tf.sigmoid(recalled[:, : 2 * units] + inputs[:, : 2 * units])
            update, reset = tf.split(gates, 2, 1)
            proposal = tf.tanh(inputs[:, 2 * units :] + reset * candidate)
            state = update * state + (1 - update) * proposal
            return step + 1, [state], (energy, state, attention, looks, context, gates, proposal, candidate)

        sizes = [(units,), (locations,), (locations,), (channels,), (2 * units,), (units,), (units,)]
        _, (energies, *found) = run_loop(
            lambda step: step < steps, forward, 0, [zeros(first, units)], [(locations, units), *sizes]
        )
        states, seen, looked, contexts, gates, proposals, candidates = joined(found, sizes)

        def gradient(to_states: tf.Tensor, to_seen: tf.Tensor, to_looked: tf.Tensor):
            before = tf.gather(states, tf.gather(starts, place[first:, 1] - 1) + place[first:, 0])
            before = tf.concat([zeros(first, units), before], 0)  # (N, 512), every row's state before its step
            updates, resets = tf.split(gates, 2, 1)
            # What a change of the new state changes: the proposal's input, the update gate, the reset gate, and
            # through the reset gate the state's part in the proposal.
            by_proposal = (1 - updates) * (1 - proposals**2)
            by_update = (before - proposals) * updates * (1 - updates)
            by_reset = by_proposal * candidates * resets * (1 - resets)
            slopes = tf.stack([by_proposal, by_update, by_reset, by_proposal * resets], 1)  # (N, 4, 512)
            kernel_t = tf.transpose(kernel)
            context_kernel_t = tf.roll(tf.transpose(w.context_kernel), units, 0)  # in the order of `slopes`
            score = w.score_kernel[:, 0]

            def backward(step, to_state, to_keys, to_score):
                n, start = counts[step], starts[step]
                rows = slice(start, start + n)
                begin = n - tf.shape(to_state)[0]  # captions whose last step this is
                to_state = tf.pad(to_state, [[0, begin], [0, 0]]) + to_states[rows]  # (n, 512)
                to_gates = to_state[:, tf.newaxis] * slopes[rows]  # (n, 4, 512)
                to_context = tf.matmul(tf.reshape(to_gates[:, :3], (-1, 3 * units)), context_kernel_t)  # (n, 256)
                to_look = tf.squeeze(tf.matmul(features[:n], to_context[:, :, tf.newaxis]), 2) + to_looked[rows]
                to_attention = (to_look if expected is None else to_look * expected[:n]) + to_seen[rows]
                attention = seen[rows]
                to_scores = attention * (to_attention - tf.reduce_sum(attention * to_attention, 1, keepdims=True))
                energy = tf.ensure_shape(energies.read(step), (None, locations, units))
                to_score += tf.matmul(tf.reshape(to_scores, (1, -1)), tf.reshape(energy, (-1, units)))
                # The slope of tanh is 1 - tanh^2: the ones are added here for the query, after the loop for the keys.
                squared = tf.square(energy)
                by_location = tf.squeeze(tf.matmul(to_scores[:, tf.newaxis], squared), 1)
                to_query = (tf.reduce_sum(to_scores, 1, keepdims=True) - by_location) * score  # (n, 512)
                to_keys = tf.pad(to_keys, [[0, begin], [0, 0], [0, 0]]) + to_scores[:, :, tf.newaxis] * squared
                to_recalled = tf.concat([tf.reshape(to_gates[:, 1:], (-1, 3 * units)), to_query], 1)  # (n, 2048)
                to_state = to_state * updates[rows] + tf.matmul(to_recalled, kernel_t)
                return step - 1, [to_state, to_keys, to_score], (to_gates, to_recalled, to_scores, to_context)

            sizes = [(4, units), (4 * units,), (locations,), (channels,)]
            (_, to_keys, to_score), found = run_loop(
                lambda step: step >= 0,
                backward,
                steps - 1,
                [zeros(last, units), zeros(last, locations, units), zeros(1, units)],
                sizes,
            )
            to_gates, to_recalled, to_scores, to_contexts = joined(found, sizes)
            to_inputs = tf.reshape(tf.roll(to_gates[:, :3], 2, 1), (-1, 3 * units))  # in Keras's order again

            by_caption = lambda rows: tf.scatter_nd(place, rows, (first, steps, rows.shape[1]))  # (B, T, ...)
            to_features = tf.matmul(by_caption(looked), by_caption(to_contexts), transpose_a=True)
            to_keys = (tf.reduce_sum(by_caption(to_scores), 1)[:, :, tf.newaxis] - to_keys) * score
            to_kernel = tf.matmul(before, to_recalled, transpose_a=True)
            to_bias = tf.reduce_sum(to_recalled, 0)
            to_weights = Weights(
                query_kernel=to_kernel[:, 3 * units :],
                query_bias=to_bias[3 * units :],
                score_kernel=tf.transpose(to_score),
                score_bias=tf.reduce_sum(to_scores, keepdims=True)[0],
                context_kernel=tf.matmul(contexts, to_inputs, transpose_a=True),
                state_kernel=to_kernel[:, : 3 * units],
                state_bias=to_bias[: 3 * units],
            )
            return to_inputs, to_features, to_keys, *to_weights

        return (states, seen, looked), gradient

    return run(words, features, keys, *weights)
