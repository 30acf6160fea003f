"""The fit: pretraining, k-means, refinement and the final statistics, written against a small Context.

Letters: N rows, K leaves, D width of a row, L width of the code.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core.hashing import stream_seed
from raydc.core.models.autoencoder import Autoencoder, choose_precision, initialize
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.build import build, check_inputs
from raydc.core.objectives.objective import Objective, ObjectiveInputs, run_pass
from raydc.core.process import release_memory
from raydc.core.search.kmeans import LeafSums, leaf_sums
from raydc.core.search.nearest import nearest
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.context import Context, Recorder
from raydc.core.training.epochs import Trainer
from raydc.core.training.kmeans_on_codes import (
    calibrated,
    cluster,
    latent_blocks,
    same_rows_each_pass,
    sample_latents,
    shared_sample,
    start_centers,
    start_rows,
)
from raydc.core.training.pretrain import pretrain_layers, pretrain_whole
from raydc.core.training.refine import PairSource, Refinement
from raydc.core.training.rows import Rows
from raydc.core.training.settings import FitSettings
from raydc.core.training.state import Clustering, State, restore, to_checkpoint

BASELINE_ROWS_PER_LEAF = 10
"""At least, in the sample of the baseline on the raw rows."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The outcome of a fit, the same on every rank."""

    clustering: Clustering
    leaves: LeafSums
    """Statistics of all rows, in float32 encoding and float64 sums, around `clustering.centers_KL`."""

    baselines: dict[str, Clustering]
    """raw_kmeans, and autoencoder_kmeans where there is an autoencoder."""

    history: list[dict[str, Any]]
    """One entry for each epoch, and one for the k-means between them."""

    decoder: nn.Module | None = None
    """Decoder of the autoencoder, where there is one."""


