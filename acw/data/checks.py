"""What is wrong, or odd, with a data set: all of it at once, each with what mends it.

`acw.data.load_dataset` stops at the first thing that cannot be right. Here the same rules are gone through one after
the other, and images are looked at, too: whether they can be decoded, which are the same picture, and whether fixations
lie where they would be expected (`registration`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from acw.data import plausibility, registration
from acw.data.convention import FIT
from acw.data.coordinates import placed
from acw.data.dataset import Stimulus
from acw.data.folds import held_out_count
from acw.data.loading import TABLE, Reading
from acw.data.plausibility import Placed
from acw.data.recording import listed
from acw.storage.errors import UserError

# Images on which registration is tried, spread over the data set: it needs no more, and seconds for so many.
MOST_JUDGED = 200
# Where so many fixations lie outside, something is wrong: then the likeliest other reading is named on less evidence.
SUSPICIOUS_SHARE, LIKELY = 0.05, 2.0
# Two pictures are nearly the same if small copies of them, in px a side, are correlated so much.
COPY_SIDE, ALIKE = 16, 0.99
LEAST_CONTRAST = 4.0  # grey levels: copies that vary less are compared with none
FEW_FIXATIONS = 5  # of an image


@dataclass(frozen=True)
class Finding:
    """text: what is there. remedy: what mends it, as it is to be typed where there is an option. needed: whether the
    data cannot, or should not, be used before."""

    text: str
    remedy: str
    needed: bool = True

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass(frozen=True, eq=False)
class Examined:
    """A data set that was gone through.

    places: of all fixations, in px of their images; None where that cannot be told. other: how they are rather meant.
    pictures: by stimulus, what its decoding gave.
    """

    reading: Reading
    places: Placed | None
    findings: Sequence[Finding]
    other: registration.Reading | None = None

    @property
    def usable(self) -> bool:
        """Whether a run would take the data set as it is."""
        return not any(finding.needed for finding in self.findings)


@dataclass
class _Pictures:
    """Of stimuli, in order: a hash of their pixels, and small copies as float32 (COPY_SIDE ** 2 * 3,), standardised; of
    a damaged one an empty hash and zeros. Of those that are judged, by their index, the conspicuity of their places."""

    hashes: list[str] = field(default_factory=list)
    copies: list[np.ndarray] = field(default_factory=list)
    conspicuity: dict[int, np.ndarray] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def examine(reading: Reading, folds: int = 5, holdout: float = 0.2) -> Examined:
    """Goes through a data set; folds, holdout: of the split that it will be used with."""
    recording = reading.recording
    if not recording.stimuli or not len(recording.image):
        return Examined(reading, None, [Finding("holds no image with fixations", "add some"), *_unseen(reading)])
    pictures = _looked_at(recording.stimuli)
    placement, places, other = _placement(reading, pictures)
    findings = [
        *_unseen(reading),
        *placement,
        *(Finding(text, "replace it") for text in pictures.damaged),
        *_categories(recording.stimuli, folds, holdout),
        *_twins(recording.stimuli, pictures),
        *_oddities(reading),
    ]
    return Examined(reading, places, findings, other)


def _unseen(reading: Reading) -> Iterator[Finding]:
    recording = reading.recording
    seen = {recording.stimuli[index].name for index in np.unique(recording.image)}
    unseen = [*recording.unseen, *(s.name for s in recording.stimuli if s.name not in seen)]
    if unseen:
        text = f"images without a fixation: {len(unseen)} ({listed(unseen)})"
        yield Finding(text, "add their fixations, or remove them from the folder")
    counts = np.bincount(recording.image, minlength=len(recording.stimuli))
    if few := [s.name for s, count in zip(recording.stimuli, counts, strict=True) if 0 < count < FEW_FIXATIONS]:
        text = f"images with fewer than {FEW_FIXATIONS} fixations: {len(few)} ({listed(few)})"
        yield Finding(text, "their scores will vary much; leave them out, or have more people look", needed=False)


# --- Where fixations lie -----------------------------------------------------------------------------------------


def _placement(
    reading: Reading, pictures: _Pictures
) -> tuple[list[Finding], Placed | None, registration.Reading | None]:
    """What is wrong with coordinates, the places that they mean, and how they are rather meant."""
    recording, convention = reading.recording, reading.convention
    findings = []
    try:
        plausibility.refuse_repeated(recording, "")
    except UserError as error:
        findings.append(_parted(str(error).removeprefix(": ")))
    try:
        places = placed(recording, convention, "")
    except UserError as error:
        return [*findings, _parted(str(error).removeprefix(": "))], None, None
    outside = ~places.inside
    reason = plausibility.misread(recording, places, convention.origin) if outside.any() else None
    corner = None if outside.any() else plausibility.corner(places)
    other = None
    if reason is None:
        images, cell = _seen(reading, places, pictures)
        certain = (LIKELY,) if corner or outside.mean() > SUSPICIOUS_SHARE else ()
        other = registration.other_reading(images, cell, *certain)
        reason = plausibility.too_far(places, convention.units) if other is None and outside.any() else None
    if other is not None:
        findings.append(_meant(reading, other))
        reason = "if the finding above is mended, few may remain" if outside.any() else None
    elif corner:
        text = "all fixations lie in the upper left {:.0%} by {:.0%} of their images".format(*corner)
        remedy = f"if they are px of images of another size, say so by --scale, perhaps {max(corner):.2g}"
        findings.append(Finding(text, remedy, needed=max(corner) <= 0.5))
    if outside.any():
        findings.append(_outside(reading, outside, reason))
    return findings, places, other


def _parted(reason: str) -> Finding:
    """A reason of `plausibility`, whose last part is the remedy."""
    *text, remedy = re.split(r"(; |(?<=\?) )", reason)
    return Finding("".join(text).removesuffix("; ").rstrip(), remedy) if text else Finding(reason, "")


def _outside(reading: Reading, outside: np.ndarray, reason: str | None) -> Finding:
    """reason: what they are there by, if that is known."""
    stimuli, image = reading.recording.stimuli, reading.recording.image
    total, lost = (np.bincount(image[mask], minlength=len(stimuli)) for mask in (outside | ~outside, outside))
    worst = np.argsort(-lost / np.maximum(total, 1), kind="stable")[:3]
    names = ", ".join(f"{stimuli[i].name} {lost[i]} of {total[i]}" for i in worst if lost[i])
    text = f"fixations outside their image: {outside.sum()} of {len(outside)} ({outside.mean():.1%}; most: {names})"
    dropped = outside.mean() <= reading.share
    if dropped:
        return Finding(text, "they are dropped, as --drop-outside says", needed=False)
    if reason:
        because = _parted(reason)
        return Finding(f"{text}: {because.text}", because.remedy) if because.remedy else Finding(text, reason)
    share = math.ceil(outside.mean() * 100 + 1e-9) / 100
    return Finding(text, f"leave them out by --drop-outside {share:g}, or correct them")


def _seen(reading: Reading, places: Placed, pictures: _Pictures) -> tuple[list[registration.Seen], float]:
    stimuli = reading.recording.stimuli
    order = np.argsort(reading.recording.image, kind="stable")
    starts = np.searchsorted(reading.recording.image[order], np.arange(len(stimuli) + 1))
    images = []
    for index, conspicuity in sorted(pictures.conspicuity.items()):
        rows = order[starts[index] : starts[index + 1]]
        if len(rows):
            images.append(registration.Seen(stimuli[index].size, conspicuity, places.x[rows], places.y[rows]))
    return images, registration.cell_of([stimulus.size for stimulus in stimuli])


def _meant(reading: Reading, other: registration.Reading) -> Finding:
    """What fixations look like, as what is conspicuous in the images says, and which option would say so."""
    said, numbers = reading.convention, other.numbers
    marked = reading.recording.pixels
    if other.kind == "swapped":
        text = "x and y look swapped"
        remedy = (
            "swap the columns, for a table by --columns x=y,y=x" if reading.reader == TABLE else "swap x and y there"
        )
    elif other.kind == "up":
        text, remedy = "y looks as if it went up from the lower edge", "say --y-axis up"
        remedy = "say --y-axis down" if said.y_axis == "up" else remedy
    elif other.kind == "scaled":
        text = f"fixations look like those of images {numbers[0]:.3g} times as large"
        plain = said.screen is None and said.scale != FIT and said.units == "px"
        factor = numbers[0] * float(said.scale) if said.scale != FIT else numbers[0]
        remedy = f"say --scale {factor:.3g}" if plain else "correct --screen, --scale or --units"
    elif other.kind == "screen":
        width, height = numbers
        text = f"fixations look like px of a screen of {width:g}x{height:g} with images in its middle"
        remedy = f"say --screen {width:g}x{height:g}"
    else:
        x, y = (round(number) for number in numbers)
        text = f"all fixations look moved by about {x:+d} px in x and {y:+d} px in y"
        largest = [max(stimulus.size[axis] for stimulus in reading.recording.stimuli) for axis in (1, 0)]
        geometry = f"{largest[0] + 2 * abs(x)}x{largest[1] + 2 * abs(y)}{x:+d}{y:+d}"
        plain = said.screen is None and said.units == "px" and said.scale == 1
        remedy = f"say --screen {geometry} if images were shown there" if plain else "correct --screen's +X+Y"
        remedy += ", or have the calibration corrected"
    return Finding(text, "correct the files" if marked else remedy)


# --- Images and categories ---------------------------------------------------------------------------------------


def _looked_at(stimuli: Sequence[Stimulus]) -> _Pictures:
    """Decodes every image once."""
    cell = registration.cell_of([stimulus.size for stimulus in stimuli])
    judged = set(np.unique(np.linspace(0, len(stimuli) - 1, MOST_JUDGED).astype(int)).tolist())
    pictures = _Pictures()

    def look(index: int) -> tuple[str, np.ndarray, np.ndarray | None]:
        """Hash, copy and conspicuity; the error of a damaged one in place of the hash."""
        try:
            pixels = stimuli[index].pixels()
        except UserError as error:
            pictures.damaged.append(str(error))
            return "", np.zeros(COPY_SIDE**2 * 3, dtype=np.float32), None
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return digest, _copy(pixels), registration.conspicuity(pixels, cell) if index in judged else None

    with ThreadPoolExecutor() as pool:
        for index, (digest, copy, conspicuity) in enumerate(pool.map(look, range(len(stimuli)))):
            pictures.hashes.append(digest)
            pictures.copies.append(copy)
            if conspicuity is not None:
                pictures.conspicuity[index] = conspicuity
    pictures.damaged.sort()
    return pictures


def _copy(pixels: np.ndarray) -> np.ndarray:
    """float32 (COPY_SIDE ** 2 * 3,): a small copy with mean 0 and length 1, less where contrast is low."""
    from PIL import Image

    small = Image.fromarray(pixels).resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), LEAST_CONTRAST * np.sqrt(len(values)))


def _twins(stimuli: Sequence[Stimulus], pictures: _Pictures) -> Iterator[Finding]:
    """Pictures that are there twice."""
    names: dict[str, list[str]] = {}
    for stimulus, digest in zip(stimuli, pictures.hashes, strict=True):
        names.setdefault(digest or stimulus.name, []).append(stimulus.name)
    same = [" = ".join(those) for those in names.values() if len(those) > 1]
    copies, alike = np.stack(pictures.copies), []
    for number, copy in enumerate(copies):
        for other in (np.flatnonzero(copies[number + 1 :] @ copy > ALIKE) + number + 1).tolist():
            if pictures.hashes[number] != pictures.hashes[other]:
                alike.append(f"{stimuli[number].name} = {stimuli[other].name}")
    remedy = "keep one of each with the fixations of both, or one may be trained on and the other scored"
    if same:
        yield Finding(f"pictures under several names: {len(same)} ({listed(same)})", remedy, needed=False)
    if alike:
        yield Finding(f"pairs of nearly the same picture: {len(alike)} ({listed(alike)})", remedy, needed=False)


def _categories(stimuli: Sequence[Stimulus], folds: int, holdout: float) -> Iterator[Finding]:
    counts = Counter(stimulus.category for stimulus in stimuli)
    small = [f"{name} {n}" for name, n in sorted(counts.items()) if n - held_out_count(n, holdout) < folds]
    if small:
        needed = next(n for n in range(1, 10**6) if n - held_out_count(n, holdout) >= folds)
        text = f"categories too small to hold images out and put one in each of {folds} folds: {listed(small, 6)}"
        yield Finding(text, f"add images up to {needed}, merge categories, or take fewer --folds")


def _oddities(reading: Reading) -> Iterator[Finding]:
    recording = reading.recording
    if turned := [stimulus.name for stimulus in recording.stimuli if stimulus.orientation != 1]:
        text = f"images that EXIF says to turn: {len(turned)} ({listed(turned)}); pixels are read as stored"
        yield Finding(text, "if people saw them turned, store them so, without EXIF", needed=False)
    names = {stimulus.category for stimulus in recording.stimuli}
    if len({name.casefold() for name in names}) < len(names):
        text = f"categories differ in their capitals alone ({listed(sorted(names), 6)})"
        yield Finding(text, "give them one name, if they are one", needed=False)
    if not np.any(recording.subject >= 0):
        text = "subjects are not known, so no score of how well other people foretell fixations"
        yield Finding(text, "give a column subject, if you have it", needed=False)
    for note in (*recording.notes, *reading.convention.note):
        yield Finding(note, "", needed=False)
