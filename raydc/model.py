"""The saved artifact: preprocessing, encoder, centers and levels. safetensors and JSON, never pickle.

`Model.load(uri).predict(x)` gives the labels that the job wrote, on plain arrays, without Ray.
"""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import perceptron
from raydc.core.models.predictor import Predictor, build_predictor
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.kernel import Kernel, top_soft_assign
from raydc.core.process import block_rows as rows_at_once
from raydc.core.search.nearest import SquaredDistances, cache_rows
from raydc.data.arrays import refuse_bad_rows, rows_of
from raydc.data.schema import MODEL_FOLDER, MODEL_FORMAT_VERSION
from raydc.data.slices import Column
from raydc.errors import DataError
from raydc.storage.lake import Lake, join

# What reading a folder that is damaged, or was never ours, may end in.
_DAMAGE = (
    FileNotFoundError,
    safetensors.SafetensorError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


HEAD, WEIGHTS, CENTROIDS, PREDICTOR = (
    "config.json",
    "weights.safetensors",
    "centroids.safetensors",
    "predictor.safetensors",
)
"""Files of a saved model; the head is written last."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Labels of N rows."""

    leaf: npt.NDArray[np.int32]
    levels: dict[int, npt.NDArray[np.int32]]
    """Group of each row at each level, by the level's number of groups."""

    confidence: npt.NDArray[np.float32]
    """Largest soft assignment."""

    distance: npt.NDArray[np.float32]
    """To the leaf's center, in the clustering space."""

    second_leaf: npt.NDArray[np.int32]
    second_distance: npt.NDArray[np.float32]

    def beyond_float32(self) -> npt.NDArray[np.int64]:
        """Return the rows whose distances float32 could not hold, though the rows themselves were good."""
        return np.flatnonzero(~(np.isfinite(self.distance) & np.isfinite(self.confidence)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A clustering that labels rows."""

    preprocess: Preprocess
    encoder: nn.Module | None
    """None: the preprocessed rows are clustered as they are."""

    centers_KL: Tensor
    """(K, L) float32."""

    kernel: Kernel
    widths: tuple[int, ...]
    """Layer widths of the encoder, input first; of length 1 where there is none."""

    levels: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    """(K,) group of each leaf, by number of groups."""

    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping: objective, columns, fingerprint."""

    predictor: Predictor | None = None
    """What decides a row's leaf and confidence; None: the nearest center and the kernel."""

    @property
    def dim(self) -> int:
        """Width of a raw row."""
        return self.widths[0]

    @property
    def num_leaves(self) -> int:
        """K."""
        return len(self.centers_KL)

    @torch.no_grad()
    def encode(self, x: npt.ArrayLike | Tensor, *, block_rows: int = 8192) -> Tensor:
        """Return the (N, L) float32 points of raw rows in the clustering space, on the model's device.

        Args:
            x: (N, D) numpy array or tensor of any float type; nothing is normalized beforehand.
            block_rows: most rows at once; peak memory about 4 * block_rows * (widest layer) bytes.

        Raises:
            ValueError: x is not two-dimensional or not D wide.
        """
        # Views and Arrow's read-only memory are copied; torch takes neither.
        rows = x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"expected rows of shape (N, {self.dim}), got {tuple(rows.shape)}")
        device = self.centers_KL.device
        parts = [self._encode_block(block.to(device)) for block in rows.split(rows_at_once(device, block_rows))]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty((0, self.centers_KL.shape[1]), device=device)

    def predict(self, x: Any, *, block_rows: int = 8192) -> Prediction:
        """Return the labels of raw rows, refusing those that a run would refuse.

        Args:
            x: (N, D) numpy array, tensor or nested lists; a column of lists, or a table with the model's columns, of
                pandas, polars or Arrow. Nothing is normalized beforehand.
            block_rows: most rows at once, see `encode`.

        Raises:
            ValueError: x is not two-dimensional or not D wide, or rows are missing, not finite, without a direction
                (under l2) or too large for float32.
        """
        x = _good_rows(self, x)
        found = self.label(self.encode(x, block_rows=block_rows), block_rows=block_rows)
        if len(lost := found.beyond_float32()):
            raise ValueError(f"row {lost[0]} of x leaves the range of float32 on its way through the network.")
        return found

    @torch.no_grad()
    def label(self, z_NL: Tensor, *, block_rows: int = 8192) -> Prediction:
        """Return the labels of points of the clustering space.

        Nearest center, second nearest and soft assignment; with a predictor its two best leaves, the probability of the
        best, and the distances to the centers of these leaves.
        """
        num = min(2, self.num_leaves)
        if self.predictor is None:
            ids, squared, confidence = self._nearest(z_NL, num, block_rows)
        else:
            found = [self.predictor.best(block, num) for block in z_NL.split(block_rows)]
            ids, probabilities = (torch.cat(parts) for parts in zip(*found, strict=True))
            confidence = probabilities[:, 0]
            apart = [((z_NL - self.centers_KL[ids[:, m]]).double() ** 2).sum(dim=1) for m in range(num)]
            squared = torch.stack(apart, dim=1)
        if self.num_leaves == 1:
            ids, squared = ids.expand(-1, 2), squared.expand(-1, 2)
        leaf = ids[:, 0].cpu().numpy().astype(np.int32)
        distances = squared.sqrt().float().cpu().numpy()
        return Prediction(
            leaf=leaf,
            levels={k: groups[leaf] for k, groups in self.levels.items()},
            confidence=confidence.float().cpu().numpy(),
            distance=distances[:, 0],
            second_leaf=ids[:, 1].cpu().numpy().astype(np.int32),
            second_distance=distances[:, 1],
        )

    def _nearest(self, z_NL: Tensor, num: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest leaves (N, num), their squared distances and the soft assignment to the nearest (N,)."""
        block_rows = min(block_rows, cache_rows(z_NL, max(self.centers_KL.shape)))
        ids, squared, top = [], [], []
        distances = SquaredDistances(self.centers_KL)
        for block in z_NL.split(block_rows):
            squared_BK = distances(block)
            of_block, apart = distances.nearest(block, squared_BK, num)
            ids.append(of_block)
            squared.append(apart)
            top.append(top_soft_assign(squared_BK, self.kernel))
        return torch.cat(ids), torch.cat(squared), torch.cat(top)

    def to(self, device: torch.device) -> "Model":
        """Return the model on another device."""
        encoder = self.encoder.to(device) if self.encoder is not None else None
        predictor = self.predictor.to(device) if self.predictor is not None else None
        return replace(self, encoder=encoder, centers_KL=self.centers_KL.to(device), predictor=predictor)

    def reordered(self, order: Sequence[int], levels: dict[int, npt.NDArray[np.int32]]) -> "Model":
        """Return the model whose leaf i is the present leaf order[i]; leaves that `order` leaves out are gone.

        Args:
            order: present leaf ids in their new order.
            levels: (len(order),) group of each new leaf, by number of groups.
        """
        kept = torch.as_tensor(np.asarray(order, np.int64))
        predictor = self.predictor.reordered(kept) if self.predictor is not None else None
        return replace(self, centers_KL=self.centers_KL[kept], levels=levels, predictor=predictor)

    def save(self, lake: Lake, uri: str) -> None:
        """Write config.json, weights.safetensors and centroids.safetensors into a folder, config.json last.

        Where leaves are decided by more than the nearest center, predictor.safetensors too.
        """
        for name, tensors in _files(self).items():
            body = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
            lake.write_bytes(join(uri, name), body)
        lake.write_json(join(uri, HEAD), _head(self))

    @classmethod
    def load(cls, uri: str | os.PathLike[str], lake: Lake | None = None) -> "Model":
        """Return the model of a folder: a run's `model/`, or the run folder itself.

        Raises:
            DataError: there is no model, or one of another format.
        """
        lake = lake or Lake()
        uri = cls.folder(os.fspath(uri), lake)
        try:
            head = json.loads(lake.read_bytes(join(uri, HEAD)))
        except (FileNotFoundError, ValueError, RecursionError):
            raise DataError(f"model {uri}: no model there. Give the model folder of a finished run.") from None
        found = (head.get("format"), head.get("format_version")) if isinstance(head, dict) else (None, None)
        if found != ("raydc-model", MODEL_FORMAT_VERSION):
            raise DataError(
                f"model {uri}: config.json says format {found[0]!r}, version {found[1]!r}; this raydc reads "
                f"'raydc-model', version {MODEL_FORMAT_VERSION}. Fit again, or use the raydc that wrote it."
            )
        try:
            return _read(uri, lake, head)
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            raise DataError(f"model {uri}: damaged ({reason}). Restore the folder, or fit again.") from None

    @staticmethod
    def folder(uri: str, lake: Lake) -> str:
        """Return the model folder that `uri` means: itself, or its `model/` where it is a run folder."""
        inside = join(uri, MODEL_FOLDER)
        if not lake.exists(join(uri, HEAD)) and lake.exists(join(inside, HEAD)):
            return inside
        return uri

    def _encode_block(self, x_BD: Tensor) -> Tensor:
        x = self.preprocess(x_BD)
        # float32 whatever the training precision: a label must not depend on the machine that assigns it.
        return x if self.encoder is None else self.encoder(x)


def _head(model: Model) -> dict[str, Any]:
    """Return what the head of a saved model says."""
    return {
        "format": "raydc-model",
        "format_version": MODEL_FORMAT_VERSION,
        "num_leaves": model.num_leaves,
        "levels": list(model.levels),
        "widths": list(model.widths),
        "encoder": "perceptron" if model.encoder is not None else None,
        "kernel": {"alpha": model.kernel.alpha, "scale": model.kernel.scale},
        "predictor": model.predictor.kind if model.predictor is not None else None,
        "preprocess": {"method": model.preprocess.method, "blocks": [list(b) for b in model.preprocess.blocks]},
        "details": model.details,
    }


def _files(model: Model) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a saved model."""
    weights = {} if model.encoder is None else dict(model.encoder.state_dict())
    statistics = {"mean": model.preprocess.mean_D, "scale": model.preprocess.scale_D}
    weights |= {f"preprocess.{name}": t for name, t in statistics.items() if t is not None}
    centroids = {"centers": model.centers_KL}
    centroids |= {f"level_{k}": torch.from_numpy(groups) for k, groups in model.levels.items()}
    files = {WEIGHTS: weights, CENTROIDS: centroids}
    if model.predictor is not None:
        files[PREDICTOR] = model.predictor.tensors()
    return files


def _read(uri: str, lake: Lake, head: dict[str, Any]) -> Model:
    weights = safetensors.torch.load(lake.read_bytes(join(uri, WEIGHTS)))
    centroids = safetensors.torch.load(lake.read_bytes(join(uri, CENTROIDS)))
    blocks = [(int(a), int(b), float(w)) for a, b, w in head["preprocess"]["blocks"]]
    preprocess = Preprocess(
        head["preprocess"]["method"],
        blocks,
        mean_D=weights.pop("preprocess.mean", None),
        scale_D=weights.pop("preprocess.scale", None),
    )
    encoder = None
    if head["encoder"] is not None:
        # Before any memory is taken for widths that a stranger wrote down.
        asked, held = _num_weights(head["widths"]), sum(t.numel() for t in weights.values())
        if asked > held:
            raise ValueError(f"widths {head['widths']} ask for {asked} weights, the file holds {held}")
        encoder = perceptron(head["widths"])
        encoder.load_state_dict(weights)
        encoder.eval().requires_grad_(False)
    levels = {int(k): centroids[f"level_{k}"].numpy() for k in head["levels"]}
    kernel, predictor = Kernel(**head["kernel"]), None
    if head.get("predictor") is not None:
        tensors = safetensors.torch.load(lake.read_bytes(join(uri, PREDICTOR)))
        predictor = build_predictor(head["predictor"], tensors)
    return Model(
        preprocess=preprocess,
        encoder=encoder,
        centers_KL=centroids["centers"],
        kernel=kernel,
        widths=tuple(head["widths"]),
        levels=levels,
        details=head.get("details", {}),
        predictor=predictor,
    )


def _num_weights(widths: Sequence[int]) -> int:
    return sum((int(a) + 1) * int(b) for a, b in itertools.pairwise(widths))


def _good_rows(model: Model, x: Any) -> npt.NDArray[Any] | Tensor:
    """Return what holds rows as a matrix or tensor, after refusing the rows that a run would refuse."""
    if isinstance(x, Tensor):
        values = x.detach().float().cpu().numpy()
    else:
        x = values = rows_of(x, model.dim, [Column.from_record(c) for c in model.details.get("columns", [])])
    if values.ndim == 2 and values.shape[1] == model.dim:
        refuse_bad_rows(values, model.preprocess.guard(model.dim))
    elif values.ndim == 1 and values.shape[0] == model.dim:
        raise ValueError(f"expected rows of shape (N, {model.dim}), got one row: give x[None, :]")
    return x
