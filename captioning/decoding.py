"""Turns image features into token ids with a trained model: greedy search and beam search, batched in the graph.

The model is any object that has the attributes of `StepModel`. In the comments B is the number of images, K the beam
size, T the number of steps, L the number of image locations and V the vocabulary size.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from captioning.config import DecodeConfig
from captioning.quiet_tensorflow import tf
from captioning.special_tokens import END_ID, PAD_ID, START_ID, UNK_ID

MAX_WORDS = 50  # a caption that has not ended by then is cut, unless the settings say otherwise


class StepModel(Protocol):
    """What decoding needs of a model. `config` has the field `vocab_size`."""

    config: Any

    def encode(self, features: tf.Tensor) -> Any:
        """Encodes features (B, L, channels) as a NamedTuple of tensors that have the images as their first axis."""

    def initial_state(self, batch_size: tf.Tensor) -> tf.Tensor:
        """Returns the state before the first word, (batch_size, units), of the dtype that `step` returns."""

    def step(self, token: tf.Tensor, images: Any, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the next word's logits (B, V), the new state (B, units) and the attention weights (B, L)."""


class DecodedBatch(NamedTuple):
    """The captions of B images as token ids; T is the number of steps of the longest one."""

    tokens: tf.Tensor  # (B, T) int32, <end> included, then padded with <pad>
    probabilities: tf.Tensor  # (B, T), of each token, given those before it
    attention: tf.Tensor  # (B, T, L), the attention weights of each step


def decode(model: StepModel, features: tf.Tensor, config: DecodeConfig) -> DecodedBatch:
    """Captions features (B, L, 2048) as the settings ask: greedily, or with a beam of more than one."""
    max_words = config.max_words or MAX_WORDS
    if config.beam_size == 1:
        return greedy_search(model, features, max_words)
    return beam_search(model, features, config.beam_size, config.length_penalty, max_words)


def forbidden_tokens(vocab_size: int) -> tf.Tensor:
    """Returns a mask (V,) of the tokens that no caption may contain: <pad>, <unk> and <start>."""
    one_hot = tf.one_hot([PAD_ID, UNK_ID, START_ID], vocab_size, on_value=True, off_value=False)  # (3, V)
    return tf.reduce_any(one_hot, axis=0)


# Greedy search.


@tf.function(reduce_retracing=True)
def greedy_search(model: StepModel, features: tf.Tensor, max_words: int = MAX_WORDS) -> DecodedBatch:
    """Takes the most probable word at every step, until <end>; never <pad>, <unk> or <start>.

    Args:
        model: see `StepModel`.
        features: (B, L, 2048).
        max_words: the number of steps after which a caption is cut.
    """
    images = model.encode(features)
    batch_size = tf.shape(features)[0]
    forbidden = forbidden_tokens(model.config.vocab_size)  # (V,)
    token = tf.fill([batch_size], START_ID)  # (B,)
    state = model.initial_state(batch_size)
    finished = tf.zeros([batch_size], tf.bool)
    tokens = tf.TensorArray(tf.int32, 0, dynamic_size=True)
    probabilities = tf.TensorArray(tf.float32, 0, dynamic_size=True)
    attention = tf.TensorArray(tf.float32, 0, dynamic_size=True)
    for t in tf.range(max_words):
        logits, state, attention_weights = model.step(token, images, state)
        logits = tf.where(forbidden, -np.inf, tf.cast(logits, tf.float32))  # (B, V)
        predicted_id = tf.argmax(logits, axis=1, output_type=tf.int32)  # (B,)
        token = tf.where(finished, PAD_ID, predicted_id)  # the next step's input
        tokens = tokens.write(t, token)
        probabilities = probabilities.write(t, tf.reduce_max(tf.nn.softmax(logits), axis=1))
        attention = attention.write(t, tf.cast(attention_weights, tf.float32))
        finished |= token == END_ID
        if tf.reduce_all(finished):
            break
    return DecodedBatch(
        tokens=tf.transpose(tokens.stack()),  # (T, B) -> (B, T)
        probabilities=tf.transpose(probabilities.stack()),  # (T, B) -> (B, T)
        attention=tf.transpose(attention.stack(), [1, 0, 2]),  # (T, B, L) -> (B, T, L)
    )


