"""Networks: bodies and weights, the feature bank, heads, fine-tuning, activation maps.

Importing them takes long (torch, torchvision, timm, fastai), so these names are here.
"""

POOLS = ("last", "all")  # stages whose features a head sees
RULES = ("mean", "log", "beta")  # by which views are averaged
