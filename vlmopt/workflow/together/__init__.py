"""One plan over all lossy passes of a recipe whose sites are open (`planning: together`)."""

from vlmopt.workflow.together.planned import plan_together
from vlmopt.workflow.together.steps import begins_together

__all__ = ["begins_together", "plan_together"]
