"""Every setting of a run: its unit, its default and its check.

A YAML file holds one mapping per section; `--set section.key=value` overrides one key, its value read as YAML.
Fields marked operational say where and how fast a run works, not what it computes: they are left out of fingerprints,
so a run may resume with other values of them.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from raydc.config import presets
from raydc.core.search.choices import Moves, Start
from raydc.errors import ConfigError
from raydc.storage.secrets import REMEDY, has_credentials, masked

OPERATIONAL: dict[str, JsonValue] = {"operational": True}

Workers = Annotated[int, Field(ge=1)]
"""A number of training workers."""


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values never change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EmbeddingColumn(Section):
    """One embedding column of the input; several are concatenated in the order given."""

    name: str
    """Column name."""

    weight: float = Field(1.0, gt=0)
    """Factor on the column after preprocessing; squared distances scale with its square."""

    dtype: Literal["float16", "float32", "float64"] | None = None
    """Element type, needed only for a fixed_size_binary column (little endian)."""


class InputConfig(Section):
    """Where the rows are and what their columns mean."""

    path: str | list[str]
    """Folder, glob, file, or a list of them; local path or any URI that fsspec knows (s3://, gs://, ...)."""

    id_column: str = "id"
    """Row identifier, int64 or string; copied to the labels."""

    embedding_columns: list[EmbeddingColumn] = Field([EmbeddingColumn(name="embedding")], min_length=1)
    """Embedding columns; a plain name or a list of names is accepted too."""

    label_column: str | None = None
    """Known classes, integers or strings; used for evaluation only, never for training."""

    weight_column: str | None = None
    """Positive row weights for every loss and statistic; absent means 1 for each row."""

    carry_columns: list[str] = []
    """Columns copied to the exemplars (a URI, a caption)."""

    image_shape: list[int] | None = Field(None, min_length=2, max_length=3)
    """(height, width) or (height, width, channels) when the rows themselves are images; the report draws them."""

    on_bad_rows: Literal["fail", "quarantine"] = "fail"
    """What to do with NaN, Inf, missing, wrong-length and (under l2) zero-norm rows."""

    on_bad_files: Literal["fail", "quarantine"] = "fail"
    """What to do with a file that cannot be read or has another schema."""

    unique_ids: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Refuse an input in which an id stands in more than one row; otherwise such rows are counted in the metrics."""

    slice_bytes: int = Field(256 * 2**20, gt=0)
    """Target size of a slice in uncompressed bytes; a larger file is split between its row groups."""

    sample_rows: int = Field(100_000, gt=0)
    """Rows that profile reads for mean, spread and bad rows; preprocessing statistics come from them."""

    @pydantic.field_validator("embedding_columns", mode="before")
    @classmethod
    def _accept_plain_names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return [{"name": n} if isinstance(n, str) else n for n in names] if isinstance(names, list) else value

    @pydantic.field_validator("path")
    @classmethod
    def _path_is_shared_and_free_of_secrets(cls, value: str | list[str]) -> str | list[str]:
        for uri in [value] if isinstance(value, str) else value:
            _check_uri(uri, "input.path")
        return value

    @pydantic.model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        names = [c.name for c in self.embedding_columns]
        if len(set(names)) != len(names):
            raise ValueError(f"input.embedding_columns names a column twice: {names}")
        if self.label_column in names or self.label_column == self.id_column:
            raise ValueError(f"input.label_column={self.label_column!r} is already the id or an embedding column")
        taken = sorted({*self.carry_columns} & {"leaf", "rank", "key", "id", "distance", "label", "embedding"})
        if taken:
            raise ValueError(f"input.carry_columns={taken} are names of the exemplars' own columns; rename them")
        return self


class StorageConfig(Section):
    """How to reach an object store. Credentials come from the environment, a profile or the instance."""

    endpoint_url: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """S3 endpoint other than AWS's own."""

    region: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """S3 region."""

    profile: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """Name of a credentials profile."""

    anonymous: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Read public buckets without credentials."""

    max_attempts: int = Field(8, ge=1, le=20, json_schema_extra=OPERATIONAL)
    """Requests to S3 for one answer, the first included; the pause between two grows from 0.5 to 20 seconds."""

    timeout_seconds: float = Field(30.0, gt=0, json_schema_extra=OPERATIONAL)
    """Longest wait for a connection to S3, and for the next bytes of an answer."""

    @pydantic.field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_plain_url(cls, value: str | None) -> str | None:
        if value is not None:
            _check_uri(value, "storage.endpoint_url")
            if not value.startswith(("http://", "https://")):
                raise ValueError(f"storage.endpoint_url={value!r} must begin with http:// or https://.")
        return value


class PreprocessConfig(Section):
    """What is done to a raw row before anything else; saved with the model."""

    method: Literal["none", "l2", "standardize", "scale"] = "none"
    """none; l2 (each column to unit norm); standardize (each dimension to mean 0, deviation 1); scale (one factor)."""

    factor: float | None = Field(None, gt=0)
    """Factor of `scale`; by default 1 / root mean square of the sample, so that |x|^2 / D is 1 on average."""


class NeighborsConfig(Section):
    """The nearest neighbors of every row, for the objectives that learn from them (temi, icon)."""

    num: int = Field(10, ge=1)
    """Neighbors of each row (M)."""

    metric: Literal["cosine", "l2"] = "cosine"
    """Of the preprocessed rows."""

    method: Literal["auto", "exact", "ivf"] = "auto"
    """exact; ivf (only the cells nearest to a row are searched, and the recall is measured and reported); auto is exact
    up to exact_rows rows."""

    exact_rows: int = Field(1_000_000, ge=1)
    """auto: most rows that are searched exactly, at 2 N^2 D operations."""

    num_probes: int = Field(32, ge=1)
    """ivf: cells searched for each row, of the square root of the number of rows."""

    recall_rows: int = Field(1000, ge=1)
    """ivf: rows, chosen by hash of the row key, that are searched exactly as well to measure the recall."""

    cpus_per_task: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of a task, which searches the neighbors of one slice."""


class AutoencoderConfig(Section):
    """The fully connected autoencoder: input - hidden_dims - latent_dim, and its mirror."""

    hidden_dims: list[Annotated[int, Field(ge=1)]] = [500, 500, 2000]
    """Widths of the hidden layers, input side first. Default: Xie et al. 2016."""

    latent_dim: int = Field(10, ge=1)
    """Width of the code, in which the rows are clustered."""


class PretrainConfig(Section):
    """End-to-end reconstruction before any clustering."""

    num_epochs: int = Field(40, ge=0)
    """Passes over the rows."""

    batch_rows: int = Field(256, ge=1)
    """Rows per step, summed over all workers."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW; sgd uses momentum 0.9."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate, of a loss that is the mean squared error over elements."""

    warmup_steps: int = Field(200, ge=0)
    """Steps in which the rate rises linearly to its peak; at most a tenth of all steps are used for it."""

    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    """Course of the rate after that: constant; a cosine from the peak to zero; a tenth after every decay_steps."""

    decay_steps: int = Field(20_000, ge=1)
    """Steps after which schedule=steps divides the rate by ten."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""

    corruption: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs set to zero before encoding (denoising); 0 is plain reconstruction."""

    layerwise: bool = False
    """Train the layers one pair after the other first (stacked denoising autoencoders, as DEC's authors do)."""

    layer_epochs: int = Field(20, ge=1)
    """layerwise: passes over the rows for each pair of layers; optimizer and rates are those of this section."""

    layer_corruption: float = Field(0.2, ge=0, lt=1)
    """layerwise: share of a layer's input and of its output that is dropped; never the rows nor the code."""

    max_grad_norm: float | None = Field(1000.0, gt=0)
    """Gradients are scaled down to this norm, which is meant for accidents alone; null leaves them as they are."""


class ClusterConfig(Section):
    """k-means: a start on a sample, moves that leave a poor optimum, then Lloyd over all rows."""

    num_leaves: int = Field(1000, ge=2)
    """Leaf clusters (K)."""

    start: Start = "auto"
    """Where k-means starts. auto: tree from 50 leaves on, restarts below.

    tree makes eight small leaves of the sample for each leaf, joins them by Ward and cuts the tree at num_leaves. It
    finds clusters that restarts miss, and costs less than one of them. Its answer is nearly the same for every seed.
    restarts takes the best of num_restarts FAISS runs, as earlier versions did; for few leaves it is as good."""

    moves: Moves = "auto"
    """Moves after the start: two leaves are joined and a third is split wherever that lowers the squared error.

    separated splits a leaf only in two parts that lie apart. all takes every move that lowers the error; with very
    uneven sizes that splits the largest cluster and joins small ones. auto: separated after a tree's start, none after
    restarts. A round costs some five passes over the rows, of which two search the nearest center. There are six rounds
    at most, two for streamed rows; most often one or none pays."""

    init_rows: int = Field(1_000_000, ge=1)
    """Rows sampled for the start, at least 20 for each leaf. Every row takes part in Lloyd and is assigned.

    Rank 0 holds them in memory, 4 bytes a number."""

    num_restarts: int = Field(5, ge=1)
    """FAISS runs of start=restarts; the one of least inertia is kept. A tree's start has no use for it."""

    num_iterations: int = Field(50, ge=1)
    """Most Lloyd iterations over all rows."""

    tolerance: float = Field(1e-5, ge=0)
    """Lloyd stops when the inertia falls by a smaller share than this."""

    space: Literal["codes", "directions"] = "codes"
    """Where k-means looks for the first leaves: among the codes as they are, or among their directions, the codes
    whitened and scaled to unit length as DeepCluster does it; the centers are then the means of the codes. How long a
    code is, and how wide each of its axes, serves the reconstruction, and may hide the groups. For few leaves in a
    narrow code; whitening also widens axes that hold nothing but noise."""


class FitConfig(Section):
    """What is learned, and on which workers."""

    objective: Literal[
        "dec", "idec", "ae", "dcn", "vade", "vdc", "distill", "temi", "icon", "autoencoder", "kmeans"
    ] = "dec"
    """dec; idec; ae (reconstruction and a loss on the code); dcn; vade, also called vdc; distill (cluster ids teach the
    network); temi and icon (a head on the preprocessed rows, from their neighbors, without an autoencoder);
    autoencoder (pretraining and k-means only); kmeans (no network, the preprocessed rows)."""

    preset: Literal["paper", "scale"] | None = None
    """Settings of the objective that are not given get their values from here (raydc/config/presets.py): paper, the
    published ones, for small data; scale, for many rows and leaves."""

    teacher: str | None = None
    """distill: URI of a finished run (or its model folder) whose labels teach; null is the run's own k-means. The fit
    goes on from the teacher's network, so autoencoder.* must name its widths, preprocessing is taken over from it, and
    nothing is pretrained; of a teacher without a network (kmeans) only the labels are taken."""

    teacher_level: int | None = Field(None, ge=1)
    """Number of groups of the teacher's tree level that teaches; null is its leaves. cluster.num_leaves must be the
    number of its groups."""

    max_rows: int | None = Field(None, ge=1)
    """Train on a sample of about this many rows, chosen by hash of the row key; every row is assigned all the same."""

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the layers in training; auto is bf16 where the hardware computes in it. Sums are float64."""

    num_workers: Workers | tuple[Workers, Workers] = Field(1, json_schema_extra=OPERATIONAL)
    """Training workers (ranks). Two numbers, [1, 4], are the fewest and the most: the fit starts on as many as there is
    room for, and goes on from its last checkpoint on fewer when a node is lost, on more when one joins."""

    resize_seconds: float = Field(60.0, gt=0, json_schema_extra=OPERATIONAL)
    """How often a fit between two numbers of workers looks for room for more of them. A resize starts the worker group
    again from the last checkpoint."""

    cpus_per_worker: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of a training worker."""

    use_gpu: bool = Field(False, json_schema_extra=OPERATIONAL)
    """One GPU per training worker (NCCL); otherwise CPU (gloo)."""

    resident_bytes: int | None = Field(None, ge=0, json_schema_extra=OPERATIONAL)
    """Most bytes of rows that a worker keeps in memory; a larger shard is streamed each epoch. Default: 60 % of the
    worker's memory."""

    checkpoint_epochs: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Epochs between checkpoints."""

    max_failures: int = Field(3, ge=-1, json_schema_extra=OPERATIONAL)
    """Restarts of the worker group after a failure; -1 is no limit."""

    @pydantic.field_validator("num_workers")
    @classmethod
    def _fewest_before_most(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"fit.num_workers={list(value)}: the fewest comes first, then the most")
        return value

    @property
    def fewest_workers(self) -> int:
        """Return how many workers the fit cannot do without."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Return how many workers the fit takes where there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class RefineConfig(Section):
    """The training on a clustering objective, after k-means."""

    num_epochs: int = Field(20, ge=0)
    """Most passes over the rows."""

    batch_rows: int = Field(256, ge=1)
    """Rows per step, summed over all workers."""

    optimizer: Literal["sgd", "adam"] = "adam"
    """sgd uses momentum 0.9."""

    learning_rate: float = Field(1e-4, gt=0)
    """Constant rate. With Adam a larger one fits the first, uncertain target too fast."""

    refreshes_per_epoch: int = Field(2, ge=1)
    """How often the target distribution is recomputed over all rows."""

    tolerance: float = Field(1e-3, ge=0, lt=1)
    """Stop when a smaller share of rows than this changes its leaf between two refreshes."""

    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Degrees of freedom of the Student-t kernel; auto takes the least that reaches target_top_q (1 in the paper)."""

    scale: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Squared length unit of the kernel; auto calibrates it to target_top_q (1 in the paper)."""

    target_top_q: float = Field(0.5, gt=0, lt=1)
    """Mean largest soft assignment to which the kernel's scale is calibrated at the start."""

    target_exponent: float = Field(2.0, ge=1)
    """DEC and IDEC: s in the target p ~ q^s / f^t. A larger one sharpens it more."""

    frequency_exponent: float = Field(1.0, ge=0)
    """DEC and IDEC: t in the target p ~ q^s / f^t. 0 leaves the sizes of the leaves to the rows; 1 evens them out."""

    size_prior: Literal["uniform", "kmeans"] | list[Annotated[float, Field(gt=0)]] = "uniform"
    """DEC and IDEC: the sizes r in p ~ q^s (r / f)^t: equal; as they are after k-means; or one number for each leaf,
    the largest for the leaf that is largest after k-means."""

    gamma: float = Field(0.1, ge=0)
    """IDEC: weight of the clustering loss beside the reconstruction."""

    code_loss: Literal["nearest", "l2", "l1"] = "nearest"
    """ae: squared distance of the code to the nearest center, its squared norm, or the sum of its absolute values."""

    beta: float = Field(0.1, ge=0)
    """ae: weight of the code loss beside the reconstruction; at 0 nothing is left to train, and the result is that of
    objective=autoencoder."""

    distance_weight: float = Field(1.0, ge=0)
    """DCN: lambda, weight of the squared distance to the nearest center beside the squared error of the row."""

    centroid_update: Literal["ema", "counts"] = "ema"
    """DCN: centers are moving averages with centroid_decay; or, as published, means over all rows counted so far."""

    centroid_decay: float = Field(0.99, ge=0, lt=1)
    """DCN: what a step leaves of the moving sums."""

    recluster_epochs: int | None = Field(10, ge=1)
    """DCN: Lloyd's iterations over all rows move the centers after every so many epochs; null for never."""

    max_grad_norm: float | None = Field(5.0, gt=0)
    """Gradients are scaled down to this norm; null leaves them as they are."""


class VadeConfig(Section):
    """Variational deep embedding (VaDE): an autoencoder with noise, and a mixture of Gaussians over its code."""

    likelihood: Literal["bernoulli", "gaussian"] = "gaussian"
    """Of the elements of a preprocessed row: bernoulli for values in [0, 1], such as pixels; gaussian, with one learned
    variance, for any others."""

    component_weights: Literal["learned", "uniform"] = "uniform"
    """uniform keeps the components' weights equal, so that a large one does not draw ever more rows to itself; learned,
    as in the paper, for components that are known to differ much in size."""

    kl_weight: float = Field(3.0, gt=0)
    """Weight of the divergence from the mixture beside the reconstruction; 1 is the evidence bound, and more lets the
    clusters pull harder. Too much, about 10 on pixels, lets them run together."""

    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs in which that weight rises linearly from zero."""

    mixture_learning_rate: float | None = Field(None, gt=0)
    """Rate of the weights, means and variances of the mixture; null is refine.learning_rate."""

    decay: float = Field(0.9, gt=0, le=1)
    """Factor on both rates after every `decay_epochs`."""

    decay_epochs: int = Field(10, ge=1)
    """Epochs between two steps of the decay."""

    decay_floor: float = Field(0.0, ge=0, le=1)
    """Least factor of the decay."""

    start_rows: int = Field(50_000, ge=2)
    """Rows, chosen by hash of the row key, to which the first mixture is fitted, starting from the k-means clusters;
    takes about 24 * start_rows * num_leaves bytes. Row weights play no part in it."""

    start_iterations: int = Field(100, ge=0)
    """Most iterations of that fit."""


class DistillConfig(Section):
    """Distillation: a softmax over prototypes learns the ids of a clustering, and the network with it."""

    metric: Literal["cosine", "euclidean"] = "cosine"
    """How prototypes compare with codes, without a teacher: by direction from the mean, or by distance. With a teacher
    it is the distance."""

    temperature: float = Field(0.3, gt=0)
    """Of the softmax over the prototypes: of their cosines, or of half the squared distances in units of the mean one
    to the nearest prototype. A low one learns from rows between clusters only; a high one moves all of them, and suits
    few clusters."""

    reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of the reconstruction beside the cross-entropy; it keeps the code from collapsing. 0 leaves the decoder
    alone."""

    num_reclusterings: int = Field(1000, ge=0)
    """Epochs, from the first on, that begin with a step of k-means from the present prototypes; later ones only assign
    anew. Without a teacher."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every class has the same share of the loss, however many rows it has."""

    start_rows: int = Field(50_000, ge=1)
    """Rows, chosen by hash of the row key, from which the first prototypes and the unit of distance come."""


class HeadConfig(Section):
    """The heads of temi and icon, on the preprocessed rows as they are; epochs, batches and optimizer are refine's."""

    hidden_dims: list[Annotated[int, Field(ge=1)]] = []
    """Widths of hidden layers; none is a linear head. TEMI's paper: [512, 256]."""

    start: Literal["kmeans", "random"] = "kmeans"
    """kmeans takes the directions of its centers as prototypes, for a linear head only."""

    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Of the softmax over cosines. auto: after a k-means start such that the mean largest probability is
    refine.target_top_q, else 0.1."""

    learning_rate: float = Field(3e-3, gt=0)
    """Constant rate, of prototypes that start at unit norm."""

    marginal_momentum: float = Field(0.9, ge=0, lt=1)
    """Of the moving average of the leaves' marginals between two passes over the rows."""

    num_heads: int = Field(1, ge=1)
    """temi: heads trained side by side, the one of the least loss is kept. Each costs as much as the first."""

    beta: float = Field(0.6, gt=0, le=1)
    """temi: exponent of the pairs' probabilities; 1 lets leaves die and follows uneven groups, less keeps them even."""

    teacher_momentum: float = Field(0.98, ge=0, lt=1)
    """temi: of the teacher, per step; 0.996 in the paper, whose runs have many more steps."""

    alpha: float = Field(0.6, ge=0, lt=1)
    """icon: share of the uniform distribution in both sides of the divergence (debiasing)."""

    num_negatives: int = Field(256, ge=1)
    """icon: rows in each step that stand for all rows."""

    @pydantic.model_validator(mode="after")
    def _centers_are_rows(self) -> Self:
        if self.start == "kmeans" and self.hidden_dims:
            raise ValueError(
                "head.start=kmeans needs a linear head: centers are no prototypes behind hidden layers. Set "
                "head.hidden_dims=[], or head.start=random"
            )
        return self


MAX_PAIRWISE_LEAVES = 20_000
"""Most leaves of single and complete linkage, which hold all distances; the same as in raydc.core.tree.linkage."""


class MergeConfig(Section):
    """The tree over the weighted leaves, and its levels."""

    linkage: Literal["ward", "average", "single", "complete"] = "ward"
    """ward; average (mean squared distance between rows); single and complete (of the centroids, for few leaves)."""

    metric: Literal["euclidean", "cosine", "pearson"] = "euclidean"
    """Of average, single and complete linkage; pearson is the cosine of rows whose mean was taken off."""

    method: Literal["auto", "exact", "certified", "minibatch"] = "auto"
    """exact; certified (cell by cell, the exact tree if eps is 0); minibatch (cell by cell, without a proof); auto, the
    first of these that is expected to stay within budget_seconds. For ward and average linkage."""

    eps: float = Field(0.0, ge=0, allow_inf_nan=False)
    """certified: a merge inside a cell may be up to 1 + eps times farther than what lies outside; above 0 the tree is
    no longer the exact one."""

    cell_size: int = Field(4096, ge=2)
    """Clusters per cell, on average; a cell holds at most twice as many."""

    top_size: int = Field(16384, ge=1)
    """This many clusters or fewer are merged exactly, without cells."""

    budget_seconds: float = Field(1800.0, gt=0)
    """auto: what the merge may take, by an estimate from the number of leaves and their width."""

    cpus_per_cell: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of the task that merges a cell."""

    levels: list[Annotated[int, Field(ge=1)]] | None = None
    """Numbers of groups at which the tree is cut; the cuts nest. Default: the powers of ten below num_leaves."""

    min_population: float | None = Field(None, gt=0, lt=1)
    """Least share of the rows of a group; a smaller branch makes none of its own, and its sibling is split on."""

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
    """Rows encoded and assigned at once; peak memory is about 4 * block_rows * (widest layer + K) bytes."""

    num_actors: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Most actors; by default one per CPU (or GPU) of the cluster, at most one per slice."""

    cpus_per_actor: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of an actor."""

    use_gpu: bool = Field(False, json_schema_extra=OPERATIONAL)
    """One GPU per actor."""


class EvaluateConfig(Section):
    """What is measured beside the labels."""

    baseline_rows: int = Field(100_000, ge=1)
    """Rows, chosen by hash of the row key, on which the baselines are fitted and compared."""

    num_exemplars: int = Field(10, ge=1)
    """Nearest rows kept for each leaf."""

    map_rows: int = Field(2000, ge=10)
    """Rows, chosen by hash of the row key, drawn in the report's map."""

    neighbor_rows: int = Field(10_000, ge=10)
    """Rows, chosen by hash of the row key, among which nearest neighbors are looked up, to compare the learned space
    with k-means on the raw rows; at most baseline_rows. They should be many for each leaf: ten or more."""

    num_neighbors: int = Field(5, ge=1)
    """Nearest neighbors of a row that should be in its leaf."""

    neighbor_queries: int = Field(4000, ge=10)
    """Rows of the sample whose neighbors are looked up; takes about 2 * queries * neighbor_rows * width FLOP."""


class DeltaConfig(Section):
    """A Delta table of label files (extra `delta`)."""

    uri: str | None = None
    """Folder of a table that runs share; `output` must lie below it, under a name with an underscore. Default: a table
    of the run, in its labels/."""

    @pydantic.field_validator("uri")
    @classmethod
    def _uri_is_free_of_secrets(cls, value: str | None) -> str | None:
        if value is not None:
            _check_uri(value, "publish.delta.uri")
        return value


_SECRETS = re.compile(r"secret|token|credential|password|access-key|access_key", re.IGNORECASE)


class IcebergConfig(Section):
    """An Iceberg table of label files (extra `iceberg`)."""

    identifier: str = Field("raydc.commands.assign", pattern=r"^[^.]+(\.[^.]+)+$")
    """Namespace and name of the table; made if it is not there."""

    catalog: str = "raydc"
    """Name of the catalog; pyiceberg takes its secrets from PYICEBERG_CATALOG__<NAME>__<KEY> in the environment."""

    properties: dict[str, str] = {}
    """pyiceberg's catalog properties, such as {type: rest, uri: https://..., warehouse: ...}. Default: an embedded
    catalog in a SQLite file, `_iceberg/` beside the run folders."""

    @pydantic.model_validator(mode="after")
    def _no_secrets(self) -> Self:
        found = [k for k, v in self.properties.items() if _SECRETS.search(k) or has_credentials(v)]
        if found:
            raise ValueError(
                f"publish.iceberg.properties: {found} hold a secret, and settings are saved with the run. Put it into "
                f"the environment as PYICEBERG_CATALOG__{self.catalog.upper()}__<KEY>, __ for a dot and _ for a hyphen"
            )
        return self


class PublishConfig(Section):
    """Tables in which the label files are registered where they lie, under the partition column run_id."""

    mode: Literal["append", "replace"] = "replace"
    """replace: the run's earlier files leave the table in the same commit; append: a table that has any is refused."""

    delta: DeltaConfig | None = None
    """`{}` or a uri; null for none."""

    iceberg: IcebergConfig | None = None
    """`{}` or more; null for none."""


class WatchConfig(Section):
    """Bounds beyond which a fit is said to collapse: a warning in the log, the summary and the report."""

    min_effective_rank: float = Field(1.5, ge=0, json_schema_extra=OPERATIONAL)
    """Least number of directions in effect of the codes (exp of the entropy of the covariance spectrum)."""

    min_rank_share: float = Field(0.3, ge=0, le=1, json_schema_extra=OPERATIONAL)
    """Least share of the effective rank after pretraining that refinement may leave."""

    max_empty_share: float = Field(0.2, ge=0, le=1, json_schema_extra=OPERATIONAL)
    """Largest share of leaves without a row at a refresh."""

    max_largest_share: float = Field(0.5, gt=0, le=1, json_schema_extra=OPERATIONAL)
    """Largest share of the rows in one leaf at a refresh; at least twice the mean leaf is always allowed."""


class SweepConfig(Section):
    """`raydc sweep`: how the numbers of leaves are compared; of no effect on a run."""

    held_out: float = Field(0.1, gt=0, lt=0.9, json_schema_extra=OPERATIONAL)
    """Share of the rows, by hash of the row key, that are left out of the training, for G = L_train / L_validation."""

    stability_rows: int = Field(20_000, ge=16, json_schema_extra=OPERATIONAL)
    """Rows of the sample that are divided into halves; K beyond an eighth of them has no stability."""

    num_repeats: int = Field(5, ge=2, json_schema_extra=OPERATIONAL)
    """Divisions into halves."""


class LeaseConfig(Section):
    """One driver at a time works on a run; see raydc.runfolder.lease."""

    heartbeat_seconds: float = Field(5.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds between two signs of life of the driver; also how old `raydc show` may be."""

    stale_seconds: float = Field(60.0, gt=0, json_schema_extra=OPERATIONAL)
    """A driver without a sign of life for so long may be followed by another. On its own machine a dead one is seen at
    once."""

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
    """auto joins the cluster that RAY_ADDRESS names (as inside `ray job submit`), else starts one on this machine;
    local always starts one."""

    num_cpus: int | None = Field(None, ge=1, json_schema_extra=OPERATIONAL)
    """Logical CPUs of a local cluster; by default what the machine has, and never fewer than the run needs."""

    object_store_bytes: int | None = Field(None, ge=80 * 2**20, json_schema_extra=OPERATIONAL)
    """Object store of a local cluster; by default Ray's own choice."""


class Config(Section):
    """All settings of a run."""

    input: InputConfig
    output: str = Field("runs", json_schema_extra=OPERATIONAL)
    """Folder or URI under which run folders are made."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random choice."""

    storage: StorageConfig = StorageConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    pretrain: PretrainConfig = PretrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    fit: FitConfig = FitConfig()
    refine: RefineConfig = RefineConfig()
    vade: VadeConfig = VadeConfig()
    distill: DistillConfig = DistillConfig()
    head: HeadConfig = HeadConfig()
    merge: MergeConfig = MergeConfig()
    assign: AssignConfig = AssignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    watch: WatchConfig = WatchConfig()
    sweep: SweepConfig = SweepConfig()
    lease: LeaseConfig = LeaseConfig()
    ray: RayConfig = RayConfig()

    @pydantic.field_validator("output")
    @classmethod
    def _output_is_shared_and_free_of_secrets(cls, value: str) -> str:
        _check_uri(value, "output")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, values: Any) -> Any:
        fit = values.get("fit") if isinstance(values, dict) else None
        if not isinstance(fit, dict) or fit.get("preset") not in ("paper", "scale"):
            return values
        objective = fit.get("objective", FitConfig.model_fields["objective"].default)
        return presets.filled(values, str(objective), fit["preset"])

    @pydantic.model_validator(mode="after")
    def _settings_fit_the_leaves(self) -> Self:
        leaves, problems = self.cluster.num_leaves, []
        if too_fine := [k for k in self.merge.levels or [] if k >= leaves]:
            problems.append(
                f"merge.levels={too_fine} must be below cluster.num_leaves={leaves}; a level groups the leaves"
            )
        if self.merge.linkage in ("single", "complete") and leaves > MAX_PAIRWISE_LEAVES:
            problems.append(
                f"merge.linkage={self.merge.linkage} holds all distances and takes at most {MAX_PAIRWISE_LEAVES} "
                f"leaves, cluster.num_leaves is {leaves}. Use ward or average, or fewer leaves"
            )
        if self.refines and self.refine.scale == "auto" and self.refine.target_top_q * leaves <= 1:
            problems.append(
                f"refine.target_top_q={self.refine.target_top_q} must be above 1 / cluster.num_leaves={1 / leaves:.3g}"
                ", the top q of a kernel without any signal"
            )
        if isinstance(self.refine.size_prior, list) and len(self.refine.size_prior) != leaves:
            problems.append(
                f"refine.size_prior has {len(self.refine.size_prior)} numbers for cluster.num_leaves={leaves}; give "
                "one for each leaf, or uniform, or kmeans"
            )
        problems += self._objective_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _objective_problems(self) -> list[str]:
        found = []
        if self.cluster.space == "directions" and not self.learns:
            found.append(
                f"cluster.space=directions is of codes, and fit.objective={self.fit.objective} learns none. For rows "
                "of unit length set preprocess.method=l2"
            )
        if self.fit.teacher is not None and self.fit.objective != "distill":
            found.append(f"fit.teacher has no effect on fit.objective={self.fit.objective}. Set it to distill")
        if self.fit.teacher_level is not None and self.fit.teacher is None:
            found.append("fit.teacher_level needs fit.teacher, the run whose tree has the level")
        bernoulli = self.fit.objective in ("vade", "vdc") and self.vade.likelihood == "bernoulli"
        if bernoulli and self.preprocess.method == "standardize":
            found.append(
                "vade.likelihood=bernoulli takes rows in [0, 1], which preprocess.method=standardize leaves. Set "
                "vade.likelihood=gaussian, or another method"
            )
        return found

    @property
    def levels(self) -> list[int]:
        """Return the level sizes, coarsest first."""
        if self.merge.levels is not None:
            return sorted(set(self.merge.levels))
        return [10**p for p in range(1, 12) if 10**p < self.cluster.num_leaves]

    @property
    def learns(self) -> bool:
        """Return whether an autoencoder is trained; otherwise the preprocessed rows are clustered as they are."""
        return self.fit.objective not in ("kmeans", "temi", "icon")

    @property
    def refines(self) -> bool:
        """Return whether an objective is trained after k-means."""
        weightless = self.fit.objective == "ae" and self.refine.beta == 0
        return self.fit.objective not in ("kmeans", "autoencoder") and not weightless

    @property
    def needs_neighbors(self) -> bool:
        """Return whether the objective learns from the neighbors of the rows, by a head."""
        return self.fit.objective in ("temi", "icon")

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages of a run with these settings, in order."""
        return [name for name in SECTIONS_OF_STAGE if name != "neighbors" or self.needs_neighbors]

    def encoder_widths(self, dim: int) -> list[int]:
        """Return the encoder's layer widths, input first; of length 1 where the rows are clustered as they are."""
        if not self.learns:
            return [dim]
        return [dim, *self.autoencoder.hidden_dims, self.autoencoder.latent_dim]

    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Return what a resident row of `dim` numbers of `itemsize` bytes takes in a training worker.

        The row, its key, place and weight, the keys of its neighbors; and where there are codes, a float32 code, which
        k-means and refinement keep one after the other, and a leaf.
        """
        neighbors = self.neighbors.num if self.needs_neighbors else 0
        codes = 4 * self.autoencoder.latent_dim + 8 if self.learns else 0
        return dim * itemsize + 20 + 8 * neighbors + codes

    def settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that decide the result of `stage`: its own and those of every stage before it."""
        sections = [s for name in _up_to(stage) for s in SECTIONS_OF_STAGE[name]]
        if not self.needs_neighbors:
            # So that these sections may change, and new ones of their kind may come, without touching other runs.
            sections = [s for s in sections if s not in ("neighbors", "head")]
        found = {name: _decisive(getattr(self, name)) for name in sections}
        if stage == "neighbors":
            found["sample"] = {"seed": self.seed, "max_rows": self.fit.max_rows}
        return found

    def fingerprint(self, stage: str) -> str:
        """Return a 16-digit hash of `settings(stage)`."""
        return digest(self.settings(stage))


SECTIONS_OF_STAGE: dict[str, tuple[str, ...]] = {
    "profile": ("input", "preprocess"),
    "neighbors": ("neighbors",),
    "fit": ("seed", "autoencoder", "pretrain", "cluster", "fit", "refine", "vade", "distill", "head", "evaluate"),
    "merge": ("merge",),
    "assign": ("assign",),
    "evaluate": (),
    "report": (),
    "publish": ("publish",),
}


def digest(value: Any) -> str:
    """Return a 16-digit hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line for each setting that differs, as `section.key was A, is B`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the checked config of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or any setting is wrong; all problems are in one message.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}. Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected a mapping of sections, found {type(values).__name__}.")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the checked config of a mapping.

    Raises:
        ConfigError: all problems in one message; unknown keys name the nearest valid ones.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a mapping of settings, in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {masked(override)!r}: expected section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    node = values
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {masked(override)!r}: {name} is not a section.")
        node = child
    node[last] = value


def _check_uri(uri: str, setting: str) -> None:
    if has_credentials(uri):
        raise ValueError(f"{setting}={masked(uri)} carries credentials. {REMEDY}")
    if uri.startswith("memory://"):
        raise ValueError(f"{setting}={uri} lives in one process, where no worker can see it. Use a folder or a store.")


def _describe(problem: Any) -> str:
    where = ".".join(_settings_in(problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        known = _known_keys(parents)
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"{'.'.join(map(str, problem['loc']))}: unknown setting. {hint}"
    if problem["type"] == "missing":
        return f"{where}: required, but not set."
    if problem["type"] == "value_error" or not where:
        return str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
    return f"{where}={masked(repr(problem['input']))}: {problem['msg']}."


def _settings_in(place: Iterable[Any]) -> list[str]:
    """Return the place of a problem without the names that pydantic adds for the members of a union."""
    kept: list[Any] = []
    for part in place:
        if isinstance(part, int) or part in _known_keys(kept):
            kept.append(part)
    return [str(part) for part in kept]


def _known_keys(parents: list[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for name in parents:
        if isinstance(name, int):
            model = EmbeddingColumn
            continue
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def _up_to(stage: str) -> list[str]:
    names = list(SECTIONS_OF_STAGE)
    return names[: names.index(stage) + 1]


def _decisive(value: Any) -> Any:
    if not isinstance(value, Section):
        return value
    kept = {n for n, f in type(value).model_fields.items() if not (f.json_schema_extra or {}).get("operational")}  # type: ignore[union-attr]
    return value.model_dump(mode="json", include=kept)


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
