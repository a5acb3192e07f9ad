"""Runs code in a process that may take 500 MB more than its imports did."""

import subprocess
import sys

LIMIT = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
"""


def run_limited(imports, code, *arguments):
    """Returns what the code printed; it reads the arguments from sys.argv[1:]."""
    command = [sys.executable, "-c", f"import sys\n{imports}\n{LIMIT}\n{code}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
