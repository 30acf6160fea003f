"""Ray's autoscaler on one machine: a head without CPUs, and nodes that it starts and stops as work comes and goes.

The nodes are raylets of Ray's own fake provider; the autoscaler, its decisions and its pace are the real ones.
`ray.cluster_utils.AutoscalingCluster` cannot be used from the wheel, which lacks its example file.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

_HEAD_ID = "f" * 51 + "00000"
# The fake provider knows its head by this name.
_HEAD_TYPE = "ray.head.default"
_MEMORY = 120_000_000
_NODES: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2, "object_store_memory": _MEMORY}, "max_workers": 3},
    "gpu": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": _MEMORY}, "max_workers": 1},
}
_PROVIDER = """\
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    pass
"""
_EMPTY_MAPS = ("auth", "docker", "file_mounts")
_EMPTY_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


class Autoscaled:
    """A cluster that starts as a bare head, what it does second by second, and jobs on it."""

    def __init__(self, *, idle_seconds: float = 20.0) -> None:
        self.events: list[tuple[float, str]] = []
        """Seconds since the start of the head, and what happened."""

        self._started = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="raydc-nodes-"))
        (self._folder / "fake_nodes.py").write_text(_PROVIDER)
        self._ip, self._port = ray._private.services.get_node_ip_address(), _free_port()
        config = self._folder / "autoscaler.json"
        config.write_text(json.dumps(self._config(idle_seconds)))
        self._head_log = self._folder / "head.log"
        self._head = self._start_head(config)
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"{self._ip}:{self._port}"

    def nodes(self) -> list[str]:
        """Return the node types that live beside the head, sorted."""
        return sorted(n.node_type_name for n in self._alive() if n.node_type_name in _NODES)

    def say(self, text: str) -> None:
        """Note what happened now."""
        self.events.append((round(time.monotonic() - self._started, 1), text))
        print(f"[{self.events[-1][0]:6.1f} s] {text}", flush=True)

    def wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Return whether a condition comes true within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (found := bool(condition())) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def run(self, config: Path, run_id: str, *settings: str) -> subprocess.Popen[str]:
        """Start `raydc run` on the cluster; its lines about stages become events."""
        command = [sys.executable, "-m", "raydc", "run", "--config", str(config), "--run-id", run_id]
        for setting in settings:
            command += ["--set", setting]
        env = self._environment() | {"RAY_ADDRESS": self.address, "PYTHONUNBUFFERED": "1"}
        del env["RAY_FAKE_CLUSTER"]
        job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=self._follow, args=(job,), daemon=True).start()
        return job

    def kill_node(self) -> None:
        """Kill the newest node of CPUs: its raylet and every process below it."""
        newest = max((n for n in self._alive() if n.node_type_name == "cpu"), key=lambda n: n.start_time_ms)
        for pid in self._processes():
            if newest.raylet_socket_name in _command(pid):
                for each in [pid, *_below(pid)]:
                    _signal(each, signal.SIGKILL)
        self.say("a node was killed")

    def close(self) -> None:
        """End the head, its nodes and what they started."""
        self._over.set()
        self._watcher.join()
        self._head.send_signal(signal.SIGTERM)
        try:
            self._head.wait(30)
        except subprocess.TimeoutExpired:
            self._head.kill()
        for number in (signal.SIGTERM, signal.SIGKILL):
            time.sleep(2)
            for pid in self._processes():
                _signal(pid, number)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self) -> list[int]:
        """Return every process whose command names the folder of this cluster."""
        pids = [int(d) for d in os.listdir("/proc") if d.isdigit() and int(d) != os.getpid()]
        return [pid for pid in pids if f"{self._folder}/r" in _command(pid)]

    def _alive(self) -> list[Any]:
        return [n for n in self._gcs.get_all_node_info(timeout=20).values() if n.state == 0]

    def _watch(self) -> None:
        last: list[str] = []
        while not self._over.wait(1):
            try:
                now = self.nodes()
            except Exception:
                continue
            if now != last:
                self.say(f"nodes: {', '.join(f'{now.count(k)} {k}' for k in sorted({*now})) or 'none'}")
                last = now

    def _follow(self, job: subprocess.Popen[str]) -> None:
        assert job.stdout is not None
        for line in job.stdout:
            if re.search(r": done in|published|Error:|node was lost|process died", line):
                self.say(f"run: {line.strip()[:160]}")

    def _config(self, idle_seconds: float) -> dict[str, Any]:
        types = {name: {**node, "node_config": {}, "min_workers": 0} for name, node in _NODES.items()}
        types[_HEAD_TYPE] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "nodes",
            "max_workers": 4,
            "upscaling_speed": 4.0,
            "idle_timeout_minutes": idle_seconds / 60,
            "provider": {
                "type": "external",
                "module": "fake_nodes.Provider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": _HEAD_ID,
                "gcs_address": self.address,
            },
            "available_node_types": types,
            "head_node_type": _HEAD_TYPE,
            "file_mounts_sync_continuously": False,
            **{name: {} for name in _EMPTY_MAPS},
            **{name: [] for name in _EMPTY_LISTS},
        }

    def _environment(self) -> dict[str, str]:
        root = Path(__file__).resolve().parent.parent
        return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{self._folder}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_raylet_start_wait_time_s": "180",
        }

    def _start_head(self, config: Path) -> subprocess.Popen[bytes]:
        from ray import _raylet

        # Ray's compiled modules tell type checkers nothing of what is in them.
        compiled: Any = _raylet
        mark = {"RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID}
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={self._port}"]
        command += ["--num-cpus=0", f"--autoscaling-config={config}", f"--temp-dir={self._folder}/r"]
        command += ["--disable-usage-stats", "--include-dashboard=false", "--object-store-memory=150000000"]
        with self._head_log.open("wb") as log:
            head = subprocess.Popen(
                command, env=self._environment() | mark, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(120):
            try:
                self._gcs = compiled.GcsClient(address=self.address)
                self._gcs.get_all_node_info(timeout=5)
            except Exception:
                time.sleep(1)
            else:
                self.say("a head without CPUs")
                return head
        raise RuntimeError(f"the head did not start: {self._head_log.read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _below(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [p for child in children for p in (int(child), *_below(int(child)))]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
