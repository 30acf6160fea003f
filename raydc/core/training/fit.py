"""The fit: pretraining, k-means, refinement and the final statistics, written against a small Context.

Letters: N rows, K leaves, D width of a row, L width of the code.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raydc.core.hashing import stream_seed
from raydc.core.models.autoencoder import Autoencoder, choose_precision, initialize
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.build import build, first_look, uses_autoencoder
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, Parts, run_pass
from raydc.core.process import release_memory
from raydc.core.search.kmeans import LeafSums, leaf_sums
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.epochs import Trainer
from raydc.core.training.kmeans_on_codes import (
    calibrated,
    cluster,
    find_optimum,
    latent_blocks,
    run_lloyd,
    same_rows_each_pass,
    sample_latents,
    shared_sample,
    start_centers,
    start_rows,
)
from raydc.core.training.pretrain import pretrain_layers, pretrain_whole
from raydc.core.training.rows import Batch, Rows, Step
from raydc.core.training.settings import FitSettings, RefineSettings
from raydc.core.training.state import Clustering, State, restore, to_checkpoint

_BASELINE_ROWS_PER_LEAF = 10
"""At least, in the sample of the baseline on the raw rows."""


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
    """A source of second rows, such as a random neighbor of each row."""

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
    teacher: Teacher | None = None,
) -> Fitted:
    """Return the fitted clustering of all rows of all ranks, going on from the last checkpoint if there is one.

    Args:
        rows: this rank's share.
        preprocess: the fixed map of raw rows.
        settings: the same on every rank.
        context: the launcher.
        partners: for an objective that takes rows in pairs.
        teacher: for distillation; where it has a network, that is where the fit starts, and nothing is pretrained.

    Raises:
        ValueError: fewer rows than leaves, rows that the objective cannot take, or a checkpoint of other settings.
        FloatingPointError: a loss was not finite; the message names phase, epoch, step and rank.
    """
    run = _Fit(rows, preprocess, settings, context, partners, teacher)
    if rows.num_rows < settings.cluster.num_leaves:
        raise ValueError(f"{settings.cluster.num_leaves} leaves need at least as many rows, there are {rows.num_rows}")
    run.restore()
    run.pretrain()
    if run.state.phase == "pretrain":
        run.start_clusters()
    if run.state.phase == "refine":
        run.refine()
    return run.finish()


def pretrain(
    rows: Rows, preprocess: Preprocess, settings: FitSettings, context: Context
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a fit after pretraining, as a checkpoint holds it; see `fit` for arguments and errors.

    A fit that finds it as its last checkpoint goes on with k-means, whatever its number of leaves.
    """
    run = _Fit(rows, preprocess, settings, context, None, None)
    run.restore()
    run.pretrain()
    return to_checkpoint(run.state, settings.fingerprint)


