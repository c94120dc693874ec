"""Teacher forcing of soft attention with a hand-written backward pass, faster on a CPU than the plain loop in model.py.

The decoder's `step` is the definition; train.py compares the two before it trains. What makes this faster
(docs/performance.md): a caption that has ended takes no part in the steps after it; the words' part of the GRU's input
is computed once for all; a kernel's gradient is one product after the loop; of a step's large tensors only e is kept.

At a step, n captions are active. L locations, C channels, U units; N is the sum of n over all T steps.

    q = h W2                               query                (n, U)       b2 is added to the keys beforehand
    e = tanh(keys + q)                     attention hidden     (n, L, U)
    a = softmax(e v)                       attention weights    (n, L)       v's bias cancels in the softmax
    b = sigmoid(h wb + bb)                 gate                 (n, 1)       only of the paper's decoder; else 1
    c = b sum_l a_l f_l                    context vector       (n, C)
    x = token_input + c Wc                 input part           (n, 3U)      of the gates z, r and g, in Keras's order
    u = h Wh                               recurrent part       (n, 3U)      the biases of z and r are in token_input
    z = sigmoid(x_z + u_z)   r = sigmoid(x_r + u_r)   p = u_g + b_g   g = tanh(x_g + r p)
    h' = z h + (1 - z) g                   new state            (n, U)
"""

from typing import NamedTuple

import numpy as np

from captioning.base.quiet_tensorflow import tf


class WordOrder(NamedTuple):
    """The order in which the words of a batch are gone through: step after step, in each the longest caption first.

    It is index arithmetic, which threads of the input pipeline do beforehand. A GPU would have to wait for each number.
    """

    longest_first: tf.Tensor  # (B,) int32, the captions by their lengths
    num_active: tf.Tensor  # (T,) int32, the captions that are active at each step
    step_start: tf.Tensor  # (T,) int32, the row of each step's first word
    positions: tf.Tensor  # (N, 2) int32, the (caption, step) of each row
    ranks: tf.Tensor  # (N, 2) int32, its (place in longest_first, step)


ORDER_SHAPES = ([None], [None], [None], [None, 2], [None, 2])


def order_words(tokens: np.ndarray) -> WordOrder:
    """Makes the order of the words that are predicted of captions (B, T + 1), which are padded with <pad>, 0."""
    lengths = np.count_nonzero(tokens, axis=1) - 1  # (B,); the last token is only predicted
    longest_first = np.argsort(-lengths, kind="stable")  # (B,)
    is_active = lengths[longest_first] > np.arange(lengths.max())[:, np.newaxis]  # (T, B)
    num_active = is_active.sum(axis=1)  # (T,)
    step, rank = np.nonzero(is_active)  # (N,), step after step
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


class Residuals(NamedTuple):
    """What the forward step keeps for the backward step, besides e."""

    prev_state: tf.Tensor  # (n, U): h
    attention_weights: tf.Tensor  # (n, L): a
    context: tf.Tensor  # (n, C): c
    update: tf.Tensor  # (n, U): z
    reset: tf.Tensor  # (n, U): r
    candidate: tf.Tensor  # (n, U): g
    recurrent_candidate: tf.Tensor  # (n, U): p
    context_gate: tf.Tensor | None = None  # (n, 1): b, if there is one


def forward_step(state, token_input, features, keys, weights, gate=()) -> tuple[tf.Tensor, tf.Tensor, Residuals]:
    """Computes h', e and the rest from state (n, U), token_input (3, n, U), features (n, L, C) and keys (n, L, U).

    The weights are Wh of z, r and g with W2, (4, U, U); Wc of z, r and g, (3, C, U); v, (U, 1); and b_g, (U,). They
    are stacked so that the parts of a product need not be copied out of it. The gate is wb (U, 1) and bb (1,).
    """
    state_kernels, context_kernels, score_kernel, candidate_bias = weights
    num_locations, units = keys.shape[1:]
    recurrent = tf.matmul(state[tf.newaxis], state_kernels)  # (4, n, U): u_z, u_r, u_g, q
    hidden = tf.tanh(keys + recurrent[3, :, tf.newaxis])  # (n, L, U)
    scores = tf.matmul(tf.reshape(hidden, (-1, units)), score_kernel)  # (n L, 1)
    attention_weights = tf.nn.softmax(tf.reshape(scores, (-1, num_locations)))  # (n, L)
    context = tf.squeeze(tf.matmul(attention_weights[:, tf.newaxis], features), 1)  # (n, C)
    context_gate = None
    if gate:
        context_gate = tf.sigmoid(tf.matmul(state, gate[0]) + gate[1])  # (n, 1)
        context *= context_gate
    inputs = token_input + tf.matmul(context[tf.newaxis], context_kernels)  # (3, n, U): x_z, x_r, x_g
    gates = tf.sigmoid(inputs[:2] + recurrent[:2])  # (2, n, U)
    update, reset = gates[0], gates[1]  # (n, U)
    recurrent_candidate = recurrent[2] + candidate_bias  # (n, U)
    candidate = tf.tanh(inputs[2] + reset * recurrent_candidate)  # (n, U)
    new_state = update * state + (1 - update) * candidate  # (n, U)
    res = Residuals(state, attention_weights, context, update, reset, candidate, recurrent_candidate, context_gate)
    return new_state, hidden, res


