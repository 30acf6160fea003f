"""Joining a cluster, and leaving it once."""

import os
import threading

import pytest

from raydc import pipeline
from raydc.config import Config
from raydc.runtime import session


@pytest.fixture
def happened(monkeypatch):
    """What is done, in its order, with Ray itself left out."""
    done, before = [], dict(os.environ)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda **_: done.append("joined"))
    monkeypatch.setattr(session.ray, "shutdown", lambda: done.append("left"))
    yield done
    # A local cluster is started with settings in the environment.
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def config():
    return Config.model_validate({"input": {"path": "in"}, "output": "out"})


def test_the_cluster_is_left_at_the_end_of_the_block(happened, config):
    with session.connected(config):
        happened.append("worked")
    assert happened == ["joined", "worked", "left"]


def test_the_cluster_is_left_after_an_error(happened, config):
    with pytest.raises(ValueError, match="broken"), session.connected(config):
        raise ValueError("broken")
    assert happened == ["joined", "left"]


def test_the_cluster_is_left_once_beside_what_follows(happened, config, monkeypatch):
    reported = threading.Event()

    def shutdown():
        assert reported.wait(60)
        happened.append("left")

    monkeypatch.setattr(session.ray, "shutdown", shutdown)
    with session.connected(config) as leave:
        leave()
        leave()
        happened.append("reported")
        reported.set()
    assert happened == ["joined", "reported", "left"]


def test_a_cluster_that_was_joined_before_is_not_left(happened, config, monkeypatch):
    monkeypatch.setattr(session.ray, "is_initialized", lambda: True)
    with session.connected(config) as leave:
        leave()
    assert happened == []


def test_no_stage_needs_the_cluster_after_one_that_does_not():
    needs = [stage.on_cluster for stage in pipeline.STAGES]
    assert needs == sorted(needs, reverse=True)
