"""The captioner: a CNN encoder, Bahdanau attention, and a GRU decoder.

    python model.py                                       # the shapes of everything, for a batch of 16
    python model.py --units 1024 --vocabulary-size 10000  # of a larger one, and how many weights it has

After "Show, Attend and Tell" (Xu et al. 2015, https://arxiv.org/abs/1502.03044) and TensorFlow's tutorial
"Image captioning with visual attention". In the comments B is the batch size, T the number of tokens, L
the 64 locations of the 8x8 grid, and the sizes are the defaults.
"""

from common import InputError, add_setting, add_settings, make_parser, quiet, run_command  # before TensorFlow

import argparse
import dataclasses
from typing import Any, NamedTuple

import numpy as np

with quiet():
    import tensorflow as tf

import recurrence

layers = tf.keras.layers
ATTENTIONS = ("soft", "hard")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model's settings, saved in a run's config.json."""

    vocabulary_size: int = 5000
    embedding_dim: int = 256  # of the words, and of the encoded features
    units: int = 512  # of the GRU, the attention and the decoder's first Dense
    dropout: float = 0.0  # share of the embeddings and of the decoder's outputs dropped while training
    attention: str = "soft"  # or "hard": one location for each word

    def __post_init__(self):
        for name in ("vocabulary_size", "embedding_dim", "units"):
            least = 5 if name == "vocabulary_size" else 1  # four special words, and one to say
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise InputError(f"{name}: expected a whole number of at least {least}, found {value!r}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected at least 0 and less than 1, found {self.dropout}")
        if self.attention not in ATTENTIONS:
            raise InputError(f"attention: expected {' or '.join(ATTENTIONS)}, found {self.attention!r}")


class Encoded(NamedTuple):
    """A batch of pictures as the decoder sees them, computed once for all words of a caption."""

    features: tf.Tensor  # (B, L, 256)
    keys: tf.Tensor  # (B, L, 512), the attention's view of them


class Chance(NamedTuple):
    """What hard attention draws while it trains, for B captions or words."""

    noise: tf.Tensor  # (B, L), Gumbel distributed
    sampled: tf.Tensor  # (B, 1) bool, those whose location is drawn; the others get the expectation


class Taught(NamedTuple):
    """What teacher forcing finds in a batch of captions: a row for each of their N tokens but the last.

    Padding has no rows. `place` says where in the batch the rows belong: `tf.gather_nd` takes what belongs to
    them from a tensor (B, T, ...), and `tf.scatter_nd` puts them into one.
    """

    logits: tf.Tensor  # (beginnings, vocabulary), of the word after each; captions of a picture may share them
    beginning: tf.Tensor  # (N,), the row's logits
    weights: tf.Tensor  # (N, L), the attention's weights, which sum to 1 at every word
    looks: tf.Tensor  # (N, L), where it looked: the weights, or in hard attention one location for each word
    sampled: tf.Tensor  # (N, 1) bool, the words whose location was drawn; none in soft attention
    place: tf.Tensor  # (N, 2), the caption and the number of the token


class CNNEncoder(tf.keras.Model):
    """One fully connected layer with ReLU over InceptionV3's cached features."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.fc = layers.Dense(embedding_dim, activation="relu")

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """(B, L, 2048) -> (B, L, 256)."""
        return self.fc(features)


