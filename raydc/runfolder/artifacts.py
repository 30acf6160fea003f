"""Every file of a run folder: its name, one typed reader and one writer. Names of files stand here and nowhere else.

`WRITES` says what each stage leaves behind: an interrupted stage goes on from it, and a new start removes it. What
loads torch is imported where it is needed, because the readers of rows are started while nobody can train.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config.stages import StageName
from raydc.data.metrics import AgreementRecord, Baseline, Metrics, NeighborFacts
from raydc.data.records import Header, LevelRecord, Manifest, ProfileRecord, StageMarker, SweepRecord
from raydc.data.schema import MODEL_FOLDER, level_column
from raydc.runfolder.formats import Artifact, BytesFile, Folder, JsonFile, Place, TableFile
from raydc.storage.lake import absolute, join

if TYPE_CHECKING:
    from torch import Tensor

    from raydc.data.profile import Profile
    from raydc.data.slices import Slice
    from raydc.data.statistics import Statistics
    from raydc.model import Model

_LEVEL = level_column(0).removesuffix("0")


class ModelFolder(Folder):
    """The files of a saved model; their names are those of raydc.model."""

    def load(self, place: Place) -> "Model":
        """Return the model.

        Raises:
            DataError: there is none, or it is damaged.
        """
        from raydc.model import Model

        return Model.load(self.uri(place), place.lake)

    def save(self, place: Place, model: "Model") -> None:
        """Write the model."""
        model.save(place.lake, self.uri(place))

    def exists(self, place: Place) -> bool:
        """Return whether a whole model is there: its head is written last."""
        from raydc.model import HEAD

        return place.lake.exists(join(self.uri(place), HEAD))


class ProfileFile(Artifact):
    """What is known of the input."""

    def read(self, place: Place) -> "Profile":
        """Return the profile of a run."""
        from raydc.data.profile import Profile

        return Profile.from_json(place.lake.read_json(self.uri(place)))

    def write(self, place: Place, profile: "Profile") -> None:
        """Write the profile."""
        body: ProfileRecord = profile.to_json()
        place.lake.write_json(self.uri(place), body)


class LinkageFile(Artifact):
    """The tree as a scipy linkage matrix, (K-1, 4) float64."""

    def read(self, place: Place) -> npt.NDArray[np.float64]:
        """Return the matrix.

        Raises:
            DataError: the file holds no such matrix.
        """
        linkage = place.lake.read_array(self.uri(place))
        if linkage.dtype != np.float64 or linkage.ndim != 2 or linkage.shape[1] != 4:
            raise self._damaged(place, ValueError(f"{linkage.dtype} of shape {linkage.shape} is no linkage matrix"))
        return linkage

    def write(self, place: Place, linkage: npt.NDArray[np.float64]) -> None:
        """Write the matrix."""
        buffer = io.BytesIO()
        np.save(buffer, linkage, allow_pickle=False)
        place.lake.write_bytes(self.uri(place), buffer.getvalue())


class LevelsFile(Artifact):
    """The group of each leaf at each level: column leaf and a column for each level."""

    def read(self, place: Place) -> dict[int, npt.NDArray[np.int64]]:
        """Return the (K,) groups of the leaves by the level's number of groups, coarsest first."""
        with place.lake.open_parquet(self.uri(place)) as handle:
            table = pq.read_table(handle).sort_by("leaf")
        groups = {
            int(name.removeprefix(_LEVEL)): table[name].to_numpy().astype(np.int64)
            for name in table.column_names
            if name.startswith(_LEVEL)
        }
        return dict(sorted(groups.items()))

    def write(self, place: Place, num_leaves: int, groups: Mapping[int, npt.NDArray[np.int32]]) -> None:
        """Write the groups of each level."""
        columns = {"leaf": np.arange(num_leaves, dtype=np.int32)} | {level_column(k): g for k, g in groups.items()}
        with place.lake.staged(self.uri(place)) as path:
            pq.write_table(pa.table(columns), path)


