"""Classes by the nearest of their prototypes. Letters: N rows, M prototypes, K classes, L latent width."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raydc.core.search.nearest import nearest_exact, squared_distances


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Prototypes in the code, each of one class; a class may have several."""

    points_ML: Tensor
    """(M, L) float32; of norm 1 under cosine."""

    classes_M: Tensor
    """(M,) int64; every class 0..K-1 has one at least."""

    shift_L: Tensor
    """(L,) the origin: subtracted from a point before anything else."""

    width: Tensor
    """Scalar, the squared length by which the probability of a prototype falls to 1 / sqrt(e) of another's."""

    cosine: Tensor
    """Scalar, 1 where points are compared by their direction, 0 by their place."""

    kind: ClassVar[str] = "prototypes"

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.classes_M.max()) + 1

    def place(self, z_NL: Tensor) -> Tensor:
        """Return the points where prototypes are compared with them: shifted, and of norm 1 under cosine."""
        moved = z_NL - self.shift_L
        return F.normalize(moved, dim=1) if bool(self.cosine) else moved

    def best(self, z_NL: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the `num` most probable classes of each point and their probabilities, float32, best first.

        The best is that of the nearest prototype, decided by float64 differences, ties by the lower prototype.
        """
        u = self.place(z_NL)
        first = self.classes_M[nearest_exact(u, self.points_ML, num=1)[0][:, 0]]
        # In double: in float32 a product of matrices depends on the rows beside a row in its last digit.
        log_p = log_classes(u.double(), self.points_ML.double(), self.classes_M, self.width.double())
        ids = [first]
        if num > 1:
            ids += [log_p.scatter(1, first[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, 0]]
        top = torch.stack(ids, dim=1)
        return top, log_p.gather(1, top).exp().float()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names of the fields."""
        return {
            "points_ML": self.points_ML,
            "classes_M": self.classes_M,
            "shift_L": self.shift_L,
            "width": self.width,
            "cosine": self.cosine,
        }

    def reordered(self, order_K: Tensor) -> "Prototypes":
        """Return the ones whose class i is the present class order_K[i]; prototypes of classes left out are gone."""
        new_class = torch.full((self.num_classes,), -1, dtype=torch.int64)
        new_class[order_K] = torch.arange(len(order_K))
        classes = new_class[self.classes_M]
        kept = classes >= 0
        return Prototypes(
            points_ML=self.points_ML[kept],
            classes_M=classes[kept],
            shift_L=self.shift_L,
            width=self.width,
            cosine=self.cosine,
        )

    def to(self, device: torch.device) -> "Prototypes":
        """Return them on another device."""
        return Prototypes(**{name: t.to(device) for name, t in self.tensors().items()})


def log_classes(u_NL: Tensor, points_ML: Tensor, classes_M: Tensor, width: Tensor) -> Tensor:
    """Return the (N, K) logarithm of the probability of each class.

    A prototype has the logit -|u - p|^2 / (2 width), which for directions is (u.p - 1) / width; a class has that of
    its best prototype, so its probability is highest where one of its prototypes is the nearest of all.

    Args:
        u_NL: (N, L) points, shifted and scaled as the prototypes are.
        points_ML: (M, L).
        classes_M: (M,) int64 class of each.
        width: scalar, positive.
    """
    logits = -squared_distances(u_NL, points_ML) / (2.0 * width)
    num_classes = int(classes_M.max()) + 1
    if num_classes != len(classes_M):
        index = classes_M.expand(len(u_NL), -1)
        empty = logits.new_full((len(u_NL), num_classes), -torch.inf)
        logits = empty.scatter_reduce(1, index, logits, "amax")
    else:
        logits = logits[:, classes_M.argsort()]
    return torch.log_softmax(logits, dim=1)
