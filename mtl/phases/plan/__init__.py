"""The plan of a run: what every phase freezes, trains and costs, found out without training."""

from mtl.phases.plan.plan import make_plan
from mtl.phases.plan.records import Claim, GroupPlan, PhasePlan, Plan, Side

__all__ = ["Claim", "GroupPlan", "PhasePlan", "Plan", "Side", "make_plan"]
