"""Teacher forcing of soft attention with a hand-written backward pass, faster on a CPU than the plain loop in model.py.

`RNNDecoder.step` is the definition; train.py compares the two before it trains. Four things make this one faster
(docs/performance.md): a caption that has ended takes no part in the steps after it; the words' part of the GRU's input
is computed once for all steps; the gradient of a kernel is one product after the loop; of the large tensors of a step
only e is kept.

At a step, n captions are active. L locations, C channels, U units; N is the sum of n over all T steps.

    q = h W2                               query                (n, U)       b2 is added to the keys beforehand
    e = tanh(keys + q)                     attention hidden     (n, L, U)
    a = softmax(e v)                       attention weights    (n, L)       v's bias cancels in the softmax
    c = sum_l a_l f_l                      context vector       (n, C)
    x = token_input + c Wc                 input part           (n, 3U)      of the gates z, r and g, in Keras's order
    u = h Wh                               recurrent part       (n, 3U)      the biases of z and r are in token_input
    z = sigmoid(x_z + u_z)   r = sigmoid(x_r + u_r)   p = u_g + b_g   g = tanh(x_g + r p)
    h' = z h + (1 - z) g                   new state            (n, U)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captioning.base.quiet_tensorflow import tf

# The order of the words of a batch.


class WordOrder(NamedTuple):
    """The packing order of a batch: step by step, in each the longest caption first.

    It is index arithmetic, which the input pipeline computes beforehand: a GPU would stall on it.
    """

    longest_first: tf.Tensor  # (B,) int32, the captions by their lengths
    num_active: tf.Tensor  # (T,) int32, the captions that are active at each step
    step_start: tf.Tensor  # (T,) int32, the row of each step's first word
    positions: tf.Tensor  # (N, 2) int32, the (caption, step) of each row
    ranks: tf.Tensor  # (N, 2) int32, its (place in longest_first, step)


ORDER_SHAPES = ([None], [None], [None], [None, 2], [None, 2])


def order_words(tokens: np.ndarray) -> WordOrder:
    """Makes the packing order of the words to predict of captions (B, T + 1), which are padded with <pad>, 0."""
    lengths = np.count_nonzero(tokens, axis=1) - 1  # (B,); the last token is only predicted
    longest_first = np.argsort(-lengths, kind="stable")  # (B,)
    is_active = lengths[longest_first] > np.arange(lengths.max())[:, np.newaxis]  # (T, B)
    num_active = is_active.sum(axis=1)  # (T,)
    step, rank = np.nonzero(is_active)  # (N,), step by step
    order = WordOrder(
        longest_first=longest_first,
        num_active=num_active,
        step_start=np.cumsum(num_active) - num_active,
        positions=np.stack([longest_first[rank], step], axis=1),
        ranks=np.stack([rank, step], axis=1),
    )
    return WordOrder(*(array.astype(np.int32) for array in order))


def order_tensors(tokens: tf.Tensor) -> WordOrder:
    """Makes the same order in a graph."""
    arrays = tf.numpy_function(order_words, [tokens], [tf.int32] * len(ORDER_SHAPES))
    return WordOrder(*map(tf.ensure_shape, arrays, ORDER_SHAPES))


# One step forward.


class Weights(NamedTuple):
    """What is trained of the attention and the GRU, as far as the loop needs it; and its gradient."""

    query: tf.Tensor  # (U, U): W2
    score: tf.Tensor  # (U, 1): v
    context: tf.Tensor  # (C, 3U): Wc
    recurrent: tf.Tensor  # (U, 3U): Wh
    candidate_bias: tf.Tensor  # (U,): b_g


class StackedWeights(NamedTuple):
    """The same, stacked so that the parts of a product need not be copied out of it."""

    state: tf.Tensor  # (4, U, U): Wh of z, r and g, and W2
    context: tf.Tensor  # (3, C, U): Wc of z, r and g
    score: tf.Tensor  # (U, 1): v
    candidate_bias: tf.Tensor  # (U,): b_g


class Residuals(NamedTuple):
    """What the forward step keeps for the backward step, besides e."""

    prev_state: tf.Tensor  # (n, U): h
    attention_weights: tf.Tensor  # (n, L): a
    context: tf.Tensor  # (n, C): c
    update: tf.Tensor  # (n, U): z
    reset: tf.Tensor  # (n, U): r
    candidate: tf.Tensor  # (n, U): g
    recurrent_candidate: tf.Tensor  # (n, U): p


def forward_step(
    state: tf.Tensor, token_input: tf.Tensor, features: tf.Tensor, keys: tf.Tensor, weights: StackedWeights
) -> tuple[tf.Tensor, tf.Tensor, Residuals]:
    """Computes h', e and the rest from h, the words' part of x (3, n, U), f (n, L, C) and the keys (n, L, U)."""
    num_locations, units = keys.shape[1:]
    recurrent = tf.matmul(state[tf.newaxis], weights.state)  # (4, n, U): u_z, u_r, u_g, q
    hidden = tf.tanh(keys + recurrent[3, :, tf.newaxis])  # (n, L, U): e
    scores = tf.matmul(tf.reshape(hidden, (-1, units)), weights.score)  # (n L, 1): e v
    attention_weights = tf.nn.softmax(tf.reshape(scores, (-1, num_locations)))  # (n, L): a
    context = tf.squeeze(tf.matmul(attention_weights[:, tf.newaxis], features), 1)  # (n, C): c
    inputs = token_input + tf.matmul(context[tf.newaxis], weights.context)  # (3, n, U): x_z, x_r, x_g
    gates = tf.sigmoid(inputs[:2] + recurrent[:2])  # (2, n, U): z, r
    update, reset = gates[0], gates[1]  # (n, U)
    recurrent_candidate = recurrent[2] + weights.candidate_bias  # (n, U): p
    candidate = tf.tanh(inputs[2] + reset * recurrent_candidate)  # (n, U): g
    new_state = update * state + (1 - update) * candidate  # (n, U): h'
    residuals = Residuals(state, attention_weights, context, update, reset, candidate, recurrent_candidate)
    return new_state, hidden, residuals


# One step backward.


class TransposedKernels(NamedTuple):
    """The kernels as the chain rule multiplies by them."""

    context: tf.Tensor  # (3U, C): Wc
    state: tf.Tensor  # (4U, U): Wh, and W2
    score: tf.Tensor  # (U,): v


class Sums(NamedTuple):
    """Gradients that the backward loop sums over the steps."""

    state: tf.Tensor  # (n, U), of h
    keys: tf.Tensor  # (n, L, U), of the keys, as sum over the steps of d_scores e^2: see `backward_step`
    score_kernel: tf.Tensor  # (1, U), of v


class StepGradients(NamedTuple):
    """Gradients of a step from which, for all steps at once, those of the kernels follow."""

    inputs: tf.Tensor  # (n, 3U), of x
    recurrent: tf.Tensor  # (n, 4U), of u, and of q
    scores: tf.Tensor  # (n, L), of e v
    context: tf.Tensor  # (n, C), of c


def partial_derivatives(res: Residuals) -> tf.Tensor:
    """Partial derivatives of h' with respect to x_z, x_r, x_g, u_g and h, for all steps at once: (N, 5, U)."""
    d_g = (1 - res.update) * (1 - res.candidate**2)  # (N, U); h' = z h + (1 - z) g, and tanh' = 1 - tanh^2
    d_z = (res.prev_state - res.candidate) * res.update * (1 - res.update)  # (N, U); sigmoid' = z (1 - z)
    d_r = d_g * res.recurrent_candidate * res.reset * (1 - res.reset)  # (N, U), through r p
    return tf.stack([d_z, d_r, d_g, d_g * res.reset, res.update], 1)  # (N, 5, U)


