"""The table of faults names tests that exist, and says of which there are none."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability.md"
OPEN = (14, 33)  # faults without a test, so far


def test_every_fault_has_tests_that_exist():
    rows = [x for x in TABLE.read_text().splitlines() if re.match(r"\| \d+ \|", x)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 36))
    for number, row in enumerate(rows, 1):
        _, _, fault, seen, tests, _ = row.split("|")
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        if number in OPEN:
            assert not named and tests.strip().startswith("none yet"), row
            continue
        assert named and fault.strip() and seen.strip(), row
        for file, test in named:
            source = (TESTS / file).read_text()
            assert f"\ndef {test}(" in source, f"{file} has no {test}"
