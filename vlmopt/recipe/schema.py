"""Recipe: everything that a run depends on, as a typed object; the YAML around it is `version: 1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from vlmopt.core.budgets import Budgets as Limits
from vlmopt.core.budgets import Limit, Quantity, parse_budgets, parse_limit
from vlmopt.core.errors import BudgetError, RecipeError
from vlmopt.core.estimators import DEFAULT_SAMPLE, DEFAULT_UPDATES, Arms, EstimatorName
from vlmopt.core.formats import Format
from vlmopt.core.program import AdapterSource

VERSION = 1
DEFAULT_MAX_DROP = 1.0  # points
ADAPTER_NAME = "[A-Za-z][A-Za-z0-9_-]*"
FOLD_ADAPTERS = "fold-adapters"  # runs behind the first pass where the model is opened with adapters
FOLD_CROSS_MODAL = "fold-cross-modal-adapter"  # ... with one adapter that came as a file
EXACT_PASSES = ("canonicalize", "fold-constants")
SHORTENING_PASSES = ("hoist-token-reads", "fold-keys-values")  # the same function by fewer products
PLAIN_PASSES = ("canonicalize", *SHORTENING_PASSES, "fold-constants")  # without a task
DEFAULT_PASSES = ("canonicalize", "skip-branches", "fold-fixed-inputs", *SHORTENING_PASSES, "fold-constants")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PassStep(_Section):
    """One pass of a recipe with its options; written as `name` or as `name: {option: value}`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            name, options = next(iter(value.items()))
            return {"name": name, "options": options or {}}
        if isinstance(value, PassStep) or (isinstance(value, dict) and {"name"} <= set(value) <= {"name", "options"}):
            return value
        raise ValueError("a pass is written as `name` or as `name: {option: value}`")

    @model_serializer
    def _to_short_form(self) -> object:
        return {self.name: self.options} if self.options else self.name


