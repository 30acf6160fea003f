"""What every objective is and needs: the one table that the settings, the plan, the trainer and the report read.

A new objective is one line here, one file beside this one, and one test. Nothing heavy is imported: the settings are
checked without torch, so a class is named by its module, and raydc.core.objectives.build loads it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

Passes = Literal["none", "one", "refreshes"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveInfo:
    """What is known of an objective before anything is built."""

    title: str
    """Its name as people write it."""

    module: str | None = None
    """Module of its class below raydc.core.objectives; None where nothing is trained after k-means."""

    class_name: str = ""
    needs_autoencoder: bool = True
    """An autoencoder is pretrained; otherwise the preprocessed rows are clustered as they are."""

    needs_decoder: bool = True
    """The decoder is trained too, so a step goes forward and back through both halves of the network."""

    needs_pairs: bool = False
    """Each row comes with one of its nearest neighbors, which the neighbors stage looks up."""

    takes_teacher: bool = False
    """A finished run may teach it (fit.teacher)."""

    takes_unit_rows: bool = False
    """With vade.likelihood=bernoulli its rows must lie in [0, 1]."""

    passes: Passes = "none"
    """Passes over all rows in an epoch, without gradients: one, or one for each of refine.refreshes_per_epoch."""

    pair_products: int = 0
    """needs_pairs: products of a row with all prototypes in a step, for each head, forward and back."""

    many_heads: bool = False
    """needs_pairs: whether head.num_heads are trained side by side."""

    weight: str | None = None
    """Field of refine that weighs its loss; at 0 nothing is left to train after k-means."""

    baseline: Literal["raw_kmeans", "autoencoder_kmeans"] | None = None
    """Name of the baseline that this objective is itself; the report would show it twice."""

    @property
    def is_trained(self) -> bool:
        """Return whether there is a class to train after k-means."""
        return self.module is not None

    def has_loss(self, refine: object) -> bool:
        """Return whether a loss that weighs anything is left to train after k-means, under settings of refine."""
        return self.is_trained and (self.weight is None or getattr(refine, self.weight) > 0)


_VADE = ObjectiveInfo(title="VaDE", module="vade", class_name="Vade", takes_unit_rows=True)

OBJECTIVES: dict[str, ObjectiveInfo] = {
    "dec": ObjectiveInfo(title="DEC", module="dec", class_name="Dec", needs_decoder=False, passes="refreshes"),
    "idec": ObjectiveInfo(title="IDEC", module="idec", class_name="Idec", passes="refreshes"),
    "ae": ObjectiveInfo(title="Autoencoder with a code loss", module="ae", class_name="Ae", weight="code_weight"),
    # Encodes every row again after its step.
    "dcn": ObjectiveInfo(title="DCN", module="dcn", class_name="Dcn", passes="one"),
    "vade": _VADE,
    "vdc": _VADE,
    # Gives every row its class before an epoch.
    "distill": ObjectiveInfo(
        title="Distillation", module="distill", class_name="Distill", passes="one", takes_teacher=True
    ),
    # Both rows of a pair, forward and back; the teacher sees both as well.
    "temi": ObjectiveInfo(
        title="TEMI",
        module="temi",
        class_name="Temi",
        needs_autoencoder=False,
        needs_pairs=True,
        pair_products=8,
        many_heads=True,
    ),
    "icon": ObjectiveInfo(
        title="I-Con", module="icon", class_name="Icon", needs_autoencoder=False, needs_pairs=True, pair_products=6
    ),
    "autoencoder": ObjectiveInfo(title="Autoencoder + k-means", baseline="autoencoder_kmeans"),
    "kmeans": ObjectiveInfo(title="k-means", needs_autoencoder=False, baseline="raw_kmeans"),
}

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    """The names of the table, as a type that a setting may have."""


def info(name: str) -> ObjectiveInfo:
    """Return what is known of an objective.

    Raises:
        ValueError: no objective has this name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}. Choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
