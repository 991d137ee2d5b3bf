"""scripts/cluster/parallel_table.py: the page and the picture that it makes of a result.  Measuring takes minutes."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from conftest import REPO, run

ROW = {"step_ms": 300.0, "exposed_ms": 200.0, "bytes_sent": [2e6, 2e6, 1e6, 2e6], "val_loss": 2.5, "cpu": [0.5, 0.251]}
RESULT = {"date": "2026-12-01", "commit": "abc", "steps": 9, "cores": 2, "hosts": 4,
          "rates": {"1gbit": {"ring": ROW, "DiLoCo": None}, "9mbit": {"ring": ROW}}}  # fmt: skip


def test_a_page_of_a_result(tmp_path: Path) -> None:
    (tmp_path / "four-hosts-2026-12-01.json").write_text(json.dumps(RESULT))
    page = tmp_path / "parallelism.md"
    command = [sys.executable, REPO / "scripts" / "cluster" / "parallel_table.py", "--page", "--out", tmp_path]
    assert run(command).code == 0
    text = page.read_text()
    assert "### Links of 1 Gbit/s" in text and "### Links of 9mbit" in text
    assert "| ring | 300.0 | 200.0 | 1.00 to 2.00 | 2.500 | 50%, 25% |" in text
    assert "| DiLoCo | not in this build |" in text
    picture = ElementTree.parse(tmp_path / "parallelism.svg")
    red = [e.get("width") for e in picture.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") == "#d1570a"]
    assert red == ["346.7", "346.7", "12"]  # two thirds of a bar of 520, for each rate; the legend

    page.write_text(text.replace("# Many devices", "# My words") + "After it.\n")
    assert run(command).code == 0
    assert page.read_text() == text.replace("# Many devices", "# My words") + "After it.\n"