def fit(
    rows: Rows,
    preprocess: Preprocess,
    settings: FitSettings,
    context: Context,
    pairs: PairSource | None = None,
    teacher: Teacher | None = None,
) -> Fitted:
    """Return the fitted clustering of all rows of all ranks, going on from the last checkpoint if there is one.

    Args:
        rows: this rank's share.
        preprocess: the fixed map of raw rows.
        settings: the same on every rank.
        context: the launcher.
        pairs: for an objective that takes rows in pairs (temi, icon).
        teacher: for distillation; where it has a network, that is where the fit starts, and nothing is pretrained.

    Raises:
        ValueError: fewer rows than leaves, rows that the objective cannot take, or a checkpoint of other settings.
        FloatingPointError: a loss was not finite; the message names phase, epoch, step and rank.
    """
    run = _Fit(rows, preprocess, settings, context, pairs, teacher)
    if rows.num_rows < settings.cluster.num_leaves:
        raise ValueError(f"{settings.cluster.num_leaves} leaves need at least as many rows, there are {rows.num_rows}")
    run.restore()
    run.pretrain()
    if run.state.phase == "pretrain":
        run.start_clusters()
    if run.state.phase == "refine":
        run.refinement().run(run.recorder)
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
        pairs: PairSource | None,
        teacher: Teacher | None,
    ) -> None:
        self.settings, self.context, self.pairs = settings, context, pairs
        self.ranks = Ranks(context.rank, context.world_size, context.device)
        arithmetic = choose_precision(settings.precision, context.device)
        self.trainer = Trainer(
            rows=rows, preprocess=preprocess, settings=settings, ranks=self.ranks, arithmetic=arithmetic
        )
        generator = torch.Generator().manual_seed(stream_seed(settings.seed, 1))
        autoencoder = None
        if settings.learns:
            autoencoder = self._new_autoencoder()
            initialize(autoencoder, generator)
        self.teacher = teacher.to(self.ranks.device) if teacher is not None else None
        if autoencoder is not None and teacher is not None:
            teacher.copy_network(autoencoder)
        layers = autoencoder is not None and settings.pretrain.layerwise and not self.has_taught_network
        self.state = State(autoencoder=autoencoder, generator=generator, phase="layers" if layers else "pretrain")
        self.recorder = Recorder(self.state, settings, context)

    @property
    def has_taught_network(self) -> bool:
        """Whether the network comes from a teacher, so that nothing is pretrained."""
        return self.teacher is not None and self.teacher.encoder is not None

    def check_inputs(self) -> None:
        """Refuse rows that the objective cannot take."""
        check = check_inputs(self.settings)
        if check is not None:
            trainer = self.trainer
            blocks = (trainer.minibatch(batch, seed=0) for batch in trainer.rows.blocks(trainer.block_rows))
            run_pass(check, blocks, self.ranks.sum)

    def pretrain(self) -> None:
        """Check the rows, then train the autoencoder on reconstruction, as far as that is not done."""
        if self.state.phase in ("layers", "pretrain"):
            self.check_inputs()
        if self.state.phase == "layers":
            pretrain_layers(self.trainer, self.state, self.recorder)
        if self.state.phase == "pretrain" and self.state.autoencoder is not None and not self.has_taught_network:
            pretrain_whole(self.trainer, self.state, self.recorder)

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
        sample = sample_latents(trainer, encoder, start_rows(settings.cluster))
        keep_ids = same_rows_each_pass(trainer, encoder)
        kmeans = cluster(trainer, blocks, sample, state.generator, keep_ids=keep_ids)
        state.centers = kmeans.centers_KD
        state.kernel, top_q = calibrated(trainer, sample, kmeans.centers_KD)
        name = "autoencoder_kmeans" if encoder is not None else "raw_kmeans"
        frozen = self._copy_encoder(encoder) if encoder is not None else None
        state.baselines[name] = Clustering(frozen, kmeans.centers_KD.cpu(), state.kernel)
        state.objective = self._objective()
        if state.objective is not None:
            state.objective.initialize(*shared_sample(trainer, encoder, state.objective.sample_rows))
        state.phase, state.epoch = ("refine" if state.objective is not None else "done"), 0
        entry = {
            "phase": "kmeans",
            "epoch": 0,
            "inertia": kmeans.inertia,
            "iterations": kmeans.num_iterations,
            "reseeded": kmeans.num_reseeded,
            "moves": sum(done.num_moves for done in kmeans.rounds if done.kept),
            "move_rounds": len(kmeans.rounds),
            "alpha": state.kernel.alpha,
            "scale": state.kernel.scale,
            "top_q": top_q,
            "target_top_q": settings.refine.target_top_q,
            "seconds": time.perf_counter() - started,
        }
        del sample, blocks
        release_memory()
        self.recorder.record(entry)

    def _raw_kmeans(self) -> Clustering:
        """Return k-means on a sample of the preprocessed rows."""
        # The same start as that of the clusters themselves, so that the comparison is fair.
        num_rows = max(self.settings.baseline_rows, BASELINE_ROWS_PER_LEAF * self.settings.cluster.num_leaves)
        sample = sample_latents(self.trainer, None, num_rows)
        centers = start_centers(
            self.trainer, sample, stream_seed(self.settings.seed, 3), whole=True, sampled_by="baseline_rows"
        )
        # An empty center is no group, and would be every row's next one in the silhouette.
        held = torch.zeros(len(centers), dtype=torch.int64)
        if self.trainer.ranks.rank == 0:
            held = torch.bincount(nearest(sample.z_NL, centers)[0][:, 0], minlength=len(centers))
        centers = centers[self.trainer.ranks.broadcast(held) > 0]
        return Clustering(None, centers, calibrated(self.trainer, sample, centers)[0])

    def refinement(self) -> Refinement:
        """Return the training on the objective."""
        assert self.state.objective is not None
        pairs = self.pairs if self.settings.needs_pairs else None
        return Refinement(self.trainer, self.state, self.state.objective, pairs)

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
        return Fitted(
            clustering=clustering, leaves=leaves, baselines=state.baselines, history=state.history, decoder=decoder
        )

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
        inputs = ObjectiveInputs(
            autoencoder=state.autoencoder,
            centers_KL=state.centers.to(self.ranks.device),
            kernel=state.kernel,
            settings=self.settings,
            arithmetic=self.trainer.arithmetic,
            num_rows=self.trainer.rows.num_rows,
            num_local_rows=self.trainer.rows.num_local,
            dim=self.trainer.rows.dim,
            teacher=self.teacher,
        )
        objective = build(self.settings.objective, inputs)
        if objective is None:
            return None
        if self.settings.needs_pairs and self.pairs is None:
            raise ValueError(f"objective={self.settings.objective} takes rows in pairs: give `pairs` a source of them")
        return objective.to(self.ranks.device)

    def _new_autoencoder(self) -> Autoencoder:
        return Autoencoder(
            self.trainer.rows.dim, self.settings.autoencoder.hidden_dims, self.settings.autoencoder.latent_dim
        )

    def _copy_encoder(self, encoder: nn.Module) -> nn.Module:
        copy = self._new_autoencoder().encoder
        copy.load_state_dict({k: t.cpu() for k, t in encoder.state_dict().items()})
        return copy.eval()

    def restore(self) -> None:
        """Take up the state of the last checkpoint, if there is one."""
        folder = self.context.latest_checkpoint()
        if folder is not None:
            tensors, values = checkpoint.load(folder)
            if values["fingerprint"] != self.settings.fingerprint:
                raise ValueError(
                    f"the last checkpoint was made with other settings or another input ({values['fingerprint']}, "
                    f"now {self.settings.fingerprint})"
                )
            restore(self.state, tensors, values, self._new_autoencoder)
        if self.state.autoencoder is not None:
            self.state.autoencoder.to(self.ranks.device)
        if self.state.centers is not None:
            self.state.centers = self.state.centers.to(self.ranks.device)
            self.state.objective = self._objective()
            if self.state.objective is not None:
                self.state.objective.load_state_tensors(checkpoint.with_prefix("objective", tensors))
