"""Decoders whose step differs from the project's: what a user may write."""

import model
from captioning.base.quiet_tensorflow import tf


class GatedDecoder(model.RNNDecoder):
    """The context vector is multiplied by a gate that depends on the state (Xu et al. 2015, section 4.2.1)."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = tf.keras.layers.Dense(1, activation="sigmoid")

    def step(self, dec_input, images, state):
        context_vector, attention_weights = self.attention(images, state)
        gru_input = tf.concat([self.gate(state) * context_vector, dec_input], axis=-1)
        state, _ = self.gru(gru_input, [state])
        return state, state, attention_weights


class WideDecoder(model.RNNDecoder):
    """The context vector enters the GRU twice, so that the GRU's kernel has more rows."""

    def step(self, dec_input, images, state):
        context_vector, attention_weights = self.attention(images, state)
        state, _ = self.gru(tf.concat([context_vector, context_vector, dec_input], axis=-1), [state])
        return state, state, attention_weights
