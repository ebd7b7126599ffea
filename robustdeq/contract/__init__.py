"""The plugin contracts as tests, for an author's own test suite.

    from robustdeq.contract import assert_contract

    @pytest.mark.parametrize("plugin", [MyDefense(), MyDefense(width=8), MyAttack()], ids=repr)
    def test_contract(plugin):
        assert_contract(plugin)

or, for a test per rule,

    @pytest.mark.parametrize("finding", contract_findings(MyDefense()), ids=lambda f: f.name)
    def test_rule(finding):
        assert finding.outcome != "failed", str(finding)

`robustdeq check` runs the same tests, and then the honesty checks on a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustdeq.contract.attacks import attack_findings
from robustdeq.contract.defenses import defense_findings
from robustdeq.contract.findings import Finding, failures
from robustdeq.contract.recipes import recipe_findings
from robustdeq.errors import UsageError
from robustdeq.interfaces import kind_of

__all__ = ["Finding", "assert_contract", "contract_findings"]


def contract_findings(plugin: Any) -> list[Finding]:
    """What the contract tests find on a defense, an attack or a recipe.

    Nothing is trained and nothing is downloaded; the models are small and stand on the CPU. Random
    numbers are drawn under fixed seeds, so that two calls find the same. A test that raises has
    failed; none stops the others.

    Args:
        plugin: an object, its parameters set.

    Returns:
        One finding per rule, in a fixed order: its name, its outcome ("passed", "failed", "skipped"
        or "info"), what was found, and what to do about a failure.

    Raises:
        UsageError: if the object is none of the three.
    """
    tests: dict[str, Callable[[Any], list[Finding]]] = {
        "defense": defense_findings,
        "attack": attack_findings,
        "recipe": recipe_findings,
    }
    kind = kind_of(plugin)
    if kind is None or isinstance(plugin, type):
        raise UsageError(
            f"{plugin!r} is no plugin object; give one with a method build, run or loss, "
            "such as MyDefense()."
        )
    return tests[kind](plugin)


def assert_contract(plugin: Any) -> None:
    """Fail with every broken rule and its remedy, a line each.

    Args:
        plugin: an object, its parameters set.

    Raises:
        AssertionError: naming each test that failed.
        UsageError: if the object is no plugin.
    """
    broken = failures(contract_findings(plugin))
    assert not broken, "\n".join(str(finding) for finding in broken)
