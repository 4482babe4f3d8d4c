"""The tables of the FER annotation: the action units of an emotion, and the text of a unit.

The sources are named beside each table; the emotions have this project's names (happy -> joy,
sad -> sadness, angry -> anger). Contempt, worried and doubt are in the sources but in no corpus
here; they stay so that the tables are complete.
"""

from typing import Final

EmotionTable = dict[str, tuple[str, ...]]
PhraseTable = dict[str, tuple[str, ...]]


# Lum1104/MER-Factory@b637adf, tools/emotion_analyzer.py (MIT), used there with the *_c columns.
# The default, because no other table has disgust, which MELD and MOSEI need.
_MER_FACTORY: Final[EmotionTable] = {
    "joy": ("AU06", "AU12", "AU14"),
    "sadness": ("AU01", "AU04", "AU14", "AU15"),
    "surprise": ("AU01", "AU02", "AU05", "AU26"),
    "fear": ("AU01", "AU02", "AU04", "AU05", "AU07", "AU20", "AU26"),
    "anger": ("AU04", "AU05", "AU07", "AU10", "AU17", "AU23"),
    "contempt": ("AU10", "AU12", "AU14", "AU17"),
    "worried": ("AU20", "AU28"),
    "disgust": ("AU09", "AU15"),
}

# A third-party transcription of the Emotion-LLaMA rules (its repository is not known).
_THIRD_PARTY: Final[EmotionTable] = {
    "joy": ("AU06", "AU12", "AU14"),
    "anger": ("AU04", "AU05", "AU07", "AU10", "AU17", "AU23"),
    "worried": ("AU20", "AU28"),
    "surprise": ("AU01", "AU02", "AU05", "AU26"),
    "sadness": ("AU01", "AU04", "AU14", "AU15"),
    "fear": ("AU01", "AU02", "AU04", "AU05", "AU07", "AU20", "AU26"),
    "doubt": ("AU25",),
    "contempt": ("AU10", "AU12", "AU15", "AU17"),
    "neutral": (),
}

# ZebangCheng/Emotion-LLaMA@4ee28d2, docs/dataset/construction.md: shorter sets.
_EMOTION_LLAMA_DOCS: Final[EmotionTable] = {
    "surprise": ("AU05", "AU26"),
    "joy": ("AU06", "AU12"),
    "sadness": ("AU01", "AU04", "AU15"),
    "anger": ("AU04", "AU05", "AU07", "AU23"),
}

EMOTION_TABLES: Final[dict[str, EmotionTable]] = {
    "mer_factory": _MER_FACTORY,
    "third_party": _THIRD_PARTY,
    "emotion_llama_docs": _EMOTION_LLAMA_DOCS,
}

# Two independent third-party transcriptions of the Emotion-LLaMA table; they differ only in one
# phrase of AU06 and in the key of the lip-suck row (AU28 here). There is no row for AU45.
_EXPRESSION: Final[PhraseTable] = {
    "AU01": (
        "Inner brow raiser",
        "Frown",
        "Eyebrow raised",
        "Head lifting wrinkles",
        "Lift eyebrows",
    ),
    "AU02": ("Outer brow raiser", "Outer brow lift", "Elevate outer brow", "Outer brow arch"),
    "AU04": ("Brow Lowerer", "Frowns furrowed", "Lower eyebrows", "A look of disapproval"),
    "AU05": (
        "Upper Lid Raiser",
        "Pupil enlargement",
        "Eyes widened",
        "Lift upper eyelids",
        "Raise upper eyelids",
    ),
    "AU06": (
        "Cheek Raiser",
        "Smile",
        "Pleasure",
        "Slight decrease in eyebrows",
        "Eyes narrowing",
        "Slightly lower eyebrows",
    ),
    "AU07": ("Lid Tightener", "Facial tightness", "Tightening of eyelids"),
    "AU09": (
        "Nose Wrinkler",
        "Wrinkle the nose",
        "Curl the nose",
        "Make a face",
        "Pucker the nose",
    ),
    "AU10": (
        "Upper Lip Raiser",
        "Curl the lips upwards",
        "Upper lip lift",
        "Lips apart showing teeth",
    ),
    "AU12": ("Lip Corner Puller", "Toothy smile", "Grinning", "Big smile", "Show teeth"),
    "AU14": (
        "Dimpler",
        "Cheek dimple",
        "Indentation when smiling",
        "Hollow on the face when smiling",
    ),
    "AU15": (
        "Lip Corner Depressor",
        "Downturned corners of the mouth",
        "Downward mouth curvature",
        "Lower Lip Depressor",
    ),
    "AU17": (
        "Chin Raiser",
        "Lift the chin",
        "Chin held high",
        "Lips arching",
        "Lips forming an upward curve",
    ),
    "AU20": (
        "Lip stretcher",
        "Tense lips stretched",
        "Anxiously stretched lips",
        "Nasal flaring",
        "Nostrils enlarge",
    ),
    "AU23": ("Lip Tightener", "Tighten the lips", "Purse the lips", "Press the lips together"),
    "AU25": ("Lips part", "Open the lips", "Slightly puzzled", "Lips slightly parted"),
    "AU26": ("Jaw Drop", "Mouth Stretch", "Open mouth wide", "Wide-mouthed", "Lips elongated"),
    "AU28": ("Lip Suck", "Purse lips", "Pucker lips", "Draw in lips", "Bring lips together"),
}

# Neutral names of the Facial Action Coding System, Lum1104/MER-Factory@b637adf.
_FACS: Final[PhraseTable] = {
    "AU01": ("Inner brow raiser",),
    "AU02": ("Outer brow raiser",),
    "AU04": ("Brow lowerer",),
    "AU05": ("Upper lid raiser",),
    "AU06": ("Cheek raiser",),
    "AU07": ("Lid tightener",),
    "AU09": ("Nose wrinkler",),
    "AU10": ("Upper lip raiser",),
    "AU12": ("Lip corner puller (smile)",),
    "AU14": ("Dimpler",),
    "AU15": ("Lip corner depressor",),
    "AU17": ("Chin raiser",),
    "AU20": ("Lip stretcher",),
    "AU23": ("Lip tightener",),
    "AU25": ("Lips part",),
    "AU26": ("Jaw drop",),
    "AU28": ("Lip suck",),
    "AU45": ("Blink",),
}

PHRASE_TABLES: Final[dict[str, PhraseTable]] = {
    "expression": _EXPRESSION,
    "facs": _FACS,
}
