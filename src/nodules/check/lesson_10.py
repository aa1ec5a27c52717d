"""Exercises on Hounsfield units, slices, places, patches, prediction intervals, and answers about nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from nodules.check.answers import array, called, choice, close, given, number, require, right
from nodules.data import cut
from nodules.data.scans import Scan

Grid = tuple[np.ndarray, np.ndarray, np.ndarray]  # origin (3,), spacing (3,), direction (3, 3)
AIR = -1000  # HU
MARKED = {"nodule": 0.02, "nothing": 0.60}
CORONAL = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]
OBLIQUE = [1.0, 0.0, 0.0, 0.0, 0.8, -0.6]


def exercise_10_1(hounsfield: Callable, forgotten: Any, stored: np.ndarray) -> None:
    """Stored numbers to Hounsfield units, padding to air, and a forgotten intercept."""
    outside = stored == -2000
    for slope, intercept, padding in ((1.0, -1024.0, -2000), (2.0, -1000.0, -7)):
        values = np.where(outside, padding, stored).astype(np.int16)
        before = values.copy()
        hu = array(called(hounsfield, values, slope, intercept, padding), values.shape)
        require((values == before).all(), "your function changes the stored numbers; work on a copy")
        told, scaled = f"slope {slope:g}, intercept {intercept:g}:", slope * values + intercept
        hint = f"{told} is the slope multiplied first, then the intercept added?"
        require(np.allclose(hu[~outside], scaled[~outside]), hint)
        hint = f"{told} padding is still scaled; look for it among the stored numbers, not among HU"
        require(not np.allclose(hu[outside], scaled[outside]), hint)
        hint = f"{told} padding became air before it was scaled; make it -1000 afterwards"
        require(not np.allclose(hu[outside], slope * AIR + intercept), hint)
        require((hu[outside] == AIR).all(), f"{told} padding should be {AIR} HU, but is {hu[outside][0]:g}")
    wrong = {
        "a": "the model learned from Hounsfield units, where air is -1000; what does 24 stand for?",
        "c": "the intercept is negative: without it everything looks denser",
    }
    choice(forgotten, "b", wrong)
    right("without the intercept, a lung full of air is soft tissue, and a nodule is bone. No error would tell.")


def _headers(orientation: list[float], distances: np.ndarray) -> list[dict[str, list[float]]]:
    """Shuffled headers of slices at distances (N,) in mm along their normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    places = np.array([-170.0, 90.0, -40.0]) + np.random.default_rng(1).permutation(distances)[:, None] * normal
    return [{"ImageOrientationPatient": orientation, "ImagePositionPatient": place.tolist()} for place in places]


def _along_normal(headers: list[dict[str, list[float]]]) -> np.ndarray:
    """Positions (N,) in mm along the normal."""
    orientation = headers[0]["ImageOrientationPatient"]
    normal = np.cross(orientation[:3], orientation[3:])
    return np.array([header["ImagePositionPatient"] for header in headers]) @ normal


def exercise_10_2(in_order: Callable, widest: Callable, stacked: Any, series: list[dict[str, list[float]]]) -> None:
    """Slices in order along their normal, the gap between them, and what it does to a volume."""
    distances = np.delete(2.0 * np.arange(12), 5)
    other = {"coronal": CORONAL, "oblique": OBLIQUE}
    cases = {"series": series} | {name: _headers(orientation, distances) for name, orientation in other.items()}
    for name, headers in cases.items():
        answer = list(given(called(in_order, list(headers)), (list, tuple, np.ndarray)))
        require(all(isinstance(each, dict) for each in answer), "return the headers themselves, not their numbers")
        require(len(answer) == len(headers), f"{name}: {len(answer)} headers of {len(headers)} came back")
        steps = np.diff(_along_normal(answer))
        hint = f"{name}: the highest slice comes first; is the normal rows x columns, not the other way round?"
        require(not (steps < 0).all(), hint)
        hint = f"{name} slices are not in order; sort by the dot product of position and normal, not by z"
        require((steps > 0).all(), hint)
    for name, headers in cases.items():
        steps = np.diff(np.sort(_along_normal(headers)))
        step = number(called(widest, list(headers)))
        usual = np.median(steps)
        require(abs(step - usual) > 1e-3, f"{name}: {step:.3g} mm is the usual step; where is it wider?")
        close(step, steps.max(), f"{name}: sort, take the differences along the normal, and the largest", 1e-3)
    wrong = {
        "a": "look up a nodule of 3 mm beyond the gap: on which slice does the program look?",
        "c": "each file brings its own slope and intercept; the values are right, but where are they?",
    }
    choice(stacked, "b", wrong)
    right("5 mm where 2.5 are usual. The library refuses such a series: with the gap there would be an answer, too.")


