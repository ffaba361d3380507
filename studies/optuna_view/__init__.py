"""Studies as Optuna sees them: exported to a database of its own, or live in its dashboard."""
