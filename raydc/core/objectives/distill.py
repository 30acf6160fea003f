"""Distillation: cluster ids teach the network that they came from. Letters: N rows, M prototypes, K classes, L latent.

The ids are the run's own, from k-means repeated on the changing code (DeepCluster), or those of a teacher: the model of
a finished run, or a cut of its tree. Either way they are the answer of a frozen model to the row, so no label file is
read, no row is looked up by its id, and it does not matter which rank holds a row.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.prototypes import Prototypes, log_classes
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs, Pass, weighted_mean
from raydc.core.objectives.reconstruction import squared_error
from raydc.core.objectives.snapshot import encode
from raydc.core.search.kmeans import LeafSums
from raydc.core.search.nearest import nearest
from raydc.core.training.settings import DistillSettings

_START_ITERATIONS = 25
"""Iterations of k-means over the directions of the sample, before the first epoch."""

_PREFIX = "taught."
"""Beginning of the names of the state tensors of the class source."""


def class_weights(masses_K: Tensor) -> Tensor:
    """Return the (K,) weight of each class's rows, by which every class counts alike and the mean over rows stays 1.

    w_c = (sum of masses) / (classes with rows * mass_c); 0 for a class without rows. In expectation this is the
    uniform sampling over clusters of Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features",
    arXiv:1807.05520, section 3.3, which batches made from row keys cannot do.
    """
    filled = masses_K > 0
    each = masses_K.sum() / (filled.sum() * masses_K.clamp_min(1e-300))
    return torch.where(filled, each, torch.zeros_like(each))


def direction_means(sums_KL: Tensor, fallback_KL: Tensor) -> Tensor:
    """Return the (K, L) directions of sums of unit vectors; of a sum near zero, as of no rows, its fallback."""
    norms = sums_KL.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-12, sums_KL / norms.clamp_min(1e-12), fallback_KL.to(sums_KL.dtype)).float()


class Distill(Objective):
    """Cross-entropy between the ids and a softmax over prototypes, and the reconstruction, which keeps the code.

    L = sum_i w_i (class weight of y_i) (-log p(y_i | x_i)) + reconstruction_weight * reconstruction.

    Without a teacher every epoch begins with a step of k-means, from the present prototypes, whose means are copied
    into the prototypes. These are frozen in between: an id means the same cluster in all epochs, and no classifier is
    started anew. With a teacher the prototypes start as the centers of its leaves and learn, its ids stay.

    Source: Caron, Bojanowski, Joulin, Douze, arXiv:1807.05520; the copied centroids are those of DeepCluster-v2 in
    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv:2006.09882,
    appendix. There the images are augmented and the ids come from an epoch before; here rows are as they are, and the
    ids those of the weights that the epoch begins with.
    """

    encoder: nn.Module
    decoder: nn.Module
    classes: Tensor
    shift: Tensor
    width: Tensor
    class_weights: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder,
        centers_KL: Tensor,
        kernel: Kernel,
        settings: DistillSettings,
        *,
        teacher: Teacher | None = None,
        arithmetic: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        self.kernel, self.settings, self.teacher, self.arithmetic = kernel, settings, teacher, arithmetic
        known = teacher is not None and teacher.encoder is not None
        points = teacher.centers_ML if teacher is not None and known else centers_KL
        classes = teacher.classes_M if teacher is not None and known else torch.arange(len(centers_KL))
        self.points = nn.Parameter(points.clone(), requires_grad=teacher is not None)
        self.register_buffer("centers", centers_KL.clone())
        self.register_buffer("classes", classes.clone())
        self.register_buffer("shift", torch.zeros(centers_KL.shape[1]))
        self.register_buffer("width", torch.ones(()))
        self.register_buffer("class_weights", torch.ones(len(centers_KL)))
        self.sample_rows = settings.start_rows
        self.class_source: _ClassSource | None = None
        """What gives the ids of this epoch; no submodule, so neither optimizer nor ranks touch it."""

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        return cls(
            inputs.autoencoder,
            inputs.centers_KL,
            inputs.kernel,
            inputs.settings.distill,
            teacher=inputs.teacher,
            arithmetic=inputs.arithmetic,
        )

    @property
    def uses_directions(self) -> bool:
        """Whether points are compared by their direction."""
        return self.teacher is None and self.settings.metric == "cosine"

    @torch.no_grad()
    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Set origin and width; without a teacher, turn the centers of k-means into prototypes.

        Under cosine the origin is the mean of the code, and k-means goes on over the directions of the sample from
        those of the centers.
        """
        if self.uses_directions:
            self.shift.copy_(weighted_mean(sample_NL, weights_N))
            u = self.prototypes().place(sample_NL)
            weighted = u.double() if weights_N is None else u.double() * weights_N.double()[:, None]
            points = self.prototypes().place(self.points)
            for _ in range(_START_ITERATIONS):
                sums = torch.zeros_like(points, dtype=torch.float64)
                points = direction_means(sums.index_add_(0, nearest(u, points)[0][:, 0], weighted), points)
            self.points.copy_(points)
        squared = weighted_mean(nearest(self.prototypes().place(sample_NL), self.points)[1], weights_N)
        # On the unit sphere -|u - p|^2 / (2 T) is (cosine - 1) / T; elsewhere the unit of T comes from the rows.
        unit = 1.0 if self.uses_directions else max(float(squared), 1e-12)
        self.width.fill_(self.settings.temperature * unit)

    def prototypes(self) -> Prototypes:
        """Return the prototypes as they are now."""
        cosine = torch.tensor(int(self.uses_directions), device=self.points.device)
        return Prototypes(
            points_ML=self.points.detach().clone(),
            classes_M=self.classes,
            shift_L=self.shift,
            width=self.width,
            cosine=cosine,
        )

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Return the pass that gives every row its id: at the start of an epoch; of a teacher once in a process."""
        if self.teacher is None:
            return _Ids(self, moves=epoch < self.settings.num_reclusterings) if step == 0 else None
        if self.class_source is not None:
            return None
        # A teacher without a network says nothing about this code but which rows belong together.
        return _Ids(self, moves=(epoch, step) == (0, 0) and self.teacher.encoder is None)

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `entropy` and `reconstruction`."""
        assert self.class_source is not None
        return self.loss(batch.x_ND, batch.weights_N, self.class_source.ids(batch))

    def loss(self, x_ND: Tensor, weights_N: Tensor, ids_N: Tensor) -> dict[str, Tensor]:
        """Return the sums of `forward` for given ids (N,) int64."""
        z = self.encoder(x_ND)
        # The softmax stays in float32: in bf16 a probability has three digits.
        with torch.autocast(x_ND.device.type, enabled=False):
            now = self.prototypes()
            log_p = log_classes(now.place(z.float()), self.points, self.classes, self.width)
            missed = -log_p.gather(1, ids_N[:, None])[:, 0]
            entropy = (weights_N * self.class_weights[ids_N] * missed).sum()
        sums = {"loss": entropy, "entropy": entropy.detach()}
        if self.settings.reconstruction_weight > 0:
            reconstruction = (weights_N * squared_error(x_ND, self.decoder(z))).sum()
            sums["loss"] = entropy + self.settings.reconstruction_weight * reconstruction
            sums["reconstruction"] = reconstruction.detach()
        return sums

    def predictor(self) -> Prototypes:
        """Return the prototypes: a row's leaf is the class of the nearest."""
        return self.prototypes()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return prototypes and weights, and without a teacher what gave the last ids."""
        own = super().state_tensors()
        if self.class_source is None or self.teacher is not None:
            return own
        return own | self.class_source.tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_tensors` gave."""
        source = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
        super().load_state_tensors({n: t for n, t in tensors.items() if not n.startswith(_PREFIX)})
        if source:
            frozen = copy.deepcopy(self.encoder).eval()
            frozen.load_state_dict(
                {n.removeprefix("encoder."): t for n, t in source.items() if n.startswith("encoder.")}
            )
            device = self.points.device
            points = Prototypes(**{n.removeprefix("points."): t for n, t in source.items() if n.startswith("points.")})
            self.class_source = _ClassSource(frozen, points.to(device), None, self.arithmetic)