class BahdanauAttention(tf.keras.Model):
    """Where to look next: additive attention, score = V tanh(W1 features + W2 hidden).

    Bahdanau et al. 2014, section A.1.2. Soft attention (Xu et al. 2015, section 4.2) looks everywhere at once,
    as much as the weights say. Hard attention (section 4.1) looks at one location: while it trains, one drawn
    with the weights as probabilities, and otherwise the most probable one.
    """

    def __init__(self, units: int, hard: bool = False):
        super().__init__()
        self.W1 = layers.Dense(units)
        self.W2 = layers.Dense(units)
        self.V = layers.Dense(1)
        self.hard = hard
        if hard:
            self.dice = tf.keras.random.SeedGenerator()

    def call(
        self, features: tf.Tensor, hidden: tf.Tensor, keys: tf.Tensor | None = None, chance: Chance | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Weighs the locations by the decoder's hidden state, and looks.

        Args:
            features: (B, L, 256).
            hidden: (B, 512), the GRU's state before this word.
            keys: (B, L, 512), W1 features, if already computed: they are the same for all words.
            chance: for hard attention while it trains, the noise (B, L) of this word.

        Returns:
            The context vector (B, 256), the attention weights (B, L), which sum to 1, and where it looked
            (B, L): the weights, or 1 at the location of hard attention.
        """
        keys = self.W1(features) if keys is None else keys
        query = self.W2(hidden)[:, tf.newaxis]  # (B, 1, 512)
        scores = tf.squeeze(self.V(tf.tanh(keys + query)), 2)  # (B, L)
        weights = tf.nn.softmax(scores)  # (B, L)
        looks = self.look(scores, weights, chance) if self.hard else weights  # (B, L)
        # A matrix product sums over the locations without storing (B, L, 256) weighted features.
        context = tf.matmul(looks[:, tf.newaxis], features)  # (B, 1, 256)
        return tf.squeeze(context, 1), weights, looks

    def look(self, scores: tf.Tensor, weights: tf.Tensor, chance: Chance | None) -> tf.Tensor:
        """One location of each picture, as a one-hot row; or the weights, where `chance` wants the expectation."""
        # The largest of scores + Gumbel noise is a draw from their softmax (Gumbel 1954).
        scores = tf.cast(scores, tf.float32)
        found = tf.argmax(scores if chance is None else scores + chance.noise, axis=1)
        one = tf.one_hot(found, tf.shape(scores)[1], dtype=weights.dtype)
        return one if chance is None else tf.where(chance.sampled, one, weights)

    def draw(self, captions: tf.Tensor, words: tf.Tensor, locations: int) -> Chance:
        """The chance of a batch: noise (N, L), and half of the captions sampled, (B, 1); section 4.1 of the paper."""
        uniform = tf.keras.random.uniform((words, locations), minval=1e-30, seed=self.dice)
        return Chance(-tf.math.log(-tf.math.log(uniform)), tf.keras.random.uniform((captions, 1), seed=self.dice) < 0.5)


class RNNDecoder(tf.keras.Model):
    """One word after the other: attention, embedding, GRU, and two Dense layers to the vocabulary.

    The GRU's state is carried from word to word. (The tutorial's code never passes it back to the GRU, so
    there each word starts from zeros: https://github.com/tensorflow/tensorflow/issues/38248.)
    """

    def __init__(self, embedding_dim: int, units: int, vocabulary_size: int, dropout: float = 0.0, hard: bool = False):
        super().__init__()
        self.units = units
        self.embedding = layers.Embedding(vocabulary_size, embedding_dim)
        # The cell of the tutorial's GRU: 512 inputs, the context and the word, and a state of 512.
        self.gru = layers.GRUCell(units, recurrent_initializer="glorot_uniform")
        self.fc1 = layers.Dense(units)
        self.fc2 = layers.Dense(vocabulary_size)
        self.attention = BahdanauAttention(units, hard)
        self.dropout = layers.Dropout(dropout)

    def initial_state(self, batch_size: int | tf.Tensor) -> tf.Tensor:
        """Zeros, (B, 512)."""
        return tf.zeros((batch_size, self.units))

    def cell(
        self, embedded: tf.Tensor, state: tf.Tensor, encoded: Encoded, chance: Chance | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One step of the recurrence, shared by teacher forcing and captioning, so that they cannot differ.

        Args:
            embedded: (B, 256), the previous word.
            state: (B, 512).
            encoded: the pictures.
            chance: for hard attention while it trains.

        Returns:
            The next state (B, 512), which is also the GRU's output; the attention weights (B, L); and where
            it looked (B, L).
        """
        context, weights, looks = self.attention(encoded.features, state, encoded.keys, chance)
        output, _ = self.gru(tf.concat([context, embedded], axis=-1), [state])  # (B, 512) from (B, 512)
        return output, weights, looks

    def to_logits(self, outputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The GRU's outputs (..., 512) -> logits (..., vocabulary)."""
        return self.fc2(self.fc1(self.dropout(outputs, training=training)))

    def encode(self, features: tf.Tensor) -> Encoded:
        """Adds the attention's keys to encoded features, (B, L, 256)."""
        return Encoded(features, self.attention.W1(features))

    def call(self, tokens: tf.Tensor, features: tf.Tensor | Encoded, state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """One word of captioning, as in the tutorial.

        Args:
            tokens: (B,) or (B, 1), the previous word's id.
            features: (B, L, 256), or what `encode` made of them.
            state: (B, 512).

        Returns:
            logits (B, vocabulary), state (B, 512), and where it looked (B, L): the attention weights.
        """
        encoded = features if isinstance(features, Encoded) else self.encode(features)
        state, _, looks = self.cell(self.embedding(tf.reshape(tokens, [-1])), state, encoded)
        return self.to_logits(state), state, looks

    def teach(
        self,
        tokens: tf.Tensor,
        encoded: Encoded,
        picture: tf.Tensor | None = None,
        training: bool = False,
        static: bool = False,
    ) -> Taught:
        """Teacher forcing: every step is given the true previous word.

        What does not depend on the step before, the embedding and the layers to the vocabulary, is computed
        for all words at once, in a few large matrix products; the steps themselves are recurrence.py's.

        Args:
            tokens: (B, T), whole captions from <start> to <end>, padded with <pad>, at least one word each.
            encoded: the pictures.
            picture: (B,), the number of each caption's picture; None if every caption has its own.
            training: whether dropout, and the draws of hard attention, are at work.
            static: whether all shapes follow from those of the arguments, as XLA needs: then padding has rows
                too, and the steps are a loop over `cell`.
        """
        if static:
            return self._loop_over_cells(tokens, encoded, picture, training)
        return self._unroll(tokens, encoded, picture, training)

    def _unroll(self, tokens: tf.Tensor, encoded: Encoded, picture: tf.Tensor | None, training: bool) -> Taught:
        """All steps of all captions, fast."""
        lengths = tf.math.count_nonzero(tokens, 1, dtype=tf.int32) - 1  # the last token is only a target
        captions = tf.argsort(lengths, direction="DESCENDING", stable=True)
        tokens, lengths = tf.gather(tokens, captions), tf.gather(lengths, captions)
        pictures = captions if picture is None else tf.gather(picture, captions)
        variables = *self.attention.W2.variables, *self.attention.V.variables, *self.gru.trainable_variables
        W2, W2_bias, V, V_bias, kernel, state_kernel, biases = (tf.cast(each, encoded.keys.dtype) for each in variables)
        # Biases are added here, not at every step, but for the candidate's, which is inside a product with a gate.
        encoded = Encoded(encoded.features, encoded.keys + W2_bias)
        # Of every caption. As a product, since its gradient is one too, and that of `tf.gather` takes longer.
        chosen = tf.one_hot(pictures, tf.shape(encoded.keys)[0], dtype=encoded.keys.dtype)  # (B, P)
        seen = Encoded(*(tf.ensure_shape(tf.tensordot(chosen, each, 1), (None, *each.shape[1:])) for each in encoded))
        alone = training and (self.attention.hard or self.dropout.rate > 0)  # each has its own draws
        order = recurrence.order_of(tokens, lengths, None if alone else pictures)
        place = tf.stack([tf.gather(captions, order.word[:, 0]), order.word[:, 1]], 1)
        embedded = self.dropout(self.embedding(tf.gather_nd(tokens, order.row)), training=training)  # (rows, 256)
        attention, look, expected, sampled = self.attention, None, None, tf.zeros((tf.shape(place)[0], 1), tf.bool)
        if attention.hard:
            chance = None
            if training:
                chance = attention.draw(tf.size(captions), tf.shape(order.look)[0], seen.features.shape[1])
                sampled = tf.gather(chance.sampled, place[:, 0])  # rows and words are the same
                chance, expected = Chance(chance.noise, sampled), tf.cast(~sampled, embedded.dtype)

            def look(scores, weights, start):
                rows = slice(start, start + tf.shape(scores)[0])
                return attention.look(scores, weights, chance and Chance(*(each[rows] for each in chance)))

        # The GRU's kernel has the context's rows first, as `cell` has its input.
        context_kernel, word_kernel = tf.split(kernel, [seen.features.shape[2], -1], 0)
        of_gates, of_candidate = tf.split(biases[1], [2 * self.units, self.units])
        words = tf.matmul(embedded, word_kernel) + (biases[0] + tf.pad(of_gates, [[0, self.units]]))
        kernels = recurrence.Weights(W2, V, V_bias, context_kernel, state_kernel, of_candidate)
        states, weights, looks = recurrence.unroll(words, *seen, kernels, order, look, expected)
        weights, looks = (tf.gather(each, order.look_of) for each in (weights, looks))
        return Taught(self.to_logits(states, training), order.row_of, weights, looks, sampled, place)

    def _loop_over_cells(
        self, tokens: tf.Tensor, encoded: Encoded, picture: tf.Tensor | None, training: bool
    ) -> Taught:
        """The same with `cell`, for padding too, all shapes known."""
        batch, steps = tokens.shape[0], tokens.shape[1] - 1
        place = np.stack(np.meshgrid(range(batch), range(steps)), axis=-1).reshape(-1, 2).astype(np.int32)
        seen = encoded if picture is None else Encoded(*(tf.gather(each, picture) for each in encoded))
        embedded = self.dropout(self.embedding(tf.transpose(tokens[:, :-1])), training=training)  # (T, B, 256)
        given, sampled = [embedded], tf.zeros((len(place), 1), tf.bool)
        if self.attention.hard and training:
            noise, sampled = self.attention.draw(batch, len(place), seen.features.shape[1])
            sampled = tf.gather(sampled, place[:, 0])
            given += [tf.reshape(each, (steps, batch, -1)) for each in (noise, sampled)]
        nowhere = tf.zeros(seen.features.shape[:2], embedded.dtype)
        found = tf.scan(
            lambda before, now: self.cell(now[0], before[0], seen, Chance(*now[1:]) if now[1:] else None),
            tuple(given),
            initializer=(tf.zeros((batch, self.units), embedded.dtype), nowhere, nowhere),
        )
        states, weights, looks = (tf.reshape(each, (len(place), each.shape[2])) for each in found)
        return Taught(self.to_logits(states, training), tf.range(len(place)), weights, looks, sampled, place)


class Captioner(tf.keras.Model):
    """Encoder and decoder together: what is trained, saved and asked for captions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = CNNEncoder(config.embedding_dim)
        self.decoder = RNNDecoder(
            config.embedding_dim, config.units, config.vocabulary_size, config.dropout, config.attention == "hard"
        )

    def encode(self, features: tf.Tensor) -> Encoded:
        """Cached features (B, L, 2048), float16 or float32 -> what `step` needs of them."""
        return self.decoder.encode(self.encoder(tf.cast(features, self.compute_dtype)))

    def step(self, tokens: tf.Tensor, state: tf.Tensor, encoded: Encoded) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One word of captioning: tokens (B,), state (B, 512) -> logits (B, vocabulary), state, looks (B, L)."""
        return tuple(tf.cast(found, tf.float32) for found in self.decoder(tokens, encoded, state))

    def call(
        self,
        features: tf.Tensor,
        tokens: tf.Tensor,
        picture: tf.Tensor | None = None,
        training: bool = False,
        static: bool = False,
    ) -> Taught:
        """Teacher forcing: features (P, L, 2048), captions (B, T), each caption's picture (B,); see `teach`."""
        return self.decoder.teach(tokens, self.encode(features), picture, training, static)


def build(
    config: ModelConfig, features_shape: tuple[int, int] = (64, 2048), mixed_precision: bool = False
) -> Captioner:
    """A captioner whose weights exist, which restoring a checkpoint needs.

    With `mixed_precision` it computes in float16 and keeps its weights in float32.
    """
    policy = tf.keras.config.dtype_policy()
    tf.keras.config.set_dtype_policy("mixed_float16" if mixed_precision else "float32")
    try:
        captioner = Captioner(config)
    finally:
        tf.keras.config.set_dtype_policy(policy)
    encoded = captioner.encode(tf.zeros((1, *features_shape)))
    captioner.step(tf.zeros(1, tf.int32), captioner.decoder.initial_state(1), encoded)
    captioner.built = True
    return captioner


def add_arguments(parser: argparse.ArgumentParser, config: ModelConfig) -> None:
    """The options of the model; `config` has their defaults."""
    group = parser.add_argument_group("model")
    texts = {
        "vocabulary_size": "words kept, the 4 special ones included",
        "embedding_dim": "size of a word's embedding, and of an encoded location",
        "units": "size of the GRU's state and of the attention",
        "dropout": "share of embeddings and outputs dropped in training",
    }
    add_settings(group, config, texts)
    text = "look everywhere, weighted, or at one location"
    add_setting(group, "attention", config.attention, text, choices=ATTENTIONS)


def main(argv: list[str] | None = None) -> None:
    """Prints the shapes of a batch of 16 on its way through the model."""
    parser = make_parser(__doc__)
    add_arguments(parser, ModelConfig())
    captioner = build(ModelConfig(**vars(parser.parse_args(argv))))
    features = tf.zeros((16, 64, 2048))
    encoded = captioner.encode(features)
    logits, state, weights = captioner.step(tf.zeros(16, tf.int32), captioner.decoder.initial_state(16), encoded)
    shapes: dict[str, Any] = {
        "features": features,
        "encoder": encoded.features,
        "attention keys": encoded.keys,
        "decoder logits": logits,
        "decoder state": state,
        "attention weights": weights,
    }
    for name, tensor in shapes.items():
        print(f"{name:18} {tuple(tensor.shape)}")
    print(f"{captioner.count_params():,} weights")


if __name__ == "__main__":
    run_command(main)
