"""Labels that are computed: FER phrases from action units, ERI reasons from two models.

Entry points: `action_units.annotate_fer`, `reasons.annotate_reasons`, `openface_run` for OpenFace.
"""
