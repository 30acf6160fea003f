"""Which error a failure of the workers becomes: one that may be gone when the same command runs again, or not."""

import re

import ray.exceptions

from raydc.errors import ClusterUnavailable, DataError, RaydcError, StageError, StorageUnavailable
from raydc.runfolder.lease import LeaseLost
from raydc.runtime.remedies import is_want_of_memory

_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorPlacementGroupRemoved,
    ray.exceptions.GetTimeoutError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RpcError,
    ray.exceptions.TaskPlacementGroupRemoved,
    ray.exceptions.WorkerCrashedError,
)
# Of Ray Train, which keeps these classes to itself.
_LOST_NAMES = {
    "NCCLHangError",
    "PreemptionError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
}
# What gloo and NCCL say in a worker whose peer is gone; an error of no class of its own.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connect.* refused", re.IGNORECASE
)
_OURS: dict[str, type[RaydcError]] = {kind.__name__: kind for kind in (DataError, StorageUnavailable, LeaseLost)}


def error_of(cause: BaseException | str, text: str) -> RaydcError:
    """Return the error that tells the driver's person `text`.

    Lost workers and nodes may be found again, and so may a store. Workers that had too little memory have it again.

    Args:
        cause: what a worker met, or the name of its class where only that came back.
        text: of the error.
    """
    kind = cause if isinstance(cause, str) else type(cause).__name__
    if kind in _OURS:
        return _OURS[kind](text)
    lost = kind in _LOST_NAMES or kind in {known.__name__ for known in _LOST}
    if not isinstance(cause, str):
        lost = lost or isinstance(cause, _LOST) or _LOST_PEER.search(str(cause)) is not None
    return ClusterUnavailable(text) if lost and not is_want_of_memory(text) else StageError(text)
