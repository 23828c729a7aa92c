"""Listeners that cannot be opened: the sentence has the way out that belongs to the error."""

from __future__ import annotations

import resource

import pytest

from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.interceptor.listeners import require_free_port


def test_without_a_file_it_is_not_another_port_that_is_asked_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(KernelError) as caught:
            require_free_port(Config(), [("127.0.0.1", 15001)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(caught.value) == (
        "cannot listen on 127.0.0.1:15001: Too many open files; is the machine out of files or memory?"
    )
