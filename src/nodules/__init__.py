"""Lung nodule malignancy from 64x64 CT patches: the helpers that the notebooks call.

Modules are layered: one imports only from those of a smaller number.

1. ``errors``, ``paths``, ``lidc``: what a user can do wrong; where things live; the radiologists' annotations
2. ``arrays``, ``metrics``, ``split``, ``phantom``, ``plots``, ``views``: arrays and tables in, the same or figures out
3. ``baselines``, ``patches``, ``models``, ``scratch``: what needs no network; any source in one table; networks
4. ``features``, ``results``, ``export``: the feature bank; numbers and figures with provenance; folders of pictures
5. ``learners``: heads trained through fastai, learning rates, test-time augmentation
6. ``whole``: all layers trained on pictures
7. ``explain``: class activation maps
8. ``explore``, ``run``, ``report``, ``bench``: a widget; notebooks executed, the report page, measured ratios
9. ``__main__``: the command line
"""
