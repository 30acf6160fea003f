"""The settings of a fit, without defaults: those live in raydc.config.config."""

from dataclasses import dataclass

from raydc.core.search.choices import Moves, Start


@dataclass(frozen=True)
class PretrainSettings:
    """See raydc.config.config.PretrainConfig."""

    num_epochs: int
    batch_rows: int
    optimizer: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    decay_steps: int
    weight_decay: float
    corruption: float
    layerwise: bool
    layer_epochs: int
    layer_corruption: float
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class ClusterSettings:
    """See raydc.config.config.ClusterConfig."""

    num_leaves: int
    init_rows: int
    num_restarts: int
    num_iterations: int
    tolerance: float
    space: str
    start: Start = "auto"
    moves: Moves = "auto"


@dataclass(frozen=True)
class RefineSettings:
    """See raydc.config.config.RefineConfig."""

    num_epochs: int
    batch_rows: int
    optimizer: str
    learning_rate: float
    refreshes_per_epoch: int
    tolerance: float
    alpha: float | str
    scale: float | str
    target_top_q: float
    target_exponent: float
    frequency_exponent: float
    size_prior: str | list[float]
    gamma: float
    beta: float
    code_loss: str
    distance_weight: float
    centroid_update: str
    centroid_decay: float
    recluster_epochs: int | None
    max_grad_norm: float | None


@dataclass(frozen=True)
class VadeSettings:
    """See raydc.config.config.VadeConfig."""

    likelihood: str
    component_weights: str
    kl_weight: float
    warmup_epochs: float
    mixture_learning_rate: float | None
    decay: float
    decay_epochs: int
    decay_floor: float
    start_rows: int
    start_iterations: int


@dataclass(frozen=True)
class DistillSettings:
    """See raydc.config.config.DistillConfig."""

    metric: str
    temperature: float
    reconstruction_weight: float
    num_reclusterings: int
    class_weights: str
    start_rows: int


@dataclass(frozen=True)
class HeadSettings:
    """See raydc.config.config.HeadConfig."""

    hidden_dims: tuple[int, ...]
    start: str
    temperature: float | str
    learning_rate: float
    marginal_momentum: float
    num_heads: int
    beta: float
    teacher_momentum: float
    alpha: float
    num_negatives: int


@dataclass(frozen=True)
class FitSettings:
    """All that decides the result of a fit, beside the rows."""

    objective: str
    """A name that raydc.core.objectives.build knows."""

    seed: int
    precision: str
    hidden_dims: tuple[int, ...]
    latent_dim: int
    pretrain: PretrainSettings
    cluster: ClusterSettings
    refine: RefineSettings
    vade: VadeSettings
    distill: DistillSettings
    baseline_rows: int
    fingerprint: str
    """Of the settings and the input; a checkpoint with another one is refused."""

    head: HeadSettings | None = None
    """None for the objectives without a head."""

    checkpoint_epochs: int = 1
    block_rows: int = 8192