class _Fit:
    def __init__(
        self,
        rows: Rows,
        preprocess: Preprocess,
        settings: FitSettings,
        context: Context,
        partners: Partners | None,
        teacher: Teacher | None,
    ) -> None:
        self.settings, self.context, self.partners = settings, context, partners
        self.ranks = Ranks(context.rank, context.world_size, context.device)
        arithmetic = choose_precision(settings.precision, context.device)
        self.trainer = Trainer(rows, preprocess, settings, self.ranks, arithmetic)
        generator = torch.Generator().manual_seed(stream_seed(settings.seed, 1))
        autoencoder = None
        if uses_autoencoder(settings.objective):
            autoencoder = self._new_autoencoder()
            initialize(autoencoder, generator)
        self.teacher = teacher.to(self.ranks.device) if teacher is not None else None
        if autoencoder is not None and teacher is not None:
            teacher.copy_network(autoencoder)
        layers = autoencoder is not None and settings.pretrain.layerwise and not self.taught
        self.state = State(autoencoder, generator, phase="layers" if layers else "pretrain")

    @property
    def taught(self) -> bool:
        """Whether the network comes from a teacher, so that nothing is pretrained."""
        return self.teacher is not None and self.teacher.encoder is not None

    def first_look(self) -> None:
        """Refuse rows that the objective cannot take."""
        look = first_look(self.settings)
        if look is not None:
            blocks = (self._minibatch(b, seed=0) for b in self.trainer.rows.blocks(self.trainer.block_rows))
            run_pass(look, blocks, self.ranks.sum)

    def pretrain(self) -> None:
        """Look at the rows, then train the autoencoder on reconstruction, as far as that is not done."""
        if self.state.phase in ("layers", "pretrain"):
            self.first_look()
        if self.state.phase == "layers":
            pretrain_layers(self.trainer, self.state, self.end_epoch)
        if self.state.phase == "pretrain" and self.state.autoencoder is not None and not self.taught:
            pretrain_whole(self.trainer, self.state, self.end_epoch)

    def start_clusters(self) -> None:
        """Find the centers by k-means, the baselines, and the kernel."""
        state, settings, trainer = self.state, self.settings, self.trainer
        started = time.perf_counter()
        # Its moments take twice the memory of the weights.
        state.optimizer = {}
        if state.autoencoder is not None:
            state.baselines["raw_kmeans"] = self._raw_kmeans()
            release_memory()
        encoder = state.autoencoder.encoder if state.autoencoder is not None else None
        blocks = latent_blocks(trainer, encoder, trainer.arithmetic)
        plan = settings.cluster
        sample = sample_latents(trainer, encoder, start_rows(plan.init_rows, plan.num_leaves))
        keep_ids = same_rows_each_pass(trainer, encoder)
        found = cluster(trainer, blocks, sample, state.generator, keep_ids=keep_ids)
        state.centers = found.centers_KD
        state.kernel, top_q = calibrated(trainer, sample, found.centers_KD)
        name = "autoencoder_kmeans" if encoder is not None else "raw_kmeans"
        frozen = self._copy_encoder(encoder) if encoder is not None else None
        state.baselines[name] = Clustering(frozen, found.centers_KD.cpu(), state.kernel)
        state.objective = self._objective()
        if state.objective is not None:
            state.objective.start(shared_sample(trainer, encoder, state.objective.sample_rows))
        state.phase, state.epoch = ("refine" if state.objective is not None else "done"), 0
        entry = {
            "phase": "kmeans",
            "epoch": 0,
            "inertia": found.inertia,
            "iterations": found.num_iterations,
            "reseeded": found.num_reseeded,
            "moves": sum(done.num_moves for done in found.rounds if done.kept),
            "move_rounds": len(found.rounds),
            "alpha": state.kernel.alpha,
            "scale": state.kernel.scale,
            "top_q": top_q,
            "target_top_q": settings.refine.target_top_q,
            "seconds": time.perf_counter() - started,
        }
        del sample, blocks
        release_memory()
        self._save(entry)

    def _raw_kmeans(self) -> Clustering:
        """Return k-means on a sample of the preprocessed rows."""
        # The same start as that of the clusters themselves, so that the comparison is fair.
        num_rows = max(self.settings.baseline_rows, _BASELINE_ROWS_PER_LEAF * self.settings.cluster.num_leaves)
        sample = sample_latents(self.trainer, None, num_rows)
        centers = start_centers(self.trainer, sample, stream_seed(self.settings.seed, 3), whole=True)
        return Clustering(None, centers, calibrated(self.trainer, sample, centers)[0])

    def refine(self) -> None:
        """Train on the objective until few rows change their leaf."""
        plan, state, trainer = self.settings.refine, self.state, self.trainer
        objective = state.objective
        assert objective is not None
        objective.num_local = trainer.rows.num_local
        module = trainer.distributed(objective)
        optimizer = _refine_optimizer(plan, objective)
        rates = [group["lr"] for group in optimizer.param_groups]
        checkpoint.restore_optimizer(optimizer, state.optimizer)
        num_steps = trainer.rows.num_steps(plan.batch_rows)
        for epoch in range(state.epoch, plan.num_epochs):
            if state.converged:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * objective.rate_factor(epoch)
            seed = stream_seed(self.settings.seed, 7, epoch)
            seen: dict[str, Any] = {}
            # The rows of the present step, without partners: they were exchanged for the loss, and cost most of a
            # step's communication.
            met: list[Minibatch] = []
            if objective.reclusters(epoch):
                objective.take_centers(*self._reclustered(objective, "lloyd"))

            def before(step: int, epoch: int = epoch, seen: dict[str, Any] = seen, seed: int = seed) -> bool:
                one = objective.refresh(epoch, step, num_steps)
                if one is None:
                    return True
                blocks = (self._minibatch(b, seed) for b in trainer.rows.blocks(trainer.block_rows))
                seen.update(run_pass(one, blocks, self.ranks.sum))
                # The steps need it in other sizes.
                release_memory()
                state.converged = seen.get("changed", 1.0) < plan.tolerance
                return not state.converged

            def loss_of(step: Step, seed: int = seed, met: list[Minibatch] = met) -> dict[str, Tensor]:
                batch = self._minibatch(step.batch, seed, step.total_weight)
                if objective.looks_back:
                    met[:] = [replace(batch, partners=None)]
                with torch.no_grad():
                    sums = objective.batch_sums(batch)
                batch = batch if sums is None else replace(batch, sums=self.ranks.sum(sums))
                with trainer.layers():
                    return module(batch)

            def after(step: Step, met: list[Minibatch] = met) -> None:
                with torch.no_grad():
                    sums = objective.step_sums(met.pop()) if objective.looks_back else None
                    objective.after_step(None if sums is None else self.ranks.sum(sums))

            steps = trainer.rows.steps(plan.batch_rows, stream_seed(self.settings.seed, 5, epoch))
            entry = trainer.run_epoch(
                "refine",
                epoch,
                steps,
                loss_of,
                optimizer,
                max_grad_norm=plan.max_grad_norm,
                encoder=objective.encoder,
                num_steps=num_steps,
                before_step=before,
                after_step=after,
            )
            self.end_epoch(epoch, plan.num_epochs, entry | seen, optimizer)
        if objective.ending != "keep":
            objective.take_centers(*self._reclustered(objective, objective.ending))
        state.phase = "done"

    def finish(self) -> Fitted:
        """Return the clustering with the statistics of all rows under it."""
        state = self.state
        release_memory()
        clustering = self._clustering()
        twice = clustering.predictor is not None
        blocks = latent_blocks(self.trainer, clustering.encoder, "float32", keep=twice)
        leaves = leaf_sums(blocks(), clustering.centers_KL, all_sum=self.ranks.sum, assign=clustering.assign)
        if twice:
            # Its leaves have no centers of their own: their means serve, and the distances are taken anew from them.
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

    def _objective(self) -> Objective | None:
        state = self.state
        assert state.centers is not None and state.kernel is not None
        parts = Parts(
            autoencoder=state.autoencoder,
            centers_KL=state.centers.to(self.ranks.device),
            kernel=state.kernel,
            settings=self.settings,
            arithmetic=self.trainer.arithmetic,
            num_rows=self.trainer.rows.num_rows,
            dim=self.trainer.rows.dim,
            teacher=self.teacher,
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
        x = self.trainer.preprocess(batch.x_ND)
        return Minibatch(
            batch.keys_N, x, batch.weights_N, batch.positions_N, seed, total_weight=total_weight, partners=partners
        )

    def _reclustered(self, objective: Objective, how: str) -> tuple[Tensor, Kernel]:
        """Return the centers of k-means on the objective's present codes, and the kernel calibrated to them."""
        trainer = self.trainer
        plan = self.settings.cluster
        sample = sample_latents(trainer, objective.encoder, start_rows(plan.init_rows, plan.num_leaves))
        blocks = latent_blocks(trainer, objective.encoder, trainer.arithmetic)
        generator = self.state.generator
        if how == "kmeans":
            first = start_centers(trainer, sample, stream_seed(self.settings.seed, 4))
            keep_ids = same_rows_each_pass(trainer, objective.encoder)
            found = find_optimum(trainer, blocks, first, generator, keep_ids=keep_ids).centers_KD
        else:
            found = run_lloyd(trainer, blocks, objective.centers.detach(), generator).centers_KD
        sample.thin(len(found))
        return found, calibrated(trainer, sample, found)[0]

    def _new_autoencoder(self) -> Autoencoder:
        return Autoencoder(self.trainer.rows.dim, self.settings.hidden_dims, self.settings.latent_dim)

    def _copy_encoder(self, encoder: nn.Module) -> nn.Module:
        copy = self._new_autoencoder().encoder
        copy.load_state_dict({k: t.cpu() for k, t in encoder.state_dict().items()})
        return copy.eval()

    def end_epoch(self, epoch: int, num_epochs: int, entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Record an epoch, and keep a checkpoint where one is due."""
        self.state.epoch = epoch + 1
        self.state.optimizer = checkpoint.optimizer_tensors(optimizer)
        last = epoch + 1 == num_epochs or self.state.converged
        self._save(entry | {"num_epochs": num_epochs}, keep=last or (epoch + 1) % self.settings.checkpoint_epochs == 0)

    def _save(self, entry: dict[str, Any], *, keep: bool = True) -> None:
        entry["num_workers"] = self.context.world_size
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


def _refine_optimizer(plan: RefineSettings, objective: Objective) -> torch.optim.Optimizer:
    groups = objective.parameter_groups(plan.learning_rate)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.learning_rate, momentum=0.9, fused=True)
    return torch.optim.Adam(groups, lr=plan.learning_rate, fused=True)
