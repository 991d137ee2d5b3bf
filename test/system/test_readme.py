"""README.md tells what the program does."""

from __future__ import annotations

import subprocess

from conftest import REPO, TRAIN


def test_readme_has_the_table_of_keys() -> None:
    table = subprocess.run([TRAIN, "--keys"], check=True, capture_output=True, text=True).stdout
    assert table.count("\n") > 40
    assert table in (REPO / "README.md").read_text(), "README.md's table of keys is out of date: run `make readme`"
