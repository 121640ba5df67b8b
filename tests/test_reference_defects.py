"""The table of the published code's defects names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reference_defects.md"


def test_every_defect_has_tests_that_exist():
    rows = [x for x in TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", x)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 26))
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            source = (TESTS / file).read_text()
            assert f"\ndef {test}(" in source, f"{file} has no {test}"
