"""What each phase freezes, trains and costs: the schedule, its phases resolved against a model, and the plan."""
