"""Turns image features into token ids with a trained model: greedy search, beam search and sampling, in the graph.

Within the loops ids are int64: a GPU keeps int32 in the host's memory, and would wait at every word. It waits only
once, to see whether all captions have ended. Tensors of words have room for `max_words` from the beginning, and are
trimmed at the end: XLA needs shapes that do not change. In the comments B is the number of images, K the beam size, T
the number of steps, L the number of image locations and V the vocabulary size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID
from captioning.config.settings import DecodeConfig
from captioning.decoder.constraints import Constraints, constrain, forbidden_tokens
from captioning.decoder.sampling import draw, image_keys, random_numbers

MAX_WORDS = 50  # a caption that has not ended by then is cut, unless the settings say otherwise
NO_CONSTRAINTS = Constraints()


class StepModel(Protocol):
    """What decoding needs of a model. `config` has the field `vocab_size`."""

    config: Any

    def encode(self, features: tf.Tensor) -> Any:
        """Encodes features (B, L, channels) as a NamedTuple of tensors that have the images as their first axis."""

    def initial_state(self, images: Any) -> tf.Tensor:
        """Returns the state before the first word of every encoded image, (B, units), of the dtype `step` returns."""

    def step(self, token: tf.Tensor, images: Any, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the logits (B, V) after a token (B,), the new state (B, units) and the attention weights (B, L)."""


class DecodedBatch(NamedTuple):
    """N captions of each of B images, best first, in R = B * N rows; T is the number of steps of the longest one."""

    tokens: tf.Tensor  # (R, T) int32, <end> included, then padded with <pad>; only <pad>: there was no further caption
    probabilities: tf.Tensor  # (R, T), of each token, given those before it
    attention: tf.Tensor  # (R, T, L), the attention weights of each step


def can_be_compiled(config: DecodeConfig) -> bool:
    """Tells whether XLA compiles a search: not with constraints, which depend on a number of words that changes."""
    return not (config.sample or config.min_words or config.no_repeat)


def decode(
    model: StepModel,
    features: tf.Tensor,
    config: DecodeConfig,
    pixels: np.ndarray | None = None,
    with_xla: bool = False,
) -> DecodedBatch:
    """Captions features (B, L, 2048) as the settings ask, `config.num_candidates` times each.

    `pixels` are the images themselves, if known. With the seed they decide the numbers by which random words are drawn.
    With `with_xla` XLA compiles the search if it can, anew for each shape of features, and T is the largest number of
    words.
    """
    max_words = config.max_words or MAX_WORDS
    constraints = Constraints(config.min_words, config.no_repeat)
    if config.sample:
        keys = image_keys(features.numpy() if pixels is None else pixels)
        numbers = random_numbers(config.decode_seed, keys, config.captions, max_words)
        # As tensors: a graph that was made for one temperature serves all.
        temperature, top_p = tf.constant(config.temperature), tf.constant(config.top_p)
        return sample_words(model, features, numbers, temperature, top_p, constraints)
    with_xla = with_xla and can_be_compiled(config)
    if config.num_beams == 1:
        search = xla_greedy_search if with_xla else greedy_search
        return search(model, features, max_words, constraints)
    length_penalty = tf.constant(config.length_penalty, tf.float32)
    search = xla_beam_search if with_xla else beam_search
    return search(model, features, config.num_beams, length_penalty, max_words, constraints, config.num_candidates)


# Greedy search, and random words.


