"""The README shows what was measured, and is short."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_made_from_results():
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
