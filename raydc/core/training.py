"""The fit: pretraining, k-means, refinement and the final statistics, written against a small Context.

Letters: N rows, K leaves, D width of a row, L width of the code.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydc.core import checkpoint
from raydc.core.autoencoder import Autoencoder, choose_precision, initialize, precision
from raydc.core.collectives import Ranks
from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.kmeans import KMeans, LeafSums, leaf_sums, lloyd, start
from raydc.core.objectives.build import build, uses_autoencoder
from raydc.core.objectives.kernel import Kernel, calibrate
from raydc.core.objectives.objective import Minibatch, Objective, Parts, run_pass
from raydc.core.objectives.reconstruction import Reconstruction, corrupt
from raydc.core.objectives.snapshot import encode
from raydc.core.preprocess import Preprocess
from raydc.core.rows import Batch, Rows, Step
from raydc.core.settings import FitSettings, PretrainSettings, RefineSettings
from raydc.core.state import Clustering, State, restore, to_checkpoint

_CHECK_STEPS = 100


class Context(Protocol):
    """What the fit needs from its launcher: Ray Train in a job, a plain object in tests."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Publish metrics, and on rank 0 a checkpoint folder. Every rank calls it equally often."""

    def latest_checkpoint(self) -> Path | None:
        """Return the folder of the last checkpoint, or None."""


class Partners(Protocol):
    """A source of second rows, such as a random neighbour of each row."""

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """Return one partner for each row, in their order; chosen by hash of (row key, seed).

        The partners may lie on other ranks: every rank calls it in every step, with no rows where it has none.
        """


@dataclass(frozen=True)
class Fitted:
    """The outcome of a fit, the same on every rank."""

    clustering: Clustering
    leaves: LeafSums
    """Statistics of all rows, in float32 encoding and float64 sums, around `clustering.centers_KL`."""

    baselines: dict[str, Clustering]
    """raw_kmeans, and autoencoder_kmeans where there is an autoencoder."""

    history: list[dict[str, Any]]
    decoder: nn.Module | None = None


def fit(
    rows: Rows,
    preprocess: Preprocess,
    settings: FitSettings,
    context: Context,
    partners: Partners | None = None,
) -> Fitted:
    """Return the fitted clustering of all rows of all ranks, going on from the last checkpoint if there is one.

    Args:
        rows: this rank's share.
        preprocess: the fixed map of raw rows.
        settings: the same on every rank.
        context: the launcher.
        partners: for an objective that takes rows in pairs.

    Raises:
        ValueError: fewer rows than leaves, or a checkpoint of other settings.
        FloatingPointError: a loss was not finite; the message names phase, epoch, step and rank.
    """
    run = _Fit(rows, preprocess, settings, context, partners)
    if rows.num_rows < settings.cluster.num_leaves:
        raise ValueError(f"{settings.cluster.num_leaves} leaves need at least as many rows, there are {rows.num_rows}")
    run.restore()
    if run.state.phase == "pretrain":
        run.pretrain()
        run.start_clusters()
    if run.state.phase == "refine":
        run.refine()
    return run.finish()


