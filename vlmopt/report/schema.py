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


class GroupSection(_Section):
    """The metric on the test items of one kind (a label, a type of question): where the compiled model gets worse.

    Groups may overlap. Every interval is that of its own group, not adjusted for how many groups there are: of fifty
    groups that lose nothing, two or three lie off zero by chance.
    """

    name: str
    n: int
    original: float
    optimized: float
    drop_points: float
    drop_interval95: Interval | None = None  # None where there are too few items for one


class ChangedItem(_Section):
    """A test item whose answer changed. `image` is a small picture as a `data:` URI, empty where the item has none.

    In retrieval an item is a search (every image for its text, every text for its image, which is then `question`), the
    answers are the first matches, and `image` is the picture searched with or searched for.
    """

    name: str
    question: str = ""
    expected: str
    original: str
    optimized: str
    original_is_right: bool
    optimized_is_right: bool
    image: str = ""


class ChangesSection(_Section):
    """How many test items changed their answer, and some of them, those that turned wrong first."""

    n: int  # items compared
    n_lost: int  # right before, wrong now
    n_gained: int  # wrong before, right now
    n_other: int  # wrong before and now, with another answer
    items: tuple[ChangedItem, ...] = ()


class RemovedSection(_Section):
    """The control of a run that put modules in: the same artifact without them; drops are against it with them."""

    what: str
    value: float
    drop_points: float
    drop_interval95: Interval


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
    groups: tuple[GroupSection, ...] = ()  # largest drop first
    changes: ChangesSection | None = None
    removed: RemovedSection | None = None
    simulated: float | None = None  # of a quantized program in PyTorch, beside its files in ONNX Runtime


class CostSection(_Section):
    parameters: int = 0
    parameters_bytes: int = 0
    macs: int = 0
    activation_bytes: int = 0
    kv_cache_bytes_per_token: int = 0


class CostPair(_Section):
    original: CostSection
    optimized: CostSection


class Latency(_Section):
    median_ms: float
    p10_ms: float
    p90_ms: float
    joules: float | None = None  # of one call in the mean; None where the machine does not say
    samples_ms: tuple[float, ...] = ()  # sorted; all calls, or 100 quantiles of them


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
    energy: str = ""  # what the joules beside the latencies are, or why there are none
    size_bytes: SizePair | None = None


class SiteSection(_Section):
    """An edit that was made; `predicted` is what the pass said that it saves."""

    name: str
    component: str
    summary: str = ""
    predicted: CostSection | None = None


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
    seconds: float | None = None


class BranchSection(_Section):
    """A residual branch of the original: its cost, its importance (loss increase without it) and whether it stays.

    `cut_by` is the step that took it out (`2 skip-branches`), `reason` why the steps that might have done so did not,
    or what they left of it. `certainty` is said of a cut branch whose rank was bootstrapped: certain where 95 % of the
    resamples rank it among the least needed, as many as were cut.
    """

    component: str
    name: str
    kind: str
    layer: int | None
    params: int
    macs: int
    score: float | None
    stderr: float | None
    kept: bool
    cut_by: str = ""
    reason: str = ""
    certainty: Literal["certain", "uncertain"] | None = None


class TrialSection(_Section):
    """One cut that the planner measured on held-out items of the profile and validation splits.

    `fits` says whether it saves what the budgets of resources ask for; `order` which search it came from.
    """

    n_cut: int
    saved_macs: int
    drop_points: float
    stderr_points: float
    is_accepted: bool
    order: str = ""
    saved_latency_us: float = 0.0
    saved_bytes: int = 0
    fits: bool = True
    is_chosen: bool = False


class PlanSection(_Section):
    """How the planner chose: what it was allowed, what it measured for its choice, and everything it tried.

    `limits` are the budgets of resources as they were written; `max_drop_points` is None where no drop was allowed or
    forbidden. `kept_out_*` is the choice on items that no search
    looked at (the last pick among a few finalists does, on all items); `notes` say what did not go straight.
    """

    max_drop_points: float | None = None
    drop_points: float
    stderr_points: float
    n_items: int
    trials: tuple[TrialSection, ...] = ()
    limits: tuple[str, ...] = ()
    kept_out_drop_points: float | None = None
    kept_out_stderr_points: float | None = None
    notes: tuple[str, ...] = ()


class EpochSection(_Section):
    """One pass over the fitting split; epoch 0 is the program before training. `validation_score` is in [0, 1]."""

    number: int
    train_loss: float | None
    validation_loss: float
    validation_score: float
    seconds: float


class RecoverySection(_Section):
    """How the kept weights or adapters were trained behind the cut; the best epoch on validation is in the artifact."""

    level: str
    n_trainable: int
    best_epoch: int
    epochs: tuple[EpochSection, ...]


class TraversalSection(_Section):
    """A pass after the first through a layer: what its gate w lets through on the tokens of the profile split, mean and
    standard deviation; `number` counts the passes of a layer from 1."""

    component: str
    layer: str
    number: int
    mean: float
    spread: float
    is_kept: bool  # in the artifact


class MixtureSection(_Section):
    """How the experts beside a layer are mixed: mean shares and standard deviations over samples of the task where the
    mixture looks at the data (`is_routed`), or the shares that the layer learned."""

    component: str
    layer: str
    is_routed: bool
    shares: tuple[float, ...]
    spread: tuple[float, ...]


class WordSection(_Section):
    """A word of the task: how often it occurred, and what the adapter adds to it as a share of its size."""

    text: str
    n: int
    share: float


class ThroughSection(_Section):
    """What a cross-modal adapter adds to each token, as a share of it: the mean at every place of an image, in order,
    and the commonest words.
    """

    places: tuple[float, ...]
    words: tuple[WordSection, ...]


class SavingSection(_Section):
    """What one pass of a plan over several brought: microseconds, bytes and MACs saved as predicted, and points of the
    metric lost, which is what the plan without it loses less. None where the plan has no edit of it."""

    name: str
    n_sites: int
    lost_points: float | None = None
    saved_latency: float | None = None
    saved_size: float | None = None
    saved_macs: float | None = None


class NextSection(_Section):
    """An edit that the plan would take next: microseconds that it saves, and by how much the loss is to grow."""

    edits: tuple[str, ...]
    passes: tuple[str, ...]
    saves_us: float
    loss: float


class TogetherSection(_Section):
    """One plan over several passes: how it was found, microseconds of a call before it and behind it as predicted."""

    origin: str
    whole_us: float
    predicted_us: float
    kinds: tuple[SavingSection, ...] = ()
    next: tuple[NextSection, ...] = ()
    left_out: tuple[str, ...] = ()


class MachineSection(_Section):
    """Where latency was measured and the run took place."""

    processor: str
    n_cores: int  # logical cores that the run may use
    n_threads: int  # that one graph ran on when it was timed
    memory_bytes: int  # 0 where the system does not say
    system: str
    python: str
    versions: dict[str, str] = Field(default_factory=dict)


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
    plan: PlanSection | None = None
    together: TogetherSection | None = None
    recovery: RecoverySection | None = None
    traversals: tuple[TraversalSection, ...] = ()
    mixtures: tuple[MixtureSection, ...] = ()
    through: ThroughSection | None = None
    machine: MachineSection | None = None
    recipe: str = ""  # the resolved recipe, as YAML
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
        raise ArtifactError(
            ": ".join([place, *([".".join(map(str, first["loc"]))] if first["loc"] else [])]),
            first["msg"].lower(),
            expected=f"a report of schema {SCHEMA}",
            remedy="run the command again",
        ) from error