def backward_step(
    d_state: tf.Tensor,
    d_attention: tf.Tensor,
    partials: tf.Tensor,
    attention_weights: tf.Tensor,
    hidden: tf.Tensor,
    features: tf.Tensor,
    kernels: TransposedKernels,
) -> tuple[Sums, StepGradients]:
    """Applies the chain rule to `forward_step`, from the bottom to the top.

    `d_state` (n, U) is the gradient of h', `d_attention` (n, L) that of a from outside, such as that of a penalty on
    it, and `hidden` is e. For `partials` (n, 5, U) see `partial_derivatives`.
    """
    units = hidden.shape[2]
    d_gates = tf.reshape(d_state[:, tf.newaxis] * partials, (-1, 5 * units))  # (n, 5U): of x_z, x_r, x_g, u_g, h
    d_inputs = d_gates[:, : 3 * units]  # (n, 3U): dx
    d_context = tf.matmul(d_inputs, kernels.context)  # (n, C): dc = dx Wc'
    d_weights = tf.squeeze(tf.matmul(d_context[:, tf.newaxis], features, transpose_b=True), 1)  # (n, L): dc . f_l
    d_weights += d_attention  # (n, L): da
    mean = tf.reduce_sum(attention_weights * d_weights, 1, keepdims=True)  # (n, 1)
    d_scores = attention_weights * (d_weights - mean)  # (n, L): through the softmax
    d_score_kernel = tf.matmul(tf.reshape(d_scores, (1, -1)), tf.reshape(hidden, (-1, units)))  # (1, U): dv
    # dq = sum_l d_scores v (1 - e^2), since tanh' = 1 - e^2. Only the part with e^2 needs a product of (n, L, U), and
    # only that part of the keys' gradient is summed: `unroll` adds the part with 1 for all steps at once.
    squared = tf.square(hidden)  # (n, L, U): e^2
    with_squares = tf.squeeze(tf.matmul(d_scores[:, tf.newaxis], squared), 1)  # (n, U)
    d_query = (tf.reduce_sum(d_scores, 1, keepdims=True) - with_squares) * kernels.score  # (n, U): dq
    d_recurrent = tf.concat([d_gates[:, : 2 * units], d_gates[:, 3 * units : 4 * units], d_query], 1)  # (n, 4U)
    d_prev_state = d_gates[:, 4 * units :] + tf.matmul(d_recurrent, kernels.state)  # (n, U): dh
    d_keys = d_scores[:, :, tf.newaxis] * squared  # (n, L, U)
    return Sums(d_prev_state, d_keys, d_score_kernel), StepGradients(d_inputs, d_recurrent, d_scores, d_context)


