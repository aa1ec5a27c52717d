"""Lung nodule malignancy from 64x64 CT patches: the helpers that the notebooks call.

A notebook opens one :class:`nodules.study.Study`. Who may import whom is declared in ``pyproject.toml`` and checked by
import-linter.
"""
