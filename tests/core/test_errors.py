"""Errors about arguments get the name of the layer or function at the public edge."""

from __future__ import annotations

import inspect
import pickle

import pytest

from batchnorm.core.errors import (
    ArgumentNameError,
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    names_errors,
    naming,
)

KINDS = {
    ArgumentValueError: ValueError,
    ArgumentTypeError: TypeError,
    ArgumentNameError: NameError,
    ArgumentRuntimeError: RuntimeError,
}


@pytest.mark.parametrize(("raised", "seen"), KINDS.items())
def test_edge_names_an_error_and_makes_it_plain(raised: type, seen: type) -> None:
    @names_errors("edge")
    def call() -> None:
        raise raised("x must be positive; got -1.")

    with pytest.raises(seen, match=r"^edge: x must be positive; got -1\.$") as info:
        call()
    assert type(info.value) is seen
    assert isinstance(pickle.loads(pickle.dumps(info.value)), seen)  # between processes


def test_methods_are_named_after_the_class_of_the_object() -> None:
    class Layer:
        @names_errors()
        def call(self, x: int) -> int:
            """Documented."""
            raise ArgumentValueError("x is wrong.")

    class Sub(Layer):
        pass

    with pytest.raises(ValueError, match=r"^Sub: x is wrong\.$"):
        Sub().call(3)
    assert Layer.call.__doc__ == "Documented."
    assert list(inspect.signature(Layer.call).parameters) == ["self", "x"]


def test_only_the_inner_edge_names() -> None:
    @names_errors("outer")
    def outer() -> None:
        with naming("inner"):
            raise ArgumentTypeError("x is none.")

    with pytest.raises(TypeError, match=r"^inner: x is none\.$"):
        outer()


def test_errors_of_the_user_s_own_code_keep_their_text() -> None:
    @names_errors("edge")
    def call() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        call()
