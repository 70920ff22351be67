"""Fails where a test was skipped that .ci/allowed_skips.txt does not name: an oracle that is not asked proves nothing.

    python .ci/check_skips.py REPORT.xml

Each line of the list is a regular expression of test names, as `tests/folder/test_file.py::test_name[...]`.
"""

import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree


def main(report: str) -> int:
    """0 where every skipped test is allowed; prints the others."""
    lines = (pathlib.Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    allowed = [re.compile(line) for line in lines if line.strip() and not line.startswith("#")]
    skipped = []
    for case in ElementTree.parse(report).iter("testcase"):
        for skip in case.findall("skipped"):
            module = case.get("classname", "").replace(".", "/") + ".py"
            skipped.append((f"{module}::{case.get('name')}", skip.get("message", "")))
    wrong = [row for row in skipped if not any(pattern.search(row[0]) for pattern in allowed)]
    for name, why in skipped:
        print(f"skipped: {name}: {why}")
    for name, _ in wrong:
        print(f"not allowed to be skipped (see .ci/allowed_skips.txt): {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
