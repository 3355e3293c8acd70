"""Add up the junit files of all sessions; the last line counts what ran."""

import pathlib
import sys
import xml.etree.ElementTree as ElementTree

passed = failed = skipped = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.xml")):
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        bad = count["failures"] + count["errors"]
        print(
            f"{path.stem}: {count['tests'] - bad - count['skipped']} passed, {bad} failed, {count['skipped']} skipped"
        )
        passed += count["tests"] - bad - count["skipped"]
        failed += bad
        skipped += count["skipped"]
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed or not passed else 0)
