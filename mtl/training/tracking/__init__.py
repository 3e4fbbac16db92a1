"""What a run logs: metrics.jsonl, a backend such as wandb, the console."""

from mtl.training.tracking.backend import BestCheckpoint, TrackedRun, TrackingBackend

__all__ = ["BestCheckpoint", "TrackedRun", "TrackingBackend"]
