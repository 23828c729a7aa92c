"""Ports that are chosen here: which, and that a small range is tried to its end."""

from __future__ import annotations

from tproxyd.net.ports import PortChoice


def test_others_are_of_the_parity_that_clients_leave_alone() -> None:
    assert {port % 2 for port in PortChoice(32768, 60999).others(500)} == {1}
    assert {port % 2 for port in PortChoice(1025, 65535).others(500)} == {0}


def test_edges_are_in_and_nothing_beyond() -> None:
    found = set(PortChoice(40000, 40099).any(10_000))
    assert found == set(range(40000, 40100))
    assert set(PortChoice(40000, 40098).others(10_000)) == set(range(40001, 40099, 2))


def test_of_a_small_range_each_is_given_once_however_few_are_asked_for() -> None:
    choice = PortChoice(40000, 40009, frozenset({40003, 40004}))
    assert sorted(choice.any(1)) == [40000, 40001, 40002, 40005, 40006, 40007, 40008, 40009]
    assert sorted(choice.others(1)) == [40001, 40005, 40007, 40009]
    assert list(PortChoice(40000, 40000).any(3)) == [40000]
    assert list(PortChoice(40000, 40000).others(3)) == []


def test_reserved_ports_are_passed_over() -> None:
    assert set(PortChoice(40000, 40999, frozenset(range(40000, 40990))).any(2000)) <= set(range(40990, 41000))
    assert list(PortChoice(40000, 40999, frozenset(range(40000, 41000))).any(10)) == []
