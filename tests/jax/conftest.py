"""What every test of the JAX front end runs under."""

from __future__ import annotations

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
