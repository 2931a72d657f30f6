"""Workers must start fast."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from medssl.scans.files import parse_file, load_formats
load_formats()
print([name for name in ("torch", "monai", "mlflow", "highdicom") if name in sys.modules])
"""


def test_parsing_headers_imports_neither_torch_nor_monai():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