def gate_slopes(res: Residuals) -> tf.Tensor:
    """Computes dh' by the pre-activations of z, r and g, by u_g, and by h directly, of all steps at once: (N, 5, U)."""
    d_g = (1 - res.update) * (1 - res.candidate**2)  # (N, U)
    d_z = (res.prev_state - res.candidate) * res.update * (1 - res.update)  # (N, U)
    d_r = d_g * res.recurrent_candidate * res.reset * (1 - res.reset)  # (N, U)
    return tf.stack([d_z, d_r, d_g, d_g * res.reset, res.update], 1)  # (N, 5, U)


def backward_step(
    d_state, d_attention, slopes, attention_weights, hidden, features, kernels, d_context=None, context_gate=None
):
    """Applies the chain rule to `forward_step`, from the bottom to the top.

    Takes the gradients of h' (n, U) and of a (n, L), the latter from outside such as that of a penalty on it, and the
    transposed kernels: Wc (3U, C), Wh with W2 (4U, U), v (U,). Returns the gradients that are summed over the steps, of
    h, of the keys before the multiplication with tanh' and v, and of v; and those of x, u with q, the scores, and the
    sum over l. With a gate it also takes the gradient of c from outside (n, C) and b (n, 1); wb is the last row of the
    kernel with Wh, and the gradient of h wb + bb stands after that of q.
    """
    units = hidden.shape[2]
    context_kernel, state_kernel, score_kernel = kernels
    d_gates = tf.reshape(d_state[:, tf.newaxis] * slopes, (-1, 5 * units))  # (n, 5U)
    d_inputs = d_gates[:, : 3 * units]  # (n, 3U)
    d_sum = tf.matmul(d_inputs, context_kernel)  # (n, C)
    if context_gate is not None:
        d_sum = (d_sum + d_context) * context_gate  # (n, C)
    d_weights = tf.squeeze(tf.matmul(d_sum[:, tf.newaxis], features, transpose_b=True), 1)  # (n, L)
    d_gate_logit = []
    if context_gate is not None:  # (1 - b) b dc . sum_l a_l f_l, of which d_weights has all but (1 - b) and a
        d_gate_logit = [(1 - context_gate) * tf.reduce_sum(attention_weights * d_weights, 1, keepdims=True)]  # (n, 1)
    d_weights += d_attention  # (n, L)
    mean = tf.reduce_sum(attention_weights * d_weights, 1, keepdims=True)  # (n, 1)
    d_scores = attention_weights * (d_weights - mean)  # (n, L), through the softmax
    d_score_kernel = tf.matmul(tf.reshape(d_scores, (1, -1)), tf.reshape(hidden, (-1, units)))  # (1, U)
    # tanh' = 1 - e^2. Only the e^2 of it is multiplied out; the sum of the ones costs next to nothing.
    squared = tf.square(hidden)  # (n, L, U)
    from_squares = tf.squeeze(tf.matmul(d_scores[:, tf.newaxis], squared), 1)  # (n, U)
    d_query = (tf.reduce_sum(d_scores, 1, keepdims=True) - from_squares) * score_kernel  # (n, U)
    d_recurrent = [d_gates[:, : 2 * units], d_gates[:, 3 * units : 4 * units], d_query, *d_gate_logit]
    d_recurrent = tf.concat(d_recurrent, 1)  # (n, 4U), or (n, 4U + 1) with a gate
    d_prev_state = d_gates[:, 4 * units :] + tf.matmul(d_recurrent, state_kernel)  # (n, U)
    d_keys = d_scores[:, :, tf.newaxis] * squared  # (n, L, U)
    return (d_prev_state, d_keys, d_score_kernel), (d_inputs, d_recurrent, d_scores, d_sum)


