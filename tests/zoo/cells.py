"""Recurrent layers and their cells."""

import tf_keras
from tf_keras import layers
from tf_keras.src.layers.rnn.cell_wrappers import ResidualWrapper

from zoo.registry import bn, builder, on


class NormCell(layers.Layer):
    """A cell that normalises its state."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units
        self.dense, self.norm = layers.Dense(units), bn()

    def call(self, x, states, training=None):
        h = self.norm(self.dense(x) + states[0], training=training)
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class NormLSTMCell(layers.LSTMCell):
    """A stock cell with BatchNormalization on its input."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.norm = bn(name="norm")

    def build(self, input_shape):
        super().build(input_shape)
        self.norm.build(input_shape)

    def call(self, inputs, states, training=None):
        return super().call(self.norm(inputs, training=training), states, training=training)


@builder
def recurrent():
    inputs = layers.Input((7, 4))
    x = bn(name="norm")(layers.LSTM(16, return_sequences=True)(inputs))
    return tf_keras.Model(inputs, bn()(layers.Bidirectional(layers.GRU(8))(x)))


@builder
def cell():
    return on((4, 4), layers.RNN(NormCell(), name="rnn"))


@builder
def cell_derived_from_stock():
    return on((3, 16), layers.RNN(NormLSTMCell(5), return_sequences=True))


@builder
def stacked_cells():
    cells = [NormCell(16), layers.SimpleRNNCell(6), NormCell(32)]
    return on((3, 4), layers.RNN(cells, name="rnn"))


@builder
def bidirectional_cell():
    return on((3, 4), layers.Bidirectional(layers.RNN(NormCell()), name="both"))


@builder
def wrapped_cell():
    return on((3, 16), layers.RNN(ResidualWrapper(NormCell()), name="rnn"))


@builder
def state_kept_between_batches():
    rnn = layers.RNN(NormCell(), stateful=True, name="rnn")
    inputs = layers.Input(batch_shape=(3, 4, 5))
    return tf_keras.Model(inputs, rnn(inputs))


@builder
def convolutional_recurrent():
    rnn = layers.ConvLSTM2D(16, 3, return_sequences=True)
    return on((2, 5, 5, 3), [rnn, layers.TimeDistributed(bn()), bn(name="norm")])
