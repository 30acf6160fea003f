"""The settings of a fit: each with its default, its unit and its check, once.

Every class is a frozen dataclass that pydantic checks when it is made, so a wrong value is refused with its name. The
YAML layer (raydc.config) uses these same classes as its sections; alone they need no file:

    FitSettings(objective="dec", cluster=ClusterSettings(num_leaves=10))

Fields marked operational say where and how fast a fit works, not what it computes: they are left out of fingerprints.
"""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass

from raydc.core.objectives.table import ObjectiveName, info
from raydc.core.search.choices import Moves, Start

OPERATIONAL: dict[str, JsonValue] = {"operational": True}

CHECKED = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""How pydantic checks a settings class: unknown names are refused, docstrings describe the fields."""

Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random choice: the same seed, the same run.")]
Width = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class AutoencoderSettings:
    """The fully connected autoencoder: input - hidden_dims - latent_dim, and its mirror."""

    hidden_dims: tuple[Width, ...] = (500, 500, 2000)
    """Widths of the hidden layers, input side first. The default is the network of Xie et al. 2016."""

    latent_dim: int = Field(default=10, ge=1)
    """Width of the code, the space in which rows are clustered. Raise it to separate many fine clusters."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class PretrainSettings:
    """Training of the autoencoder on reconstruction, before any clustering."""

    num_epochs: int = Field(default=40, ge=0)
    """Passes over the rows."""

    batch_rows: int = Field(default=256, ge=1)
    """Rows per step, summed over all workers."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW. sgd uses momentum 0.9."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. The loss is the mean squared error over all elements."""

    warmup_steps: int = Field(default=200, ge=0)
    """Steps in which the rate rises linearly to its peak. At most a tenth of all steps are used for it."""

    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    """Learning rate after the warmup. cosine falls from the peak to zero; steps divides by ten every decay_steps."""

    decay_steps: int = Field(default=20_000, ge=1)
    """Steps after which schedule=steps divides the rate by ten."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW)."""

    corruption: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs set to zero before encoding (a denoising autoencoder). 0 is plain reconstruction."""

    layerwise: bool = False
    """Train one pair of layers after the other first, as the authors of DEC do (stacked denoising autoencoders)."""

    layer_epochs: int = Field(default=20, ge=1)
    """Passes over the rows for each pair of layers, with layerwise=true. Optimizer and rates are those above."""

    layer_corruption: float = Field(default=0.2, ge=0, lt=1)
    """Share of a layer's input and output that is dropped, with layerwise=true. Rows and code are never dropped."""

    max_grad_norm: float | None = Field(default=1000.0, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it. The default stops accidents only; null is off."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ClusterSettings:
    """k-means: a start on a sample, moves that leave a poor optimum, then Lloyd's iterations over all rows."""

    num_leaves: int = Field(default=1000, ge=2)
    """Number of leaf clusters (K)."""

    start: Start = "auto"
    """Where k-means starts. auto is tree from 50 leaves on, and restarts below.

    tree makes eight small leaves of the sample for each leaf, joins them by Ward and cuts the tree at num_leaves. It
    finds clusters that restarts miss, and costs less than one of them. restarts takes the best of num_restarts FAISS
    runs, which is as good for few leaves. A sample of fewer than eight rows for each leaf takes one FAISS run."""

    moves: Moves = "auto"
    """Moves after the start: two leaves are joined and a third is split where that lowers the squared error.

    separated splits a leaf only in two parts that lie apart. all takes every move that lowers the error; where sizes
    are very uneven it splits the largest cluster and joins small ones. none leaves the start as it is. auto is
    separated after tree, and none after restarts. A round costs five passes over the rows, two of which search the
    nearest center. There are at most six rounds (two if rows are streamed), and most often none or one pays."""

    init_rows: int = Field(default=1_000_000, ge=1)
    """Rows sampled for the start, at least 20 for each leaf. Lloyd's iterations and the labels take every row.

    One worker holds the sample in memory, as float32."""

    num_restarts: int = Field(default=5, ge=1)
    """FAISS runs of start=restarts; the one with the lowest inertia is kept."""

    num_iterations: int = Field(default=50, ge=1)
    """Most Lloyd iterations over all rows."""

    tolerance: float = Field(default=1e-5, ge=0)
    """Lloyd stops when an iteration lowers the inertia by a smaller share than this."""

    space: Literal["codes", "directions"] = "codes"
    """Space of the first k-means. Try directions when few leaves in a narrow code miss groups that you know.

    codes clusters the codes as they are. directions whitens them and scales them to unit length, as DeepCluster does.
    The centers are then the means of the codes. Whitening also widens axes that hold nothing but noise."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class RefineSettings:
    """Training on the clustering objective, after k-means."""

    num_epochs: int = Field(default=20, ge=0)
    """Most passes over the rows."""

    batch_rows: int = Field(default=256, ge=1)
    """Rows per step, summed over all workers."""

    optimizer: Literal["sgd", "adam"] = "adam"
    """sgd uses momentum 0.9."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Constant learning rate. Raise it with care: Adam then fits the first, uncertain target too fast."""

    refreshes_per_epoch: int = Field(default=2, ge=1)
    """How often an epoch recomputes the target distribution over all rows (dec, idec)."""

    tolerance: float = Field(default=1e-3, ge=0, lt=1)
    """Stop early when a smaller share of the rows than this changes its leaf between two refreshes."""

    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Degrees of freedom of the Student-t kernel; 1 in the paper. auto takes the smallest that reaches target_top_q."""

    scale: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Squared length unit of the kernel; 1 in the paper. auto calibrates it to target_top_q."""

    target_top_q: float = Field(default=0.5, gt=0, lt=1)
    """Mean largest soft assignment (q) to which the kernel is calibrated at the start. Lower means softer clusters."""

    target_exponent: float = Field(default=2.0, ge=1)
    """dec, idec: exponent s in the target p ~ q^s / f^t. A larger one sharpens the target."""

    frequency_exponent: float = Field(default=1.0, ge=0)
    """dec, idec: exponent t in the target p ~ q^s / f^t. 1 evens the sizes of the leaves out; 0 does not."""

    size_prior: Literal["uniform", "kmeans"] | list[Annotated[float, Field(gt=0)]] = "uniform"
    """dec, idec: the leaf sizes r that the target p ~ q^s (r / f)^t aims at.

    uniform makes them equal. kmeans keeps the sizes found by k-means. A list gives one number per leaf; the largest
    number goes to the leaf that is largest after k-means."""

    clustering_weight: float = Field(default=0.1, ge=0)
    """idec: weight of the clustering loss beside the reconstruction (gamma in the paper)."""

    code_loss: Literal["nearest", "l2", "l1"] = "nearest"
    """ae: loss on the code. nearest is the squared distance to the nearest center; l2 and l1 are norms of the code."""

    code_weight: float = Field(default=0.1, ge=0)
    """ae: weight of the code loss beside the reconstruction. At 0 the result is that of objective=autoencoder."""

    distance_weight: float = Field(default=1.0, ge=0)
    """dcn: weight of the squared distance to the nearest center beside the squared error (lambda in the paper)."""

    centroid_update: Literal["ema", "counts"] = "ema"
    """dcn: how centers follow their rows. ema is a moving average; counts, as published, is a mean over all so far."""

    centroid_decay: float = Field(default=0.99, ge=0, lt=1)
    """dcn: share of the moving averages that survives a step, with centroid_update=ema."""

    recluster_epochs: int | None = Field(default=10, ge=1)
    """dcn: epochs between two runs of Lloyd's iterations over all rows; null is never."""

    max_grad_norm: float | None = Field(default=5.0, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it. null is off."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class VadeSettings:
    """Variational deep embedding (VaDE): a variational autoencoder with a mixture of Gaussians over its code."""

    likelihood: Literal["bernoulli", "gaussian"] = "gaussian"
    """Distribution of a row's elements. bernoulli is for values in [0, 1], such as pixels; gaussian for all others."""

    component_weights: Literal["learned", "uniform"] = "uniform"
    """Weights of the mixture's components. uniform keeps a large one from drawing ever more rows to itself.

    learned is as in the paper, for components that are known to differ much in size."""

    kl_weight: float = Field(default=3.0, gt=0)
    """Weight of the divergence from the mixture beside the reconstruction. More lets the clusters pull harder.

    1 is the evidence lower bound. Too much, about 10 on pixels, merges the clusters."""

    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs in which kl_weight rises linearly from zero."""

    mixture_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the mixture's weights, means and variances. null takes refine.learning_rate."""

    decay: float = Field(default=0.9, gt=0, le=1)
    """Factor on both learning rates after every decay_epochs."""

    decay_epochs: int = Field(default=10, ge=1)
    """Epochs between two decays."""

    decay_floor: float = Field(default=0.0, ge=0, le=1)
    """Smallest total factor that the decay may reach."""

    start_rows: int = Field(default=50_000, ge=2)
    """Rows to which the first mixture is fitted, from the k-means clusters; chosen by hash of the row key.

    It takes about 24 * start_rows * num_leaves bytes. Row weights play no part in it."""

    start_iterations: int = Field(default=100, ge=0)
    """Most iterations of that first fit (expectation-maximization)."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class DistillSettings:
    """Distillation: a softmax over prototypes learns the ids of a clustering, and trains the network with them."""

    metric: Literal["cosine", "euclidean"] = "cosine"
    """How codes compare with prototypes: by direction from the mean, or by distance. With a teacher it is distance."""

    temperature: float = Field(default=0.3, gt=0)
    """Softmax temperature over the prototypes. Lower it to train on rows between clusters only.

    A higher one moves all rows; use it for few clusters. The logits are cosines. For metric=euclidean they are half
    the squared distances, divided by the mean squared distance to the nearest prototype."""

    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Weight of the reconstruction beside the cross-entropy. It keeps the code from collapsing; 0 drops the decoder."""

    num_reclusterings: int = Field(default=1000, ge=0)
    """Epochs, from the first on, that begin with a k-means step from the present prototypes.

    Later epochs only assign the rows again. It has no effect with a teacher."""

    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss. balanced gives every class the same share, however many rows it has."""

    start_rows: int = Field(default=50_000, ge=1)
    """Rows from which the first prototypes and the unit of distance are made; chosen by hash of the row key."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class HeadSettings:
    """The heads of temi and icon, on the preprocessed rows. Epochs, batches and optimizer are those of refine."""

    hidden_dims: tuple[Width, ...] = ()
    """Widths of hidden layers; an empty list is a linear head. The TEMI paper uses [512, 256]."""

    start: Literal["kmeans", "random"] = "kmeans"
    """First prototypes: the directions of the k-means centers (for a linear head), or random ones."""

    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Softmax temperature over the cosines. Lower means harder assignments.

    auto, after a k-means start, makes the mean largest probability refine.target_top_q. After a random start it is
    0.1."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Constant learning rate. The prototypes start at unit norm."""

    marginal_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the moving average of the leaves' marginals, between two passes over the rows."""

    num_heads: int = Field(default=1, ge=1)
    """temi: heads trained side by side; the one with the lowest loss is kept. Each costs as much as the first."""

    pair_exponent: float = Field(default=0.6, gt=0, le=1)
    """temi: exponent of the pairs' probabilities (beta in the paper). Lower keeps the leaves even.

    1 follows uneven groups, but lets leaves die."""

    teacher_momentum: float = Field(default=0.98, ge=0, lt=1)
    """temi: momentum of the teacher per step. The paper uses 0.996, in runs with many more steps."""

    debiasing: float = Field(default=0.6, ge=0, lt=1)
    """icon: share of the uniform distribution mixed into both sides of the divergence (alpha in the paper)."""

    num_negatives: int = Field(default=256, ge=1)
    """icon: rows in each step that stand for all rows."""

    @pydantic.model_validator(mode="after")
    def _centers_are_rows(self) -> Self:
        if self.start == "kmeans" and self.hidden_dims:
            raise ValueError(
                "head.start=kmeans needs a linear head: centers are no prototypes behind hidden layers. Set "
                "head.hidden_dims=[], or head.start=random"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class WatchSettings:
    """Bounds beyond which a fit is said to collapse: a warning in the log, the summary and the report."""

    min_effective_rank: float = Field(default=1.5, ge=0, json_schema_extra=OPERATIONAL)
    """Smallest effective rank of the codes that is not reported: about the number of directions they vary in.

    It is exp(H), with H the entropy of the normalized covariance spectrum."""

    min_rank_share: float = Field(default=0.3, ge=0, le=1, json_schema_extra=OPERATIONAL)
    """Smallest share of the effective rank after pretraining that refinement may leave."""

    max_empty_share: float = Field(default=0.2, ge=0, le=1, json_schema_extra=OPERATIONAL)
    """Largest share of leaves without a row at a refresh."""

    max_largest_share: float = Field(default=0.5, gt=0, le=1, json_schema_extra=OPERATIONAL)
    """Largest share of the rows in one leaf at a refresh. Twice the mean leaf is always allowed."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class BaselineSettings:
    """The baselines that every fit is compared with."""

    baseline_rows: int = Field(default=100_000, ge=1)
    """Rows on which the baselines are fitted and compared; chosen by hash of the row key."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class AgreementSettings:
    """Whether a row's nearest neighbors among the raw rows are in its leaf."""

    neighbor_rows: int = Field(default=10_000, ge=10)
    """Rows among which nearest neighbors are looked up, to compare the learned space with k-means on the raw rows.

    They are chosen by hash of the row key, at most baseline_rows. Take ten or more for each leaf."""

    num_neighbors: int = Field(default=5, ge=1)
    """Nearest neighbors of a row that should be in its leaf."""

    neighbor_queries: int = Field(default=4000, ge=10)
    """Rows of that sample whose neighbors are looked up. Costs about 2 * queries * neighbor_rows * width FLOP."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class StabilitySettings:
    """Whether two halves of the rows give the same clusters."""

    stability_rows: int = Field(default=20_000, ge=16, json_schema_extra=OPERATIONAL)
    """Rows of the sample that is divided into halves. K above an eighth of them gets no stability."""

    num_repeats: int = Field(default=5, ge=2, json_schema_extra=OPERATIONAL)
    """Number of divisions into halves."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class SweepSettings(StabilitySettings, AgreementSettings):
    """A sweep over numbers of leaves."""

    num_leaves: tuple[int, ...]
    """The numbers of leaves (K) to compare."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ObjectiveSettings:
    """What is learned, and in which arithmetic."""

    objective: ObjectiveName = "dec"
    """The clustering method.

    - dec, idec, dcn: an autoencoder refined on a clustering loss.
    - ae: an autoencoder refined on reconstruction and a loss on its code.
    - vade, also called vdc: a variational autoencoder with a mixture of Gaussians.
    - distill: cluster ids, of k-means or of another run, teach the network.
    - temi, icon: a head on the preprocessed rows, taught by their neighbors; no autoencoder.
    - autoencoder: pretraining and k-means only.
    - kmeans: no network; k-means on the preprocessed rows.
    """

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the layers in training. auto is bf16 where the hardware computes in it. Sums are always float64."""

    checkpoint_epochs: int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Epochs between two checkpoints."""

    checkpoint_seconds: float | None = Field(default=600.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds between two checkpoints inside an epoch of resident rows, at least; null makes none there.

    A fit goes on after the step at which it was made. Streamed rows come in another order each time, so their
    checkpoints are made between two epochs. One is made at once when Ray announces that a node goes."""

    @property
    def learns(self) -> bool:
        """Return whether an autoencoder is trained; otherwise the preprocessed rows are clustered as they are."""
        return info(self.objective).needs_autoencoder

    @property
    def needs_pairs(self) -> bool:
        """Return whether each row comes with one of its nearest neighbors."""
        return info(self.objective).needs_pairs


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class FitSettings(ObjectiveSettings, BaselineSettings):
    """All that decides the result of a fit, beside the rows."""

    seed: Seed = 0
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    pretrain: PretrainSettings = PretrainSettings()
    cluster: ClusterSettings = ClusterSettings()
    refine: RefineSettings = RefineSettings()
    vade: VadeSettings = VadeSettings()
    distill: DistillSettings = DistillSettings()
    head: HeadSettings = HeadSettings()

    fingerprint: str = ""
    """Hash of the settings and the input. A checkpoint with another one is refused."""

    check_steps: int = Field(default=100, ge=1)
    """Steps between two looks at the losses and at the clock; each look waits for the device."""

    look_seconds: float = Field(default=1.0, ge=0)
    """Seconds between two questions to the launcher whether it wants a checkpoint, at least."""

    block_rows: int = Field(default=8192, ge=1)
    """Rows encoded at once in a pass without gradients."""

    @property
    def refines(self) -> bool:
        """Return whether an objective is trained after k-means."""
        return info(self.objective).has_loss(self.refine)
