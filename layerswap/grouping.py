"""Which numbers of groups are legal for a number of channels, and which to take."""

from __future__ import annotations

import math

AUTO_MOST_GROUPS = 32
AUTO_LEAST_CHANNELS = 16


def legal_groups(channels: int) -> tuple[int, ...]:
    """Every number of groups that divides `channels`, ascending.

    Args:
        channels: a positive number of channels.
    """
    small = [d for d in range(1, math.isqrt(channels) + 1) if channels % d == 0]
    large = [channels // d for d in reversed(small) if d * d != channels]
    return (*small, *large)


def auto_groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves at least 16 channels in
    each group, else 1.

    Fewer groups keep more of what BatchNormalization knew; larger groups have steadier
    statistics. The two bounds are those that kept most accuracy without retraining.

    Args:
        channels: a positive number of channels.
    """
    fitting = (
        groups
        for groups in legal_groups(channels)
        if groups <= AUTO_MOST_GROUPS and channels // groups >= AUTO_LEAST_CHANNELS
    )
    return max(fitting, default=1)


def nearest_groups(channels: int, wanted: int) -> int:
    """The largest legal number of groups that is not above `wanted`.

    Args:
        channels: a positive number of channels.
        wanted: a positive number of groups.
    """
    return max(groups for groups in legal_groups(channels) if groups <= wanted)


def usual_groups(channels: int) -> tuple[int, ...]:
    """The numbers of groups that people take, as far as they are legal, ascending.

    1, 2, 4, 8, 16 and 32, or the nearest below; what "auto" takes; one group per channel.

    Args:
        channels: a positive number of channels.
    """
    powers = {nearest_groups(channels, 2**exponent) for exponent in range(6)}
    return tuple(sorted({*powers, auto_groups(channels), channels}))
