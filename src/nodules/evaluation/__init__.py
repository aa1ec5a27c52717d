"""From predictions to results with intervals: metrics, decisions, radiologists, baselines, experiments."""
