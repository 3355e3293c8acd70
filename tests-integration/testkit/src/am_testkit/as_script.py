"""Run a script as `python script.py arguments` does, and leave as a rank of a test leaves: see `ranks.py` for why.

python as_script.py script.py arguments

What is registered for the end is done and what is printed is written out, then the process ends without finalising its
interpreter. A script that fails, or that a signal ends, ends as it would have.
"""

from __future__ import annotations

import atexit
import os
import pathlib
import runpy
import sys
import threading


def main() -> None:
    del sys.argv[0]
    script = pathlib.Path(sys.argv[0])
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leave:
        if leave.code:
            raise
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
