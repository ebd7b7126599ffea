"""Equilibrium core: solvers, gradient estimators and the classifier that joins them."""

from robustdeq.equilibrium.anderson import Anderson
from robustdeq.equilibrium.backprop import Backprop
from robustdeq.equilibrium.broyden import Broyden
from robustdeq.equilibrium.compiled import Compiled, compiled
from robustdeq.equilibrium.counting import Meter, metered
from robustdeq.equilibrium.drive import Drive, Value
from robustdeq.equilibrium.fixed_point import FixedPoint
from robustdeq.equilibrium.gradients import (
    Honest,
    Implicit,
    OneStep,
    Phantom,
    SolveGradient,
    Unrolled,
    splice,
)
from robustdeq.equilibrium.iteration import Method, Solver
from robustdeq.equilibrium.joint import Dynamics, JointAscent, JointState, JointStep
from robustdeq.equilibrium.lockstep import Glance, Lockstep, Look
from robustdeq.equilibrium.memory_format import channels_last
from robustdeq.equilibrium.model import EquilibriumClassifier, parameter_dtype
from robustdeq.equilibrium.solution import (
    AdjointTrace,
    Cell,
    Injection,
    Problem,
    Solve,
    finite,
    join_rows,
    relative_residual,
    take_rows,
)
from robustdeq.equilibrium.states import Intermediate, SimultaneousAdjoint

__all__ = [
    "AdjointTrace", "Anderson", "Backprop", "Broyden", "Cell", "Compiled", "Drive", "Dynamics",
    "EquilibriumClassifier", "FixedPoint", "Glance", "Honest", "Implicit", "Injection",
    "Intermediate", "JointAscent", "JointState", "JointStep", "Lockstep", "Look", "Meter",
    "Method", "OneStep", "Phantom", "Problem", "SimultaneousAdjoint", "Solve", "SolveGradient",
    "Solver", "Unrolled", "Value", "channels_last", "compiled", "finite", "join_rows", "metered",
    "parameter_dtype", "relative_residual", "splice", "take_rows",
]  # fmt: skip
