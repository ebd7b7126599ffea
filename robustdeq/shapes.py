"""The tensor shapes that stand in signatures; the tests check them at run time."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, " batch"]
PerSample = Float[Tensor, " batch"]
Counts = Int[Tensor, " batch"]
Mask = Bool[Tensor, " batch"]
State = Float[Tensor, "batch *state"]
