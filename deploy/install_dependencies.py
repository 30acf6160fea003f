"""Install on a cluster node what raydc depends on, in the versions that are tested. The code arrives with each job.

Usage: python install_dependencies.py {cpu,gpu,gpu-cuvs} FOLDER [--print]

FOLDER holds pyproject.toml and constraints.txt. Needs no package but pip, so that it runs on a bare image.
"""

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extra: str) -> list[str]:
    """Return the requirements of the package with `extra`, the Ray of the image among them."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"][extra]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", choices=["cpu", "gpu", "gpu-cuvs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--print", action="store_true", help="show the command and stop")
    arguments = parser.parse_args()

    wanted = requirements(arguments.folder / "pyproject.toml", arguments.extra)
    constraints = arguments.folder / "constraints.txt"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", str(constraints), *wanted]
    if arguments.print:
        print(" ".join(command))
    else:
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