def loop(body, num_steps, carry, shapes, reverse=False):
    """Calls body(t, *carry) -> carry, values for every step; returns the last carry, and a TensorArray per value."""
    settings = {"size": num_steps, "infer_shape": False, "clear_after_read": False}
    arrays = [tf.TensorArray(carry[0].dtype, element_shape=(None, *shape), **settings) for shape in shapes]

    def iterate(i, carry, arrays):
        t = num_steps - 1 - i if reverse else i
        carry, values = body(t, *carry)
        return i + 1, carry, [array.write(t, value) for array, value in zip(arrays, values, strict=True)]

    # The number of active captions changes, and with it the shapes. A step needs the last one: one iteration at a time.
    free = [tf.TensorShape((None, *tensor.shape[1:])) for tensor in carry]
    shapes = (tf.TensorShape(()), free, [tf.TensorShape(None)] * len(arrays))
    return tf.while_loop(lambda i, *_: i < num_steps, iterate, (0, carry, arrays), shapes, parallel_iterations=1)[1:]


def forward_loop(token_inputs, features, keys, initial_state, order, weights, gate):
    """Runs all steps; returns the new states (N, U), e as a TensorArray, since a copy would cost, and Residuals."""
    num_locations, units = keys.shape[1:]

    def body(t, state):
        n, start = order.num_active[t], order.step_start[t]
        inputs = token_inputs[:, start : start + n], features[:n], keys[:n]
        new_state, hidden, res = forward_step(state[:n], *inputs, weights, gate)
        return [new_state], [hidden, new_state, *(tensor for tensor in res if tensor is not None)]

    shapes = [(num_locations, units), *[(units,)] * 2, (num_locations,), (features.shape[2],), *[(units,)] * 4]
    if gate:
        shapes.append((1,))
    hidden, *arrays = loop(body, tf.size(order.num_active), [initial_state], shapes)[1]
    states, *residuals = (array.concat() for array in arrays)  # (N, ...)
    return states, hidden, Residuals(*residuals)


def backward_loop(d_states, d_attention, d_contexts, hidden, res, features, order, kernels):
    """Runs `backward_step` from the last step to the first; returns its sums and its other gradients."""
    units, num_locations = res.update.shape[1], d_attention.shape[1]
    slopes = gate_slopes(res)

    def body(t, d_state, d_keys, d_score_kernel):
        n, start = order.num_active[t], order.step_start[t]
        rows = slice(start, start + n)
        ending = [[0, n - tf.shape(d_state)[0]], [0, 0]]  # captions that have no later step
        d_state = tf.pad(d_state, ending) + d_states[rows]  # (n, U)
        inputs = d_attention[rows], slopes[rows], res.attention_weights[rows], hidden.read(t), features[:n]
        gating = () if res.context_gate is None else (d_contexts[rows], res.context_gate[rows])
        sums, others = backward_step(d_state, *inputs, kernels, *gating)
        return [sums[0], tf.pad(d_keys, [*ending, [0, 0]]) + sums[1], d_score_kernel + sums[2]], others

    zeros = [tf.zeros(shape, d_states.dtype) for shape in ((0, units), (0, num_locations, units), (1, units))]
    shapes = [(3 * units,), (kernels[1].shape[0],), (num_locations,), (features.shape[2],)]
    sums, arrays = loop(body, tf.size(order.num_active), zeros, shapes, reverse=True)
    return *sums, *[array.concat() for array in arrays]