class _Fit:
    def __init__(
        self,
        rows: Rows,
        preprocess: Preprocess,
        settings: FitSettings,
        context: Context,
        partners: Partners | None,
    ) -> None:
        self.rows, self.preprocess, self.settings, self.context = rows, preprocess, settings, context
        self.partners = partners
        self.ranks = Ranks(context.rank, context.world_size, context.device)
        self.arithmetic = choose_precision(settings.precision, context.device)
        generator = torch.Generator().manual_seed(stream_seed(settings.seed, 1))
        autoencoder = None
        if uses_autoencoder(settings.objective):
            autoencoder = self._new_autoencoder()
            initialize(autoencoder, generator)
        self.state = State(autoencoder, generator)

    def pretrain(self) -> None:
        """Train the autoencoder on reconstruction."""
        plan, state = self.settings.pretrain, self.state
        if state.autoencoder is None:
            return
        module = self._distributed(Reconstruction(state.autoencoder))
        optimizer = torch.optim.AdamW(
            state.autoencoder.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
        )
        checkpoint.restore_optimizer(optimizer, state.optimizer)
        num_steps = self.rows.num_steps(plan.batch_rows)
        for epoch in range(state.epoch, plan.num_epochs):
            seed = stream_seed(self.settings.seed, 2, epoch)

            def loss_of(step: Step, seed: int = seed) -> dict[str, Tensor]:
                x = self.preprocess(step.batch.x_ND)
                noisy = corrupt(x, step.batch.keys_N, share=plan.corruption, seed=seed)
                return module(x, step.batch.weights_N, noisy)

            def set_rate(step: int, epoch: int = epoch) -> None:
                _set_rate(optimizer, learning_rate(plan, epoch * num_steps + step, plan.num_epochs * num_steps))

            steps = self.rows.steps(plan.batch_rows, seed)
            entry = self._run_epoch("pretrain", epoch, steps, loss_of, optimizer, None, set_rate)
            self._end_epoch(epoch, plan.num_epochs, entry, optimizer)

    def start_clusters(self) -> None:
        """Find the centres by k-means, the baselines, and the kernel."""
        state, settings = self.state, self.settings
        started = time.perf_counter()
        if state.autoencoder is not None:
            baseline = self._sample(None, settings.baseline_rows)
            raw = self._faiss_start(baseline, stream_seed(settings.seed, 3))
            state.baselines["raw_kmeans"] = Clustering(None, raw, self._calibrated(baseline, raw)[0])
        encoder = state.autoencoder.encoder if state.autoencoder is not None else None
        blocks = self._latent_blocks(encoder)
        sample = self._sample(encoder, settings.cluster.init_rows)
        found = self._lloyd(blocks, self._faiss_start(sample, stream_seed(settings.seed, 4)).to(self.ranks.device))
        state.centers = found.centers_KD
        state.kernel, top_q = self._calibrated(sample, found.centers_KD.cpu())
        name = "autoencoder_kmeans" if encoder is not None else "raw_kmeans"
        frozen = self._copy_encoder(encoder) if encoder is not None else None
        state.baselines[name] = Clustering(frozen, found.centers_KD.cpu(), state.kernel)
        state.objective = self._objective()
        if state.objective is not None:
            state.objective.start(self._shared_sample(encoder, state.objective.sample_rows))
        state.phase, state.epoch, state.optimizer = ("refine" if state.objective is not None else "done"), 0, {}
        entry = {
            "phase": "kmeans",
            "epoch": 0,
            "inertia": found.inertia,
            "iterations": found.num_iterations,
            "reseeded": found.num_reseeded,
            "alpha": state.kernel.alpha,
            "scale": state.kernel.scale,
            "top_q": top_q,
            "target_top_q": settings.refine.target_top_q,
            "seconds": time.perf_counter() - started,
        }
        self._save(entry)

    def refine(self) -> None:
        """Train on the objective until few rows change their leaf."""
        plan, state = self.settings.refine, self.state
        objective = state.objective
        assert objective is not None
        module = self._distributed(objective)
        optimizer = _refine_optimizer(plan, objective)
        checkpoint.restore_optimizer(optimizer, state.optimizer)
        num_steps = self.rows.num_steps(plan.batch_rows)
        for epoch in range(state.epoch, plan.num_epochs):
            if state.converged:
                break
            seed = stream_seed(self.settings.seed, 7, epoch)
            seen: dict[str, Any] = {}
            if objective.reclusters(epoch):
                objective.take_centers(*self._reclustered(objective, "lloyd"))

            def before(step: int, epoch: int = epoch, seen: dict[str, Any] = seen, seed: int = seed) -> bool:
                one = objective.refresh(epoch, step, num_steps)
                if one is None:
                    return True
                blocks = (self._minibatch(b, seed) for b in self.rows.blocks(self.settings.block_rows))
                seen.update(run_pass(one, blocks, self.ranks.sum))
                state.converged = seen.get("changed", 1.0) < plan.tolerance
                return not state.converged

            def loss_of(step: Step, seed: int = seed) -> dict[str, Tensor]:
                return module(self._with_sums(objective, self._minibatch(step.batch, seed, step.total_weight)))

            def after(step: Step, seed: int = seed) -> None:
                with torch.no_grad():
                    sums = objective.step_sums(self._minibatch(step.batch, seed, step.total_weight))
                    objective.after_step(None if sums is None else self.ranks.sum(sums))

            steps = self.rows.steps(plan.batch_rows, stream_seed(self.settings.seed, 5, epoch))
            entry = self._run_epoch("refine", epoch, steps, loss_of, optimizer, plan.max_grad_norm, before, after)
            self._end_epoch(epoch, plan.num_epochs, entry | seen, optimizer)
        if objective.ending != "keep":
            objective.take_centers(*self._reclustered(objective, objective.ending))
        state.phase = "done"

    def finish(self) -> Fitted:
        """Return the clustering with the statistics of all rows under it."""
        state = self.state
        clustering = self._clustering()
        blocks = self._latent_blocks(clustering.encoder, arithmetic="float32")
        leaves = leaf_sums(blocks(), clustering.centers_KL, all_sum=self.ranks.sum, assign=clustering.assign)
        if clustering.predictor is not None:
            # Its leaves have no centres of their own: their means serve, and the distances are taken anew from them.
            clustering = replace(clustering, centers_KL=leaves.means(clustering.centers_KL).float())
            leaves = leaf_sums(blocks(), clustering.centers_KL, all_sum=self.ranks.sum, assign=clustering.assign)
        decoder = state.autoencoder.decoder if state.autoencoder is not None else None
        return Fitted(clustering, leaves, state.baselines, state.history, decoder)

    def _clustering(self) -> Clustering:
        state = self.state
        assert state.centers is not None and state.kernel is not None
        if state.objective is not None:
            objective = state.objective.eval()
            centers = objective.centers.detach().clone()
            return Clustering(objective.encoder, centers, objective.kernel, objective.predictor())
        encoder = state.autoencoder.encoder.eval() if state.autoencoder is not None else None
        return Clustering(encoder, state.centers, state.kernel)

    def _run_epoch(
        self,
        phase: str,
        epoch: int,
        steps: Iterator[Step],
        loss_of: Callable[[Step], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        before_step: Callable[[int], bool | None],
        after_step: Callable[[Step], None] = lambda step: None,
    ) -> dict[str, Any]:
        """Return the means of the epoch's sums, after a step of the optimiser for each training step."""
        started = time.perf_counter()
        totals: dict[str, Tensor] = {}
        weight = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        unchecked: list[Tensor] = []
        number = -1
        where = f"{phase} epoch {epoch + 1}"
        for number, step in enumerate(steps):
            if before_step(number) is False:
                break
            with precision(self.ranks.device, self.arithmetic):
                sums = loss_of(step)
            # DDP averages the gradients over the ranks; times world_size over the step's global weight is the mean
            # over all rows of the step, whichever rank holds them.
            loss = sums["loss"] * (self.ranks.world_size / step.total_weight).float()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(_parameters(optimizer), max_grad_norm)
            optimizer.step()
            after_step(step)
            unchecked.append(loss.detach())
            if len(unchecked) == _CHECK_STEPS:
                self._check_finite(unchecked, number, where)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
            weight += step.total_weight
        self._check_finite(unchecked, number, where)
        entry: dict[str, Any] = {"phase": phase, "epoch": epoch, "steps": number + 1}
        if totals:
            means = self.ranks.sum(torch.stack(list(totals.values()))) / weight
            entry |= dict(zip(totals, means.tolist(), strict=True))
        seconds = time.perf_counter() - started
        return entry | {"seconds": seconds, "rows_per_second": self.rows.num_rows / seconds}

    def _check_finite(self, losses: list[Tensor], last_step: int, where: str) -> None:
        # Nothing is saved between two checks, so a broken step never reaches a checkpoint.
        first_bad = torch.zeros(self.ranks.world_size, dtype=torch.int64)
        if losses:
            bad = ~torch.isfinite(torch.stack(losses))
            if bool(bad.any()):
                first_bad[self.ranks.rank] = last_step + 1 - len(losses) + int(bad.int().argmax()) + 1
        first_bad = self.ranks.sum(first_bad)
        if bool((first_bad > 0).any()):
            rank = int((first_bad > 0).int().argmax())
            raise FloatingPointError(
                f"{where}: the loss is not finite at step {int(first_bad[rank])} on rank {rank}. Lower the learning "
                "rate, set refine.max_grad_norm, or scale the rows (preprocess.method=scale or standardize)."
            )
        losses.clear()

    def _objective(self) -> Objective | None:
        state = self.state
        assert state.centers is not None and state.kernel is not None
        parts = Parts(
            autoencoder=state.autoencoder,
            centers_KL=state.centers.to(self.ranks.device),
            kernel=state.kernel,
            settings=self.settings,
            arithmetic=self.arithmetic,
            num_rows=self.rows.num_rows,
            dim=self.rows.dim,
        )
        objective = build(self.settings.objective, parts)
        if objective is None:
            return None
        if objective.needs_partners and self.partners is None:
            raise ValueError(f"the objective {self.settings.objective} takes rows in pairs, but none were given")
        return objective.to(self.ranks.device)

    def _minibatch(self, batch: Batch, seed: int, total_weight: Tensor | None = None) -> Minibatch:
        partners = None
        if total_weight is not None and self.state.objective is not None and self.state.objective.needs_partners:
            assert self.partners is not None
            partners = self._minibatch(self.partners(batch, seed), seed)
        x = self.preprocess(batch.x_ND)
        return Minibatch(
            batch.keys_N, x, batch.weights_N, batch.positions_N, seed, total_weight=total_weight, partners=partners
        )

    def _with_sums(self, objective: Objective, batch: Minibatch) -> Minibatch:
        # An autocast of its own: inside the step's, weights cast without a gradient would be cached for the loss.
        with torch.no_grad(), precision(self.ranks.device, self.arithmetic):
            sums = objective.batch_sums(batch)
        return batch if sums is None else replace(batch, sums=self.ranks.sum(sums))

    def _reclustered(self, objective: Objective, how: str) -> tuple[Tensor, Kernel]:
        """Return the centres of k-means on the objective's present codes, and the kernel calibrated to them."""
        sample = self._sample(objective.encoder, self.settings.cluster.init_rows)
        centers = objective.centers.detach()
        if how == "kmeans":
            centers = self._faiss_start(sample, stream_seed(self.settings.seed, 4)).to(self.ranks.device)
        found = self._lloyd(self._latent_blocks(objective.encoder), centers).centers_KD
        return found, self._calibrated(sample, found.cpu())[0]

    def _lloyd(self, blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]], centers_KL: Tensor) -> KMeans:
        plan = self.settings.cluster
        return lloyd(
            blocks,
            centers_KL,
            all_sum=self.ranks.sum,
            generator=self.state.generator,
            num_iterations=plan.num_iterations,
            tolerance=plan.tolerance,
        )

    def _latent_blocks(
        self, encoder: nn.Module | None, arithmetic: str | None = None
    ) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """Return a source of (z, weights) blocks: codes are kept in memory, plain rows are read again each time."""
        name, size = arithmetic or self.arithmetic, self.settings.block_rows
        if encoder is None:
            return lambda: ((self.preprocess(b.x_ND), b.weights_N) for b in self.rows.blocks(size))
        kept = [(encode(encoder, self.preprocess(b.x_ND), name), b.weights_N) for b in self.rows.blocks(size)]
        return lambda: iter(kept)

    def _sample(self, encoder: nn.Module | None, num_rows: int) -> Tensor:
        """Return about `num_rows` latents (or preprocessed rows) of all ranks, on rank 0, in the order of the keys."""
        fraction, seed = num_rows / max(self.rows.num_rows, 1), stream_seed(self.settings.seed, 6)
        keys, values = [], []
        for batch in self.rows.blocks(self.settings.block_rows):
            chosen = torch.from_numpy(sample_mask(batch.keys_N.cpu().numpy(), seed, fraction))
            chosen = chosen.to(batch.x_ND.device)
            keys.append(batch.keys_N[chosen])
            values.append(encode(encoder, self.preprocess(batch.x_ND[chosen]), self.arithmetic))
        width = self.rows.dim if encoder is None else self.settings.latent_dim
        device = self.ranks.device
        all_keys = self.ranks.gather_rows(torch.cat([torch.empty(0, dtype=torch.int64, device=device), *keys]))
        all_values = self.ranks.gather_rows(torch.cat([torch.empty((0, width), device=device), *values]))
        return all_values[all_keys.argsort()]

    def _shared_sample(self, encoder: nn.Module | None, num_rows: int) -> Tensor:
        """Return the rows of `_sample` on every rank, on the training device; none for 0 rows."""
        if not num_rows:
            width = self.rows.dim if encoder is None else self.settings.latent_dim
            return torch.empty((0, width), device=self.ranks.device)
        sample = self._sample(encoder, num_rows)
        size = int(self.ranks.broadcast(torch.tensor([len(sample)]))[0])
        sample = sample if self.ranks.rank == 0 else sample.new_empty((size, sample.shape[1]))
        return self.ranks.broadcast(sample).to(self.ranks.device)

    def _faiss_start(self, sample_ND: Tensor, seed: int) -> Tensor:
        plan = self.settings.cluster
        size = int(self.ranks.broadcast(torch.tensor([len(sample_ND)]))[0])
        if size < plan.num_leaves:
            raise ValueError(
                f"the k-means start has a sample of {size} rows for {plan.num_leaves} leaves. "
                "Raise cluster.init_rows and evaluate.baseline_rows."
            )
        if self.ranks.rank == 0:
            centers = start(sample_ND, plan.num_leaves, num_restarts=plan.num_restarts, seed=seed)
        else:
            centers = torch.empty(plan.num_leaves, sample_ND.shape[1])
        return self.ranks.broadcast(centers)

    def _calibrated(self, sample_ND: Tensor, centers_KD: Tensor) -> tuple[Kernel, float]:
        plan = self.settings.refine
        numbers = torch.zeros(3, dtype=torch.float64)
        if self.ranks.rank == 0:
            # The first rows by key are a random sample already; the bound keeps the (rows, K) distances small.
            most = max(256, 20_000_000 // len(centers_KD))
            spread = np.linspace(0, len(sample_ND) - 1, min(most, len(sample_ND))).astype(np.int64)
            alpha = None if plan.alpha == "auto" else float(plan.alpha)
            kernel, top_q = calibrate(
                sample_ND[torch.from_numpy(spread)], centers_KD, target_top_q=plan.target_top_q, alpha=alpha
            )
            numbers = torch.tensor([kernel.alpha, kernel.scale, top_q], dtype=torch.float64)
        alpha_found, scale, top_q = self.ranks.broadcast(numbers).tolist()
        return Kernel(alpha_found, scale), top_q

    def _new_autoencoder(self) -> Autoencoder:
        return Autoencoder(self.rows.dim, self.settings.hidden_dims, self.settings.latent_dim)

    def _copy_encoder(self, encoder: nn.Module) -> nn.Module:
        copy = self._new_autoencoder().encoder
        copy.load_state_dict({k: t.cpu() for k, t in encoder.state_dict().items()})
        return copy.eval()

    def _distributed(self, module: nn.Module) -> nn.Module:
        module.to(self.ranks.device)
        if self.ranks.world_size == 1:
            return module
        device_ids = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)

    def _end_epoch(self, epoch: int, num_epochs: int, entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        self.state.epoch = epoch + 1
        self.state.optimizer = checkpoint.optimizer_tensors(optimizer)
        last = epoch + 1 == num_epochs or self.state.converged
        self._save(entry | {"num_epochs": num_epochs}, keep=last or (epoch + 1) % self.settings.checkpoint_epochs == 0)

    def _save(self, entry: dict[str, Any], *, keep: bool = True) -> None:
        self.state.history.append(entry)
        if self.ranks.rank == 0 and keep:
            with tempfile.TemporaryDirectory(prefix="raydc-checkpoint-") as folder:
                checkpoint.save(Path(folder), *to_checkpoint(self.state, self.settings.fingerprint))
                self.context.report(entry, Path(folder))
        else:
            self.context.report(entry)

    def restore(self) -> None:
        """Take up the state of the last checkpoint, if there is one."""
        folder = self.context.latest_checkpoint()
        if folder is not None:
            tensors, values = checkpoint.load(folder)
            if values["fingerprint"] != self.settings.fingerprint:
                raise ValueError(
                    f"the checkpoint was made with other settings or another input ({values['fingerprint']}, "
                    f"now {self.settings.fingerprint})"
                )
            restore(self.state, tensors, values, self._new_autoencoder)
        if self.state.autoencoder is not None:
            self.state.autoencoder.to(self.ranks.device)
        if self.state.centers is not None:
            self.state.centers = self.state.centers.to(self.ranks.device)
            self.state.objective = self._objective()
            if self.state.objective is not None:
                self.state.objective.recall(checkpoint.with_prefix("objective", tensors))


def learning_rate(plan: PretrainSettings, step: int, num_steps: int) -> float:
    """Return the rate of a pretraining step: a linear rise, then constant or a cosine to zero."""
    warmup = min(plan.warmup_steps, num_steps // 10)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    if plan.schedule == "constant":
        return plan.learning_rate
    done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    return plan.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def _refine_optimizer(plan: RefineSettings, objective: Objective) -> torch.optim.Optimizer:
    groups = objective.parameter_groups(plan.learning_rate)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.learning_rate, momentum=0.9, fused=True)
    return torch.optim.Adam(groups, lr=plan.learning_rate, fused=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