@dataclass(frozen=True)
class Leaves:
    """Sufficient statistics of the K leaves, float64. Letter: L, width of the clustering space."""

    weights_K: npt.NDArray[np.float64]
    """Rows of each leaf, or the sum of their weights."""

    means_KL: npt.NDArray[np.float64]
    sse_K: npt.NDArray[np.float64]
    """Sum of squared distances to the mean."""

    def taken(self, order: npt.NDArray[np.int64]) -> "Leaves":
        """Return some of the leaves, in another order."""
        return Leaves(self.weights_K[order], self.means_KL[order], self.sse_K[order])

    def group_centers(self, groups_K: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Return the (G, L) weighted mean of the leaves of each group."""
        mass = np.bincount(groups_K, self.weights_K)
        sums = np.zeros((len(mass), self.means_KL.shape[1]))
        np.add.at(sums, groups_K, self.means_KL * self.weights_K[:, None])
        return sums / mass[:, None]


class LeavesFile(Artifact):
    """The statistics of the leaves, as safetensors: weights, means, sse."""

    def read(self, place: Place) -> Leaves:
        """Return the statistics.

        Raises:
            DataError: they are damaged.
        """
        import safetensors.numpy

        try:
            tensors = safetensors.numpy.load(place.lake.read_bytes(self.uri(place)))
            leaves = Leaves(tensors["weights"], tensors["means"], tensors["sse"])
        except (safetensors.SafetensorError, LookupError) as error:
            raise self._damaged(place, error) from None
        if not leaves.weights_K.shape == leaves.sse_K.shape == leaves.means_KL.shape[:1] or leaves.means_KL.ndim != 2:
            raise self._damaged(place, ValueError("its arrays are of different numbers of leaves"))
        return leaves

    def write(self, place: Place, leaves: Leaves) -> None:
        """Write the statistics."""
        import safetensors.numpy

        arrays = {"weights": leaves.weights_K, "means": leaves.means_KL, "sse": leaves.sse_K}
        body = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
        place.lake.write_bytes(self.uri(place), body)


class WeightsFile(Artifact):
    """The state_dict of a network, as safetensors."""

    def read_if_there(self, place: Place) -> "dict[str, Tensor] | None":
        """Return the weights, None where there are none.

        Raises:
            DataError: they are damaged.
        """
        import safetensors.torch

        if not self.exists(place):
            return None
        try:
            return safetensors.torch.load(place.lake.read_bytes(self.uri(place)))
        except safetensors.SafetensorError as error:
            raise self._damaged(place, error) from None

    def write(self, place: Place, state_dict: "Mapping[str, Tensor]") -> None:
        """Write the weights."""
        import safetensors.torch

        weights = {name: tensor.cpu().contiguous() for name, tensor in state_dict.items()}
        place.lake.write_bytes(self.uri(place), safetensors.torch.save(weights))


class StatisticsFile(Artifact):
    """The sum of what labeling has counted; tables of rows left out."""

    def read(self, place: Place, num_groups: int) -> "Statistics":
        """Return the statistics of a run whose partitions have so many groups together.

        Raises:
            DataError: they are damaged, or claim more.
        """
        from raydc.data.statistics import Statistics

        return Statistics.from_bytes(place.lake.read_bytes(self.uri(place)), num_groups)

    def write(self, place: Place, statistics: "Statistics") -> None:
        """Write the counts; the tables of rows have files of their own."""
        place.lake.write_bytes(self.uri(place), statistics.without_rows().to_bytes())


class SliceFiles(Folder):
    """A folder with one file for each slice, named like the slice."""

    def of(self, part: "Slice") -> Artifact:
        """Return the file of a slice."""
        return self.file(part.name)


class SliceStatistics(SliceFiles):
    """What labeling has counted in each slice; the file of a slice says that the slice is complete."""

    def of(self, part: "Slice") -> BytesFile:
        """Return the file of a slice, of bytes of raydc.data.statistics."""
        return BytesFile(join(self.path, part.name.removesuffix(".parquet") + ".npz"))

    def incomplete(self, place: Place, parts: "Sequence[Slice]") -> "list[Slice]":
        """Return the slices that have no file, by one listing for all of them."""
        prefix = absolute(place.root).rstrip("/") + "/"
        found = {stored.uri.removeprefix(prefix) for stored in place.lake.find(self.uri(place))}
        return [part for part in parts if self.of(part).path not in found]


class NeighborFiles(SliceFiles):
    """The neighbors of the trained rows of each slice: key, neighbors and similarities, with facts in the metadata."""

    _FACTS = b"raydc"

    def read(self, place: Place, part: "Slice") -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the keys (n,) of the trained rows of a slice, rising, and the keys (n, M) of their neighbors."""
        with place.lake.open_parquet(self.of(part).uri(place)) as handle:
            table = pq.read_table(handle, columns=["key", "neighbors"])
        keys, lists = table["key"].to_numpy(), table["neighbors"]
        return keys, lists.combine_chunks().flatten().to_numpy().reshape(len(keys), lists.type.list_size)

    def read_facts(self, place: Place, part: "Slice") -> tuple[int, NeighborFacts]:
        """Return the number of rows of a slice's file, and what its search said of itself."""
        with place.lake.open_parquet(self.of(part).uri(place)) as handle:
            parquet = pq.ParquetFile(handle)
            return parquet.metadata.num_rows, json.loads(parquet.schema_arrow.metadata[self._FACTS])

    def write(
        self,
        place: Place,
        part: "Slice",
        keys_N: npt.NDArray[np.int64],
        neighbors_NM: npt.NDArray[np.int64],
        similarities_NM: npt.NDArray[np.float32],
        facts: NeighborFacts,
    ) -> None:
        """Write the file of a slice whole.

        Args:
            place: the run folder.
            part: the slice.
            keys_N: (N,) keys of its trained rows, rising.
            neighbors_NM: (N, M) keys of their neighbors, the nearest first.
            similarities_NM: (N, M) float32.
            facts: what the search says of itself.
        """
        num = neighbors_NM.shape[1]
        table = pa.table(
            {
                "key": keys_N,
                "neighbors": pa.FixedSizeListArray.from_arrays(pa.array(neighbors_NM.reshape(-1)), num),
                "similarities": pa.FixedSizeListArray.from_arrays(pa.array(similarities_NM.reshape(-1)), num),
            }
        )
        table = table.replace_schema_metadata({self._FACTS: json.dumps(facts)})
        with place.lake.staged(self.of(part).uri(place)) as path:
            pq.write_table(table, path)


RUN = JsonFile[Header]("run.json")
STAGES = Folder("stages")
LEASE = Folder("lease")
ATTEMPTS = Folder("attempts")
PROFILE = ProfileFile("profile.json")
NEIGHBORS = NeighborFiles("neighbors")
CHECKPOINTS = Folder("checkpoints")
FIT = Folder("fit")
FIT_MODEL = ModelFolder("fit/model")
FIT_LEAVES = LeavesFile("fit/leaves.safetensors")
FIT_DECODER = WeightsFile("fit/decoder.safetensors")
TREE = Folder("tree")
LINKAGE = LinkageFile("tree/linkage.npy")
NODES = TableFile("tree/nodes.parquet")
LEVELS = LevelsFile("tree/levels.parquet")
LEVEL_STATISTICS = JsonFile[dict[str, LevelRecord]]("tree/level_statistics.json")
LEAVES = LeavesFile("tree/leaves.safetensors")
CELLS = Folder("tree/cells")
MODEL = ModelFolder(MODEL_FOLDER)
LABELS = SliceFiles("labels")
REJECTS = SliceFiles("rejects")
SLICES = SliceStatistics("slices")
STATISTICS = StatisticsFile("statistics.npz")
LABEL_FILES = TableFile("label_files.parquet")
"""Rows, bytes, checksums and ranges of each file of labels and rejects, by raydc.data.label_files."""

EXEMPLARS = TableFile("exemplars.parquet")
MAP_ROWS = TableFile("map_rows.parquet")
AGREEMENT = JsonFile[AgreementRecord]("agreement.json")
METRICS = JsonFile[Metrics]("metrics.json")
LEAF_TABLE = TableFile("leaves.parquet")
REPORT = Folder("report")
PAGE = BytesFile("report/index.html")
MANIFEST = JsonFile[Manifest]("_MANIFEST.json")

# Files of the other commands.
SWEEP = JsonFile[SweepRecord]("sweep.json")
SWEEP_PAGE = BytesFile("sweep.md")
SWEEP_FIGURE = BytesFile("sweep.png")
COMPARISON = JsonFile[dict[str, Any]]("compare.json")
COMPARISON_PAGE = BytesFile("compare.md")
LABELED_FROM = JsonFile[dict[str, Any]]("labels.json")
"""Beside labels of new rows: what they are made from."""


def attempts(stage: str) -> Folder:
    """Return the counts of the attempts of a stage that were lost; see raydc.runtime.attempts."""
    return Folder(join(ATTEMPTS.path, stage))


WRITES: dict[StageName, tuple[Artifact, ...]] = {
    "profile": (PROFILE, attempts("profile")),
    "neighbors": (NEIGHBORS, attempts("neighbors")),
    "fit": (CHECKPOINTS, FIT, attempts("fit")),
    "merge": (TREE, MODEL, attempts("merge")),
    "assign": (
        LABELS,
        REJECTS,
        SLICES,
        STATISTICS,
        LABEL_FILES,
        EXEMPLARS,
        MAP_ROWS,
        AGREEMENT,
        attempts("assign"),
    ),
    "evaluate": (METRICS, LEAF_TABLE),
    "report": (REPORT,),
    "publish": (MANIFEST,),
}
"""What each stage leaves in the run folder. Stage evaluate also adds a column to NODES, which is merge's."""

UNLISTED: tuple[Folder, ...] = (CHECKPOINTS, STAGES, SLICES, FIT, LEASE, Folder("labels/_delta_log"))
"""Working files, which a later command may rewrite: the manifest does not list them."""


def marker(stage: str) -> JsonFile[StageMarker]:
    """Return the marker of a stage."""
    return JsonFile[StageMarker](join(STAGES.path, f"{stage}.json"))


def baseline(name: str) -> ModelFolder:
    """Return the model of a baseline of the fit."""
    return ModelFolder(join(FIT.path, "baselines", name))


def baselines_of(place: Place) -> "dict[str, Model]":
    """Return the models of the baselines that a fit has kept."""
    return {name: baseline(name).load(place) for name in get_args(Baseline) if baseline(name).exists(place)}


def cell_merges(round_fingerprint: str, cell: int) -> BytesFile:
    """Return the file of the merges of one cell, of the round with this fingerprint."""
    return BytesFile(join(CELLS.path, round_fingerprint, f"{cell:06d}.npz"))


def figure(name: str) -> BytesFile:
    """Return a figure of the report, as PNG."""
    return BytesFile(join(REPORT.path, f"{name}.png"))
