"""How sure an answer is: probability within a distance, the radius that holds a share of it, and their calibration.

Everything here is about a circle around an answer, and comes from the model's distribution over places by one function,
the mass within a distance. No jax is imported with this module.
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import workdir

if TYPE_CHECKING:
    from geotoken_jax.predict.pool import PlaceDistribution

#: Percent of the probability whose radius is told.
MASSES = (50, 90)
#: What is always left elsewhere: a model that is sure of one cell leaves nothing, and its radius would never pass the
#: cell's edge however often the truth does.
_ELSEWHERE = 1e-6
#: Quantiles that a calibration keeps; they must hold MASSES.
_KNOTS = np.linspace(0, 1, 21)
#: Between which temperature and elsewhere are looked for.
_BOUNDS = ((0.2, 5.0), (1e-3, 1e4))
#: Halvings of half the Earth's circumference until a radius is exact to a micrometer.
_HALVINGS = 45
#: Photos at once: 5 distances from 65 places are 2.7 MB of float64.
_BLOCK = 1024


def mass_within(
    places: "PlaceDistribution", at: Float[np.ndarray, "b 2"], km: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b n"]:
    """Returns the probability within `km` of each answer, in [0, 1]; it never falls as `km` rises.

    at: degrees. km: [b, n] or what broadcasts to it. A cell counts as a disc of its level's mean area around its
    center: all that the circle holds of it while the circle is inside, and then rising evenly until the circle's edge
    has passed over it. What the cells lack to 1 is spread evenly over the Earth.
    """
    km = np.broadcast_to(np.asarray(km, np.float64), (len(at), km.shape[-1]))
    found = np.empty(km.shape)
    for rows in _blocks(len(at)):
        discs = _Discs(type(places)(*(values[rows] for values in places)), at[rows])
        found[rows] = discs.within(km[rows])
    return found


def radius_km(
    places: "PlaceDistribution", at: Float[np.ndarray, "b 2"], mass: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "b n"]:
    """Returns the smallest distance from each answer that holds each mass: the inverse of `mass_within`.

    mass: in [0, 1]. Half the Earth's circumference holds everything.
    """
    from geotoken_jax.geo.distance import EARTH_RADIUS_KM  # and jax with it

    mass = np.asarray(mass, np.float64)
    found = np.empty((len(at), len(mass)))
    for rows in _blocks(len(at)):
        discs = _Discs(type(places)(*(values[rows] for values in places)), at[rows])
        low = np.zeros(found[rows].shape)
        high = np.full(low.shape, np.pi * EARTH_RADIUS_KM)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = discs.within(middle) >= mass
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        found[rows] = np.where(mass > 0, high, 0.0)
    return found


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What makes probabilities within a distance come true, on photos like those it was fitted to.

    temperature: the cells' probabilities, as shares of what they hold together, are raised to 1 / temperature.
    elsewhere: what the odds of being in none of the cells are multiplied by. levels: the mass within the truth's
    distance that each of _KNOTS of the photos stays below; from any mass to a probability and back they are joined by
    straight lines (Kuleshov et al. 2018, algorithm 1). photos: it was fitted to so many.
    """

    temperature: float
    elsewhere: float
    levels: tuple[float, ...]
    photos: int

    def within(self, places: "PlaceDistribution", at: Float[np.ndarray, "b 2"]) -> Float[np.ndarray, "b 5"]:
        """Returns the probability that the truth is within each of THRESHOLDS_KM of the answers, rising."""
        from geotoken_jax.geo.distance import THRESHOLDS_KM

        mass = mass_within(self._mended(places), at, np.array(THRESHOLDS_KM))
        return np.interp(mass, self.levels, _KNOTS)

    def radius_km(self, places: "PlaceDistribution", at: Float[np.ndarray, "b 2"]) -> Float[np.ndarray, "b 2"]:
        """Returns the radii around the answers that hold the truth with a probability of each of MASSES percent."""
        levels = np.interp(np.array(MASSES) / 100, _KNOTS, self.levels)
        return radius_km(self._mended(places), at, levels)

    def save(self, path: epath.Path) -> None:
        """Writes the calibration as JSON."""
        workdir.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: epath.Path) -> "Calibration":
        """Reads what `save` wrote."""
        held = json.loads(path.read_text())
        return cls(held["temperature"], held["elsewhere"], tuple(held["levels"]), held["photos"])

    def _mended(self, places: "PlaceDistribution") -> "PlaceDistribution":
        """Returns the places at this temperature, and with so much elsewhere."""
        held = np.clip(places.probability.sum(1, keepdims=True), 0, 1 - _ELSEWHERE)
        held = held / (held + self.elsewhere * (1 - held))
        most = np.maximum(places.probability.max(1, keepdims=True, initial=0), 1e-300)
        weight = (places.probability / most) ** (1 / self.temperature)
        return places._replace(probability=weight * held / np.maximum(weight.sum(1, keepdims=True), 1e-300))


