"""The speed of curves, which the tests of one-dimensional latents hold against K."""
import numpy as np

from transport.latent1d.curves import Curve


def lipschitz(curve: Curve) -> float:
    """The largest speed; no time may pass without length where the curve moves."""
    way, time = np.linalg.norm(np.diff(curve.places, axis=0), axis=1), np.diff(curve.times)
    assert not way[time == 0].any(), "the curve jumps"
    return float((way[time > 0] / time[time > 0]).max())
