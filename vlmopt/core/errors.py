"""Every error a user can meet, with its exit code.

A message says the place, what was found, what was expected and what to do.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DIFFERENT = 3
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class VlmoptError(Exception):
    """Something the user can act on; printed as one line, without a traceback.

    Args:
        place: file, module, option or step where it happened.
        found: what is there.
        expected: what should be there.
        remedy: what to do next.
    """

    exit_code = EXIT_ERROR

    def __init__(self, place: str, found: str, *, expected: str = "", remedy: str = "") -> None:
        self.place, self.found, self.expected, self.remedy = place, found, expected, remedy
        super().__init__(self.one_line())

    def one_line(self) -> str:
        parts = [f"{self.place}: {self.found}"]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.remedy:
            parts.append(self.remedy)
        return "; ".join(" ".join(part.split()) for part in parts)


class ModelError(VlmoptError):
    """A model folder, its configuration or its weights cannot be used."""


class CaptureError(VlmoptError):
    """A model could not be turned into a graph, or the graph computes something else."""


class TaskError(VlmoptError):
    """A task folder, its data or its labels cannot be used."""


class SealedSplitError(TaskError):
    """A split was read at a time when reading it would spoil the evidence."""


class RecipeError(VlmoptError):
    """A recipe cannot be read, or asks for something that does not exist."""


class PassError(VlmoptError):
    """A pass cannot be loaded, broke its contract, or failed while it ran."""


class PassOptionError(PassError):
    """An option of a pass means nothing for this program: the recipe is to be corrected, the pass is not at fault."""


class ProfileError(VlmoptError):
    """A profile cannot be read, or belongs to another model or other data."""


class PlanError(VlmoptError):
    """No plan meets the budgets."""


class TuningError(VlmoptError):
    """Recovery by training cannot begin or go on."""


class BudgetError(VlmoptError):
    """A budget cannot be read, or needs something that is not known."""


class EmitError(VlmoptError):
    """A graph could not be written in the format asked for."""


class ArtifactError(VlmoptError):
    """An artifact directory is missing something, or a file in it was changed."""


class OutputExistsError(VlmoptError):
    """The output path exists and must not be overwritten."""


class GateError(VlmoptError):
    """Something was verified and found different."""

    exit_code = EXIT_DIFFERENT
