"""Results of a run: its report and summary, evaluation, predictions, exports, and the time that a freeze saves."""
