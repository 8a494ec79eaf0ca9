"""The HAProxy that Ray Serve starts for us."""

from __future__ import annotations

import subprocess
import sys


def test_it_is_haproxy_and_takes_its_arguments():
    command = [sys.executable, "-m", "ostro.cluster.haproxy", "-v"]
    version = subprocess.run(command, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("HAProxy")
