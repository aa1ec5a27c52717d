"""Lung nodule malignancy from 64x64 CT patches: the helpers that the notebooks call.

Modules are layered: one imports only from those of a smaller number.

1. ``errors``: what a user can do wrong
2. ``device``, ``lidc``, ``paths``, ``units``: what computes; the radiologists' annotations; where things live and how
   files are written; what a pixel value means
3. ``arrays``, ``duplicates``, ``metrics``, ``phantom``, ``plots``, ``split``, ``views``: arrays and tables in, the same
   or figures out
4. ``baselines``, ``decisions``, ``patches``, ``models``, ``readers``, ``scratch``: what needs no network; calibration
   and thresholds; any source in one table; networks; the radiologists; networks from nothing
5. ``cards``, ``features``, ``results``, ``export``: cards of data and model; the feature bank; numbers and figures with
   provenance; folders of pictures
6. ``learners``: heads trained through fastai, learning rates, test-time augmentation
7. ``trials``, ``whole``: experiments repeated until their spread is known; all layers trained on pictures
8. ``explain``: class activation maps
9. ``explore``, ``run``, ``report``, ``bench``, ``messages``: a widget; notebooks executed, the report page, measured
   ratios; every error in one table
10. ``__main__``, ``alone``: the command line; one run at a time
"""
