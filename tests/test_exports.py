"""The public face: the names exist, and importing the package stays light."""

import subprocess
import sys

import herdling


def test_every_name_resolves():
    for name in herdling.__all__:
        assert getattr(herdling, name) is not None


def test_import_loads_no_torch():
    code = "import sys, herdling; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
