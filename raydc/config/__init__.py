"""The settings of a run: sections, presets, YAML, messages, fingerprints.

The sections that the fit takes (autoencoder, pretrain, cluster, refine, vade, distill, head, watch) are dataclasses of
raydc.core.training.settings; all others are here. Neither torch nor Ray is loaded.
"""

from raydc.config.config import Config
from raydc.config.data import (
    ElementType,
    EmbeddingColumn,
    InputConfig,
    NeighborsConfig,
    PreprocessConfig,
    StorageConfig,
)
from raydc.config.fingerprint import difference, digest
from raydc.config.fit import FitConfig
from raydc.config.load import apply_override, load_config, parse_config
from raydc.config.output import (
    AssignConfig,
    DeltaConfig,
    EvaluateConfig,
    IcebergConfig,
    LeaseConfig,
    MergeConfig,
    PublishConfig,
    RayConfig,
    SweepConfig,
)
from raydc.config.section import Section, description_of, dump, fields_of

__all__ = [
    "AssignConfig",
    "Config",
    "DeltaConfig",
    "ElementType",
    "EmbeddingColumn",
    "EvaluateConfig",
    "FitConfig",
    "IcebergConfig",
    "InputConfig",
    "LeaseConfig",
    "MergeConfig",
    "NeighborsConfig",
    "PreprocessConfig",
    "PublishConfig",
    "RayConfig",
    "Section",
    "StorageConfig",
    "SweepConfig",
    "apply_override",
    "description_of",
    "difference",
    "digest",
    "dump",
    "fields_of",
    "load_config",
    "parse_config",
]