# All steps.


def make_arrays(num_steps: tf.Tensor, dtype: tf.DType, shapes: Sequence[tuple[int, ...]]) -> list[tf.TensorArray]:
    """Makes an array for each of some values of the steps, whose shapes are given without the captions."""
    return [
        tf.TensorArray(dtype, num_steps, element_shape=(None, *shape), infer_shape=False, clear_after_read=False)
        for shape in shapes
    ]


def forward_loop(
    token_inputs: tf.Tensor,
    features: tf.Tensor,
    keys: tf.Tensor,
    initial_state: tf.Tensor,
    order: WordOrder,
    weights: StackedWeights,
) -> tuple[tf.Tensor, tf.TensorArray, Residuals]:
    """Runs all steps.

    Returns:
        The new states (N, U); e of every step, as an array, since a copy of it would cost; and the rest, (N, ...).
    """
    num_steps = tf.size(order.num_active)
    (num_locations, units), channels = keys.shape[1:], features.shape[2]
    # e, h', and the seven of Residuals.
    shapes = [(num_locations, units), (units,), (units,), (num_locations,), (channels,), *[(units,)] * 4]

    def body(t: tf.Tensor, state: tf.Tensor, arrays: list[tf.TensorArray]) -> tuple:
        n, start = order.num_active[t], order.step_start[t]
        inputs = token_inputs[:, start : start + n], features[:n], keys[:n]
        new_state, hidden, residuals = forward_step(state[:n], *inputs, weights)
        values = [hidden, new_state, *residuals]
        return t + 1, new_state, [array.write(t, value) for array, value in zip(arrays, values, strict=True)]

    _, _, arrays = tf.while_loop(
        lambda t, *_: t < num_steps,
        body,
        (0, initial_state, make_arrays(num_steps, initial_state.dtype, shapes)),
        # The number of active captions changes, and with it the shape of the state.
        (tf.TensorShape(()), tf.TensorShape((None, units)), [tf.TensorShape(None)] * len(shapes)),
        parallel_iterations=1,  # a step needs the one before it
    )
    hidden, *others = arrays
    states, *residuals = (array.concat() for array in others)  # (N, ...)
    return states, hidden, Residuals(*residuals)


