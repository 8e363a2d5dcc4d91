"""Codes of types and activations, and the rows of the statistics that a forward step keeps.

The numbers are those of the enumerations in native/batchnorm.hpp; a test compares them.
"""

TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2}
STATISTICS = {
    name: row
    for row, name in enumerate(("mean", "low", "var", "rstd", "scale", "offset", "r", "d"))
}
