"""Files of somebody else in a lake, local or on S3, and the commands that may meet them."""

import json
import os
from pathlib import Path

import pytest
import yaml

from raydc import pipeline
from raydc.cli import main
from raydc.errors import ConfigError, StageError
from raydc.storage.lake import Lake, join
from tests import shards

TIMES = {"heartbeat_seconds": 0.05, "stale_seconds": 5.0}

FOREIGN = {
    "names of our own folders": {
        "labels/human_labels.csv": b"id,label\n1,cat\n",
        "labels/part-00.parquet": b"PAR1 of somebody",
        "model/clip.pt": b"weights",
        "tree/wordnet.json": b"{}",
        "checkpoints/best.pt": b"weights",
        "sweep.json": b"[]",
        "sweep.md": b"# notes",
        "rejects/a.txt": b"",
        "stages/fit.json": b"{}",
        "_MANIFEST.json": b"{}",
    },
    "a run.json and labels.json of another program": {
        "run.json": b'{"run_id": "w4x1", "config": {"lr": 0.1}}',
        "labels.json": b'{"0": "cat", "1": "dog"}',
        "fit/a.bin": b"\0\1",
    },
    "markers that are no JSON": {"run.json": b"{", "labels.json": b"cat\n", "labels/a.csv": b"1"},
    "a contract in lease/": {"lease/agreement.pdf": b"%PDF", "lease/00000001.json": b"{}"},
    "a hidden file": {".notes.tmp": b"notes"},
}

COMMANDS = ("run", "dry run", "python", "sweep", "demo", "assign")


class Local:
    """A folder that stands for a lake."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def put(self, name: str, body: bytes) -> None:
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        os.utime(path, ns=(10**18, 10**18))

    def everything(self) -> dict:
        """Return contents and time of every file, and every folder."""
        paths = sorted(Path(self.root).rglob("*"))
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for p in paths}


class Bucket:
    """A bucket that keeps every version, so that not even a deletion or a rewrite of the same bytes goes unseen."""

    def __init__(self, root: str, client) -> None:
        self.root, self._client, self._name = root, client, root.removeprefix("s3://")
        client.put_bucket_versioning(Bucket=self._name, VersioningConfiguration={"Status": "Enabled"})

    def put(self, name: str, body: bytes) -> None:
        self._client.put_object(Bucket=self._name, Key=name, Body=body)

    def everything(self) -> dict:
        """Return checksum and time of every version of every object, deletions among them."""
        found = self._client.list_object_versions(Bucket=self._name)
        assert not found["IsTruncated"]
        versions = [*found.get("Versions", []), *found.get("DeleteMarkers", [])]
        return {(v["Key"], v["VersionId"]): (v.get("ETag"), v["LastModified"], v["IsLatest"]) for v in versions}


class Reached(Exception):
    """The command came as far as the cluster."""


def job(folder: Path, path, output, **sections) -> str:
    """Write the settings of a small job and return their path."""
    values = {"lease": TIMES} | sections
    config = shards.settings(path if isinstance(path, list) else str(path), output=str(output), **values)
    (folder / "job.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return str(folder / "job.yaml")


def call(command: str, tmp_path: Path, rows, output: str, run_id: str, model: Path) -> None:
    """Start a command that would work in `<output>/<run_id>`."""
    config = job(tmp_path, rows, output)
    if command == "python":
        pipeline.run(shards.settings(rows, output=output, lease=TIMES), run_id)
        return
    main(
        {
            "run": ["run", "--config", config, f"--run-id={run_id}"],
            "dry run": ["run", "--config", config, f"--run-id={run_id}", "--dry-run"],
            "sweep": ["sweep", "--config", config, "--k", "2,3", f"--run-id={run_id}"],
            "demo": ["demo", "--output", output],
            "assign": ["assign", "--model", str(model), "--input", str(rows), "--output", join(output, run_id)],
        }[command]
    )


def refusal(capsys, command: str, *arguments) -> str:
    """Return the one message with which a command ends."""
    capsys.readouterr()
    if command == "python":
        with pytest.raises((ConfigError, StageError)) as caught:
            call(command, *arguments)
        return f"{type(caught.value).__name__}: {caught.value}"
    with pytest.raises(SystemExit) as stop:
        call(command, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def as_written_before(uri: str, *keys: str) -> None:
    """Take keys away that an earlier version did not write."""
    body = Lake().read_json(uri)
    Lake().write_json(uri, {k: v for k, v in body.items() if k not in keys})
