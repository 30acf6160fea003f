"""`python -m benchmarks [NAME]`: run one benchmark, or all of them."""

import argparse
import os

from benchmarks import device, faults, heads, linkage, methods, scale, speed, starts

NAMES = {
    "device": device.main,
    "faults": faults.main,
    "heads": heads.main,
    "linkage": linkage.main,
    "methods": methods.main,
    "scale": scale.main,
    "speed": speed.main,
    "starts": starts.main,
}


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("name", nargs="?", choices=sorted(NAMES), help="one benchmark; all by default")
    parser.add_argument("--mnist", default=os.environ.get("RAYDC_MNIST"), metavar="FOLDER", help="MNIST as Parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=[*methods.METHODS, *heads.METHODS], help="methods, heads: some")
    parser.add_argument("--data", nargs="+", choices=["digits", "mnist", "planted"], help="methods, heads: some")
    parser.add_argument("--imbalance", action="store_true", help="methods: on classes of unequal size instead")
    rows = [*linkage.ROWS, *speed.ROWS, *starts.DATA]
    parser.add_argument("--rows", nargs="+", choices=rows, help="rows of linkage, speed or starts; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="speed: runs of each side of a row")
    parser.add_argument("--num-rows", type=int, default=1_280_000, help="speed: rows of the largest input; device")
    parser.add_argument(
        "--sizes", type=int, nargs="+", metavar="ROWS", help="speed: of pipeline, inputs of these sizes"
    )
    parser.add_argument("--device", default="cuda", help="device: cuda, or cpu to see that it runs")
    parser.add_argument("--only", nargs="+", metavar="FAULT/STAGE", help="faults: these, * stands for anything")
    parser.add_argument("--afresh", action="store_true", help="faults: forget the injections that are in the table")
    parser.add_argument("--autoscaler", action="store_true", help="scale: an autoscaled cluster alone")
    parser.add_argument("--files", type=int, metavar="N", help="scale: the driver of up to N files alone, simulated")
    parser.add_argument("--folder", help="faults: work here, and keep the unbroken runs for the next time")
    parser.add_argument("--lock", metavar="FILE", help="faults: hold a lock on this file, to share a machine")
    parser.add_argument("--turn-seconds", type=float, default=300.0, help="faults: give the lock back after these")
    options = parser.parse_args()
    for name in [options.name] if options.name else sorted(NAMES):
        NAMES[name](options)


if __name__ == "__main__":
    main()
