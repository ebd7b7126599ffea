"""Where the rows of a run start."""

from __future__ import annotations

import torch
from robustdeq.attacks._ascent import Lanes
from robustdeq.attacks._losses import GoalLoss
from torch import Tensor

from robustdeq.equilibrium import Dynamics, JointAscent, parameter_dtype
from robustdeq.randomness import SampleRandom
from robustdeq.shapes import Counts, Images, Labels
from robustdeq.threats import Threat


def random_starts(threat: Threat, x: Images, streams: SampleRandom) -> Images:
    """A random point for each row: uniform in the cube for Linf, on the sphere for L2."""
    uniform = streams.uniform(x)
    radial = torch.ones(len(x)).to(x)
    return threat.project(x, x + threat.random_offset(uniform, radial))


def side_by_side(goals: Tensor, samples: Counts) -> tuple[Counts, Labels]:
    """Rows for some samples: each with its first goal, then each with its second, and so on."""
    return samples.repeat(goals.shape[1]), goals[samples].T.flatten()


def joint_ends(
    dynamics: Dynamics,
    ascent: JointAscent,
    loss: GoalLoss,
    lanes: Lanes,
    x: Images,
    y: Labels,
    threat: Threat,
) -> Images:
    """Where a joint ascent from the start of each row ends, in the ball and the box."""
    dtype = parameter_dtype(dynamics.model) or x.dtype
    clean, labels = x[lanes.samples], y[lanes.samples]

    def per_row(logits: Tensor) -> Tensor:
        return loss(logits, labels, lanes.goals)

    ends, _ = ascent(dynamics, clean.to(dtype), threat, per_row, lanes.start.to(dtype))
    # A mixture of iterates, and rounding to the images' type, may leave the ball.
    return threat.project(clean, ends.to(x))
