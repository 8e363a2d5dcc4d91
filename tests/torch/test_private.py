"""Private names of torch that are gone: what takes over gives the same results."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.tools.frameworks.torch import private as of_tools
from batchnorm.torch import private

# Names inside torch, and the names in private.py that their fallbacks take.
REMOVED = {
    "_C._len_torch_dispatch_stack": "count_modes",
    "_C._functorch.peek_interpreter_stack": "find_transformation",
    "_C._get_tracing_state": "find_trace",
    "autograd.forward_ad._current_level": "in_forward_mode",
    "_C._functorch.is_functorch_wrapped_tensor": "is_wrapped",
    "_C._functorch.is_legacy_batchedtensor": "is_batched",
    "Tensor._is_zerotensor": "is_zero",
    "_C._storage_Use_Count": "count_storage_uses",
    "UntypedStorage._cdata": "count_storage_uses",
    "_C._current_graph_task_id": "find_backward",
    "_C._autograd._top_saved_tensors_default_hooks": "find_saving_hooks",
    "_C._dynamo.eval_frame": "skip_in_compilers",
    "utils._python_dispatch.TorchDispatchMode": "OperatorMode",
    "utils._pytree": "flatten_tree",
    "_dynamo_marked_constant": "constant_in_graphs",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """The words of each process without one of the names, and of one with all of them."""
    script = Path(__file__).with_name("without_private.py")
    command = [sys.executable, str(script), *REMOVED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["nothing", *REMOVED])
def test_results_are_right_without(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "right"


def test_every_name_that_is_looked_up_is_removed_once() -> None:
    looked_up = {
        node.args[0].value
        for file in (private.__file__, of_tools.__file__)
        for node in ast.walk(ast.parse(Path(file).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "_find"
        and isinstance(node.args[0], ast.Constant)
    }
    assert looked_up <= set(REMOVED)


def test_compiler_says_no_without_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "_is_compiling_flag")
    with private.not_compiling():
        assert not hasattr(torch.compiler, "_is_compiling_flag")


def test_mark_of_constants_is_that_of_torch() -> None:
    def one() -> int:
        return 1

    torch.compiler.assume_constant_result(one)
    marks = vars(one)
    assert vars(private.constant_in_graphs(lambda: 1)) == marks