def exercise_10_3(to_mm: Callable, to_voxel: Callable, of_viewer: Any, grid: Grid) -> None:
    """A voxel's place in mm and back, and a place from a viewer that counts other ways."""
    origin, spacing, _ = grid
    turned = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    uneven = np.array([0.7, 0.8, 2.5])
    voxel = np.array([100.0, 200.0, 30.0])
    for name, case in {"this volume": grid, "a sagittal volume": (origin, uneven, turned)}.items():
        scan = Scan(np.zeros((1, 1, 1), np.int16), case[1], case[0], case[2], "", "", "")
        place = scan.mm(voxel)
        answer = array(called(to_mm, voxel, *case), (3,))
        hint = f"{name}: you left the direction out, and step to the left and the back always"
        require(not np.allclose(answer, case[0] + voxel * case[1]), hint)
        hint = f"{name}: its columns are the directions; multiply the matrix by the vector, in this order"
        require(not np.allclose(answer, case[0] + (voxel * case[1]) @ case[2]) or np.allclose(answer, place), hint)
        hint = f"{name}: spacing belongs to x, y, z of the array; multiply by it before the direction"
        require(np.allclose(answer, place), hint)
        back = array(called(to_voxel, place, *case), (3,))
        hint = f"{name}: to_voxel leads back to {back.round(1).tolist()}, not to {voxel.tolist()}"
        order = "undo the steps in turn: subtract the origin, apply the transpose, divide by the spacing"
        require(np.allclose(back, voxel), f"{hint}; {order}")
        between = array(called(to_voxel, place + 0.3, *case), (3,))
        require(np.allclose(between, scan.voxel(place + 0.3)), f"{name}: do not round; a place may lie between voxels")
    answer = array(of_viewer, (3,))
    scan = Scan(np.zeros((1, 1, 1), np.int16), spacing, origin, grid[2], "", "", "")
    as_shown, expected = (scan.voxel(np.array(place)) for place in ((40, -20, -150), (-40, 20, -150)))
    hint = "you took R and A for left and back; turn the signs of the first two"
    require(not np.allclose(answer, as_shown, atol=0.5), hint)
    hint = "give a voxel, as x, y, z; which signs change from right, front, head to left, back, head?"
    require(np.allclose(answer, expected, atol=0.5), f"{answer.round(1).tolist()} is not it; {hint}")
    across = np.linalg.norm((as_shown - expected) * spacing)
    right(f"voxel {expected.round().astype(int).tolist()}. With wrong signs you would ask {across:.0f} mm away.")


