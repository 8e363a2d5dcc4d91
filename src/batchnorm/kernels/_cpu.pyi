from typing import Any, TypeAlias

import numpy as np

_Doubles: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

TYPES: dict[str, int]
ACTIVATIONS: dict[str, int]
STATISTICS: dict[str, int]

def instructions() -> str: ...
def use_instructions(name: str) -> bool: ...
def xla_handlers() -> dict[str, object]: ...

class State:
    def __init__(
        self,
        *,
        gamma: int = 0,
        gamma_type: int = 2,
        beta: int = 0,
        beta_type: int = 2,
        running_type: int = 2,
        running_mean: int = 0,
        running_var: int = 0,
        batches: int = 0,
        running_stddev: int = 0,
        renorm_mean: int = 0,
        renorm_stddev: int = 0,
    ) -> None: ...

class Renorm:
    def __init__(self, *, decay: float, rmin: float, rmax: float, dmax: float) -> None: ...

class Kept:
    def row(self, which: int) -> _Doubles: ...
    def count(self) -> _Doubles: ...
    def all(self) -> _Doubles: ...

class Plan:
    def __init__(
        self,
        *,
        type: int,
        outer: int,
        channels: int,
        inner: int,
        groups: int,
        run: int,
        row: int,
        activation: int,
        zero_padding: bool,
    ) -> None: ...
    def set_mask(self, *, width: int, repeat: int, outer: int, inner: int) -> None: ...
    def set_team(self, team: int) -> None: ...
    def moments(self, *, x: int, mask: int, threads: int) -> Kept: ...
    def forward(
        self,
        *,
        x: int,
        mask: int,
        y: int,
        residual: int,
        residual_row: int,
        state: State,
        eps: float,
        decay: float,
        batch: bool,
        update: bool,
        unbiased: bool,
        renorm: Renorm | None,
        threads: int,
        kept: Kept | None,
    ) -> Kept: ...
    def restore(self, *, data: int, size: int, renorm: bool) -> Kept: ...
    def backward(
        self,
        *,
        dy: int,
        dy_row: int,
        x: int,
        y: int,
        mask: int,
        dx: int,
        dresidual: int,
        dgamma: int,
        dgamma_type: int,
        dbeta: int,
        dbeta_type: int,
        kept: Kept,
        batch: bool,
        threads: int,
    ) -> None: ...
    def reduce(
        self,
        *,
        dy: int,
        dy_row: int,
        x: int,
        y: int,
        mask: int,
        dresidual: int,
        dgamma: int,
        dgamma_type: int,
        dbeta: int,
        dbeta_type: int,
        kept: Kept,
        threads: int,
    ) -> _Doubles: ...
    def apply(
        self,
        *,
        dy: int,
        dy_row: int,
        x: int,
        y: int,
        mask: int,
        dx: int,
        dresidual: int,
        sums: _Doubles,
        kept: Kept,
        threads: int,
    ) -> None: ...
