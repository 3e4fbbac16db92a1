"""The plan of a run: what every phase freezes, trains and costs, found out without training."""

from mtl.plan.plan import Claim, GroupPlan, PhasePlan, Plan, Side, make_plan

__all__ = ["Claim", "GroupPlan", "PhasePlan", "Plan", "Side", "make_plan"]
