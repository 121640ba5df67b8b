"""The table of faults names tests that exist, for every fault."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability.md"


def test_every_fault_has_tests_that_exist():
    rows = [x for x in TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", x)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 36))
    for row in rows:
        _, _, fault, seen, tests, _ = row.split("|")
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named and fault.strip() and seen.strip(), row
        for file, test in named:
            source = (TESTS / file).read_text()
            assert f"\ndef {test}(" in source, f"{file} has no {test}"
