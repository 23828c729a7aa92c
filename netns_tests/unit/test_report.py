"""What a relay loop and its owner say to each other."""

from __future__ import annotations

import re
from pathlib import Path

from tproxyd.datapath import report


def test_no_two_kinds_of_message_are_the_same() -> None:
    source = Path(report.__file__).read_text()
    for title in ("Owner to loop.", "Loop to owner."):
        section = source.split(f"# {title}\n")[1].split("\n\n")[0].split("\n# ")[0]
        kinds = re.findall(r'^[A-Z_]+ = (b".")', section, re.MULTILINE)
        assert len(kinds) > 10
        assert len({*kinds}) == len(kinds)
