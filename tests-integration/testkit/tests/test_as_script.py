"""A script that is run by `as_script` does what it does under Python, up to its end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from am_testkit import as_script

ENDS = {
    "by itself": "",
    "with a message": "sys.exit('no such file')",
    "with a code": "sys.exit(3)",
    "with zero": "sys.exit(0)",
    "in an error": "1 / 0",
    "by a signal": "os.kill(os.getpid(), 15)",
}
SCRIPT = """
import atexit, os, sys, threading, time
import beside

atexit.register(print, "last words")
threading.Thread(target=lambda: (time.sleep(0.2), print("of a thread", flush=True))).start()
print(sys.argv[1:], beside.VALUE, __name__, os.path.basename(__file__))
END
"""


@pytest.mark.parametrize("end", ENDS)
def test_a_script_prints_and_ends_as_under_python(end, tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("END", ENDS[end]))
    runs = [
        subprocess.run([sys.executable, *runner, script, "--more"], capture_output=True, text=True, timeout=60)
        for runner in ((), (as_script.__file__,))
    ]
    plain, ours = ((run.returncode, run.stdout, run.stderr.splitlines()[-1:]) for run in runs)
    assert plain == ours
