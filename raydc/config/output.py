"""The settings of what comes after the fit: tree, labels, measurements and tables; and of the job around it."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from raydc.config.section import OPERATIONAL, Section, check_uri
from raydc.core.training.settings import CHECKED, AgreementSettings, BaselineSettings, StabilitySettings
from raydc.storage.schemes import is_link_local
from raydc.storage.secrets import has_credentials


class MergeConfig(Section):
    """The tree over the weighted leaves, and its levels."""

    linkage: Literal["ward", "average", "single", "complete"] = "ward"
    """Distance between two branches. single and complete look at centroids and are for few leaves.

    average is the mean squared distance between rows."""

    metric: Literal["euclidean", "cosine", "pearson"] = "euclidean"
    """Metric of average, single and complete linkage. pearson subtracts each row's mean, then takes the cosine."""

    method: Literal["auto", "exact", "certified", "minibatch"] = "auto"
    """How ward and average trees are built. auto takes the first that should stay within budget_seconds.

    exact merges all leaves at once. certified works cell by cell, and gives the exact tree for eps=0. minibatch works
    cell by cell without such a proof."""

    eps: float = Field(0.0, ge=0, allow_inf_nan=False)
    """certified: how much farther (1 + eps times) a merge inside a cell may be than what lies outside.

    Above 0 the tree is faster to build and no longer exact."""

    cell_size: int = Field(4096, ge=2)
    """Clusters in a cell, on average. A cell holds at most twice as many."""

    top_size: int = Field(16384, ge=1)
    """Number of clusters from which on all are merged exactly, without cells."""

    budget_seconds: float = Field(1800.0, gt=0)
    """Seconds that method=auto allows the merge, by an estimate from the number of leaves and their width."""

    cpus_per_cell: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of the task that merges a cell."""

    levels: list[Annotated[int, Field(ge=1)]] | None = None
    """Numbers of groups at which the tree is cut; the cuts nest. null is the powers of ten below num_leaves."""

    min_population: float | None = Field(None, gt=0, lt=1)
    """Smallest share of the rows that a group may hold. Set it to keep outliers from becoming groups.

    A smaller branch makes no group of its own: it joins its sibling, which is split further."""

    @pydantic.model_validator(mode="after")
    def _linkage_and_metric_agree(self) -> Self:
        if self.linkage == "ward" and self.metric != "euclidean":
            raise ValueError(
                f"merge.metric={self.metric} does not go with merge.linkage=ward, which is Euclidean. Use "
                "linkage=average, or preprocess.method=l2 with metric=euclidean."
            )
        return self


class AssignConfig(Section):
    """Labels for every row."""

    block_rows: int = Field(8192, ge=1, json_schema_extra=OPERATIONAL)
    """Rows encoded and assigned at once. Peak memory is about 4 * block_rows * (widest layer + K) bytes."""

    num_actors: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Most actors. null is as many as there is room for, and at most one per slice.

    While all are busy, an autoscaler is asked for more nodes. Set it to bound the nodes that are started. Once the pool
    of CPU nodes is full, Ray's autoscaler also starts nodes with GPUs for actors that need none."""

    cpus_per_actor: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of an actor."""

    use_gpu: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Give each actor one GPU."""

    stall_seconds: float = Field(1800.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds without another labeled block of rows after which an actor is taken for hung, killed and replaced.

    It counts as one of ray.max_attempts. Set it above the slowest block, and above the loading of the model."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class EvaluateConfig(AgreementSettings, BaselineSettings):
    """What is measured beside the labels."""

    num_exemplars: int = Field(default=10, ge=1)
    """Rows kept as exemplars of each leaf: those nearest to its center."""

    map_rows: int = Field(default=2000, ge=10)
    """Rows drawn in the report's map, chosen by hash of the row key."""


class DeltaConfig(Section):
    """A Delta table of label files (extra `delta`)."""

    uri: str | None = None
    """Folder of a table that several runs share. null is a table of this run alone, in its labels/.

    `output` must lie below the folder, under a name that begins with an underscore."""

    @pydantic.field_validator("uri")
    @classmethod
    def _uri_is_free_of_secrets(cls, value: str | None) -> str | None:
        if value is not None:
            check_uri(value, "publish.delta.uri")
        return value


CATALOG_PROPERTIES = (
    "type",
    "uri",
    "warehouse",
    "prefix",
    "scope",
    "audience",
    "resource",
    "oauth2-server-uri",
    "snapshot-loading-mode",
    "rest-page-size",
    "namespace-separator",
    "view-endpoints-supported",
    "rest.sigv4-enabled",
    "rest.signing-region",
    "rest.signing-name",
    "glue.id",
    "glue.endpoint",
    "glue.region",
    "glue.profile-name",
    "glue.skip-archive",
    "glue.max-retries",
    "glue.retry-mode",
    "dynamodb.region",
    "dynamodb.profile-name",
    "table-name",
    "hive.hive2-compatible",
    "hive.kerberos-authentication",
    "hive.kerberos-service-name",
    "gcp.bigquery.project-id",
    "gcp.bigquery.location",
    "client.region",
    "client.profile-name",
    "s3.endpoint",
    "s3.region",
    "s3.force-virtual-addressing",
    "gcs.project-id",
    "gcs.default-bucket-location",
    "adls.account-name",
    "adls.account-host",
    "init_catalog_tables",
    "pool_pre_ping",
)
"""Catalog properties of pyiceberg that hold no secret. Settings are written down, so no other one is taken."""


class IcebergConfig(Section):
    """An Iceberg table of label files (extra `iceberg`)."""

    identifier: str = Field("raydc.labels", pattern=r"^[^.]+(\.[^.]+)+$")
    """Namespace and name of the table. It is made if it is not there."""

    catalog: str = "raydc"
    """Name of the catalog. pyiceberg takes its secrets from PYICEBERG_CATALOG__<NAME>__<KEY> in the environment."""

    properties: dict[str, str] = {}
    """Catalog properties of pyiceberg, such as {type: rest, uri: https://..., warehouse: ...}, without secrets.

    docs/tables.md lists those that are taken; pyiceberg finds all others in its own configuration.

    Empty is an embedded catalog in a SQLite file, `_iceberg/` beside the run folders."""

    @pydantic.model_validator(mode="after")
    def _properties_are_known_and_free_of_secrets(self) -> Self:
        refused = [k for k, v in self.properties.items() if k not in CATALOG_PROPERTIES or has_credentials(v)]
        if refused:
            raise ValueError(
                f"publish.iceberg.properties: {refused} may hold a secret, and settings are saved with the run. Put "
                f"them into the environment as PYICEBERG_CATALOG__{self.catalog.upper()}__<KEY>, __ for a dot and _ "
                "for a hyphen, or into ~/.pyiceberg.yaml. Taken here, without a password in them: "
                f"{', '.join(CATALOG_PROPERTIES)}"
            )
        for name in ("uri", "oauth2-server-uri", "glue.endpoint", "s3.endpoint"):
            if is_link_local(value := self.properties.get(name, "")):
                raise ValueError(
                    f"publish.iceberg.properties: {name}={value} names a link-local address. Use another host"
                )
        return self


class PublishConfig(Section):
    """Tables in which the label files are registered where they lie. Their partition column is run_id."""

    mode: Literal["append", "replace"] = "replace"
    """What happens to earlier files of the same run. replace takes them out of the table in the same commit.

    append refuses a table that has any."""

    delta: DeltaConfig | None = None
    """Register the labels in a Delta table: `{}`, or a uri. null is none."""

    iceberg: IcebergConfig | None = None
    """Register the labels in an Iceberg table: `{}`, or more. null is none."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class SweepConfig(StabilitySettings):
    """`raydc sweep`: how numbers of leaves are compared. It has no effect on a run."""

    held_out: float = Field(default=0.1, gt=0, lt=0.9, json_schema_extra=OPERATIONAL)
    """Share of the rows left out of training, by hash of the row key, to measure L_train / L_validation."""


class LeaseConfig(Section):
    """One driver at a time works on a run; see raydc.runfolder.lease."""

    heartbeat_seconds: float = Field(5.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds between two signs of life of the driver. What `raydc show` says may be this old."""

    stale_seconds: float = Field(60.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds without a sign of life after which another driver may take the run over.

    On the machine of a dead driver its end is seen at once."""

    @pydantic.model_validator(mode="after")
    def _some_heartbeats_may_be_late(self) -> Self:
        if self.stale_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"lease.stale_seconds={self.stale_seconds:g} must be at least three times "
                f"lease.heartbeat_seconds={self.heartbeat_seconds:g}, or a heartbeat that comes late costs the run"
            )
        return self


class RayConfig(Section):
    """The Ray cluster to use."""

    address: str = Field("auto", json_schema_extra=OPERATIONAL)
    """Ray cluster to join. auto joins the one of RAY_ADDRESS, as inside `ray job submit`, or starts a local one.

    local always starts one on this machine."""

    num_cpus: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Logical CPUs of a local cluster. null is what the machine has, and never fewer than the run needs."""

    object_store_bytes: int | None = Field(None, ge=80 * 2**20, json_schema_extra=OPERATIONAL)
    """Bytes of a local cluster's object store. null is Ray's own choice."""

    max_attempts: int = Field(5, ge=1, json_schema_extra=OPERATIONAL)
    """Processes that a slice, or another piece of work, may kill before the run stops and names it.

    With input.on_bad_files=quarantine a slice goes to the rejects instead. A lost node counts a quarter."""
