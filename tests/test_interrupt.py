"""Ctrl-C while the workers train: exit code 130 and the command that goes on, as documented."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests import shards


@pytest.mark.ray
def test_an_interrupt_in_fit_exits_130_and_says_how_to_go_on(tmp_path):
    x, _ = shards.near_corners(2000)
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(x))
    settings = {
        "input.path": tmp_path / "in", "output": tmp_path / "runs", "cluster.num_leaves": 4, "merge.levels": [2],
        "autoencoder.hidden_dims": [16], "autoencoder.latent_dim": 2, "pretrain.num_epochs": 100_000,
        "ray.address": "local",
    }  # fmt: skip
    command = [sys.executable, "-m", "raydc", "run", "--run-id", "r"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    # A group of its own: a terminal sends the signal to the driver's processes, not to the test's.
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=os.getcwd()
    )
    watchdog = threading.Timer(240, driver.kill)
    watchdog.start()
    try:
        assert driver.stdout is not None
        lines = []
        for line in driver.stdout:
            lines.append(line)
            if "pretrain epoch" in line:
                driver.send_signal(signal.SIGINT)
                break
        out, err = driver.communicate(timeout=120)
    finally:
        watchdog.cancel()
        driver.kill()
    text = "".join(lines) + out
    assert driver.returncode == 130, text + err
    assert (
        f"Interrupted. `raydc resume {tmp_path}/runs/r` continues, and so does the same command with --run-id r." in err
    )
    starting = [i for i, line in enumerate(lines) if "fit: starting 1 training worker" in line]
    assert starting, text
