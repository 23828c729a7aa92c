"""Errors: the root cannot be raised, every branch has its exit code, a ConfigError keeps its problems apart."""

from __future__ import annotations

import pytest

from tproxyd.errors import CapabilityError, ConfigError, KernelError, MissingError, TproxydError, UsageError

EXIT_CODES = {UsageError: 64, MissingError: 69, KernelError: 71, CapabilityError: 77, ConfigError: 78}
"""Exit codes that scripts and units rely on."""


def test_the_root_cannot_be_raised() -> None:
    with pytest.raises(TypeError, match="not the root"):
        raise TproxydError("something")


@pytest.mark.parametrize("branch", EXIT_CODES)
def test_every_branch_has_its_exit_code_and_says_its_sentence(branch: type[TproxydError]) -> None:
    with pytest.raises(TproxydError, match=r"^a sentence$") as caught:
        raise branch("a sentence")
    assert caught.value.exit_code == EXIT_CODES[branch]


def test_every_branch_is_in_the_table() -> None:
    assert set(TproxydError.__subclasses__()) == set(EXIT_CODES)


def test_a_config_error_has_all_problems() -> None:
    error = ConfigError("one", "two")
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"
