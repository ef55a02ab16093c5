"""What FreezeOut would save: the cost of each layer, measured or counted -> the saving of each schedule."""

from .costs import Prediction, StepCosts, Suggestion, predict, suggest_t_0
from .flops import flop_costs
from .measuring import measure_costs, measure_loader
from .median_error import median_error
from .planning import T_0S, Plan, plan, plan_from_costs, suggestions_text

__all__ = [
    "T_0S",
    "Plan",
    "Prediction",
    "StepCosts",
    "Suggestion",
    "flop_costs",
    "measure_costs",
    "measure_loader",
    "median_error",
    "plan",
    "plan_from_costs",
    "predict",
    "suggest_t_0",
    "suggestions_text",
]
