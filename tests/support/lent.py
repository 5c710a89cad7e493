"""Arrays of libraries that are not installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


class Lent:
    """An array of another library: all that is known of it is its memory, on whichever device it is."""

    def __init__(self, array: np.ndarray | Tensor):
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()
