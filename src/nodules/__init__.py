"""Lung nodule malignancy from 64x64 CT patches: the helpers that the notebooks call.

Modules are layered: one imports only from those of a smaller number.

1. ``errors``, ``paths``, ``lidc``: what a user can do wrong; where things live; the radiologists' annotations
2. ``arrays``, ``duplicates``, ``metrics``, ``phantom``, ``plots``, ``split``, ``views``: arrays and tables in, the same
   or figures out
3. ``baselines``, ``decisions``, ``patches``, ``models``, ``readers``, ``scratch``: what needs no network; calibration
   and thresholds; any source in one table; networks; the radiologists; networks from nothing
4. ``cards``, ``features``, ``results``, ``export``: cards of data and model; the feature bank; numbers and figures with
   provenance; folders of pictures
5. ``learners``: heads trained through fastai, learning rates, test-time augmentation
6. ``trials``, ``whole``: experiments repeated until their spread is known; all layers trained on pictures
7. ``explain``: class activation maps
8. ``explore``, ``run``, ``report``, ``bench``: a widget; notebooks executed, the report page, measured ratios
9. ``__main__``: the command line
"""
