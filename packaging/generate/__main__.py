"""`python packaging/generate docs` and `... install DIR`; see the package's own words."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "packaging")]  # run as a folder, not as a module

from generate.completions import SHELLS, completion  # noqa: E402  # found by the line above
from generate.manual import PAGES, page  # noqa: E402  # behind the path that finds it
from generate.reference import COMMITTED  # noqa: E402  # as above


def main(arguments: list[str]) -> None:
    """Writes what is asked for. SOURCE_DATE_EPOCH is the day of manual pages, as in every reproducible build."""
    match arguments:
        case ["docs"]:
            for name, make in COMMITTED.items():
                (ROOT / name).write_text(make(), encoding="utf-8")
        case ["install", directory]:
            day = datetime.fromtimestamp(
                float(os.environ.get("SOURCE_DATE_EPOCH", datetime.now(UTC).timestamp())), UTC
            ).date()
            pages = {f"share/man/man{name[-1]}/{name}": page(name, day) for name in PAGES}
            for name, text in (pages | {where: completion(shell) for shell, (where, _) in SHELLS.items()}).items():
                file = Path(directory) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
        case _:
            sys.exit("usage: python packaging/generate docs | install DIR")


main(sys.argv[1:])
