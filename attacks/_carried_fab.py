"""The reference FAB-T with states that are carried, and all targets of all samples side by side."""

from __future__ import annotations

from typing import Any

from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import targeted_margin
from robustdeq.attacks._reference import reference_class
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from robustdeq.equilibrium import JointState, Lockstep
from robustdeq.shapes import Counts, Images, Labels
from robustdeq.threats import Threat

ITERATIONS = 100
"""Of the reference's FAB in AutoAttack."""


def carried_fab(
    lockstep: Lockstep,
    settled: JointState,
    ledger: Ledger,
    samples: Counts,
    goals: Labels,
    x: Images,
    threat: Threat,
) -> None:
    """The reference's iterations for some rows; the ledger is offered what they find in the ball.

    Its own class runs, with its gradients and its question for the label answered by one look and
    one glance; the reference asks for them one target after another.

    Args:
        settled: state and adjoint of each row to begin with.
        samples: the sample of each row.
        goals: the class of each row.
        x: clean images of the rows.
    """
    kind: Any = type("CarriedFab", (_Answers, reference_class("fab_pt", "FABAttack_PT")), {})
    attack = kind(None, norm=str(threat.norm), n_iter=ITERATIONS, eps=threat.eps, device=x.device)
    attack.lockstep, attack.state, attack.ledger = lockstep, settled, ledger
    attack.samples, attack.goals, attack.x, attack.threat = samples, goals, x, threat
    attack.target_class = 1
    attack.attack_single_run(x, ledger.y[samples], is_targeted=True)


class _Answers:
    """What the reference's class asks of a model."""

    lockstep: Lockstep
    state: JointState
    ledger: Ledger
    samples: Counts
    goals: Labels
    x: Images
    threat: Threat
    begun = False

    def _predict_fn(self, images: Images) -> Tensor:
        # The reference takes the class of rank `target_class` for its target.
        return F.one_hot(self.goals, self.ledger.clean.shape[1]).to(images)

    def _get_predicted_label(self, images: Images) -> Labels:
        y = self.ledger.y[self.samples]
        if not self.begun:  # asks which clean images are right: all of them
            self.begun = True
            return y.clone()
        glance = self.lockstep.glance(images, self.state)
        self.state = glance.state
        labels = glance.logits.argmax(1)
        _offered(self.ledger, self.threat, self.samples, self.x, images, labels != y)
        return labels

    def get_diff_logits_grads_batch_targeted(
        self, images: Images, own: Labels, goal: Labels
    ) -> tuple[Tensor, Tensor]:
        def gap(logits: Tensor) -> Tensor:
            return targeted_margin(logits, own, goal)

        look = self.lockstep.look(images, self.state, gap)
        self.state = look.state
        losses, gradient = look.losses.nan_to_num(0.0), look.gradient.nan_to_num(0.0, 0.0, 0.0)
        return losses[:, None].to(images), gradient[:, None].to(images)


def _offered(
    ledger: Ledger, threat: Threat, samples: Counts, x: Images, images: Images, wrong: Tensor
) -> None:
    """Those that claim to be fooled within the ball, for samples that are still open."""
    near = wrong & (threat.distance(x, images) <= threat.eps) & ~ledger.settled[samples]
    if bool(near.any()):
        ledger.offer(samples[near], threat.project(x[near], images[near]))
