"""The contract suite: what every backend must keep, as checks that run against a real one.

In a plugin's own tests::

    import pytest
    from backends.contract import Check, Subject, checks_for
    from my_package import MyBackend

    SUBJECT = Subject(MyBackend, model="a-model", unknown_model="no-such-model")

    @pytest.mark.parametrize("check", checks_for(SUBJECT), ids=str)
    def test_contract(check: Check) -> None:
        check.run(SUBJECT)

A check that fails raises `ContractBreach`, which says what is asked for and what was seen. The suite needs no test
framework. It asks the model a few hundred contexts of a few tokens, which a service may charge for.
"""

from __future__ import annotations

from backends.contract import answers, calls, setup
from backends.contract.subject import CASES, Case, Check, ContractBreach, Subject

__all__ = ["CASES", "CHECKS", "Case", "Check", "ContractBreach", "Subject", "checks_for"]

CHECKS: tuple[Check, ...] = tuple(
    value for module in (setup, answers, calls) for value in vars(module).values() if isinstance(value, Check)
)
"""All checks; those that score nothing come first."""


def checks_for(subject: Subject) -> list[Check]:
    """The checks that apply: those of capabilities that the backend does not claim are left out."""
    return [check for check in CHECKS if check.applies(subject)]
