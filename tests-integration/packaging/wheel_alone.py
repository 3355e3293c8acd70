"""Run in a clean environment: only the declared packages of ours are there, they import, and the README's code runs.

python wheel_alone.py am-tp-plans,am-tp-styles packages/am-tp-plans/README.md
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tempfile

AS_SCRIPT = pathlib.Path(__file__).parents[1] / "testkit/src/am_testkit/as_script.py"


def main() -> None:
    expected, readme = sys.argv[1].split(","), pathlib.Path(sys.argv[2])
    installed = sorted({d.name.lower() for d in importlib.metadata.distributions()})
    ours = [name for name in installed if name.startswith("am-")]
    if ours != expected:
        sys.exit(f"expected {expected} and nothing else of ours, found {ours}")
    brought = {"transformers", "numpy"} & set(installed)
    if brought:
        sys.exit(f"the wheel brought {sorted(brought)}, which it must not need")
    for name in ours:
        says = importlib.import_module(name.replace("-", "_")).__version__
        if says != importlib.metadata.version(name):
            sys.exit(f"{name} {importlib.metadata.version(name)} says that it is {says}")
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    if not blocks:
        sys.exit(f"{readme} has no code to run")
    for number, block in enumerate(blocks):
        with tempfile.TemporaryDirectory() as folder:
            script = pathlib.Path(folder) / "snippet.py"
            script.write_text(block)
            subprocess.run([sys.executable, str(AS_SCRIPT), str(script)], check=True, timeout=300)
        print(f"{readme}: block {number} ran", flush=True)


if __name__ == "__main__":
    main()
