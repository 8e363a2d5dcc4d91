"""Process groups as arguments."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError

_OUTSIDE = -100  # torch.distributed.GroupMember.NON_GROUP_MEMBER


def check_group(synchronized: bool, group: Any) -> None:
    """Raise unless `group` can be the process group of a layer or call."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        outside = "" if group != _OUTSIDE else ", which means that this rank is not in the group"
        raise ArgumentTypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this rank "
            f"belongs to, or None for the default group; got {group!r}{outside}."
        )
    if not synchronized:
        raise ArgumentValueError(
            f"process_group needs synchronized=True; got synchronized=False and {group}."
        )