def exercise_10_4(patch: Callable, plane: np.ndarray) -> None:
    """A patch around a voxel, inside of a slice and at its edges, of two sides."""
    before = plane.copy()
    for voxel in ((52.3, 47.6), (3.2, 60.7), (101.6, 4.9), (108.2, 88.8)):
        for side in (64, 32):
            told = f"around {voxel}, side {side}:"
            answer = given(called(patch, plane, voxel, side), np.ndarray)
            require((plane == before).all(), "your function changes the slice that it is given; work on a copy")
            hint = "a slice from a negative index is empty, and one beyond the end is short"
            require(answer.shape == (side, side), f"{told} the shape is {answer.shape}; {hint}")
            kept = slice((cut.SIDE - side) // 2, (cut.SIDE + side) // 2)
            expected = cut.window(plane, np.array(voxel), AIR)[kept, kept]
            swapped = cut.window(plane, np.array(voxel[::-1]), AIR)[kept, kept]
            hint = "x and y are swapped: rows are y, columns are x"
            require(not np.array_equal(answer, swapped), f"{told} {hint}")
            inside = expected != AIR
            zeros = np.array_equal(answer[inside], expected[inside]) and (answer[~inside] == 0).any()
            require(not zeros, f"{told} 0 HU is water; fill what lies outside with -1000, air")
            hint = "the patch reaches beyond the slice, but yours holds no air: do not move it inwards"
            require(inside.all() or (answer == AIR).any(), f"{told} {hint}")
            hint = "the middle is not as near as possible: round x - (side - 1) / 2 to the nearest, also below 0"
            require(np.array_equal(answer, expected), f"{told} {hint}")
    right("64 pixels of 0.7 mm show 45 mm, 32 only 22. Give a model what it was taught with.")


def _ends(p: np.ndarray, factor: float) -> np.ndarray:
    """Mean logit of probabilities (n,) minus and plus ``factor`` standard deviations: (2,)."""
    logits = logit(p)
    return logits.mean() + np.array([-1, 1]) * factor * logits.std(ddof=1)


def _factor(n: int, level: float) -> float:
    """Half the width of a prediction interval from n values, in their standard deviations."""
    return student.ppf((1 + level) / 2, n - 1) * np.sqrt(1 + 1 / n)


def _slips(n: int, level: float) -> dict[str, float]:
    """What a wrong formula has for the factor of an interval from n values, by its hint."""
    t, root = student.ppf((1 + level) / 2, n - 1), np.sqrt(1 + 1 / n)
    of_normal = norm.ppf((1 + level) / 2)
    return {
        "1 / n alone gives the interval of the mean; a further network also differs by itself: 1 + 1 / n": t / n**0.5,
        "the mean itself is known from n networks only; multiply by the root of 1 + 1 / n": t,
        "that quantile is of the normal distribution; few networks tell little of s: student.ppf": of_normal * root,
        "half of the rest belongs to each end: ask for the quantile (1 + level) / 2": _factor(n, 2 * level - 1),
        "divide by n - 1 in the standard deviation: std(ddof=1)": t * root * np.sqrt(1 - 1 / n),
    }


def exercise_10_5(interval: Callable, wider: Any, says: Any, opinions: np.ndarray) -> None:
    """Student's prediction interval of a further network, from five and from two."""
    for p, level in ((opinions, 0.9), (opinions[:2], 0.9), (opinions, 0.5)):
        n, factor = len(p), _factor(len(p), level)
        low, high = array(called(interval, p, level), (2,))
        told, expected = f"{n} networks, level {level}:", expit(_ends(p, factor))
        require(low < high, f"{told} the lower end is not below the upper one; return low, high")
        in_logits = np.allclose([low, high], _ends(p, factor), atol=1e-3)
        require(not in_logits, f"{told} these are logits; take the sigmoid (expit) of both ends")
        for hint, slip in _slips(n, level).items():
            require(not np.allclose([low, high], expit(_ends(p, slip)), atol=1e-4), f"{told} {hint}")
        about = f"{low:.3f} to {high:.3f}, but it is {expected[0]:.3f} to {expected[1]:.3f}"
        hint = "take m and s of the logits, then the sigmoid of both ends"
        require(np.allclose([low, high], expected, atol=1e-3), f"{told} {about}; {hint}")
    ratio, only_t = number(wider), student.ppf(0.95, 1) / student.ppf(0.95, 4)
    require(abs(ratio - only_t) > 0.01, f"{ratio:.3g} compares t alone; the root of 1 + 1 / n changes, too")
    close(wider, _factor(2, 0.9) / _factor(5, 0.9), "divide t times the root of 1 + 1 / n of two by that of five", 0.01)
    wrong = {
        "a": "no nodule's true label went into it, only opinions of networks; what varies between these?",
        "b": "networks that agree may all be wrong: how often they are right is measured on other patients",
    }
    choice(says, "c", wrong)
    five, two = (interval(each, 0.9) for each in (opinions, opinions[:2]))
    told = f"five networks: {five[0]:.0%} to {five[1]:.0%}; the first two: {two[0]:.0%} to {two[1]:.0%}"
    right(f"{told}, though these differ less. For the same s, two give {ratio:.1f} times the width.")


def exercise_10_6(unnoticed: Callable, letters: Any) -> None:
    """Answers about nothing that no mark gives away, what may be said of an answer, and whose scan it is."""
    shares = {}
    for clicked, empty in ((1000, 0.1), (1000, 0.5), (200, 0.0)):
        count, share = array(called(unnoticed, clicked, empty), (2,))
        told = f"{clicked} places, {empty:.0%} empty:"
        nothing, of_nodules = clicked * empty, clicked * (1 - empty)
        missed, answered = nothing * (1 - MARKED["nothing"]), of_nodules * (1 - MARKED["nodule"])
        of_marked = nothing > 0 and np.isclose(count, nothing * MARKED["nothing"])
        require(not of_marked, f"{told} {count:g} are marked; count the others")
        hint = "how many places are empty, and what share of these is not marked?"
        close(count, missed, f"{told} {hint}", 1e-3)
        slips = {
            "that is the share of all places; leave out the marked ones": missed / clicked,
            "that is the share of empty places that are not marked; turn it around": missed / max(nothing, 1),
            "some proper nodules are marked, too: leave them out": missed / (missed + of_nodules),
        }
        shares[empty] = missed / (missed + answered)
        for hint, slip in slips.items():
            require(abs(share - slip) > 1e-6 or abs(slip - shares[empty]) < 1e-6, f"{told} {share:.3g}: {hint}")
        close(share, shares[empty], f"{told} divide by all unmarked answers, about nodules and about nothing", 1e-3)
    told, passed_on = letters
    wrong = {
        "a": "the interval is about other networks, not about cancer; without the follow-up one would be found late",
        "b": "you have just counted unmarked answers about nothing; no mark is no proof",
    }
    choice(told, "c", wrong)
    wrong = {
        "a": "to you, for this; the class is something else, and nobody asked",
        "b": "a hundred fields are left, such as birth date, hospital and day; and names can stand in the picture",
    }
    choice(passed_on, "c", wrong)
    found = f"{shares[0.1]:.0%} of unmarked answers are about nothing, and {shares[0.5]:.0%} if half of the places are"
    right(f"{found} empty. The model is the same: what an answer is worth depends on who asks.")
