"""A cluster that is only described: what a run would take on it, and cost, without joining one.

`raydc run --dry-run --assume-cluster FILE` reads it from YAML, a list `nodes` of node types. Prices, bandwidth and
rates are the reader's own numbers; none is looked up.
"""

import math
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import Field

from raydc.config import Config
from raydc.config.section import Section
from raydc.errors import ConfigError
from raydc.runtime.plan import Plan, duration, size


class NodeType(Section):
    """Nodes of one kind."""

    name: str
    count: int = Field(1, ge=1)
    cpus: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    memory_gib: float = Field(gt=0)
    gbit_per_second: float = Field(10.0, gt=0)
    """Bandwidth of a node."""

    gpu_tflops: float | None = Field(None, gt=0)
    """What a GPU reaches in training steps; null leaves the time of a fit on GPUs open."""

    price_per_hour: float = Field(0.0, ge=0)
    """For one node, in any currency."""


class AssumedCluster(Section):
    """The nodes of a cluster."""

    nodes: list[NodeType] = Field(min_length=1)

    @property
    def price_per_hour(self) -> float:
        """Return the price of all nodes."""
        return sum(n.count * n.price_per_hour for n in self.nodes)

    def hosts(self, config: Config) -> list[NodeType]:
        """Return the node types that can have a training worker."""
        fit = config.fit
        return [n for n in self.nodes if n.cpus >= fit.cpus_per_worker and (n.gpus > 0 or not fit.use_gpu)]

    def lines(self, config: Config, plan: Plan) -> list[str]:
        """Return what the run takes on this cluster, one fact per line, and what does not fit."""
        nodes = ", ".join(f"{n.count} {n.name}" for n in self.nodes)
        cpus, gpus = (sum(n.count * getattr(n, name) for n in self.nodes) for name in ("cpus", "gpus"))
        memory = sum(n.count * n.memory_gib for n in self.nodes)
        lines = [f"cluster     {nodes}: {cpus} CPUs, {gpus} GPUs, {memory:,.0f} GiB; {self.price_per_hour:g} an hour"]
        hosts = self.hosts(config)
        places = sum(n.count * _places(n, config, plan) for n in hosts)
        workers = plan.fewest_workers
        if places < workers:
            each = f"{config.fit.cpus_per_worker} CPU" + (", a GPU" if config.fit.use_gpu else "")
            return [
                *lines,
                f"cluster     TOO SMALL: {workers} training worker(s) of {each} and {size(plan.worker_bytes)} are "
                f"asked for, it has room for {places}. Lower fit.num_workers or fit.resident_bytes, or add nodes",
            ]
        # Workers wait for the slowest of them.
        bandwidth = min(n.gbit_per_second / 8e-9 / max(1, min(_places(n, config, plan), workers)) for n in hosts)
        rate = _rate(hosts, config, plan)
        lines += [f"gradients   {e.line(workers, bandwidth, rate)}" for e in plan.exchanges]
        if rate is None:
            return [*lines, "cost        unknown: give gpu_tflops of the nodes with GPUs"]
        return [*lines, self._cost(plan, cpus, bandwidth, rate)]

    def _cost(self, plan: Plan, cpus: int, bandwidth: float, rate: float) -> str:
        epochs = {"pretrain": plan.pretrain_steps, "refine": plan.refine_steps}
        sent = sum(epochs[e.phase] / e.steps * e.epoch_seconds(plan.fewest_workers, bandwidth) for e in plan.exchanges)
        fit = plan.fit_flops / (rate * plan.fewest_workers) + sent
        network = sum(n.count * n.gbit_per_second for n in self.nodes) / 8e-9
        read = plan.input_bytes * (plan.lake_passes + 1) / network
        others = (plan.assign_flops + plan.neighbors_flops) / (plan.cpu_rate * cpus)
        seconds = fit + read + others
        return (
            f"cost        at least {seconds / 3600 * self.price_per_hour:,.2f}: fit {duration(fit)}, reading "
            f"{duration(read)}, assign and neighbors {duration(others)}; all nodes for the whole run, without start-up"
        )


def _places(node: NodeType, config: Config, plan: Plan) -> int:
    """Return how many training workers a node has room for."""
    room = [node.cpus // config.fit.cpus_per_worker, math.floor(node.memory_gib * 2**30 / max(plan.worker_bytes, 1))]
    return min([*room, node.gpus] if config.fit.use_gpu else room)


def _rate(hosts: list[NodeType], config: Config, plan: Plan) -> float | None:
    """Return the FLOP/s of the slowest training worker; None where a GPU's is not given."""
    if not config.fit.use_gpu:
        return plan.worker_rate
    rates = [n.gpu_tflops for n in hosts]
    return None if None in rates else 1e12 * min(r for r in rates if r is not None)


def read_cluster(path: Path) -> AssumedCluster:
    """Return the cluster that a YAML file describes.

    Raises:
        ConfigError: the file cannot be read, or says something else.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return AssumedCluster.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--assume-cluster {path}: cannot be read: {error}") from None
    except pydantic.ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"--assume-cluster {path}: {found}. Expected a list `nodes` with name, count, cpus, gpus, memory_gib, "
            "gbit_per_second, gpu_tflops and price_per_hour each."
        ) from None
