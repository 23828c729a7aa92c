"""What stands in the documents as a configuration is one, and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tproxyd.config import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


def _configurations() -> list[object]:
    return [
        pytest.param(text, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, text in enumerate(_TOML.findall(document.read_text()))
    ]


@pytest.mark.parametrize("text", _configurations())
def test_a_configuration_in_a_document_is_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tproxyd.toml"
    path.write_text(text)
    load_config(path)


@pytest.mark.parametrize("document", [pytest.param(one, id=one.name) for one in DOCUMENTS])
def test_what_a_document_links_to_is_there(document: Path) -> None:
    links = _LINK.findall(document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing
