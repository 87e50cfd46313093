"""The command line of the golden runner."""

import argparse
import sys
from pathlib import Path

import tests.golden
from tests.golden import run_case

OUTPUTS = ("out", "moments", "decoded", "last", "pooled", "output", "context")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.golden", description=tests.golden.__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="print every row, not only the outputs and what failed")
    options = parser.parse_args(arguments)
    failed = False
    for folder in options.folders:
        try:
            rows = run_case(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        failed |= not all(r.passed for r in rows)
        for r in rows:
            if options.all or not r.passed or r.name in OUTPUTS:
                print(
                    f"{r.case:22} {r.dtype:8} {r.name:40} {r.error:9.1e} {r.bound:8.0e} {'ok' if r.passed else 'BAD'}"
                )
        print(f"{folder.name}: {sum(r.passed for r in rows)} of {len(rows)} within their bounds")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
