"""Types of the JSON documents that a run writes and reads back: the keys that scripts may depend on.

A document stays a mapping, so that a reader sees what a run of another version wrote; the type says which keys there
are. `python -m raydc.data.json_schema docs` makes the JSON schemas in docs/ from these types.
"""

from typing import Any, Literal, NotRequired, Required

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
    """Its score minus that of k-means on the raw rows."""

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


class LevelRecord(TypedDict):
    """How even the groups of one level are, and how tight; see raydc.core.tree.order.LevelStatistics."""

    num_groups: int
    size_cv: float
    size_max_over_mean: float
    num_over_4x_mean: int
    smallest: float
    sse: float


class BadFile(TypedDict):
    """A file that was left out under input.on_bad_files=quarantine."""

    uri: str
    problem: str
    rows: int | None


class ColumnRecord(TypedDict):
    """One embedding column."""

    name: str
    dim: int
    dtype: str
    weight: float


class SpecRecord(TypedDict):
    """What profile found out about the columns of the input; see raydc.data.slices.InputSpec."""

    columns: list[ColumnRecord]
    id_column: str
    id_type: Literal["int64", "string"]
    label_column: str | None
    weight_column: str | None
    carry_columns: list[str]
    refuse_zero_norm: bool
    on_bad_rows: str
    on_bad_files: str


class MomentsRecord(TypedDict):
    """Mean and squared deviations of the sampled rows."""

    num_rows: int
    mean: list[float]
    m2: list[float]


class SliceRecord(TypedDict):
    """One slice of the plan; see raydc.data.slices.Slice."""

    index: int
    name: str
    uri: str
    row_groups: list[int]
    first_row: int
    first_key: int
    num_rows: int
    num_bytes: int


class ProfileRecord(TypedDict):
    """profile.json."""

    fingerprint: str
    num_rows: int
    num_bytes: int
    spec: SpecRecord
    bad_files: list[BadFile]
    sample_rejects: dict[str, int]
    moments: MomentsRecord
    slices: list[SliceRecord]


class Header(TypedDict):
    """run.json: how the run is made, by the driver that works on it now."""

    format: NotRequired[str]
    kind: NotRequired[Literal["run", "sweep"]]
    """The command that the folder belongs to."""

    run_id: str
    format_version: int
    started: str
    seed: int
    commit: str | None
    versions: dict[str, str]
    command: list[str]
    config: dict[str, Any]
    """The resolved settings; see raydc.config."""


class FileEntry(TypedDict):
    """One file of the manifest."""

    path: str
    bytes: int
    sha256: str
    rows: NotRequired[int]
    """Rows, where the file is Parquet."""


class TableEntry(TypedDict):
    """One table in which the labels are registered."""

    format: str
    table: str
    version: str


class ProfileMetrics(TypedDict):
    """What stage profile says of the input."""

    rows: int
    bytes: int
    slices: int
    dim: int
    sampled_rows: int
    sample_rejects: dict[str, int]
    bad_files: list[BadFile]
    repeated_ids: int


class MergeMetrics(TypedDict):
    """What stage merge says of the tree."""

    leaves: int
    left_out: int
    """Leaves that hold no row, and are not in the model."""

    levels: list[int]
    level_statistics: dict[str, LevelRecord]
    method: str
    reason: str
    rounds: int
    cells: int
    cell_merges: int
    inversions: int


class AssignMetrics(TypedDict):
    """What stage assign has written."""

    rows: int
    labels: int
    rejects: int
    slices: int


class EvaluateMetrics(TypedDict):
    """What of metrics.json the marker repeats."""

    rows: Rows
    quality: NotRequired[Quality]
    internal: InternalOfTree
    baselines: dict[Method, Scores]
    agreement: NotRequired[AgreementRecord]
    verdict: VerdictRecord
    warnings: list[str]


class ReportMetrics(TypedDict):
    """What is on the page."""

    figures: int
    bytes: int
    leaves_shown: int


class PublishMetrics(TypedDict):
    """What the manifest lists."""

    files: int
    bytes: int
    tables: list[TableEntry]


class StageMarker(TypedDict):
    """stages/<name>.json: the state of a stage."""

    stage: str
    fingerprint: str
    state: Literal["running", "done"]
    started: NotRequired[str]
    """While it runs."""

    finished: NotRequired[str]
    seconds: NotRequired[float]
    metrics: NotRequired[dict[str, Any]]
    """What the stage returned."""

    settings: dict[str, Any]
    """Settings that decide its result."""


class Manifest(TypedDict):
    """_MANIFEST.json: what a reader may trust."""

    format_version: int
    run_id: str
    finished: str
    input_fingerprint: str
    rows: Rows
    files: list[FileEntry]
    tables: list[TableEntry]


class SweepEntry(TypedDict, total=False):
    """The criteria of one K of a sweep; null where one could not be measured."""

    k: Required[int]
    seconds: Required[float]
    inertia: float
    silhouette: float | None
    davies_bouldin: float | None
    calinski_harabasz: float | None
    size_max_over_mean: float
    empty: int
    train_loss: float | None
    held_out_loss: float | None
    g: float | None
    """Training loss over held-out loss."""

    g_error: float | None
    alpha: float
    epochs: int
    sample_rows: int
    neighbor_agreement: float
    stability: float
    stability_error: float
    acc: float
    nmi: float
    ari: float


class SweepRows(TypedDict):
    """Rows of a sweep."""

    trained: int
    held_out: int
    sample: int
    input: int


class VoteRecord(TypedDict):
    """What one criterion says of K."""

    criterion: str
    num_leaves: int | None
    reason: str


class RecommendationRecord(TypedDict):
    """A number of leaves, and how it came about; see raydc.core.metrics.choose_k."""

    num_leaves: int | None
    sentence: str
    votes: list[VoteRecord]
    agree: bool
    drop: int | None


class SweepRecord(TypedDict):
    """sweep.json."""

    objective: str
    seed: int
    rows: SweepRows
    entries: list[SweepEntry]
    recommendation: RecommendationRecord