def _nearest_class(z_NL: Tensor, prototypes: Prototypes) -> Tensor:
    return prototypes.classes_M[nearest(prototypes.place(z_NL), prototypes.points_ML)[0][:, 0]]


class _ClassSource:
    """What gives a row its id between two passes."""

    def __init__(
        self, encoder: nn.Module | None, answers: "Prototypes | Teacher", ids_N: Tensor | None, arithmetic: str
    ) -> None:
        """Answer by `ids_N` where the rows are resident, else by the frozen encoder and prototypes, or the teacher."""
        self._encoder, self._answers, self._ids, self._arithmetic = encoder, answers, ids_N, arithmetic

    @torch.no_grad()
    def ids(self, batch: Minibatch) -> Tensor:
        """Return the (n,) int64 class of each row."""
        if self._ids is not None and batch.positions_N is not None:
            return self._ids[batch.positions_N]
        if isinstance(self._answers, Teacher):
            return self._answers.classes(batch.x_ND)
        assert self._encoder is not None
        return _nearest_class(encode(self._encoder, batch.x_ND, self._arithmetic), self._answers)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `Distill.load_state_tensors` needs; nothing of one rank alone."""
        assert self._encoder is not None and isinstance(self._answers, Prototypes)
        encoder = {f"{_PREFIX}encoder.{name}": t for name, t in self._encoder.state_dict().items()}
        return encoder | {f"{_PREFIX}points.{name}": t for name, t in self._answers.tensors().items()}


class _Ids:
    """The pass that gives every row its id, weighs the classes and, if asked, moves the prototypes to their means."""

    def __init__(self, model: Distill, *, moves: bool) -> None:
        self._model, self._moves = model, moves
        self._prototypes = model.prototypes()
        num_classes, dim = model.centers.shape
        self._sums = LeafSums.zeros(num_classes, dim, model.points.device)
        # Weights of the rows, and of those whose id changed.
        self._counts = torch.zeros(2, dtype=torch.float64, device=model.points.device)
        self._kept: list[Tensor] = []

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""
        model = self._model
        z = encode(model.encoder, batch.x_ND, model.arithmetic)
        ids = model.teacher.classes(batch.x_ND) if model.teacher is not None else _nearest_class(z, self._prototypes)
        weights = changed = batch.weights_N.double()
        if model.class_source is not None:
            changed = weights * (model.class_source.ids(batch) != ids)
        self._counts += torch.stack([weights.sum(), changed.sum()])
        u = self._prototypes.place(z)
        self._sums.add(u, ids, torch.zeros_like(u[:, 0]), batch.weights_N)
        if batch.positions_N is not None:
            self._kept.append(ids if model.teacher is not None else z)

    def sums(self) -> Tensor:
        """Return masses and sums of the classes, and the weights of all and of the changed rows, as one tensor."""
        return torch.cat([self._sums.packed().flatten(), self._counts])

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Move the prototypes, keep the ids; return changed, empty and largest_share."""
        model = self._model
        leaves = LeafSums.unpacked(sums[:-2].reshape(self._sums.packed().shape))
        masses = leaves.weights_K
        with torch.no_grad():
            if self._moves:
                directions = model.uses_directions
                means = direction_means(leaves.sums_KD, model.points) if directions else leaves.means(model.points)
                model.points.copy_(means)
            if model.settings.class_weights == "balanced":
                model.class_weights.copy_(class_weights(masses))
        if model.teacher is not None:
            ids = torch.cat(self._kept) if self._kept else None
            model.class_source = _ClassSource(None, model.teacher, ids, model.arithmetic)
        else:
            now = model.prototypes()
            ids = torch.cat([_nearest_class(z, now) for z in self._kept]) if self._kept else None
            model.class_source = _ClassSource(copy.deepcopy(model.encoder).eval(), now, ids, model.arithmetic)
        numbers = {"empty": int((masses == 0).sum()), "largest_share": float(masses.max() / masses.sum())}
        return numbers if model.teacher is not None else numbers | {"changed": float(sums[-1] / sums[-2])}
