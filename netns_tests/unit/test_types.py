"""What a user's type checker says of programs that use the package: nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_examples_and_the_test_that_users_are_shown_are_clean_for_a_strict_mypy(tmp_path: Path) -> None:
    """Elsewhere, and without this project's settings: the types are those that py.typed promises to an importing program."""
    files = []
    for example in sorted((ROOT / "examples").glob("*.py")):
        files.append(tmp_path / example.name)
        files[-1].write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    page = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
    (test,) = re.findall(r"^```python\n(import json\n.*?)^```", page, re.M | re.S)
    files.append(tmp_path / "test_of_a_user.py")
    files[-1].write_text(test, encoding="utf-8")
    assert len(files) > 2
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from tproxyd import Forward\nForward(8080)\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, *map(str, files)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"Success: no issues found in {len(files)} source files\n"), (
        done.stderr
    )
    # And the types are there at all: an untyped package would have been clean, too.
    done = subprocess.run([*command, str(wrong)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'incompatible type "int"' in done.stdout
