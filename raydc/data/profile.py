"""What is known of the input before any worker starts: its columns, its slices, what a sample says."""

from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from raydc.config import Config
from raydc.core.models.preprocess import Moments, Preprocess
from raydc.data.records import BadFile, ProfileRecord, SliceRecord, SpecRecord
from raydc.data.slices import Column, InputSpec, Slice
from raydc.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is known of the input before any worker starts."""

    spec: InputSpec
    slices: list[Slice]
    fingerprint: str
    """Digest of every file's name, size and footer."""

    listing: str = ""
    """Digest of every file's name, size and version, as the listing says it; "" where it says no version."""

    bad_files: list[BadFile] = field(default_factory=list)
    """Files left out under on_bad_files=quarantine."""

    moments: Moments | None = None
    """Mean and spread of the sample; None before it was read."""

    sample_rejects: dict[str, int] = field(default_factory=dict)
    """Bad rows in the sample, by reason."""

    notes: list[str] = field(default_factory=list)
    """What was passed over, or read otherwise than it lies; told in the plan and in the summary."""

    @property
    def num_rows(self) -> int:
        """Rows of all slices, good and bad."""
        return sum(s.num_rows for s in self.slices)

    @property
    def num_bytes(self) -> int:
        """Uncompressed bytes of all slices."""
        return sum(s.num_bytes for s in self.slices)

    def preprocess(self, config: Config) -> Preprocess:
        """Return the map of raw rows that the settings ask for, with the sample's statistics."""
        assert self.moments is not None
        section = config.preprocess
        try:
            return Preprocess.fit(section.method, self.spec.blocks, self.moments, section.factor)
        except ValueError as error:
            raise DataError(f"profile: preprocess.{error}") from None

    def trained_fraction(self, config: Config) -> float:
        """Return the share of the rows that the fit is trained on, chosen by hash of the row key."""
        return min(self.num_rows, config.fit.max_rows or self.num_rows) / self.num_rows

    def to_json(self) -> ProfileRecord:
        """Return the profile as a JSON value."""
        assert self.moments is not None
        return {
            "fingerprint": self.fingerprint,
            "listing": self.listing,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "spec": cast(SpecRecord, asdict(self.spec)),
            "bad_files": self.bad_files,
            "sample_rejects": self.sample_rejects,
            "notes": self.notes,
            "moments": {
                "num_rows": self.moments.num_rows,
                "mean": self.moments.mean_D.tolist(),
                "m2": self.moments.m2_D.tolist(),
            },
            "slices": [cast(SliceRecord, asdict(s)) for s in self.slices],
        }

    @classmethod
    def from_json(cls, value: ProfileRecord) -> "Profile":
        """Return the profile that `to_json` gave."""
        spec = cast(dict[str, Any], value["spec"])
        columns = tuple(Column.from_record(c) for c in spec["columns"])
        lists = {k: tuple(v) for k, v in spec.items() if isinstance(v, list)}
        moments = value["moments"]
        return cls(
            spec=InputSpec(**(spec | lists | {"columns": columns})),
            slices=[Slice.from_row(cast(dict[str, Any], s)) for s in value["slices"]],
            fingerprint=value["fingerprint"],
            listing=value.get("listing", ""),
            bad_files=value["bad_files"],
            moments=Moments(moments["num_rows"], np.array(moments["mean"]), np.array(moments["m2"])),
            sample_rejects=value["sample_rejects"],
            notes=value.get("notes", []),
        )
