"""The memory of an import, as the tool measures it."""

import re
import subprocess
import sys

import pytest

from tests import jobs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes are read from /proc")
def test_import_needs_little_memory_besides_the_arrays():
    """Beyond the arrays themselves, which are the host's on a CPU, less than half of them while they are read."""
    tool = [sys.executable, str(jobs.ROOT / "tools" / "import_memory.py"), "--megabytes=250"]
    printed = subprocess.run(tool, env=jobs.environment(), check=True, capture_output=True, text=True).stdout
    arrays = float(re.search(r"([\d,]+) MB as float32", printed).group(1).replace(",", ""))
    reading = float(re.search(r"reading +([\d,]+) MB", printed).group(1).replace(",", ""))
    assert arrays > 400
    assert reading < 1.5 * arrays, printed
