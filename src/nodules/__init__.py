"""Lung nodule malignancy from 64x64 CT patches: the helpers that the notebooks call.

Modules are layered: one imports only from those of a smaller number.

1. ``errors``, ``paths``, ``lidc``: what a user can do wrong; where things live; the radiologists' annotations
2. ``arrays``, ``metrics``, ``split``, ``phantom``, ``plots``, ``views``: arrays and tables in, the same or figures out
3. ``baselines``, ``patches``: what needs no picture; any source read into one verified table
4. ``results``, ``export``: numbers and figures kept with their provenance; patches as folders of pictures
5. ``run``, ``report``, ``bench``: notebooks executed, the report page, measured ratios
6. ``__main__``: the command line
"""
