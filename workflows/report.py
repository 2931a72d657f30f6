"""Compare runs that are done, from their predictions alone, and write one report.

python workflows/report.py runs/first runs/second --out runs/compared
"""

import sys
from pathlib import Path

import medssl


def main() -> None:
    """Compare the run folders given before ``--out`` into the folder given after it."""
    separator = sys.argv.index("--out")
    runs, out = [Path(name) for name in sys.argv[1:separator]], Path(sys.argv[separator + 1])
    comparisons = medssl.compare(runs, out)
    columns = ["task", "protocol", "num_labelled_patients", "init", "effect", "verdict"]
    print(comparisons[columns].to_string(index=False))
    print("report:", out / "report.html")


if __name__ == "__main__":
    main()
