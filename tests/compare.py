"""Computed floats are held to the largest entry, as the rounding of sums is."""

import numpy as np


def assert_close(actual, desired, error, *, least=0.0, about=""):
    """No entry is farther from `desired` than `error` times its largest entry.

    A sum is off by a share of its terms. Where they nearly cancel, that is far more
    than the same share of the sum, and something else on a machine that adds in another
    order. So an entry is held not to its own size but to that of the largest beside it.

    desired: of the same shape, or one number for all entries.
    least: taken in place of a largest entry below it: the size of the terms.
    """
    actual, desired = (np.asarray(a).astype(np.float64) for a in (actual, desired))
    about = f"{about}: " if about else ""
    if desired.shape not in ((), actual.shape):
        raise AssertionError(f"{about}shape {actual.shape}, not {desired.shape}")
    desired = np.broadcast_to(desired, actual.shape)
    largest = np.abs(desired[np.isfinite(desired)]).max(initial=least)
    # What isn't a number is wrong, too; infinities are right where they are the same.
    with np.errstate(invalid="ignore"):
        off = np.where(actual == desired, 0.0, np.abs(actual - desired))
    wrong = ~(off <= error * largest)
    if not wrong.any():
        return
    place = np.unravel_index(np.where(np.isnan(off), np.inf, off).argmax(), off.shape)
    raise AssertionError(
        f"{about}{wrong.sum()} of {wrong.size} entries are off by more than {error:g} "
        f"of the largest, {largest:g}; the most at {tuple(map(int, place))}: "
        f"{actual[place]:.9g}, not {desired[place]:.9g}, off by {off[place]:.3g}"
    )