class Budgets(_Section):
    """What the compiled model must stay within, as `vlmopt.core.budgets` reads it; None sets no budget.

    `max_drop` is in points of the task's metric (`1`) or in percent of the original's (`2%`); the others are amounts
    (`5ms`, `20MB`, `1.2G`) or shares of the original's (`0.5x`).
    """

    max_drop: float | str | None = None
    latency: str | None = None
    size: str | None = None
    macs: float | str | None = None

    @field_validator("max_drop", "latency", "size", "macs", mode="before")
    @classmethod
    def _can_be_read(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return None
        quantity = Quantity(info.field_name)
        try:
            parse_limit(quantity, value)
        except BudgetError as error:
            raise ValueError(f"{error.found}; expected {error.expected}") from error
        if quantity is Quantity.DROP and isinstance(value, str) and not value.strip().endswith("%"):
            return float(value)  # typed on the command line
        return value

    @property
    def limits(self) -> Limits:
        """The budgets in the units that the code counts in."""
        return parse_budgets({quantity: getattr(self, quantity.value) for quantity in Quantity})

    @property
    def drop(self) -> Limit | None:
        """The largest drop of the metric that is allowed."""
        return self.limits.drop


class ProfileSettings(_Section):
    """Where importance comes from: a file measured before, or an estimator that runs on the profile split.

    `n_updates`, `subset_size` and `arms` are of das-bandit and subset-ridge: turns, how many are skipped at a time
    (None: a third), and what. `sample_size` is how many images the distortions look at. `stability` is of
    leave-one-out: whether the ranking is tried on other items and wrong labels (None: where the head is re-fitted).
    """

    file: str | None = None
    estimator: EstimatorName = "leave-one-out"
    scoring: Literal["refit", "raw"] = "refit"
    num_samples: Annotated[int, Field(ge=2)] = 512
    n_updates: Annotated[int, Field(ge=1)] = DEFAULT_UPDATES
    subset_size: Annotated[int, Field(ge=1)] | None = None
    arms: Arms = "branch"
    sample_size: Annotated[int, Field(ge=3)] = DEFAULT_SAMPLE
    stability: bool | None = None


class TrainingStage(_Section):
    """One of several trainings in a row: the weights that train, as names or patterns `COMPONENT/PATH`, and what
    differs from the settings around it."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    epochs: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None

    @field_validator("train", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class RecoverySettings(_Section):
    """What follows a cut. `head`: heads are fitted anew in closed form. `closed-form`: kept branches are fitted to the
    original's stream as well, where that is better. `adapters` and `weights`: heads are fitted, then the inserted
    adapters, or all kept weights, are trained together with them; the other fields say how.

    With a `preference` above 0 a generative model is trained to prefer expected answers to the rejected ones of its
    task (Phantom Optimization has 1), whatever is trained.

    `headroom` is in points: a cut may drop by so much more than `max_drop` before it is trained. Where the validation
    split shows that training has not made up for it, the headroom is halved and the cut chosen again.

    With `stages` there are several trainings in a row, each of the weights that it names and each from where the one
    before was best; `level` then says only that there is training.
    """

    level: Literal["head", "closed-form", "adapters", "weights"] = "head"
    headroom: Annotated[float, Field(ge=0, le=100)] = 3.0
    epochs: Annotated[int, Field(ge=1)] = 8
    batch_items: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    head_factor: Annotated[float, Field(gt=0)] = 1.0
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    feature_distillation: Annotated[float, Field(ge=0)] = 0.0
    preference: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    preference_beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    preference_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    patience: Annotated[int, Field(ge=1)] = 3
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    stages: tuple[TrainingStage, ...] = ()

    @field_validator("stages", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _stages_train(self) -> RecoverySettings:
        if self.stages and not self.trains:
            raise ValueError(f"stages train weights, and level {self.level} trains none")
        return self

    @property
    def trains(self) -> bool:
        return self.level in ("adapters", "weights")


class AdapterEntry(_Section):
    """An adapter that the model is opened with; written as `NAME=PATH`, `NAME=PATH:WEIGHT`, or as a mapping."""

    name: Annotated[str, Field(pattern=f"^{ADAPTER_NAME}$")]
    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: object) -> object:
        return parse_adapter(value) if isinstance(value, str) else value

    @property
    def source(self) -> AdapterSource:
        return AdapterSource(self.name, self.path, self.weight)


def adapter_sources(texts: Sequence[str], *, place: str) -> tuple[AdapterSource, ...]:
    """Adapters as they are typed, `NAME=PATH[:WEIGHT]`.

    Raises:
        RecipeError: one is no such text, or two have one name.
    """
    found: dict[str, AdapterSource] = {}
    for text in texts:
        try:
            source = AdapterEntry.model_validate(text).source
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError(place, f"{text!r} {reason}", expected="NAME=PATH or NAME=PATH:WEIGHT") from error
        if source.name in found:
            raise RecipeError(place, f"two adapters have the name {source.name!r}", expected="a name for each")
        found[source.name] = source
    return tuple(found.values())


def parse_adapter(text: str) -> dict[str, object]:
    """Name, path and weight of `NAME=PATH[:WEIGHT]`.

    Raises:
        ValueError: there is no name, or no path.
    """
    name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError("is no adapter; expected NAME=PATH or NAME=PATH:WEIGHT")
    folder, _, weight = path.rpartition(":")
    try:
        return {"name": name, "path": folder, "weight": float(weight)} if folder else {"name": name, "path": path}
    except ValueError:  # the colon belongs to the path
        return {"name": name, "path": path}


class VerifySettings(_Section):
    """Which optional gates decide whether an artifact is published."""

    max_drop_gate: bool = True


class Recipe(_Section):
    """A run, resolved: paths are absolute, and running it again gives the same artifact.

    `planning`: passes choose their sites one after another, or one plan is made for all whose sites are open
    (`together`), with latency as measured here, or as `device_profile` predicts it for another device.
    `num_samples` limits the profile and validation splits of the task; None takes all. The test split is judged whole:
    it is the evidence. `max_sites` is the largest number of
    sites to apply, over all passes together, to find out which of them matters; None applies all. `adapters` are put on
    the model when it is opened; `fold-adapters` folds them.
    """

    version: Literal[1] = 1
    model: Annotated[str, Field(min_length=1)]
    task: Annotated[str, Field(min_length=1)] | None = None
    budgets: Budgets = Budgets()
    planning: Literal["in-turn", "together"] = "in-turn"
    device_profile: str | None = None
    profile: ProfileSettings = ProfileSettings()
    passes: tuple[PassStep, ...] = tuple(PassStep(name=name) for name in DEFAULT_PASSES)
    emit: tuple[Format, ...] = ("onnx",)
    opset: Annotated[int, Field(ge=18, le=26)] = 20
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps)$")] = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    num_samples: Annotated[int, Field(ge=2)] | None = None
    max_sites: Annotated[int, Field(ge=0)] | None = None
    pass_dirs: tuple[str, ...] = ()
    allow_pickle: bool = False
    adapters: tuple[AdapterEntry, ...] = ()
    recovery: RecoverySettings = RecoverySettings()
    verify: VerifySettings = VerifySettings()

    @field_validator("emit", "passes", "pass_dirs", "adapters", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("emit")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no format")
        if len(set(value)) != len(value):
            raise ValueError("names a format twice")
        return value

    @field_validator("adapters")
    @classmethod
    def _names_once(cls, value: tuple[AdapterEntry, ...]) -> tuple[AdapterEntry, ...]:
        names = [one.name for one in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two adapters have the name {twice[0]!r}")
        return value

    def as_dict(self) -> dict[str, Any]:
        """Plain data in the form of the YAML file, every field written out."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data


def known_keys(location: tuple[int | str, ...]) -> Mapping[str, object]:
    """The keys that a section of a recipe may hold; empty where the section is free (the options of a pass)."""
    section: Any = Recipe
    for part in location:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return {}
    fields: Mapping[str, object] = section.model_fields
    return fields