@tf.custom_gradient
def unroll(
    token_inputs, features, keys, initial_state, order, query_kernel, score_kernel, context_kernel, kernel, bias, *gate
):
    """Runs all steps; its gradient has one product for each kernel. See `run` for shapes and results.

    With the gate's kernel and bias the context vectors and the gates are results, too; the latter have no gradient.
    """
    units = keys.shape[2]
    state_kernels = tf.stack([*tf.split(kernel, 3, 1), query_kernel])  # (4, U, U)
    weights = state_kernels, tf.stack(tf.split(context_kernel, 3, 1)), score_kernel, bias
    token_inputs = tf.stack(tf.split(token_inputs, 3, 1))  # (3, N, U)
    states, hidden, res = forward_loop(token_inputs, features, keys, initial_state, order, weights, gate)

    def gradient(d_states, d_attention, d_contexts=None, _=None):
        state_kernel = tf.concat([kernel, query_kernel, *gate[:1]], 1)  # (U, 4U), or (U, 4U + 1) with a gate
        kernels = tf.transpose(context_kernel), tf.transpose(state_kernel), score_kernel[:, 0]
        grads = backward_loop(d_states, d_attention, d_contexts, hidden, res, features, order, kernels)
        d_initial, squares, d_score_kernel, d_inputs, d_recurrent, d_scores, d_sum = grads

        def unpack(rows):  # (N, D) -> (B, T, D)
            return tf.scatter_nd(order.ranks, rows, (tf.shape(keys)[0], tf.size(order.num_active), rows.shape[1]))

        d_features = tf.matmul(unpack(res.attention_weights), unpack(d_sum), transpose_a=True)  # (B, L, C)
        d_keys = (tf.reduce_sum(unpack(d_scores), 1)[:, :, tf.newaxis] - squares) * score_kernel[:, 0]  # (B, L, U)
        d_state = tf.matmul(res.prev_state, d_recurrent, transpose_a=True)  # (U, 4U): of Wh, and of W2; and of wb
        d_context_kernel = tf.matmul(res.context, d_inputs, transpose_a=True)  # (C, 3U)
        d_bias = tf.reduce_sum(d_recurrent[:, 2 * units : 3 * units], 0)  # (U,)
        d_query_kernel = d_state[:, 3 * units : 4 * units]  # (U, U)
        d_kernels = d_query_kernel, tf.transpose(d_score_kernel), d_context_kernel, d_state[:, : 3 * units]
        d_gate = (d_state[:, 4 * units :], tf.reduce_sum(d_recurrent[:, 4 * units :], 0)) if gate else ()
        return d_inputs, d_features, d_keys, d_initial, *[None] * len(order), *d_kernels, d_bias, *d_gate

    outputs = (states, res.attention_weights)
    return (*outputs, res.context, res.context_gate) if gate else outputs, gradient


def run(dec_input, images, order, attention, gru, initial_state, gate=None) -> tuple[tf.Tensor, ...]:
    """Runs all steps.

    Args:
        dec_input: (N, E), the embedded input words, packed: step after step, in each the active captions in order.
        images: features (B, L, C) and keys (B, L, U) of every caption's image, longest caption first.
        order: the order of the words.
        attention: the `BahdanauAttention`.
        gru: the `GRUCell`; the first C rows of its kernel belong to the context.
        initial_state: (B, U), that of the GRU before the first word, longest caption first.
        gate: the Dense layer of the context vector's gate, if there is one.

    Returns:
        The new states (N, U) and the attention weights (N, L); with a gate also the context vectors (N, C), and the
        gates (N, 1), which have no gradient.
    """
    units, channels, dtype = images.keys.shape[2], images.features.shape[2], images.keys.dtype
    variables = attention.W2.kernel, attention.W2.bias, attention.V.kernel, *gru.trainable_variables
    query_kernel, query_bias, score_kernel, kernel, state_kernel, bias = (tf.cast(v, dtype) for v in variables)
    gate_weights = [tf.cast(v, dtype) for v in gate.trainable_variables] if gate else []
    # On the device that runs the loops: a number from another device would be sent to it in every iteration.
    order = WordOrder(*map(tf.identity, order))
    # The biases of z and r are added with the words; that of g is multiplied by r, so it stays in the loop.
    token_bias = bias[0] + tf.pad(bias[1, : 2 * units], [[0, units]])  # (3U,)
    token_inputs = tf.matmul(dec_input, kernel[channels:]) + token_bias  # (N, 3U)
    weights = query_kernel, score_kernel, kernel[:channels], state_kernel, bias[1, 2 * units :]
    keys = images.keys + query_bias  # (B, L, U)
    return unroll(token_inputs, images.features, keys, initial_state, order, *weights, *gate_weights)


def matches(model: tf.keras.Model) -> bool:
    """Tells whether `run` computes what the decoder of a caption model does step by step, and its gradient.

    The model is a small one: 7 channels of features, 8 words. Its weights become random.
    """
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))  # biases, too: they start from zeros
    features, tokens = rng.normal(size=(2, 4, 7)).astype(np.float32), tf.constant([[2, 5, 4, 6, 3], [2, 7, 6, 5, 3]])

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
