"""Rows of weights that ship, as lines of a suite: what tests of whole runs attack."""

from __future__ import annotations


def _row(name: str, defense: str, parameters: str, weights: str) -> str:
    return (
        f'[[defenses]]\nid = "{name}"\ndefense = "{defense}"\n'
        f'parameters = {{ width = 96, inner = 96{parameters} }}\nweights = "{weights}"\n'
    )


PLAIN = _row("Plain", "feedforward", "", "digits-feedforward-clean.safetensors")
ROBUST = _row("Robust", "feedforward", "", "digits-feedforward-pgd_at.safetensors")
EQUILIBRIUM = _row("Equilibrium", "deq", ", gain = 0.8", "digits-deq-clean.safetensors")
