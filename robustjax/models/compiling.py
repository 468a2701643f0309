"""Compiler options that make nets faster on CPU and TPU, where jaxlib knows them."""

import functools

import jax
import jax.numpy as jnp

ONEDNN = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
"""Convolutions by oneDNN instead of Eigen and YNNPACK; matrix products as they are."""

LARGER_TILES = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
"""Twice the fast memory of a v5e that one fusion may take."""


def tpu_options(kind: str | None = None) -> dict[str, str]:
    """Options under which products and convolutions have larger tiles on a TPU.

    By the TPU compiler's estimates for a v5e (docs/plan.md); not run on one. Only for
    kinds that were looked at.

    Args:
        kind: a device's `device_kind`; None: that of this process' first device.

    Returns:
        Options for `jax.jit(f, compiler_options=...)`; `{}` for other kinds.

    >>> tpu_options("TPU v5 lite")
    {'xla_tpu_scoped_vmem_limit_kib': '32768'}
    >>> tpu_options("cpu")
    {}
    """
    if kind is None:
        kind = jax.devices()[0].device_kind
    return dict(LARGER_TILES) if kind == "TPU v5 lite" else {}


@functools.cache
def convolution_options() -> dict[str, bool | str]:
    """Options for `jax.jit(f, compiler_options=...)` under which convolutions are fast.

    On CPU oneDNN's; on TPU `tpu_options`.

    Measured (JAX 0.12): a third less time for the PGD-7 training step of
    PreActResNet-18 of width 16, a tenth for that of Madry's net (docs/benchmarks.md).
    JAX 0.10 accepts the options, and convolves as before. The options belong to one
    compiled program: nothing global changes, and a jaxlib that does not know them is
    found out by a trial compilation (with `XLA_FLAGS` it would abort). Results differ
    from those without the options by float32 rounding. A compilation cache
    (`jax_compilation_cache_dir`) does not keep programs that call oneDNN.

    Returns:
        The options, or `{}` where they do not apply.

    >>> f = jax.jit(lambda x: 2 * x, compiler_options=convolution_options())
    >>> float(f(1.0))
    2.0
    """
    platform = jax.default_backend()
    options = {"cpu": lambda: dict(ONEDNN), "tpu": tpu_options}.get(platform, dict)()
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(1.0).compile()
    except Exception:  # what an unknown option raises differs between versions
        return {}
    return options


@functools.cache
def quick_options(level: int = 0) -> dict[str, bool | int]:
    """Options under which a program takes less time to compile, on CPU.

    Measured (JAX 0.12): level 1 takes a fifth off the programs of `evaluate` on a small
    net and a third off a PreActResNet-18's input gradient, and costs nothing when they
    run; level 0 takes half, and its programs ran 5 times slower.

    Args:
        level: of the compiler's optimizations, 0 to 3.

    Returns:
        The options on CPU, else `{}`.

    >>> f = jax.jit(lambda x: 2 * x, compiler_options=quick_options())
    >>> float(f(1.0))
    2.0
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, bool | int] = {"xla_backend_optimization_level": level}
    return (
        options | {"xla_llvm_disable_expensive_passes": True} if not level else options
    )
