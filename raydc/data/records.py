"""Types of the JSON documents that a run writes and reads back: the keys that scripts may depend on.

Those of metrics.json are in raydc.data.metrics.

A document stays a mapping, so that a reader sees what a run of another version wrote; the type says which keys there
are. `python -m raydc.data.json_schema docs` makes the JSON schemas in docs/ from these types.
"""

from typing import Any, Literal, NotRequired, Required

from typing_extensions import TypedDict

from raydc.data.metrics import AgreementRecord, InternalOfTree, Method, Quality, Rows, Scores, VerdictRecord


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
    scale: NotRequired[float]
    parts: NotRequired[list[str]]
    npy: NotRequired[str | None]


class SpecRecord(TypedDict):
    """What profile found out about the columns of the input; see raydc.data.slices.InputSpec."""

    columns: list[ColumnRecord]
    id_column: str
    id_type: str
    label_column: str | None
    weight_column: str | None
    carry_columns: list[str]
    carry_as_text: NotRequired[list[str]]
    refuse_zero_norm: bool
    on_bad_rows: str
    factor: NotRequired[list[float]]
    offset: NotRequired[list[float]]
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
    listing: NotRequired[str]
    """Digest of every file's name, size and ETag or times: while it stays, no footer is read again."""

    num_rows: int
    num_bytes: int
    spec: SpecRecord
    bad_files: list[BadFile]
    sample_rejects: dict[str, int]
    notes: NotRequired[list[str]]
    """What was passed over, or read otherwise than it lies."""

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
    """Rows of a Parquet file."""


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
    notes: NotRequired[list[str]]
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
