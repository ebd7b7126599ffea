"""The third party's own tests: the contract, a test per finding and a test per plugin."""

from __future__ import annotations

import pytest
from acme_deq import AcmeDEQ, Corners

from robustdeq.contract import Finding, assert_contract, contract_findings


@pytest.mark.parametrize("plugin", [AcmeDEQ(), AcmeDEQ(slope=0.1), Corners()], ids=repr)
def test_contract(plugin: object) -> None:
    assert_contract(plugin)


@pytest.mark.parametrize("finding", contract_findings(AcmeDEQ()), ids=lambda f: f.name)
def test_each_rule(finding: Finding) -> None:
    assert finding.outcome != "failed", str(finding)
