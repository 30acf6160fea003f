"""The job that `ray job submit` runs: cluster a data set by the settings of a YAML file.

    python jobs/cluster_imagenet.py --config jobs/cluster_imagenet.yaml --run-id first
    ray job submit --working-dir . -- python jobs/cluster_imagenet.py --config jobs/digits.yaml

The same as `raydc run`. With the same --run-id a stopped run continues.
"""

import sys

from raydc.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
