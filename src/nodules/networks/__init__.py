"""Networks: bodies and weights, the feature bank, heads, fine-tuning, activation maps."""
