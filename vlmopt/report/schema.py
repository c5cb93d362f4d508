"""report.json as types: what a run found, in plain numbers. Units are in every name, unknown fields are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmopt.core.errors import ArtifactError

SCHEMA = 1
Interval = Annotated[tuple[float, float], Field(description="lower and upper bound of a 95 % interval")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    path: str
    model_type: str
    architecture: str
    fingerprint: str


class TaskSection(_Section):
    name: str
    kind: str
    metric: str
    fingerprint: str
    n_profile: int
    n_validation: int
    n_test: int


class MetricSection(_Section):
    """The task's metric on the test split, as fractions in [0, 1]; drops are in points (hundredths)."""

    name: str
    original: float
    optimized: float
    drop_points: float
    drop_interval95: Interval
    original_interval95: Interval
    optimized_interval95: Interval
    p_value: float | None
    n: int
    all: dict[str, tuple[float, float]] = Field(default_factory=dict)  # other metrics: original, optimized


class CostSection(_Section):
    parameters: int = 0
    parameters_bytes: int = 0
    macs: int = 0
    activation_bytes: int = 0


class CostPair(_Section):
    original: CostSection
    optimized: CostSection


class Latency(_Section):
    median_ms: float
    p10_ms: float
    p90_ms: float


class LatencyPair(_Section):
    """`ratio` is original over optimized: 2 means twice as fast."""

    original: Latency
    optimized: Latency | None  # None when the component is gone
    ratio: float | None


class SizePair(_Section):
    original: int
    optimized: int


class ResultSection(_Section):
    metric: MetricSection | None = None
    cost: CostPair
    latency_ms: dict[str, LatencyPair] = Field(default_factory=dict)
    size_bytes: SizePair | None = None


class SiteSection(_Section):
    name: str
    component: str
    summary: str = ""


class RefusalSection(_Section):
    name: str
    component: str
    reason: str


class PassSection(_Section):
    """One step of the recipe: what it saved as predicted and as counted afterwards."""

    step: int
    name: str
    promise: Literal["exact", "close", "lossy"]
    n_sites: int
    n_applied: int
    sites: tuple[SiteSection, ...] = ()
    refusals: tuple[RefusalSection, ...] = ()
    predicted: CostSection
    counted: CostSection
    verdict: str


class BranchSection(_Section):
    """A residual branch of the original: its cost, its importance (loss increase without it) and whether it stays."""

    component: str
    name: str
    kind: str
    layer: int | None
    params: int
    macs: int
    score: float | None
    stderr: float | None
    kept: bool


class GateSection(_Section):
    name: str
    passed: bool
    found: float | str | None
    allowed: float | str | None


class StageSection(_Section):
    name: str
    seconds: float


class Report(_Section):
    """What a run found; `report.json` holds exactly this."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    vlmopt: str
    created: str
    model: ModelSection
    task: TaskSection | None = None
    result: ResultSection
    passes: tuple[PassSection, ...] = ()
    branches: tuple[BranchSection, ...] = ()
    gates: tuple[GateSection, ...] = ()
    stages: tuple[StageSection, ...] = ()
    reproduce: str = ""
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `report.json` holds it."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return data


def read_report(data: object, *, place: str = "report.json") -> Report:
    """The typed report from parsed JSON; ArtifactError when it does not follow the schema."""
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{place}: {where}",
            first["msg"].lower(),
            expected=f"a report of schema {SCHEMA}",
            remedy="run the command again",
        ) from error
