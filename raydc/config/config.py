"""All settings of a run, the checks between sections, and what follows from the settings alone.

A YAML file holds one mapping per section; `--set section.key=value` overrides one key, its value read as YAML.
Fields marked operational say where and how fast a run works, not what it computes: they are left out of fingerprints,
so a run may resume with other values of them.
"""

from typing import Any, Self

import pydantic
from pydantic import Field

from raydc.config import presets
from raydc.config.data import InputConfig, NeighborsConfig, PreprocessConfig, StorageConfig
from raydc.config.fingerprint import decisive, digest, sections_until
from raydc.config.fit import FitConfig
from raydc.config.output import (
    AssignConfig,
    EvaluateConfig,
    LeaseConfig,
    MergeConfig,
    PublishConfig,
    RayConfig,
    SweepConfig,
)
from raydc.config.renamed import with_present_names
from raydc.config.section import OPERATIONAL, Section, check_uri
from raydc.config.stages import STAGE_NAMES, StageName
from raydc.core.objectives.table import OBJECTIVES, info
from raydc.core.training.settings import (
    AutoencoderSettings,
    ClusterSettings,
    DistillSettings,
    FitSettings,
    HeadSettings,
    PretrainSettings,
    RefineSettings,
    Seed,
    VadeSettings,
    WatchSettings,
)
from raydc.core.tree.limits import MAX_PAIRWISE_LEAVES


class Config(Section):
    """All settings of a run."""

    input: InputConfig
    output: str = Field("runs", json_schema_extra=OPERATIONAL)
    """Folder or URI under which run folders are made."""

    seed: Seed = FitSettings.seed
    storage: StorageConfig = StorageConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    pretrain: PretrainSettings = PretrainSettings()
    cluster: ClusterSettings = ClusterSettings()
    fit: FitConfig = FitConfig()
    refine: RefineSettings = RefineSettings()
    vade: VadeSettings = VadeSettings()
    distill: DistillSettings = DistillSettings()
    head: HeadSettings = HeadSettings()
    merge: MergeConfig = MergeConfig()
    assign: AssignConfig = AssignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()
    watch: WatchSettings = WatchSettings()
    sweep: SweepConfig = SweepConfig()
    lease: LeaseConfig = LeaseConfig()
    ray: RayConfig = RayConfig()

    @pydantic.field_validator("output")
    @classmethod
    def _output_is_shared_and_free_of_secrets(cls, value: str) -> str:
        check_uri(value, "output")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_old_names_and_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = _with_a_kernel_for_two_leaves(with_present_names(values))
        fit = values.get("fit")
        if not isinstance(fit, dict) or fit.get("preset") not in ("paper", "scale"):
            return values
        return presets.filled(values, str(fit.get("objective", FitConfig.objective)), fit["preset"])

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
                f", the top q of a kernel without any signal. Set it to {(1 + 1 / leaves) / 2:.3g}, say"
            )
        if isinstance(self.refine.size_prior, list) and len(self.refine.size_prior) != leaves:
            problems.append(
                f"refine.size_prior has {len(self.refine.size_prior)} numbers for cluster.num_leaves={leaves}; give "
                "one for each leaf, or uniform, or kmeans"
            )
        if self.storage.max_wait_seconds >= self.assign.stall_seconds:
            problems.append(
                f"storage.max_wait_seconds={self.storage.max_wait_seconds:g} must be below "
                f"assign.stall_seconds={self.assign.stall_seconds:g}, after which an actor that waits is taken for "
                "hung. Raise assign.stall_seconds"
            )
        problems += self._objective_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _objective_problems(self) -> list[str]:
        name, found = self.fit.objective, []
        if self.cluster.space == "directions" and not self.learns:
            found.append(
                f"cluster.space=directions is of codes, and fit.objective={name} learns none. For rows of unit length "
                "set preprocess.method=l2"
            )
        if self.fit.teacher is not None and not info(name).takes_teacher:
            taught = " or ".join(n for n, about in OBJECTIVES.items() if about.takes_teacher)
            found.append(f"fit.teacher has no effect on fit.objective={name}. Set it to {taught}")
        if self.fit.teacher_level is not None and self.fit.teacher is None:
            found.append(
                "fit.teacher_level needs fit.teacher, the run whose tree has the level. Set fit.teacher, or leave the "
                "level out"
            )
        bernoulli = info(name).takes_unit_rows and self.vade.likelihood == "bernoulli"
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
        return self.fit.learns

    @property
    def refines(self) -> bool:
        """Return whether an objective is trained after k-means."""
        return info(self.fit.objective).has_loss(self.refine)

    @property
    def needs_neighbors(self) -> bool:
        """Return whether the objective learns from the neighbors of the rows, by a head."""
        return self.fit.needs_pairs

    @property
    def stages(self) -> list[StageName]:
        """Return the names of the stages of a run with these settings, in order."""
        return [name for name in STAGE_NAMES if name != "neighbors" or self.needs_neighbors]

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

    def fit_settings(self, input_fingerprint: str) -> FitSettings:
        """Return the settings of the core's fit on an input with this fingerprint."""
        return FitSettings(
            objective=self.fit.objective,
            precision=self.fit.precision,
            checkpoint_epochs=self.fit.checkpoint_epochs,
            checkpoint_seconds=self.fit.checkpoint_seconds,
            baseline_rows=self.evaluate.baseline_rows,
            seed=self.seed,
            autoencoder=self.autoencoder,
            pretrain=self.pretrain,
            cluster=self.cluster,
            refine=self.refine,
            vade=self.vade,
            distill=self.distill,
            head=self.head,
            fingerprint=f"{self.fingerprint('fit')}-{input_fingerprint}",
        )

    def settings(self, stage: StageName) -> dict[str, Any]:
        """Return the settings that decide the result of `stage`: its own and those of every stage before it."""
        sections = sections_until(stage)
        if not self.needs_neighbors:
            # So that these sections may change, and new ones of their kind may come, without touching other runs.
            sections = [s for s in sections if s not in ("neighbors", "head")]
        found = {name: decisive(getattr(self, name)) for name in sections}
        if stage == "neighbors":
            found["sample"] = {"seed": self.seed, "max_rows": self.fit.max_rows}
        return found

    def fingerprint(self, stage: StageName) -> str:
        """Return a 16-digit hash of `settings(stage)`."""
        return digest(self.settings(stage))


def _with_a_kernel_for_two_leaves(values: dict[str, Any]) -> dict[str, Any]:
    # The default, 0.5, is the top q of no signal at all for two leaves: halfway to certainty instead.
    cluster, refine = (values.get(name) or {} for name in ("cluster", "refine"))
    if not isinstance(cluster, dict) or not isinstance(refine, dict) or "target_top_q" in refine:
        return values
    return values | {"refine": refine | {"target_top_q": 0.75}} if str(cluster.get("num_leaves")) == "2" else values
