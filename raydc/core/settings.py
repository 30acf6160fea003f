"""The settings of a fit, without defaults: those live in raydc.config."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainSettings:
    """See raydc.config.PretrainConfig."""

    num_epochs: int
    batch_rows: int
    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    corruption: float


@dataclass(frozen=True)
class ClusterSettings:
    """See raydc.config.ClusterConfig."""

    num_leaves: int
    init_rows: int
    num_restarts: int
    num_iterations: int
    tolerance: float


@dataclass(frozen=True)
class RefineSettings:
    """See raydc.config.RefineConfig."""

    num_epochs: int
    batch_rows: int
    optimizer: str
    learning_rate: float
    refreshes_per_epoch: int
    tolerance: float
    alpha: float | str
    target_top_q: float
    gamma: float
    max_grad_norm: float | None


@dataclass(frozen=True)
class FitSettings:
    """All that decides the result of a fit, beside the rows."""

    objective: str
    """dec, idec, autoencoder or kmeans."""

    seed: int
    precision: str
    hidden_dims: tuple[int, ...]
    latent_dim: int
    pretrain: PretrainSettings
    cluster: ClusterSettings
    refine: RefineSettings
    baseline_rows: int
    fingerprint: str
    """Of the settings and the input; a checkpoint with another one is refused."""

    checkpoint_epochs: int = 1
    block_rows: int = 8192