#: For want of photos to fit to: what the model says.
UNCALIBRATED = Calibration(1.0, 1.0, tuple(_KNOTS.tolist()), 0)


def fit(places: "PlaceDistribution", at: Float[np.ndarray, "b 2"], truth: Float[np.ndarray, "b 2"]) -> Calibration:
    """Returns the calibration that fits answers to the truth, both in degrees; UNCALIBRATED where there are none.

    The levels are those of the masses within the truth's distance: under true probabilities they are spread evenly over
    [0, 1], and where they are not, their quantiles say which mass holds the truth how often; of n photos the k-th
    smallest is that of k / (n + 1). Temperature and elsewhere are those with which what is then told, whether the truth
    is within each of THRESHOLDS_KM, has the least log loss: a proper score, which only better probabilities can gain.
    """
    from scipy.optimize import minimize

    from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km

    if not len(at):
        return UNCALIBRATED
    km = np.asarray(great_circle_km(*at.T, *truth.T))[:, None]
    near = km <= np.array(THRESHOLDS_KM)

    def fitted(logs: Float[np.ndarray, "2"]) -> Calibration:
        begun = dataclasses.replace(UNCALIBRATED, temperature=math.exp(logs[0]), elsewhere=math.exp(logs[1]))
        mass = mass_within(begun._mended(places), at, km)[:, 0]
        levels = np.quantile(mass, _KNOTS[1:-1], method="weibull")
        return dataclasses.replace(begun, levels=(0.0, *levels.tolist(), 1.0), photos=len(at))

    def loss(logs: Float[np.ndarray, "2"]) -> float:
        p = np.clip(fitted(logs).within(places, at), 1e-6, 1 - 1e-6)
        return float(-np.log(np.where(near, p, 1 - p)).mean())

    begin = np.array([(0.0, 0.0), (0.7, 0.0), (0.0, 2.0)])
    found = minimize(
        loss, begin[0], method="Nelder-Mead", bounds=np.log(_BOUNDS),
        options={"initial_simplex": begin, "xatol": 0.03, "fatol": 1e-5, "maxfev": 100},
    )  # fmt: skip
    return fitted(found.x)


def _blocks(b: int) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, b, _BLOCK)]


class _Discs:
    """The places of b photos as discs around an answer each; the last is elsewhere, which is all the Earth."""

    def __init__(self, places: "PlaceDistribution", at: Float[np.ndarray, "b 2"]):
        from geotoken_jax.geo.distance import EARTH_RADIUS_KM, great_circle_km

        whole = places.level < 0
        away = np.asarray(great_circle_km(*np.moveaxis(places.coordinates, -1, 0), *at.T[..., None]))
        last = np.zeros((len(at), 1))
        rest = np.maximum(1 - places.probability.sum(1, keepdims=True), 0)
        self._earth = EARTH_RADIUS_KM
        self._weight = np.concatenate([places.probability, rest], 1)[:, None]
        self._weight /= self._weight.sum(-1, keepdims=True)
        # A cap of half the angle a covers sin(a / 2)^2 of the sphere.
        share = np.where(whole, 1.0, 4.0 ** -np.maximum(places.level, 0) / 6)
        radius = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.concatenate([share, last + 1], 1)))[:, None]
        away = np.concatenate([np.where(whole, 0.0, away), last], 1)[:, None]
        self._radius = radius
        self._inner = np.abs(away - radius)
        self._outer = np.minimum(away + radius, np.pi * EARTH_RADIUS_KM)
        self._inside = away < radius
        # What a circle holds of the disc that it is about to leave.
        self._held = np.where(self._inside, self._caps(self._inner), 0.0)

    def within(self, km: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b n"]:
        km = km[..., None]
        passed = np.clip((km - self._inner) / np.maximum(self._outer - self._inner, 1e-12), 0, 1)
        share = np.where(self._inside & (km < self._inner), self._caps(km), self._held + (1 - self._held) * passed)
        return np.minimum((share * self._weight).sum(-1), 1.0)

    def _caps(self, km: Float[np.ndarray, "b n F"]) -> Float[np.ndarray, "b n F"]:
        """Returns the area of a circle over that of the disc."""
        return (np.sin(km / (2 * self._earth)) / np.sin(self._radius / (2 * self._earth))) ** 2