# Beam search.


class BeamState(NamedTuple):
    """The K captions of each image that a beam search follows, t words long.

    At the beginning, and when only a few words are possible, some of the K places hold no caption. Their score is
    -inf.
    """

    token: tf.Tensor  # (B, K) int32, the last word
    state: tf.Tensor  # (B * K, units), the decoder's state; the captions of an image are consecutive rows
    scores: tf.Tensor  # (B, K), log p of the caption
    finished: tf.Tensor  # (B, K) bool, whether the caption has its <end>
    tokens: tf.Tensor  # (B, K, t) int32
    probabilities: tf.Tensor  # (B, K, t)
    attention: tf.Tensor  # (B, K, t, L)


class Expansion(NamedTuple):
    """The K best captions of each image that are one word longer; all (B, K)."""

    parent: tf.Tensor  # int32, the beam that each one continues
    token: tf.Tensor  # int32, its new word
    scores: tf.Tensor  # log p of the caption
    probabilities: tf.Tensor  # of the new word


@tf.function(reduce_retracing=True)
def beam_search(
    model: StepModel,
    features: tf.Tensor,
    beam_size: int,
    length_penalty: float = DecodeConfig.length_penalty,
    max_words: int = MAX_WORDS,
) -> DecodedBatch:
    """Follows the `beam_size` most probable captions of each image at the same time, and returns the best one.

    At every step each unfinished caption is continued by every word, and the most probable continuations are kept. A
    finished caption keeps its place, so that fewer are continued. In the end the caption with the largest
    log p(caption) / length ** length_penalty is returned. The length includes <end>. A penalty of 0 prefers short
    captions, and 1 compares the means over the words. An image without a finished caption gets its best unfinished one.

    Args:
        model: see `StepModel`.
        features: (B, L, 2048).
        beam_size: K; 1 gives the greedy caption.
        length_penalty: the exponent of the length.
        max_words: the number of steps after which captions are cut.
    """
    # The captions of an image are consecutive rows of one batch.
    images = tf.nest.map_structure(lambda x: tf.repeat(x, beam_size, axis=0), model.encode(features))  # (B * K, ...)
    vocab_size = model.config.vocab_size
    forbidden = forbidden_tokens(vocab_size)  # (V,)
    beams = init_beams(model, features, beam_size)
    for _ in tf.range(max_words):
        tf.autograph.experimental.set_loop_options(shape_invariants=[(beams, loop_shapes(beams))])
        logits, state, attention_weights = model.step(tf.reshape(beams.token, [-1]), images, beams.state)
        logits = tf.where(forbidden, -np.inf, tf.cast(logits, tf.float32))  # (B * K, V)
        log_probs = tf.reshape(tf.nn.log_softmax(logits), [-1, beam_size, vocab_size])  # (B, K, V)
        expansion = expand_beams(beams.scores, log_probs, beams.finished)
        beams = reorder_beams(beams, expansion, state, attention_weights)
        if tf.reduce_all(beams.finished | (beams.scores == -np.inf)):
            break
    return pick_best(beams, length_penalty)


def init_beams(model: StepModel, features: tf.Tensor, beam_size: int) -> BeamState:
    """Returns the beams before the first step: one empty caption, and K - 1 places without one."""
    batch_size, num_locations = tf.shape(features)[0], features.shape[1]
    first_only = tf.one_hot(0, beam_size, on_value=0.0, off_value=-np.inf)  # (K,)
    return BeamState(
        token=tf.fill([batch_size, beam_size], START_ID),
        state=model.initial_state(batch_size * beam_size),
        scores=tf.tile(first_only[tf.newaxis], [batch_size, 1]),  # (B, K)
        finished=tf.zeros([batch_size, beam_size], tf.bool),
        tokens=tf.zeros([batch_size, beam_size, 0], tf.int32),
        probabilities=tf.zeros([batch_size, beam_size, 0]),
        attention=tf.zeros([batch_size, beam_size, 0, num_locations]),
    )


