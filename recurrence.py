"""The decoder's recurrence over all words of a batch, with its gradient written out.

`RNNDecoder.cell` in model.py says what one step is. Here are the same steps for teacher forcing, several times
faster than TensorFlow's own gradient of a loop over `cell`:

- The words' half of the GRU's input is computed for all words at once, before the loop.
- Captions of a picture take the steps of the words they begin with together, the first word at least, until they part.
- Captions are sorted by length, and one that has ended takes no part in the steps after it.
- The gradient of every weight is one large product after the loop, not a sum of small ones inside it.
- tanh(keys + query), by far the largest value of a step, is the only one of its size that is kept.

In the comments B is the batch size, T the number of steps, L the 64 locations. A step has m looks, each at a picture
from a state, and then n rows, each a word that goes on from a look; M and N are their sums over all steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf


class Weights(NamedTuple):
    """The weights inside the loop; the sizes are the defaults, 512 for the state and 256 for the context."""

    query_kernel: tf.Tensor  # (512, 512), the attention's W2
    score_kernel: tf.Tensor  # (512, 1), the attention's V
    score_bias: tf.Tensor  # (1,)
    context_kernel: tf.Tensor  # (256, 1536), the GRU's for the context, with the gates in Keras's order
    state_kernel: tf.Tensor  # (512, 1536), the GRU's for the state
    candidate_bias: tf.Tensor  # (512,), of the state's part in the proposal


class Order(NamedTuple):
    """How the steps of a batch are laid out. Captions are counted from the longest."""

    looks: tf.Tensor  # (T,), m of every step: states with a word to come
    first_look: tf.Tensor  # (T,)
    look: tf.Tensor  # (M, 2), the caption, the longest of those that share it, and step of every look
    rows: tf.Tensor  # (T,), n of every step: beginnings of captions
    first_row: tf.Tensor  # (T,)
    row: tf.Tensor  # (N, 2), the caption and step of every row
    parent: tf.Tensor  # (N,), the look every row goes on from, counted from its step's first
    apart: tf.Tensor  # the first step from which on every caption has its own look
    word: tf.Tensor  # (words, 2), the caption and step of every word of every caption
    row_of: tf.Tensor  # (words,), its row
    look_of: tf.Tensor  # (words,), its look


def order_of(tokens: tf.Tensor, lengths: tf.Tensor, picture: tf.Tensor | None = None) -> Order:
    """The order for captions (B, T or more), the longest first, with so many words (B,).

    With the number of each caption's picture, (B,), captions of a picture share the words they begin with.
    """
    captions, steps = tf.range(tf.size(lengths)), tf.range(-1, lengths[0])[:, tf.newaxis]  # -1: before the first word
    live = lengths > steps  # (1 + T, B)
    if picture is None:
        leader = tf.broadcast_to(captions, tf.shape(live))
    else:
        # As float32, which holds them exactly: TensorFlow has GPU kernels for it, and none for int32.
        beginning = tf.cast(tf.concat([picture[:, tf.newaxis], tokens[:, : lengths[0]]], 1), tf.float32)  # (B, 1 + T)
        alike = tf.math.cumprod(tf.cast(beginning[:, tf.newaxis] == beginning, tf.float32), 2)  # (B, B, 1 + T)
        leader = tf.transpose(tf.argmax(alike, 1, output_type=tf.int32))  # (1 + T, B), the first that begins so
    # Those that lead are in order of length, so that those with words to come are first.
    leads = live & (leader == captions)
    number = tf.cumsum(tf.cast(leads, tf.int32), 1, exclusive=True)
    number = tf.gather(number, leader, axis=1, batch_dims=1)  # (1 + T, B), the row of every caption in every step
    looking = leads[:-1] & live[1:]
    looks, rows, words = (tf.reduce_sum(tf.cast(which, tf.int32), 1) for which in (looking, leads[1:], live[1:]))
    first_look, first_row = tf.cumsum(looks, exclusive=True), tf.cumsum(rows, exclusive=True)
    look, row, word = (
        tf.cast(tf.where(which), tf.int32) for which in (looking, leads[1:], live[1:])
    )  # (step, caption)
    return Order(
        looks=looks,
        first_look=first_look,
        look=look[:, ::-1],
        rows=rows,
        first_row=first_row,
        row=row[:, ::-1],
        parent=tf.gather_nd(number, row),
        apart=tf.math.count_nonzero(looks < words, dtype=tf.int32),
        word=word[:, ::-1],
        row_of=tf.gather(first_row, word[:, 0]) + tf.gather_nd(number[1:], word),
        look_of=tf.gather(first_look, word[:, 0]) + tf.gather_nd(number, word),
    )


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
        words: (N, 1536), the words' half of the GRU's input, with all its biases but the candidate's.
        features: (B, L, 256), of every caption's picture, longest caption first.
        keys: (B, L, 512), the attention's view of them, with the biases of W1 and W2.
        weights: of the attention and the GRU.
        order: of the steps.
        look: where hard attention looks, from scores (m, L), weights (m, L) and the number of the first look;
            None looks everywhere, as much as the weights say.
        expected: (M, 1), with `look`: 1 for those that look as the weights say, 0 for those that draw. What
            is drawn has no gradient.

    Returns:
        The GRU's new state of every row (N, 512), and of every look the attention weights and where it looked, (M, L).
    """
    captions, channels = tf.shape(keys)[0], features.shape[2]
    locations, units = keys.shape[1:]
    steps = tf.size(order.rows)
    zeros = lambda *shape: tf.zeros(shape, words.dtype)
    looks_at = lambda step: slice(order.first_look[step], order.first_look[step] + order.looks[step])
    rows_at = lambda step: slice(order.first_row[step], order.first_row[step] + order.rows[step])

    # Once the captions are apart, the first m of them look, and every look has one row.
    def of_looks(by_caption, step, shared):
        """What belongs to the captions that look."""
        return tf.gather(by_caption, order.look[looks_at(step), 0]) if shared else by_caption[: order.looks[step]]

    def of_rows(by_look, step, shared):
        """What belongs to the looks that the rows go on from, (..., m, 512) -> (..., n, 512)."""
        return tf.gather(by_look, order.parent[rows_at(step)], axis=-2) if shared else by_look

    def to_looks(by_row, step, shared):
        """The sum over the rows that go on from a look."""
        if not shared:
            return by_row
        return tf.math.unsorted_segment_sum(by_row, order.parent[rows_at(step)], order.looks[step])

    def to_captions(total, by_look, step, shared):
        """Adds to the captions that look; the total has the first captions, as many as were needed."""
        count = captions if shared else order.looks[step]
        total = tf.pad(total, [[0, count - tf.shape(total)[0]], [0, 0], [0, 0]])
        if shared:
            return tf.tensor_scatter_nd_add(total, order.look[looks_at(step), :1], by_look)
        return total + by_look

    def run_loops(body, step, going, carried: list[tf.Tensor], sizes: list[tuple]) -> tuple[list, list[tf.TensorArray]]:
        """Runs `body` from a step on, for steps that captions share or do not, as long as the pairs of `going` say.

        It returns the next step, what it carries, and a tensor of each size to be collected.
        """
        kind = {"dtype": words.dtype, "size": steps, "infer_shape": False, "clear_after_read": False}
        found = [tf.TensorArray(**kind, element_shape=(None, *size)) for size in sizes]
        free = [tf.TensorShape((None, *tensor.shape[1:])) for tensor in carried]
        shapes = tf.TensorShape(()), free, [tf.TensorShape(None)] * len(sizes)

        for shared, condition in going:

            def collecting(step, carried, found, shared=shared):
                following, carried, values = body(step, shared, *carried)
                found = [array.write(step, value) for array, value in zip(found, values, strict=True)]
                return following, carried, found

            # A step needs the one before it, and keeping several at hand costs time.
            start = step, carried, found
            step, carried, found = tf.while_loop(condition, collecting, start, shapes, parallel_iterations=1)
        return carried, found

    def joined(found: list[tf.TensorArray], sizes: list[tuple]) -> list[tf.Tensor]:
        return [tf.ensure_shape(array.concat(), (None, *size)) for array, size in zip(found, sizes, strict=True)]

    @tf.custom_gradient
    def run(words: tf.Tensor, features: tf.Tensor, keys: tf.Tensor, *weights: tf.Tensor):
        w = Weights(*weights)
        # Stacked, so that a product's parts need not be copied out of it: update and reset gate, proposal, and query.
        state_kernels = tf.stack([*tf.split(w.state_kernel, 3, 1), w.query_kernel])  # (4, 512, 512)
        context_kernels, parts = (tf.stack(tf.split(each, 3, 1)) for each in (w.context_kernel, words))  # (3, ..., 512)

        def forward(step, shared, state):
            state = state[: order.looks[step]]  # (m, 512)
            recalled = tf.matmul(state[tf.newaxis], state_kernels)  # (4, m, 512)
            energy = tf.tanh(of_looks(keys, step, shared) + recalled[3, :, tf.newaxis])  # (m, L, 512)
            scores = tf.matmul(tf.reshape(energy, (-1, units)), w.score_kernel) + w.score_bias  # (m L, 1)
            scores = tf.reshape(scores, (-1, locations))
            attention = tf.nn.softmax(scores)
            looks = look(scores, attention, order.first_look[step]) if look else attention
            context = tf.squeeze(tf.matmul(looks[:, tf.newaxis], of_looks(features, step, shared)), 1)  # (m, 256)
            inputs = of_rows(tf.matmul(context[tf.newaxis], context_kernels), step, shared)  # (3, n, 512)
            inputs += parts[:, rows_at(step)]
            recalled, before = of_rows(recalled[:3], step, shared), of_rows(state, step, shared)
            gates = tf.sigmoid(recalled[:2] + inputs[:2])
            update, reset = gates[0], gates[1]
            candidate = recalled[2] + w.candidate_bias
            proposal = tf.tanh(inputs[2] + reset * candidate)
            after = update * before + (1 - update) * proposal  # (n, 512)
            return (
                step + 1,
                [after],
                (energy, state, attention, looks, context, after, update, reset, proposal, candidate),
            )

        of_look = [(units,), (locations,), (locations,), (channels,)]
        of_row = [(units,)] * 5
        _, (energies, *found) = run_loops(
            forward,
            0,
            [(True, lambda step, *_: step < order.apart), (False, lambda step, *_: step < steps)],
            [zeros(order.looks[0], units)],
            [(locations, units), *of_look, *of_row],
        )
        states, attentions, looked, contexts, after, updates, resets, proposals, candidates = joined(
            found, of_look + of_row
        )

        def gradient(to_after: tf.Tensor, to_attentions: tf.Tensor, to_looked: tf.Tensor):
            to_attentions, to_looked = map(tf.convert_to_tensor, (to_attentions, to_looked))
            # What a change of the new state changes: the inputs of the update gate, the reset gate and the proposal,
            # through the reset gate the state's part in the proposal, and the state itself.
            by_proposal = (1 - updates) * (1 - proposals**2)
            before = tf.gather(states, tf.gather(order.first_look, order.row[:, 1]) + order.parent)  # (N, 512)
            by_update = (before - proposals) * updates * (1 - updates)
            by_reset = by_proposal * candidates * resets * (1 - resets)
            slopes = tf.stack([by_update, by_reset, by_proposal, by_proposal * resets, updates], 1)  # (N, 5, 512)
            with tf.control_dependencies([keys]):  # first the encoder, which the loop waits for
                kernel_t = tf.concat([tf.transpose(w.state_kernel), tf.transpose(w.query_kernel)], 0)  # (2048, 512)
                context_kernel_t = tf.transpose(w.context_kernel)  # (1536, 256)
            score = w.score_kernel[:, 0]

            def backward(step, shared, to_state, to_keys, to_score):
                here = looks_at(step)
                to_state = tf.pad(to_state, [[0, order.rows[step] - tf.shape(to_state)[0]], [0, 0]])  # others end here
                to_state += to_after[rows_at(step)]  # (n, 512)
                to_gates = tf.reshape(to_state[:, tf.newaxis] * slopes[rows_at(step)], (-1, 5 * units))
                to_gates = to_looks(to_gates, step, shared)  # (m, 5 * 512)
                to_inputs = to_gates[:, : 3 * units]
                to_context = tf.matmul(to_inputs, context_kernel_t)  # (m, 256)
                its_features = of_looks(features, step, shared)
                to_look = tf.matmul(to_context[:, tf.newaxis], its_features, transpose_b=True)
                to_look = tf.squeeze(to_look, 1) + to_looked[here]
                to_attention = (to_look if expected is None else to_look * expected[here]) + to_attentions[here]
                attention = attentions[here]
                to_scores = attention * (to_attention - tf.reduce_sum(attention * to_attention, 1, keepdims=True))
                energy = tf.ensure_shape(energies.read(step), (None, locations, units))
                to_score += tf.matmul(tf.reshape(to_scores, (1, -1)), tf.reshape(energy, (-1, units)))
                # The slope of tanh is 1 - tanh^2: the ones are added here for the query, after the loop for the keys.
                squared = tf.square(energy)
                by_location = tf.squeeze(tf.matmul(to_scores[:, tf.newaxis], squared), 1)
                to_query = (tf.reduce_sum(to_scores, 1, keepdims=True) - by_location) * score  # (m, 512)
                to_keys = to_captions(to_keys, to_scores[:, :, tf.newaxis] * squared, step, shared)
                to_recalled = [to_gates[:, : 2 * units], to_gates[:, 3 * units : 4 * units], to_query]
                to_recalled = tf.concat(to_recalled, 1)  # (m, 2048), as `kernel_t` has its rows
                before = to_gates[:, 4 * units :] + tf.matmul(to_recalled, kernel_t)  # (m, 512)
                return step - 1, [before, to_keys, to_score], (to_state, to_inputs, to_recalled, to_scores, to_context)

            sizes = [(units,), (3 * units,), (4 * units,), (locations,), (channels,)]
            (_, to_keys, to_score), found = run_loops(
                backward,
                steps - 1,
                [(False, lambda step, *_: step >= order.apart), (True, lambda step, *_: step >= 0)],
                [zeros(0, units), zeros(0, locations, units), zeros(1, units)],
                sizes,
            )
            to_after, to_inputs, to_recalled, to_scores, to_contexts = joined(found, sizes)

            by_caption = lambda rows: tf.scatter_nd(order.look, rows, (captions, steps, rows.shape[1]))  # (B, T, ...)
            to_features = tf.matmul(by_caption(looked), by_caption(to_contexts), transpose_a=True)
            to_keys = (tf.reduce_sum(by_caption(to_scores), 1)[:, :, tf.newaxis] - to_keys) * score
            to_kernel = tf.matmul(states, to_recalled, transpose_a=True)
            to_weights = Weights(
                query_kernel=to_kernel[:, 3 * units :],
                score_kernel=tf.transpose(to_score),
                score_bias=tf.reduce_sum(to_scores, keepdims=True)[0],
                context_kernel=tf.matmul(contexts, to_inputs, transpose_a=True),
                state_kernel=to_kernel[:, : 3 * units],
                candidate_bias=tf.reduce_sum(to_recalled[:, 2 * units : 3 * units], 0),
            )
            to_words = tf.reshape(to_after[:, tf.newaxis] * slopes[:, :3], (-1, 3 * units))
            return to_words, to_features, to_keys, *to_weights

        return (after, attentions, looked), gradient

    return run(words, features, keys, *weights)
