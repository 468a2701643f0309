"""What is stated of the chips: peak, clock, memory, links."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device of a generation.

    kind:         what `device.device_kind` says.
    peak:         bf16 FLOP/s.
    clock:        Hz of the cycles in the compiler's estimates.
    memory:       bytes of HBM.
    bandwidth:    bytes/s of HBM.
    interconnect: bytes/s that leave it over all its links together: half of the
                  bidirectional figure that is stated.
    note:         what one device is, where it is not a chip.
    """

    kind: str
    peak: float
    clock: float
    memory: float
    bandwidth: float
    interconnect: float
    note: str = ""


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The clock follows from the stated peak and
# the products per cycle that the compiler reckons with (of a large matrix product, as a
# multiple of 65,536: v5e and a core of v4 1, v5p 2, v6e 4).
CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 1.5e9, 16e9, 819e9, 200e9),
    "v5p": Chip("TPU v5", 459e12, 1.75e9, 95e9, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 918e12, 1.75e9, 32e9, 1638e9, 400e9),
    "v4": Chip(
        *("TPU v4", 137.5e12, 1.05e9, 16e9, 600e9, 150e9),
        "libtpu shows each of a v4 chip's two cores as a device: figures are per core",
    ),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:16x16".

    Raises:
      ValueError: the generation is not in the table.

    >>> chip_of("v6e:2x2").kind
    'TPU v6 lite'
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise ValueError(
            f"topology={topology!r}: no peak, clock and memory are known for "
            f"{generation!r}. Known: {', '.join(CHIPS)}; for another, add what its "
            "maker states to scripts/plan_lib/chips.py."
        )
    return CHIPS[generation]


def alone(topology: str) -> str:
    """The topology of one device of the same generation.

    >>> alone("v5e:16x16"), alone("v5p:2x2x1")
    ('v5e:1x1', 'v5p:1x1x1')
    """
    generation, _, grid = topology.partition(":")
    return generation + ":" + "x".join("1" for _ in grid.split("x"))