def loop_shapes(beams: BeamState) -> BeamState:
    """Returns the shapes that hold at every step: any batch size, and any number of words."""
    any_batch = [tf.TensorShape([None, *tensor.shape[1:]]) for tensor in beams[:4]]
    any_length = [tf.TensorShape([None, tensor.shape[1], None, *tensor.shape[3:]]) for tensor in beams[4:]]
    return BeamState(*any_batch, *any_length)


def expand_beams(scores: tf.Tensor, log_probs: tf.Tensor, finished: tf.Tensor) -> Expansion:
    """Finds the K most probable captions that continue the K present ones by one word.

    Args:
        scores: (B, K), log p of the captions.
        log_probs: (B, K, V), log p of their next words.
        finished: (B, K) bool. Such a caption has one continuation, <pad>, whose log p is 0 and which is always kept.
    """
    batch_size, (beam_size, vocab_size) = tf.shape(log_probs)[0], log_probs.shape[1:]
    pad_only = tf.one_hot(PAD_ID, vocab_size, on_value=0.0, off_value=-np.inf)  # (V,)
    is_finished = finished[:, :, tf.newaxis]  # (B, K, 1)
    log_probs = tf.where(is_finished, pad_only, log_probs)  # (B, K, V)
    totals = scores[:, :, tf.newaxis] + log_probs  # (B, K, V)
    ranks = tf.where(is_finished & (pad_only == 0), np.inf, totals)  # (B, K, V)
    _, best = tf.math.top_k(tf.reshape(ranks, [batch_size, -1]), beam_size)  # (B, K), indices into K * V

    def gather_best(tensor: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.reshape(tensor, [batch_size, -1]), best, batch_dims=1)  # (B, K, V) -> (B, K)

    return Expansion(
        parent=best // vocab_size,
        token=best % vocab_size,
        scores=gather_best(totals),
        probabilities=tf.exp(gather_best(log_probs)),
    )


def reorder_beams(beams: BeamState, expansion: Expansion, state: tf.Tensor, attention_weights: tf.Tensor) -> BeamState:
    """Moves everything that belongs to a caption to its new place, and appends its new word.

    Args:
        beams: the beams before the step.
        expansion: the captions that are kept.
        state: (B * K, units), the decoder's state after the step.
        attention_weights: (B * K, L), of the step.
    """
    batch_size, beam_size = tf.shape(expansion.parent)[0], beams.token.shape[1]

    def reorder(tensor: tf.Tensor) -> tf.Tensor:
        return tf.gather(tensor, expansion.parent, batch_dims=1)

    def append(tensor: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        return tf.concat([tensor, new[:, :, tf.newaxis]], axis=2)  # (B, K, t + 1)

    is_valid = expansion.scores > -np.inf
    finished = (reorder(beams.finished) | (expansion.token == END_ID)) & is_valid
    # The attention of the step belongs to the captions as they were before it.
    attention_t = tf.reshape(tf.cast(attention_weights, tf.float32), [batch_size, beam_size, beams.attention.shape[3]])
    beam_index = tf.range(batch_size)[:, tf.newaxis] * beam_size + expansion.parent  # (B, K), rows of B * K
    return BeamState(
        token=expansion.token,
        state=tf.gather(state, tf.reshape(beam_index, [-1])),
        scores=expansion.scores,
        finished=finished,
        tokens=append(reorder(beams.tokens), expansion.token),
        probabilities=append(reorder(beams.probabilities), expansion.probabilities),
        attention=reorder(append(beams.attention, attention_t)),
    )


def pick_best(beams: BeamState, length_penalty: float) -> DecodedBatch:
    """Returns the best caption of each image: a finished one if there is any."""
    lengths = tf.reduce_sum(tf.cast(beams.tokens != PAD_ID, tf.float32), axis=2)  # (B, K)
    final_scores = beams.scores / lengths**length_penalty  # (B, K)
    has_finished = tf.reduce_any(beams.finished, axis=1, keepdims=True)  # (B, 1)
    final_scores = tf.where(has_finished & ~beams.finished, -np.inf, final_scores)  # (B, K)
    best_beam = tf.argmax(final_scores, axis=1)  # (B,)
    return DecodedBatch(
        *(tf.gather(tensor, best_beam, batch_dims=1) for tensor in (beams.tokens, beams.probabilities, beams.attention))
    )
