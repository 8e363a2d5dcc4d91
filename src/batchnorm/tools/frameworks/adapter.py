"""The protocol between tools and frameworks: all questions about a model and its batch norms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Protocol

from numpy.typing import NDArray

from batchnorm.tools.frameworks.records import (
    Called,
    FoldedModel,
    FoundLayer,
    Framework,
    Observation,
    OtherArray,
    Values,
)
from batchnorm.tools.state import BatchNormState

__all__ = ["Adapter", "ArrayTree", "Follower", "Following", "Judge", "Leaves", "States"]

Pairs = Sequence[tuple[str, str]] | None

# The reason against a folded copy, or None: outputs before and after, precision, depth.
Judge = Callable[[list[Any], list[Any], float, int], str | None]


class States(Protocol):
    """A framework's module that finds batch norms, and reads and writes their states."""

    def owns(self, model: Any) -> bool:
        """True for a model or layer of this framework."""

    def is_batch_norm(self, layer: Any) -> bool:
        """True for a layer that `take_state` reads."""

    def find(self, model: Any) -> list[tuple[str, Any]]:
        """Names and batch norms of a model, each once, in the order of definition."""

    def take_state(self, layer: Any, name: str = "") -> BatchNormState:
        """The layer's state, copied.

        Raises:
            ValueError: the layer has no weights yet.
        """

    def put_state(self, layer: Any, state: BatchNormState) -> None:
        """Write a state into a layer, in place, after checking all of it.

        Raises:
            ValueError: it does not fit; the layer is unchanged.
        """


class Follower(Protocol):
    """Sees the arrays that go into and come out of every layer, and may replace them."""

    def enter(self, layer: Called, arrays: list[Any]) -> list[Any]:
        """Take the arrays that a layer is called with, and return those that it gets."""

    def leave(self, layer: Called, arrays: list[Any]) -> list[Any]:
        """Take the arrays that a layer returns, and return those that its caller gets."""


class Following(Protocol):
    """A module whose functions follow every layer of a model, and read and write its arrays."""

    def follow(self, model: Any, follower: Follower, seed: int) -> AbstractContextManager[None]:
        """Show a follower every eager call of every layer of a model, the model itself included.

        Args:
            model: a model of this framework.
            follower: sees the calls.
            seed: the framework's random numbers begin here inside, and go on as before behind.
        """

    def read(self, array: Any) -> Values | None:
        """The values of an array; None for what is none, or has no values yet (a tracer)."""

    def write(self, values: Any, like: Any) -> Any:
        """NumPy values as an array of the type, and on the device, of another."""

    def run(self, model: Any, batch: Any, mask: Any) -> None:
        """Run a model on a batch with its mask, where its call takes one."""


class Adapter(Protocol):
    """One framework: its models, and the batch norms in them.

    Attributes:
        name: of the framework.
        states: what finds, reads and writes its batch norms.
        takes_pairs: `fold` takes names of layers that run one after the other.
    """

    name: Framework
    states: States
    takes_pairs: bool = False

    def check_shared(self, pairs: Sequence[tuple[Any, BatchNormState]]) -> None:
        """Raise if layers would get different values of an option that they share.

        Args:
            pairs: layers, and the states that they are to have.
        """
        return

    def can_average(self, layer: Any) -> bool:
        """True for a layer whose running statistics can be the plain average of all batches."""
        return False

    def runs_on_torch(self) -> bool:
        """True if the layers' arrays are torch's, which ranks can send."""
        return False

    def to_mask(self, mask: Any, x: Any) -> Any:
        """A NumPy mask as `Observation` has it for an input x."""
        return mask

    @abstractmethod
    def refuse_update(self, layer: Any) -> str | None:
        """The reason for not touching a layer's statistics, or None."""

    @abstractmethod
    def rehearse(
        self, model: Any, layers: Sequence[FoundLayer]
    ) -> AbstractContextManager[tuple[Any, Sequence[FoundLayer]]]:
        """A model to run, and its layers, which normalize by the batch; all else is in evaluation.

        It is the model itself or a copy; afterwards the model is as before.

        Args:
            model: a model of this framework.
            layers: those of its batch norms that are to run as in training.
        """

    @abstractmethod
    def watch(
        self, layers: Sequence[FoundLayer], see: Callable[[Observation], None]
    ) -> AbstractContextManager[None]:
        """Call `see` before every call of one of the layers; see `tools.observe`."""

    @abstractmethod
    def following(self) -> Following:
        """The functions that follow the layers of this framework's models."""

    @abstractmethod
    def copy(self, model: Any) -> Any:
        """A model like this one, with arrays of its own.

        Raises:
            ValueError: it cannot be copied.
        """

    @abstractmethod
    def others(self, model: Any) -> list[OtherArray]:
        """The arrays of numbers that belong to no batch norm, each once; no random numbers' seeds.

        A copy's are in the same order.
        """

    def call(self, model: Any, batch: Any) -> None:
        """Run a model on an array, or on a mapping of keyword arguments."""
        if isinstance(batch, dict):
            model(**batch)
        else:
            model(batch)

    def settle(self) -> None:
        """Wait until all calls so far have been seen, and raise what `see` raised."""
        return

    @abstractmethod
    def fold(
        self, model: Any, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
    ) -> FoldedModel:
        """A copy whose batch norms are folded into the linear maps beside them (S19).

        Args:
            model: a model of this framework; unchanged.
            layers: its batch norms.
            example: input to run both on, or None for a random batch.
            pairs: names of layers that run one after the other, where `takes_pairs` is True.
            judge: compares outputs, for adapters that undo folds that it refuses.
        """


class ArrayTree(Protocol):
    """Batch norms in arrays that cannot be changed in place, only replaced in a copy.

    Attributes:
        states: of the batch norms.
        notes: remarks on what looks like a layer, but is none.
        has_options: eps and decay are in the tree, beside the arrays.
    """

    states: list[BatchNormState]
    notes: Sequence[str]
    has_options: bool

    def others(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of numbers that belong to no batch norm, half types as float32."""

    def replaced(
        self,
        changes: Mapping[str, BatchNormState],
        others: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> Any:
        """A copy with other states for the layers of these names, and other arrays beside them.

        Raises:
            ValueError: a state does not fit.
        """


class Leaves(Protocol):
    """A module that reads the arrays in a tree, and makes others like them."""

    def is_array(self, leaf: Any) -> bool:
        """True for a leaf with a type and a shape."""

    def is_seed(self, leaf: Any) -> bool:
        """True for what random numbers come from."""

    def type_of(self, leaf: Any) -> str:
        """The name of the leaf's type, like "float32"."""

    def read(self, leaf: Any) -> NDArray[Any]:
        """The values, in NumPy; half types as float32."""

    def copy(self, leaf: Any) -> Any:
        """The same leaf, or a copy of one that can be changed in place."""

    def make(self, values: Any, like: Any) -> Any:
        """Values as a leaf of the type, shape and place of another."""
