# SPDX-License-Identifier: MIT
"""Find the torch device for the name that a user gives, and check that it works."""

from __future__ import annotations

import torch

from afpq.errors import AfpqError


def find_device(name: str) -> torch.device:
    """Return the device; `auto` is the GPU if there is one, else the CPU. Raises AfpqError for an unusable one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device).item()  # a name may be right and its device absent, or a meta device
        return device
    except Exception as error:  # torch raises many kinds for names and for drivers
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise AfpqError(f"device {name!r} cannot be used; try auto or cpu ({reason})") from None
