"""The decoder of Show, Attend and Tell (Xu et al. 2015), which uses the image in three more places than the tutorial's.

The first state is made from the mean of all locations (section 3.1.2). The context vector is scaled by a gate, one
number for each word (section 4.2.1). The logits of the next word also depend on the previous word and on the context
vector, a "deep output layer" (section 3.1.2, equation 7).
"""

from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from model import EncodedImages, RNNDecoder

layers = tf.keras.layers


class PaperDecoder(RNNDecoder):
    """The paper's decoder with a GRU; its sizes here are the defaults."""

    cell_class = layers.GRUCell

    def __init__(self, config: ModelConfig):
        tf.keras.Model.__init__(self)  # without the layers of the tutorial's decoder
        self.units = config.units
        self.embedding = layers.Embedding(config.vocab_size, config.embedding_dim)
        self.f_init_h = layers.Dense(config.units, activation="tanh")
        if self.cell_class is layers.LSTMCell:
            self.f_init_c = layers.Dense(config.units, activation="tanh")
        self.attention = self.attention_class(config.units)
        self.f_beta = layers.Dense(1, activation="sigmoid")
        self.cell = self.cell_class(config.units, recurrent_initializer="glorot_uniform")
        self.L_h = layers.Dense(config.embedding_dim)
        self.L_z = layers.Dense(config.embedding_dim, use_bias=False)  # L_h has one
        self.L_o = layers.Dense(config.vocab_size)
        self.dropout = layers.Dropout(config.dropout)
        self.fused = False
        self.output_sizes = [config.units, config.embedding_dim, config.embedding_dim]

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns h before the first word, (B, 512)."""
        return self.f_init_h(tf.reduce_mean(images.features, axis=1))

    def gate(self, state: tf.Tensor) -> tf.Tensor:
        """Returns how much the next word uses the image, (B, 1) from 0 to 1: beta, of section 4.2.1."""
        return self.f_beta(state[:, : self.units])

    def step(
        self, dec_input: tf.Tensor, images: EncodedImages, state: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs one step, as `RNNDecoder.step`; the output holds h, the context vector and the word, (B, 1024)."""
        context_vector, attention_weights = self.attention(images, state[:, : self.units])
        context_vector *= self.gate(state)  # (B, 256)
        h, state = self.run_cell(tf.concat([context_vector, dec_input], axis=-1), state)
        return tf.concat([h, context_vector, dec_input], axis=1), state, attention_weights

    def run_cell(self, cell_input: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns h (B, 512), and the new state."""
        h, _ = self.cell(cell_input, [state])
        return h, h

    def variables_by_word(self) -> list[tuple[tf.Variable, int]]:
        """Returns the weights that each word of the vocabulary has a part of, each with its axis of words."""
        return [(self.embedding.embeddings, 0), (self.L_o.kernel, 1), (self.L_o.bias, 0)]

    def to_logits(self, outputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps the outputs (N, 1024) of N steps to logits (N, vocab_size), by equation 7."""
        h, context_vector, dec_input = tf.split(outputs, self.output_sizes, axis=1)  # (N, 512), (N, 256), (N, 256)
        h = self.dropout(h, training=training)
        hidden = tf.tanh(dec_input + self.L_h(h) + self.L_z(context_vector))  # (N, 256)
        return self.L_o(self.dropout(hidden, training=training))


class PaperLSTMDecoder(PaperDecoder):
    """The same with the paper's LSTM, whose state is h beside its memory c, (B, 1024)."""

    cell_class = layers.LSTMCell

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns h and c before the first word, (B, 1024)."""
        mean = tf.reduce_mean(images.features, axis=1)  # (B, 256)
        return tf.concat([self.f_init_h(mean), self.f_init_c(mean)], axis=1)

    def run_cell(self, cell_input: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns h (B, 512), and the new state (B, 1024)."""
        h, (_, c) = self.cell(cell_input, tf.split(state, 2, axis=1))
        return h, tf.concat([h, c], axis=1)