@tf.function(reduce_retracing=True)
def greedy_search(
    model: StepModel,
    features: tf.Tensor,
    max_words: int = MAX_WORDS,
    constraints: Constraints = NO_CONSTRAINTS,
    trim: bool = True,
) -> DecodedBatch:
    """Takes the most probable word at every step, until <end>; never <pad>, <unk> or <start>. `trim` as `generate`."""

    def most_probable(log_probs: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        return tf.argmax(log_probs, axis=1)

    return generate(model, model.encode(features), most_probable, max_words, constraints, trim)


@tf.function(reduce_retracing=True)
def sample_words(
    model: StepModel,
    features: tf.Tensor,
    numbers: tf.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    constraints: Constraints = NO_CONSTRAINTS,
) -> DecodedBatch:
    """Draws a word at every step, until <end>; never <pad>, <unk> or <start>.

    `numbers` (B * N, T) are the random numbers of N captions of each image, of at most T words; for them, `temperature`
    and `top_p` see `sampling`.
    """
    num_captions = tf.shape(numbers)[0] // tf.maximum(1, tf.shape(features)[0])
    images = repeat_images(model.encode(features), num_captions)

    def random_word(log_probs: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        return draw(log_probs, numbers[:, t], temperature, top_p)

    return generate(model, images, random_word, tf.shape(numbers)[1], constraints)


def repeat_images(images: Any, count: int | tf.Tensor) -> Any:
    """Repeats encoded images, each `count` times in consecutive rows."""
    return tf.nest.map_structure(lambda x: tf.repeat(x, count, axis=0), images)


def count_locations(images: Any) -> int:
    """Returns L of encoded images: cached features are (B, L, C), but pixels, which a trained CNN takes, are not."""
    return tf.nest.flatten(images)[0].shape[1]


def generate(
    model: StepModel,
    images: Any,
    choose: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    max_words: int | tf.Tensor,
    constraints: Constraints = NO_CONSTRAINTS,
    trim: bool = True,
) -> DecodedBatch:
    """Generates a caption of each of B encoded images.

    `choose` returns the next words (B,) int64 for log p of all words (B, V) and the step's number. Without `trim` T is
    `max_words`: XLA has no slices whose size is computed.
    """
    forbidden = forbidden_tokens(model.config.vocab_size)  # (V,)
    state = model.initial_state(images)
    batch_size = tf.shape(state)[0]
    token = tf.fill([batch_size], tf.constant(START_ID, tf.int64))  # (B,)
    finished = tf.zeros([batch_size], tf.bool)
    tokens = tf.fill([batch_size, max_words], tf.constant(PAD_ID, tf.int64))  # (B, T)
    probabilities = tf.TensorArray(tf.float32, max_words, element_shape=token.shape)
    attention = tf.TensorArray(tf.float32, max_words, element_shape=[*token.shape, count_locations(images)])
    t, is_done = tf.constant(0), tf.constant(False)
    while tf.logical_and(t < max_words, ~is_done):
        tf.autograph.experimental.set_loop_options(shape_invariants=[(tokens, tf.TensorShape([None, None]))])
        logits, state, attention_weights = model.step(tf.cast(token, tf.int32), images, state)
        logits = tf.where(forbidden, -np.inf, tf.cast(logits, tf.float32))  # (B, V)
        log_probs = tf.nn.log_softmax(logits)
        history = tokens[:, : t if constraints != NO_CONSTRAINTS else 0]  # (B, t), or (B, 0): nothing depends on it
        chosen_id = choose(constrain(log_probs, history, constraints), t)  # (B,)
        token = tf.where(finished, tf.constant(PAD_ID, tf.int64), chosen_id)  # the next step's input
        tokens = tf.where(tf.range(max_words) == t, token[:, tf.newaxis], tokens)
        probabilities = probabilities.write(t, tf.exp(tf.gather(log_probs, chosen_id, batch_dims=1)))
        attention = attention.write(t, tf.cast(attention_weights, tf.float32))
        finished |= token == END_ID
        t, is_done = t + 1, tf.reduce_all(finished)
    num_steps = t if trim else max_words
    return DecodedBatch(
        tokens=tf.cast(tokens[:, :num_steps], tf.int32),
        probabilities=tf.transpose(probabilities.stack()[:num_steps]),  # (T, B) -> (B, T)
        attention=tf.transpose(attention.stack()[:num_steps], [1, 0, 2]),  # (T, B, L) -> (B, T, L)
    )


# Beam search.


class BeamState(NamedTuple):
    """The K captions of each image that a beam search follows, t words long, with room for T = `max_words`.

    At the beginning, and when only a few words are possible, some of the K places hold no caption: their score is -inf.
    """

    token: tf.Tensor  # (B * K,) int64, the last word; the captions of an image are consecutive rows
    state: tf.Tensor  # (B * K, units), the decoder's state
    scores: tf.Tensor  # (B, K), log p of the caption
    finished: tf.Tensor  # (B, K) bool, whether the caption has its <end>
    tokens: tf.Tensor  # (B, K, T) int64
    probabilities: tf.Tensor  # (B, K, T)
    rows: tf.Tensor  # (B, K, T) int64, the row of each word's attention in that of all steps, (T * B * K, L)


class Expansion(NamedTuple):
    """The K best captions of each image that are one word longer; all (B, K)."""

    parent: tf.Tensor  # int64, the beam that each one continues
    token: tf.Tensor  # int64, its new word
    scores: tf.Tensor  # log p of the caption
    probabilities: tf.Tensor  # of the new word


@tf.function(reduce_retracing=True)
def beam_search(
    model: StepModel,
    features: tf.Tensor,
    beam_size: int,
    length_penalty: float = DecodeConfig.length_penalty,
    max_words: int = MAX_WORDS,
    constraints: Constraints = NO_CONSTRAINTS,
    num_captions: int = 1,
    trim: bool = True,
) -> DecodedBatch:
    """Follows the `beam_size` most probable captions of each image at the same time, and returns the best of them.

    At every step each unfinished caption is continued by every word, and the most probable continuations are kept. A
    finished caption keeps its place, so that fewer are continued. In the end the `num_captions` with the largest
    log p(caption) / length ** length_penalty are returned. The length includes <end>. A penalty of 0 prefers short
    captions, and 1 compares the means over the words. Unfinished captions come after all finished ones. `trim` as
    `generate`.
    """
    # The captions of an image are consecutive rows of one batch.
    images = repeat_images(model.encode(features), beam_size)  # (B * K, ...)
    vocab_size = model.config.vocab_size
    forbidden = forbidden_tokens(vocab_size)  # (V,)
    beams = init_beams(model.initial_state(images), beam_size, max_words)
    any_batch = tf.nest.map_structure(lambda tensor: tf.TensorShape([None, *tensor.shape[1:]]), beams)
    attention = tf.TensorArray(tf.float32, max_words, element_shape=[*beams.token.shape, count_locations(images)])
    t, is_done = tf.constant(0), tf.constant(False)
    while tf.logical_and(t < max_words, ~is_done):
        tf.autograph.experimental.set_loop_options(shape_invariants=[(beams, any_batch)])
        logits, state, attention_weights = model.step(tf.cast(beams.token, tf.int32), images, beams.state)
        logits = tf.where(forbidden, -np.inf, tf.cast(logits, tf.float32))  # (B * K, V)
        history = beams.tokens[:, :, : t if constraints != NO_CONSTRAINTS else 0]  # (B, K, t), or (B, K, 0)
        history = tf.reshape(history, [-1, tf.shape(history)[2]])  # (B * K, t)
        log_probs = constrain(tf.nn.log_softmax(logits), history, constraints)  # (B * K, V)
        log_probs = tf.reshape(log_probs, [-1, beam_size, vocab_size])  # (B, K, V)
        expansion = expand_beams(beams.scores, log_probs, beams.finished)
        # The attention of the step belongs to the captions as they were before it.
        attention = attention.write(t, tf.cast(attention_weights, tf.float32))
        beams = reorder_beams(beams, expansion, state, tf.cast(t, tf.int64))
        t, is_done = t + 1, tf.reduce_all(beams.finished | (beams.scores == -np.inf))
    decoded = rank_beams(beams, attention.stack(), length_penalty, num_captions)
    num_steps = t if trim else max_words
    return DecodedBatch(*(tensor[:, :num_steps] for tensor in decoded))


def init_beams(state: tf.Tensor, beam_size: int, max_words: int) -> BeamState:
    """Returns the beams before the first step: one empty caption, and K - 1 places without one."""
    batch_size = tf.shape(state)[0] // beam_size
    first_only = tf.one_hot(0, beam_size, on_value=0.0, off_value=-np.inf)  # (K,)
    return BeamState(
        token=tf.fill([batch_size * beam_size], tf.constant(START_ID, tf.int64)),
        state=state,
        scores=tf.tile(first_only[tf.newaxis], [batch_size, 1]),  # (B, K)
        finished=tf.zeros([batch_size, beam_size], tf.bool),
        tokens=tf.fill([batch_size, beam_size, max_words], tf.constant(PAD_ID, tf.int64)),
        probabilities=tf.zeros([batch_size, beam_size, max_words]),
        rows=tf.zeros([batch_size, beam_size, max_words], tf.int64),
    )


def expand_beams(scores: tf.Tensor, log_probs: tf.Tensor, finished: tf.Tensor) -> Expansion:
    """Finds the K most probable captions that continue the K present ones by one word.

    A finished caption has one continuation, <pad>, whose log p is 0 and which is always kept.

    Args:
        scores: (B, K), log p of the captions.
        log_probs: (B, K, V), log p of their next words.
        finished: (B, K) bool.
    """
    batch_size, (beam_size, vocab_size) = tf.shape(log_probs)[0], log_probs.shape[1:]
    pad_only = tf.one_hot(PAD_ID, vocab_size, on_value=0.0, off_value=-np.inf)  # (V,)
    is_finished = finished[:, :, tf.newaxis]  # (B, K, 1)
    log_probs = tf.where(is_finished, pad_only, log_probs)  # (B, K, V)
    totals = scores[:, :, tf.newaxis] + log_probs  # (B, K, V)
    ranks = tf.where(is_finished & (pad_only == 0), np.inf, totals)  # (B, K, V)
    _, best = tf.math.top_k(tf.reshape(ranks, [batch_size, -1]), beam_size)
    best = tf.cast(best, tf.int64)  # (B, K), indices into K * V
    token = best % vocab_size  # (B, K)
    # best // vocab_size. LiteRT has no division of int64; that of a multiple in float32 is whole but for rounding.
    parent = tf.cast(tf.round(tf.cast(best - token, tf.float32) / vocab_size), tf.int64)  # (B, K)

    def gather_best(tensor: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.reshape(tensor, [batch_size, -1]), best, batch_dims=1)  # (B, K, V) -> (B, K)

    return Expansion(parent, token, scores=gather_best(totals), probabilities=tf.exp(gather_best(log_probs)))


def reorder_beams(beams: BeamState, expansion: Expansion, state: tf.Tensor, t: tf.Tensor) -> BeamState:
    """Moves everything that belongs to a caption to its new place, and adds its new word, with the number t (int64).

    `state` (B * K, units) is that of the step, in the old order.
    """
    batch_size, (beam_size, max_words) = tf.shape(expansion.parent, tf.int64)[0], beams.tokens.shape[1:]
    is_new = tf.range(max_words, dtype=tf.int64) == t  # (T,)

    def reorder(tensor: tf.Tensor) -> tf.Tensor:
        return tf.gather(tensor, expansion.parent, batch_dims=1)

    def extend(tensor: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        return tf.where(is_new, new[:, :, tf.newaxis], reorder(tensor))  # (B, K, T)

    is_valid = expansion.scores > -np.inf
    finished = (reorder(beams.finished) | (expansion.token == END_ID)) & is_valid
    beam_index = tf.range(batch_size)[:, tf.newaxis] * beam_size + expansion.parent  # (B, K), rows of B * K
    return BeamState(
        token=tf.reshape(expansion.token, [-1]),
        state=tf.gather(state, tf.reshape(beam_index, [-1])),
        scores=expansion.scores,
        finished=finished,
        tokens=extend(beams.tokens, expansion.token),
        probabilities=extend(beams.probabilities, expansion.probabilities),
        rows=extend(beams.rows, t * batch_size * beam_size + beam_index),
    )


def rank_beams(beams: BeamState, attention: tf.Tensor, length_penalty: float, num_captions: int) -> DecodedBatch:
    """Returns the N best captions of each image, finished ones first; `attention` (T, B * K, L) is of all steps."""
    lengths = tf.reduce_sum(tf.cast(beams.tokens != PAD_ID, tf.float32), axis=2)  # (B, K)
    final_scores = beams.scores / lengths**length_penalty  # (B, K)
    by_score = tf.argsort(final_scores, direction="DESCENDING", stable=True)  # (B, K)
    is_unfinished = tf.cast(~tf.gather(beams.finished, by_score, batch_dims=1), tf.int32)
    order = tf.gather(by_score, tf.argsort(is_unfinished, stable=True), batch_dims=1)[:, :num_captions]  # (B, N)
    is_caption = tf.gather(beams.scores, order, batch_dims=1) > -np.inf
    tokens = tf.cast(tf.gather(beams.tokens, order, batch_dims=1), tf.int32)  # (B, N, T)
    tokens = tf.where(is_caption[..., tf.newaxis], tokens, PAD_ID)

    def to_rows(tensor: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tensor, tf.concat([[-1], tf.shape(tensor)[2:]], axis=0))  # (B, N, ...) -> (B * N, ...)

    probabilities = tf.gather(beams.probabilities, order, batch_dims=1)  # (B, N, T)
    rows = tf.gather(beams.rows, order, batch_dims=1)  # (B, N, T)
    attention = tf.gather(tf.reshape(attention, [-1, attention.shape[2]]), rows)  # (B, N, T, L)
    return DecodedBatch(to_rows(tokens), to_rows(probabilities), to_rows(attention))


# The same searches, compiled by XLA, which takes seconds for each shape.

xla_greedy_search = tf.function(functools.partial(greedy_search.python_function, trim=False), jit_compile=True)
xla_beam_search = tf.function(functools.partial(beam_search.python_function, trim=False), jit_compile=True)
