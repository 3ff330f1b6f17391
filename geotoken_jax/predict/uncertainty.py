"""Uncertainty of an answer: probability within a distance, radius for a probability, and calibration of both.

Everything is computed from one quantity: the probability that the model's distribution over places has in a circle
around the answer. It is called the mass of the circle. This module does not import jax until a function needs it.
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import manifests

if TYPE_CHECKING:
    from geotoken_jax.predict.pool import PlaceDistribution

#: Probabilities, in percent, for which predictions have a radius.
MASSES = (50, 90)
#: Smallest probability outside all cells. If it were 0, a model that gives one cell all probability would have no
#: radius beyond this cell. Calibration could not enlarge the radius, even if the truth is often outside the cell.
_ELSEWHERE = 1e-6
#: Probabilities p for which a calibration stores the p-quantile (Calibration.levels). They must include MASSES.
_KNOTS = np.linspace(0, 1, 21)
#: Bounds of Calibration.temperature and Calibration.elsewhere in `fit`.
_BOUNDS = ((0.2, 5.0), (1e-3, 1e4))
#: Number of bisection steps for a radius. They narrow half the Earth's circumference to less than 1 micrometer.
_HALVINGS = 45
#: The same to 2 meters, which float32 resolves.
_HALVINGS_FLOAT32 = 23
#: Smallest divisor, and smallest difference of two quantiles of a calibration.
_LEAST, _LEAST_STEP = 1e-30, 1e-7
#: Photos per block. For 5 radii and 257 discs per photo, an array of float64 takes 10.5 MB.
_BLOCK = 1024


def mass_within(
    distribution: "PlaceDistribution", at: Float[np.ndarray, "b 2"], km: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b n"]:
    """Returns the probability in the circles of radius `km` around each answer, in [0, 1].

    at: answers, in degrees. km: radii [b, n], or an array that broadcasts to this shape. A larger circle never has a
    smaller probability.

    A cell counts as a disc around its center, with the mean area of the cells of its level. The circle contains this
    share of the cell's probability:

    - Answer in the disc: the circle's area divided by the disc's area, until the circle touches the disc's edge. For
      larger circles, the share grows linearly with the radius. It is 1 when the circle covers the disc.
    - Answer outside the disc: 0 until the circle reaches the near edge of the disc. The share then grows linearly with
      the radius. It is 1 at the far edge.

    Probability that is in no cell is spread evenly over the Earth.
    """
    km = np.broadcast_to(np.asarray(km, np.float64), (len(at), km.shape[-1]))
    mass = np.empty(km.shape)
    for rows in _blocks(len(at)):
        mass[rows] = Discs(type(distribution)(*(values[rows] for values in distribution)), at[rows]).within(km[rows])
    return mass


def radius_km(
    distribution: "PlaceDistribution", at: Float[np.ndarray, "b 2"], mass: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "b n"]:
    """Returns the radius in km of the smallest circle around each answer b that has each mass n.

    This is the inverse of `mass_within`. The largest radius is half the Earth's circumference, for mass 1.

    at: answers, in degrees. mass: probabilities in [0, 1].
    """
    mass = np.asarray(mass, np.float64)
    km = np.empty((len(at), len(mass)))
    for rows in _blocks(len(at)):
        discs = Discs(type(distribution)(*(values[rows] for values in distribution)), at[rows])
        km[rows] = discs.radius_km(mass, _HALVINGS)
    return km


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Correction of the probability that the truth is within a distance, valid for photos like the ones in the fit.

    temperature: the cells' relative probabilities are raised to 1 / temperature. elsewhere: factor on the odds that the
    photo is in none of the cells. levels: p-quantile of the photos' masses for each probability p in _KNOTS. The mass
    of a photo is the probability in the circle around the answer whose edge is at the truth. Linear interpolation
    between the levels maps a mass to a probability and back (Kuleshov et al. 2018, algorithm 1). photos: number of
    photos in the fit.
    """

    temperature: float
    elsewhere: float
    levels: tuple[float, ...]
    photos: int

    def within(self, distribution: "PlaceDistribution", at: Float[np.ndarray, "b 2"]) -> Float[np.ndarray, "b 5"]:
        """Returns the probability that the truth is within each of THRESHOLDS_KM of the answer.

        at: answers, in degrees.
        """
        from geotoken_jax.geo.distance import THRESHOLDS_KM

        mass = mass_within(self.adjusted(distribution), at, np.array(THRESHOLDS_KM))
        return np.interp(mass, self.levels, _KNOTS)

    def radius_km(self, distribution: "PlaceDistribution", at: Float[np.ndarray, "b 2"]) -> Float[np.ndarray, "b 2"]:
        """Returns the radii in km around each answer that contain the truth with a probability of MASSES percent."""
        return radius_km(self.adjusted(distribution), at, self.masses)

    @property
    def masses(self) -> Float[np.ndarray, "2"]:
        """The model's mass in the circle that contains the truth with a probability of MASSES percent."""
        return np.interp(np.array(MASSES) / 100, _KNOTS, self.levels)

    def traced(self, distribution: "PlaceDistribution", at: Any) -> tuple[Any, Any]:
        """Returns radius_km [b, 2] and within [b, 5] inside a jax transformation, in float32."""
        import jax.numpy as jnp

        from geotoken_jax.geo.distance import THRESHOLDS_KM

        discs = Discs(self.adjusted(distribution), at)
        mass = discs.within(jnp.array(THRESHOLDS_KM, jnp.float32)[None])
        low, high = np.array(self.levels[:-1], np.float32), np.array(self.levels[1:], np.float32)
        # Linear interpolation as a sum of one ramp per knot, which every runtime computes.
        ramps = jnp.clip((mass[..., None] - low) / np.maximum(high - low, _LEAST_STEP), 0, 1)
        within = jnp.minimum(ramps.sum(-1) / len(low), 1.0)
        return discs.radius_km(self.masses.astype(np.float32), _HALVINGS_FLOAT32), within

    def save(self, path: epath.Path) -> None:
        """Writes the calibration as JSON."""
        manifests.write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: epath.Path) -> "Calibration":
        """Returns the calibration that `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(fields["temperature"], fields["elsewhere"], tuple(fields["levels"]), fields["photos"])

    def adjusted(self, distribution: "PlaceDistribution") -> "PlaceDistribution":
        """Returns the distribution with `temperature` and `elsewhere` applied."""
        from geotoken_jax.geo.distance import namespace

        xp: Any = namespace(distribution.probability)
        inside = xp.clip(distribution.probability.sum(1, keepdims=True), 0, 1 - _ELSEWHERE)
        inside = inside / (inside + self.elsewhere * (1 - inside))
        most = xp.maximum(distribution.probability.max(1, keepdims=True, initial=0), _LEAST)
        weight = (distribution.probability / most) ** (1 / self.temperature)
        return distribution._replace(probability=weight * inside / xp.maximum(weight.sum(1, keepdims=True), _LEAST))


#: Calibration that keeps the model's own probabilities, used if there are no photos to fit to.
UNCALIBRATED = Calibration(1.0, 1.0, tuple(_KNOTS.tolist()), 0)


def fit(
    distribution: "PlaceDistribution", at: Float[np.ndarray, "b 2"], truth: Float[np.ndarray, "b 2"]
) -> Calibration:
    """Returns the calibration fitted to photos with known places; UNCALIBRATED if there are no photos.

    at: answers, in degrees. truth: true coordinates, in degrees.

    Each photo has a mass: the model's probability in the circle around the answer whose edge is at the truth. `levels`
    are quantiles of the photos' masses. If the model's probabilities are right, the masses are uniform in [0, 1].
    Otherwise the quantiles show how often a circle with a given mass contains the truth. Of n masses the k-th smallest
    is the quantile k / (n + 1).

    `temperature` and `elsewhere` minimize the log loss of the calibrated probabilities that the truth is within each of
    THRESHOLDS_KM. The log loss is a proper score: only better probabilities lower it.
    """
    from scipy.optimize import minimize

    from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km

    if not len(at):
        return UNCALIBRATED
    km = np.asarray(great_circle_km(*at.T, *truth.T))[:, None]
    within = km <= np.array(THRESHOLDS_KM)

    def fitted(logs: Float[np.ndarray, "2"]) -> Calibration:
        unfitted = dataclasses.replace(UNCALIBRATED, temperature=math.exp(logs[0]), elsewhere=math.exp(logs[1]))
        mass = mass_within(unfitted.adjusted(distribution), at, km)[:, 0]
        levels = np.quantile(mass, _KNOTS[1:-1], method="weibull")
        return dataclasses.replace(unfitted, levels=(0.0, *levels.tolist(), 1.0), photos=len(at))

    def loss(logs: Float[np.ndarray, "2"]) -> float:
        p = np.clip(fitted(logs).within(distribution, at), 1e-6, 1 - 1e-6)
        return float(-np.log(np.where(within, p, 1 - p)).mean())

    simplex = np.array([(0.0, 0.0), (0.7, 0.0), (0.0, 2.0)])
    result = minimize(
        loss, simplex[0], method="Nelder-Mead", bounds=np.log(_BOUNDS),
        options={"initial_simplex": simplex, "xatol": 0.03, "fatol": 1e-5, "maxfev": 100},
    )  # fmt: skip
    return fitted(result.x)


def _blocks(b: int) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, b, _BLOCK)]


class Discs:
    """The cells of b photos as discs, with each disc's distance from the photo's answer.

    The last disc of each photo is the whole Earth, with the probability that is outside all cells of the photo.
    """

    def __init__(self, distribution: "PlaceDistribution", at: Any):
        """at: answers [b, 2], in degrees."""
        from geotoken_jax.geo.distance import EARTH_RADIUS_KM, great_circle_km, namespace
        from geotoken_jax.predict.pool import disc_km

        xp: Any = namespace(distribution.probability)
        self._xp = xp
        whole = distribution.level < 0
        places = distribution.coordinates
        away = great_circle_km(places[..., 0], places[..., 1], at[:, :1], at[:, 1:])
        last = xp.zeros((at.shape[0], 1))
        rest = xp.maximum(1 - distribution.probability.sum(1, keepdims=True), 0)
        self._earth = EARTH_RADIUS_KM
        weight = xp.concatenate([distribution.probability, rest], 1)[:, None]
        self._weight = weight / weight.sum(-1, keepdims=True)
        radius = xp.where(whole, np.pi * EARTH_RADIUS_KM, disc_km(distribution.level))
        radius = xp.concatenate([radius, last + np.pi * EARTH_RADIUS_KM], 1)[:, None]
        away = xp.concatenate([xp.where(whole, 0.0, away), last], 1)[:, None]
        self._radius = radius
        self._inner = xp.abs(away - radius)
        self._outer = xp.minimum(away + radius, np.pi * EARTH_RADIUS_KM)
        self._inside = away < radius
        # Area of the largest circle around the answer that is inside the disc, divided by the disc's area.
        self._edge = xp.where(self._inside, self._caps(self._inner), 0.0)

    def within(self, km: Any) -> Any:
        """Returns the probability [b, n] in the circles of radius `km` [b, n] around each answer."""
        xp, km = self._xp, km[..., None]
        passed = xp.clip((km - self._inner) / xp.maximum(self._outer - self._inner, 1e-12), 0, 1)
        share = xp.where(self._inside & (km < self._inner), self._caps(km), self._edge + (1 - self._edge) * passed)
        return xp.minimum((share * self._weight).sum(-1), 1.0)

    def radius_km(self, mass: Float[np.ndarray, "n"], halvings: int) -> Any:
        """Returns the radius [b, n] in km of the smallest circle around each answer that contains each mass.

        halvings: number of bisection steps, which start from half the Earth's circumference.
        """
        xp = self._xp
        low = xp.zeros((self._weight.shape[0], len(mass)))
        high = low + np.pi * self._earth
        for _ in range(halvings):
            middle = (low + high) / 2
            enough = self.within(middle) >= mass
            low, high = xp.where(enough, low, middle), xp.where(enough, middle, high)
        return xp.where(mass > 0, high, 0.0)

    def _caps(self, km: Any) -> Any:
        """Returns the area of a circle of radius `km`, divided by the area of the disc."""
        return (self._xp.sin(km / (2 * self._earth)) / self._xp.sin(self._radius / (2 * self._earth))) ** 2
