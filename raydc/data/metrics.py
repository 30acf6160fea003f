"""Types of what is measured: metrics.json, the history of a fit, the scores of a partition.

See raydc.data.records for the other documents of a run, and for why they are mappings.
"""

from typing import Literal, NotRequired, Required

from typing_extensions import TypedDict

Phase = Literal["layers", "pretrain", "kmeans", "refine"]
Tone = Literal["better", "same", "worse", "none"]

Baseline = Literal["raw_kmeans", "autoencoder_kmeans"]
Method = Literal["raw_kmeans", "autoencoder_kmeans", "learned"]
"""A baseline, or the run's own model."""


class Epoch(TypedDict, total=False):
    """One entry of the history of a fit: an epoch, or the k-means between pretraining and refinement."""

    phase: Required[Phase]
    epoch: Required[int]
    """Counted from 0, in its phase."""

    num_epochs: int
    """Epochs that the phase may have."""

    num_workers: int
    seconds: float
    rows_per_second: float
    steps: int
    layer: int
    loss: float
    """Mean over the rows of the epoch, like its terms below."""

    kl: float
    code: float
    distance: float
    reconstruction: float
    changed: float
    """Share of the rows that changed their leaf at the refresh."""

    top_q: float
    """Mean largest soft assignment."""

    empty: int
    """Leaves without a row."""

    largest_share: float
    effective_rank: float
    inertia: float
    iterations: int
    reseeded: int
    """Empty leaves that k-means gave new centers."""

    moves: int
    """Merges and splits of k-means that were kept."""

    move_rounds: int
    """Rounds of them that were tried."""

    alpha: float
    scale: float
    target_top_q: float
    num_leaves: int
    """K of the entry, in a sweep."""


class Resize(TypedDict):
    """Where the number of workers changed between two epochs."""

    phase: Phase
    epoch: int
    num_workers: list[int]
    """Before and after."""


class FitMetrics(TypedDict):
    """What a fit says of itself."""

    objective: str
    rows: int
    num_workers: int
    resizes: list[Resize]
    device: str
    precision: str
    mode: Literal["resident", "streamed"]
    rows_per_second: float | None
    num_empty: int
    watch: list[str]
    """Signs of collapse."""

    history: list[Epoch]
    load_seconds: float


class Rows(TypedDict):
    """Where the input rows went."""

    input: int
    labels: int
    rejects: int


class External(TypedDict):
    """Scores of a partition against known classes."""

    acc: float
    nmi: float
    ami: float
    ari: float
    purity: float


class Internal(TypedDict):
    """Scores of a partition that need no classes."""

    silhouette: float
    davies_bouldin: float | None
    size_cv: float
    size_max_over_mean: float
    num_empty: int


class Scores(TypedDict, total=False):
    """All scores of one partition, as far as they were measured."""

    rows: int
    """Rows that they are measured on."""

    acc: float
    nmi: float
    ami: float
    ari: float
    purity: float
    silhouette: float
    davies_bouldin: float | None
    size_cv: float
    size_max_over_mean: float
    num_empty: int


class Quality(TypedDict):
    """Scores of the labels against known classes, over all rows."""

    leaf: External
    levels: dict[str, External]
    """By the level's number of groups."""

    dendrogram_purity: float


class InternalOfTree(TypedDict):
    """Scores of the labels that need no classes, over all rows."""

    leaf: Internal
    levels: dict[str, Internal]


class MethodAgreement(TypedDict):
    """How one method's partition treats nearest neighbors; see raydc.core.metrics.neighbor_agreement."""

    score: float
    share: float
    chance: float
    num_effective: float
    gain: float
    """Mean difference of its scores to those of k-means on the raw rows."""

    standard_error: float


class AgreementRecord(TypedDict):
    """agreement.json: how the partitions treat the nearest neighbors of raw rows, on a sample."""

    rows: int
    queries: int
    num_neighbors: int
    num_leaves: int
    methods: dict[Method, MethodAgreement]


class CriterionRecord(TypedDict):
    """One comparison of the learned partition with that of k-means on the raw rows."""

    name: str
    learned: float
    raw: float
    gain: float
    margin: float
    vote: Tone


class VerdictRecord(TypedDict):
    """Whether learning a space has paid."""

    tone: Tone
    sentence: str
    details: list[str]
    criteria: list[CriterionRecord]


class NeighborFacts(TypedDict):
    """What the search of one slice says of itself, in the metadata of its file."""

    exact: bool
    hits: int
    """Neighbors that the approximate search has found too, of those asked for."""

    wanted: int
    similarity: float
    """Sum over all neighbors."""


class NeighborsMetrics(TypedDict):
    """What stage neighbors says of its search."""

    rows: int
    num: int
    metric: str
    method: Literal["exact", "ivf"]
    recall: float | None
    recall_rows: int
    mean_similarity: float


class StageSeconds(TypedDict):
    """The time of one stage."""

    seconds: float


class Measured(TypedDict):
    """What stage evaluate has measured, before it is judged."""

    rows: Rows
    quality: NotRequired[Quality]
    """Where the input has a label column."""

    repeated_ids: int | None
    """Rows that repeat the id of another; null where they were not counted."""

    internal: InternalOfTree
    baselines: dict[Method, Scores]
    """On the same sample of rows."""

    agreement: NotRequired[AgreementRecord]
    stages: dict[str, StageSeconds]
    fit: FitMetrics
    neighbors: NotRequired[NeighborsMetrics]


class Metrics(Measured):
    """metrics.json."""

    verdict: VerdictRecord
    warnings: list[str]
