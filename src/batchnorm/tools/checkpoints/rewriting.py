"""Writing all arrays of a checkpoint in the layout that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import CheckpointError, one_line
from batchnorm.tools.checkpoints.source import Checkpoint, Texts
from batchnorm.tools.checkpoints.writing import format_of, nested, replacing, write_msgpack

__all__ = ["check_layout", "rewrite", "stored"]

_FORMATS = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".msgpack": "msgpack",
    ".weights.h5": "hdf5",
    ".h5": "hdf5",
}
_SUFFIXES = {
    "safetensors": ".safetensors",
    "torch": ".pt",
    "msgpack": ".msgpack",
}
# Errors of a library for arrays or texts that its format cannot hold.
_UNFIT = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError)

Arrays = Mapping[str, NDArray[Any]]


def check_layout(checkpoint: Checkpoint, target: Path) -> None:
    """Raise unless files of the target's suffix have the checkpoint's layout.

    Raises:
        CheckpointError: they have another one, to which only batch norms can be converted.
    """
    wanted = format_of(target)
    found = _SUFFIXES.get(checkpoint.format)
    if checkpoint.format == "hdf5" and checkpoint.contents is not None:
        names = {name for _, name in checkpoint.contents.texts}
        # Keras 2 keeps the order of layers; a long list is cut in numbered parts.
        found = ".h5" if names & {"layer_names", "layer_names0"} else ".weights.h5"
    if found is not None and (wanted == found or _FORMATS[wanted] == _FORMATS[found] == "torch"):
        return
    remedy = "leave everything=True (--all) out"
    if found is not None:
        remedy = f"give it a name that ends in {found}, or {remedy}"
    raise CheckpointError(
        f"{target}: all arrays are written in the format that they come in, and "
        f"{checkpoint.path} is {_described(checkpoint.format, found)}; only batch norms are "
        f"converted. {remedy[0].upper()}{remedy[1:]}."
    )


def _described(kind: str, found: str | None) -> str:
    if found is None:
        return f"in a format that is not written ({kind})"
    return f"a file like {found}"


def stored(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array in the type that a file stores."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.asarray(array.astype(ml_dtypes.bfloat16))
    return np.asarray(array.astype(dtype, copy=False))


def rewrite(target: Path, checkpoint: Checkpoint, arrays: Arrays) -> None:
    """Write a file that appears complete or not at all.

    Args:
        target: its suffix fits, as `check_layout` has found.
        checkpoint: with `contents`, whose paths and texts the file gets.
        arrays: by name, of types that `stored` gives.

    Raises:
        CheckpointError: it cannot be written.
        ImportError: of the format's package.
    """
    assert checkpoint.contents is not None
    paths, texts = checkpoint.contents.paths, checkpoint.contents.texts
    suffix = format_of(target)
    try:
        with replacing(target) as part:
            keyed = {paths.get(name, (name,)): array for name, array in arrays.items()}
            if suffix == ".safetensors":
                _write_safetensors(part, arrays, texts)
            elif suffix == ".msgpack":
                write_msgpack(part, keyed)
            elif _FORMATS[suffix] == "torch":
                _write_torch(part, keyed)
            else:
                _write_hdf5(part, arrays, texts)
    except CheckpointError:
        raise
    except _UNFIT as error:
        reason = one_line(str(getattr(error, "strerror", None) or error))
        raise CheckpointError(f"{target}: it cannot be written: {reason}.") from error


def _write_safetensors(path: Path, arrays: Arrays, texts: Texts) -> None:
    from safetensors.numpy import save_file

    metadata = {name: text for (_, name), text in texts.items() if isinstance(text, str)}
    whole = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    save_file(whole, path, metadata or None)


def _write_torch(path: Path, arrays: Mapping[tuple[str, ...], NDArray[Any]]) -> None:
    import torch

    def tensor(array: NDArray[Any]) -> Any:
        if array.dtype.name == "bfloat16":  # which torch does not take from NumPy
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    torch.save(nested({key: tensor(array) for key, array in arrays.items()}), path)


def _write_hdf5(path: Path, arrays: Arrays, texts: Texts) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        for (place, name), text in texts.items():
            item = file
            if place:
                item = file[place] if place in file else file.create_group(place)
            if isinstance(text, list):
                encoded = [part.encode() for part in text]
                item.attrs[name] = np.array(encoded, None if encoded else "S1")
            else:
                item.attrs[name] = text