def backward_loop(
    d_states: tf.Tensor,
    d_attention: tf.Tensor,
    hidden: tf.TensorArray,
    res: Residuals,
    features: tf.Tensor,
    order: WordOrder,
    kernels: TransposedKernels,
) -> tuple[Sums, StepGradients]:
    """Runs `backward_step` from the last step to the first.

    `d_states` (N, U) and `d_attention` (N, L) are the gradients of what `run` returns; `hidden` and `res` (N, ...) are
    what the forward loop has kept.

    Returns:
        The sums over the steps, of B captions, and the gradients of all steps, (N, ...).
    """
    num_steps = tf.size(order.num_active)
    units, num_locations, channels = res.update.shape[1], d_attention.shape[1], features.shape[2]
    partials = partial_derivatives(res)

    def body(i: tf.Tensor, sums: Sums, arrays: list[tf.TensorArray]) -> tuple:
        t = num_steps - 1 - i
        n, start = order.num_active[t], order.step_start[t]
        rows = slice(start, start + n)
        ending = [[0, n - tf.shape(sums.state)[0]], [0, 0]]  # captions that have no later step
        d_state = tf.pad(sums.state, ending) + d_states[rows]  # (n, U)
        saved = partials[rows], res.attention_weights[rows], hidden.read(t)
        of_step, gradients = backward_step(d_state, d_attention[rows], *saved, features[:n], kernels)
        sums = Sums(
            state=of_step.state,
            keys=tf.pad(sums.keys, [*ending, [0, 0]]) + of_step.keys,
            score_kernel=sums.score_kernel + of_step.score_kernel,
        )
        return i + 1, sums, [array.write(t, value) for array, value in zip(arrays, gradients, strict=True)]

    zeros = Sums(
        state=tf.zeros((0, units), d_states.dtype),
        keys=tf.zeros((0, num_locations, units), d_states.dtype),
        score_kernel=tf.zeros((1, units), d_states.dtype),
    )
    growing = Sums(*(tf.TensorShape(shape) for shape in ((None, units), (None, num_locations, units), (1, units))))
    shapes = [(3 * units,), (4 * units,), (num_locations,), (channels,)]  # of StepGradients
    _, sums, arrays = tf.while_loop(
        lambda i, *_: i < num_steps,
        body,
        (0, zeros, make_arrays(num_steps, d_states.dtype, shapes)),
        (tf.TensorShape(()), growing, [tf.TensorShape(None)] * len(shapes)),
        parallel_iterations=1,
    )
    return sums, StepGradients(*(array.concat() for array in arrays))


@tf.custom_gradient
def unroll(
    token_inputs: tf.Tensor,
    features: tf.Tensor,
    keys: tf.Tensor,
    initial_state: tf.Tensor,
    order: WordOrder,
    weights: Weights,
) -> tuple[tuple[tf.Tensor, tf.Tensor], Any]:
    """Runs all steps; its gradient has one product for each kernel.

    `token_inputs` (N, 3U) are the words' part of x, and the keys have b2 added; the rest is as in `run`.
    """
    units = keys.shape[2]
    stacked = StackedWeights(
        state=tf.stack([*tf.split(weights.recurrent, 3, 1), weights.query]),
        context=tf.stack(tf.split(weights.context, 3, 1)),
        score=weights.score,
        candidate_bias=weights.candidate_bias,
    )
    token_inputs = tf.stack(tf.split(token_inputs, 3, 1))  # (3, N, U)
    states, hidden, res = forward_loop(token_inputs, features, keys, initial_state, order, stacked)

    def gradient(d_states: tf.Tensor, d_attention: tf.Tensor) -> tuple:
        kernels = TransposedKernels(
            context=tf.transpose(weights.context),
            state=tf.transpose(tf.concat([weights.recurrent, weights.query], 1)),
            score=weights.score[:, 0],
        )
        sums, steps = backward_loop(d_states, d_attention, hidden, res, features, order, kernels)

        def unpack(rows: tf.Tensor) -> tf.Tensor:  # (N, D) -> (B, T, D)
            return tf.scatter_nd(order.ranks, rows, (tf.shape(keys)[0], tf.size(order.num_active), rows.shape[1]))

        d_features = tf.matmul(unpack(res.attention_weights), unpack(steps.context), transpose_a=True)  # (B, L, C)
        # (B, L, U): sum over the steps of d_scores v (1 - e^2)
        d_keys = (tf.reduce_sum(unpack(steps.scores), 1)[:, :, tf.newaxis] - sums.keys) * weights.score[:, 0]
        d_state_kernels = tf.matmul(res.prev_state, steps.recurrent, transpose_a=True)  # (U, 4U): of Wh, and of W2
        d_weights = Weights(
            query=d_state_kernels[:, 3 * units :],
            score=tf.transpose(sums.score_kernel),
            context=tf.matmul(res.context, steps.inputs, transpose_a=True),
            recurrent=d_state_kernels[:, : 3 * units],
            candidate_bias=tf.reduce_sum(steps.recurrent[:, 2 * units : 3 * units], 0),
        )
        no_order = [None] * len(order)  # integers have no gradient
        return steps.inputs, d_features, d_keys, sums.state, *no_order, *d_weights

    return (states, res.attention_weights), gradient


