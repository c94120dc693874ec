"""Layers in NumPy, as papers write them, and the rows of teacher forcing by caption and step."""

import numpy as np

from captioning.base.quiet_tensorflow import tf


def unpack(rows, outputs, tokens):
    """Unpacks rows (N, ...) of outputs to (B, T, ...), with zeros where there is no row."""
    return tf.scatter_nd(outputs.positions, rows, (tokens.shape[0], tokens.shape[1] - 1, *rows.shape[1:])).numpy()


def dense(layer, inputs):
    return inputs @ layer.kernel.numpy() + (layer.bias.numpy() if layer.use_bias else 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(cell, inputs, state):
    """The next state; Keras has the gates z, r and g one after the other."""
    bias, recurrent_bias = cell.bias.numpy()
    x_z, x_r, x_g = np.split(inputs @ cell.kernel.numpy() + bias, 3, -1)
    u_z, u_r, u_g = np.split(state @ cell.recurrent_kernel.numpy() + recurrent_bias, 3, -1)
    update = sigmoid(x_z + u_z)
    return update * state + (1 - update) * np.tanh(x_g + sigmoid(x_r + u_r) * u_g)
