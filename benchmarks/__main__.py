"""`python -m benchmarks [NAME]`: run one benchmark, or all of them."""

import argparse
import os

from benchmarks import linkage, quality, speed

NAMES = {"linkage": linkage.main, "quality": quality.main, "speed": speed.main}


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("name", nargs="?", choices=sorted(NAMES), help="one benchmark; all by default")
    parser.add_argument("--mnist", default=os.environ.get("RAYDC_MNIST"), metavar="FOLDER", help="MNIST as Parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    rows = [*linkage.ROWS, *speed.ROWS]
    parser.add_argument("--rows", nargs="+", choices=rows, help="rows of linkage or speed; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="speed: runs of each side of a row")
    parser.add_argument("--num-rows", type=int, default=1_280_000, help="speed: rows of the largest planted input")
    options = parser.parse_args()
    for name in [options.name] if options.name else sorted(NAMES):
        NAMES[name](options)


if __name__ == "__main__":
    main()
