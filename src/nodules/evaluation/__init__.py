"""From predictions to numbers with intervals: metrics, decisions, radiologists, baselines, experiments."""
