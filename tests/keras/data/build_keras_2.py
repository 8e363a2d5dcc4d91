"""Write the files beside this one with Keras 2: pip install tf_keras, then run it.

Last run with tf_keras 2.21.0. `keras_2_model.h5` has no ghost batches, since Keras 2 saves their
axis wrong and cannot load its own file; and no layers of several axes, since Keras 3 drops the axes
when it loads the config.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tf_keras
from tf_keras import layers

HERE = Path(__file__).parent


def make(ghost: int | None) -> tf_keras.Model:
    """A model with every kind of batch normalization; ghost batches are in an inner model."""
    inputs, inner = layers.Input((4, 3)), layers.Input((4, 4))
    x = layers.BatchNormalization(name="plain")(inputs)
    x = layers.Dense(4, name="dense")(x)
    renorm = layers.BatchNormalization(name="renorm", renorm=True, scale=False)
    if ghost:
        y = renorm(layers.BatchNormalization(name="ghost", virtual_batch_size=ghost)(inner))
        x = tf_keras.Model(inner, y, name="inner")(x)
    else:
        x = renorm(x)
    axis = [1, 2] if ghost else -1
    return tf_keras.Model(inputs, layers.BatchNormalization(name="axes", axis=axis)(x))


def main() -> None:
    """Train both models for a few steps, and save the models and their outputs."""
    tf_keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(2.0, 3.0, (8, 4, 3)).astype("float32")
    answers = {}
    for name, ghost in (("weights", 2), ("model", None)):
        model = make(ghost)
        model.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.fit(x, np.ones((8, 4, 4)), batch_size=4, epochs=3, verbose=0)
        answers[name] = model(x, training=False).numpy()
        if ghost:
            model.save_weights(HERE / "keras_2_weights.h5")
            model.save_weights(HERE / "keras_2.weights.h5")
        else:
            model.save(HERE / "keras_2_model.h5", include_optimizer=False)
    np.savez(HERE / "keras_2.npz", x=x, **answers)


if __name__ == "__main__":
    main()
