"""sdk_shapes.py against the server: every reply valid by the clients' own models."""

import subprocess
import sys
from pathlib import Path


def test_every_reply_fits(server):
    script = Path(__file__).with_name("sdk_shapes.py")
    done = subprocess.run(
        [sys.executable, str(script), server.url, "toy"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
