"""Which other classes a search has come nearest to."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdeq.shapes import Counts, Labels, Logits


class Rivals:
    """By how much each class has led the own one at most, over all looks at a sample.

    Args:
        y: labels (batch,).
        classes: how many there are.
    """

    def __init__(self, y: Labels, classes: int) -> None:
        self.y = y
        self.lead = torch.full((len(y), classes), -torch.inf, device=y.device)

    def see(self, samples: Counts, logits: Logits) -> None:
        """Look at logits (rows, classes); a sample may have several rows."""
        logits = logits.detach().to(self.lead)
        ahead = logits - logits.gather(1, self.y[samples][:, None])
        # Infinity less infinity says nothing.
        ahead = ahead.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.lead.scatter_reduce_(0, samples[:, None].expand_as(ahead), ahead, "amax")

    def nearest(self, samples: Counts, goals: Tensor, count: int) -> Tensor:
        """(rows, goals): of each row's goals whether it is one of the `count` nearest.

        Args:
            samples: the sample of each row.
            goals: the classes that a row chooses among (rows, goals).
        """
        ranks = self.lead[samples].gather(1, goals).argsort(dim=1, descending=True, stable=True)
        chosen = torch.zeros_like(goals, dtype=torch.bool)
        return chosen.scatter(1, ranks[:, :count], True)