def run(
    dec_input: tf.Tensor, images: Any, order: WordOrder, attention: Any, gru: Any, initial_state: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs all steps.

    Args:
        dec_input: (N, E), the embedded input words, packed: step by step, in each the active captions in order.
        images: the `EncodedImages`, features (B, L, C) and keys (B, L, U), longest caption first.
        order: the order of the words.
        attention: the `BahdanauAttention`.
        gru: the `GRUCell`; the first C rows of its kernel belong to the context vector.
        initial_state: (B, U), the state before the first word, longest caption first.

    Returns:
        The new states (N, U), which are also the outputs, and the attention weights (N, L).
    """
    units, channels, dtype = images.keys.shape[2], images.features.shape[2], images.keys.dtype
    variables = attention.W2.kernel, attention.W2.bias, attention.V.kernel, *gru.trainable_variables
    query_kernel, query_bias, score_kernel, kernel, state_kernel, bias = (tf.cast(v, dtype) for v in variables)
    # On the device that runs the loops: a number from another device would be sent to it in every iteration.
    order = WordOrder(*map(tf.identity, order))
    # The biases of z and r are added with the words; that of g is multiplied by r, so it stays in the loop.
    token_bias = bias[0] + tf.pad(bias[1, : 2 * units], [[0, units]])  # (3U,)
    token_inputs = tf.matmul(dec_input, kernel[channels:]) + token_bias  # (N, 3U)
    keys = images.keys + query_bias  # (B, L, U)
    weights = Weights(query_kernel, score_kernel, kernel[:channels], state_kernel, bias[1, 2 * units :])
    return unroll(token_inputs, images.features, keys, initial_state, order, weights)


def matches(model: tf.keras.Model) -> bool:
    """Returns whether `run` computes what the decoder of a caption model does step by step, and its gradient.

    The model is a small one: 7 channels of features, 8 words. Its weights become random.
    """
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))  # biases, too: they start from zeros
    features = rng.normal(size=(2, 4, 7)).astype(np.float32)
    tokens = tf.constant([[2, 5, 4, 6, 3], [2, 7, 6, 5, 3]])

    def compute() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = model(features, tokens)
            total = tf.reduce_sum(tf.math.log_softmax(outputs.logits)[:, 5]) + tf.nn.l2_loss(outputs.attention_weights)
        variables = model.trainable_variables
        gradients = [  # a layer that only one of the two uses has none (None) in the other
            tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
            for gradient, variable in zip(tape.gradient(total, variables), variables, strict=True)
        ]
        return [outputs.logits, outputs.attention_weights, *gradients]

    plain = compute()
    model.decoder.fused = True
    try:
        fused = compute()
    except (AttributeError, TypeError, ValueError, tf.errors.OpError):  # the step has other layers, or other shapes
        return False
    return all(
        x.shape == y.shape and np.allclose(x, y, rtol=1e-2, atol=1e-3)  # GPUs round TF32
        for x, y in zip(plain, fused, strict=True)
    )
