"""Operator norms of linear operators, rigorous from above.

`|A|_p = max |A x|_p / |x|_p`. For p = 1 and infinity it is the largest column or row
sum of magnitudes. For p = 2 power iteration alone is a LOWER bound; here it only
proposes a number, and a Cholesky factorization proves that nothing larger is there.
"""

import numpy as np

from robustjax.certify.operators import Chain, Op, adjoint, apply, dense, sizes

DENSE_ENTRIES, DENSE_SIDE = 2**22, 1024
OUTWARD = 1 + 1e-9
"""Sums of k terms of one sign err by less than `k * 2^-53` of their value in float64:
below this for every k up to 4 million."""
UNIT = 2.0**-53


def operator_norm(chain: Chain, norm: str) -> float:
    """An upper bound on `max |A x|_p / |x|_p` of a chain, on its actual input size.

    A chain whose matrix has at most 2^22 entries and 1024 rows or columns is taken as
    one matrix: for L1 and Linf the bound is the norm, for L2 at most 1 % above it. A
    larger one is bounded operation by operation, scales folded into the convolutions
    and matrices beside them: L1 and Linf by column and row sums of the product of
    magnitudes, L2 of a convolution as on a torus (`torus_bound`).

    Args:
      chain: linear operations in float64; the empty one is the identity.
      norm: "Linf", "L2" or "L1", on input and output.

    Returns:
      A float, rounded outward by 1e-9 of itself.

    Raises:
      ValueError: another norm.

    >>> matrix = Op("dot", (2,), (2,), np.array([[1.0, -2.0], [0.0, 3.0]]))
    >>> [round(operator_norm((matrix,), p), 3) for p in ("Linf", "L2", "L1")]
    [5.0, 3.65, 3.0]
    """
    if norm not in ("Linf", "L2", "L1"):
        raise ValueError(f"norm={norm!r}: operator norms know 'Linf', 'L2' and 'L1'.")
    if not chain:
        return 1.0
    if is_small(chain):
        matrix = dense(chain)
        if norm == "L2":
            return spectral_bounds(matrix)[1]
        return float(np.abs(matrix).sum(1 if norm == "L1" else 0).max()) * OUTWARD
    if norm != "L2":
        return _sums(chain, norm)
    total = 1.0
    for op in folded(chain):
        total *= _spectral(op)
    other = _sums(chain, "Linf") * _sums(chain, "L1")
    return float(min(total, np.sqrt(other))) * OUTWARD


def is_small(chain: Chain) -> bool:
    """Whether the chain is small enough to be taken as a matrix.

    >>> is_small((Op("dot", (3,), (2,), np.ones((3, 2))),))
    True
    """
    n_in, n_out = sizes(chain)
    return n_in * n_out <= DENSE_ENTRIES and min(n_in, n_out) <= DENSE_SIDE


def _sums(chain: Chain, norm: str) -> float:
    """Largest row (Linf) or column (L1) sum of the product of magnitudes."""
    if norm == "Linf":
        sums = apply(chain, np.ones((1, *chain[0].source)), absolute=True)
    else:
        sums = adjoint(chain, np.ones((1, *chain[-1].target)), absolute=True)
    return float(sums.max()) * OUTWARD


def _spectral(op: Op) -> float:
    """An upper bound on the L2 norm of one operation of any size."""
    if op.kind == "scale":
        return float(np.abs(op.data).max())
    if op.kind == "dot":
        return spectral_bounds(op.data)[1]
    if op.kind in ("reshape", "transpose", "pad", "slice"):
        return 1.0
    bound = np.sqrt(_sums((op,), "Linf") * _sums((op,), "L1"))
    if op.kind == "conv":
        kernel, strides, pads = op.data
        rows, columns = op.source[1:3]
        bound = min(bound, torus_bound(kernel, (rows, columns), strides, pads))
    if op.kind == "parallel":
        bound = min(bound, sum(operator_norm(chain, "L2") for chain in op.data))
    return float(bound)


def spectral_bounds(matrix: np.ndarray) -> tuple[float, float]:
    """`(lower, upper)` bounds on the largest singular value, at most 1 % apart.

    Subspace iteration on the smaller Gram matrix G gives the lower bound. The upper one
    is `sqrt(t)`, where the Cholesky factorization of `t I - G` ran to its end in
    float64, which proves that no eigenvalue of G exceeds `t (1 + n^2 2^-52)`; G's own
    rounding, at most `k 2^-52 |A|_F^2` for sums of k products, is added.

    Args:
      matrix: `[n, m]`, float64.

    Returns:
      Two floats; the upper one is a bound in spite of all rounding.

    Reference: Rump, Verification of Positive Definiteness, BIT 46 (2006).

    >>> lower, upper = spectral_bounds(np.diag([1.0, 3.0, 2.0]))
    >>> lower <= 3 + 1e-12 and 3 <= upper < 3.03
    True
    """
    matrix = np.asarray(matrix, np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("matrix holds NaN or infinity: the net's weights are broken.")
    scale = float(np.abs(matrix).max(initial=0.0))
    if scale == 0:
        return 0.0, 0.0
    matrix = matrix / scale
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    n, k = matrix.shape
    gram = matrix @ matrix.T
    trace = float(np.trace(gram))
    largest = _largest_eigenvalue(gram)
    slack = 2 * (k + 2) * UNIT * trace
    excess, top = 1e-4, 0.0
    while True:
        top = largest * (1 + excess)
        try:
            np.linalg.cholesky(top * np.eye(n) - gram)
            break
        except np.linalg.LinAlgError:
            excess *= 6
    upper = top * (1 + 2 * n * (n + 2) * UNIT) + slack
    lower = max(0.0, largest * (1 - 1e-12) - slack)
    below, above = float(np.sqrt(lower)), float(np.sqrt(upper))
    return below * scale / OUTWARD, above * scale * OUTWARD


def _largest_eigenvalue(gram: np.ndarray) -> float:
    """The largest Rayleigh quotient that subspace iteration finds."""
    n = len(gram)
    if n <= 256:
        return float(np.linalg.eigvalsh(gram)[-1])
    block = np.random.default_rng(0).normal(size=(n, 8))
    found = 0.0
    for _ in range(60):
        for _ in range(4):
            block = gram @ block
            block /= np.abs(block).max()
        block, _ = np.linalg.qr(block)
        value = float(np.linalg.eigvalsh(block.T @ gram @ block)[-1])
        if value <= found * (1 + 1e-5):
            break
        found = value
    return max(found, value)


def torus_bound(
    kernel: np.ndarray,
    size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
) -> float:
    """An upper bound on the L2 norm of a zero-padded convolution, from Fourier series.

    On a torus of `N >= size + max(pads)` pixels, a multiple of the stride, the zeros of
    the padding lie beside the image, so the convolution is a part of the torus's, which
    the Fourier transform cuts into one matrix per frequency: for stride s those of the
    `s^2` frequencies that the stride identifies, side by side, divided by s.

    Args:
      kernel: `[h, w, C, O]`.
      size: rows and columns of the image.
      strides, pads: of the convolution, pads as ((top, bottom), (left, right)).

    Returns:
      The largest singular value over all frequencies, rounded outward by 1e-9, which is
      a thousand times what LAPACK's and the transform's rounding can be. The smaller
      the image the further above the norm: some percent at 8 pixels and kernel 3.

    Reference: Sedghi, Gupta & Long, The Singular Values of Convolutional Layers,
    arXiv:1805.10408 (stride 1, circular).

    >>> bool(torus_bound(np.ones((3, 3, 1, 1)), (8, 8), pads=((1, 1), (1, 1))) >= 8.29)
    True
    """
    lengths = []
    for axis in range(2):
        taps, step, (low, high) = kernel.shape[axis], strides[axis], pads[axis]
        outputs = (size[axis] + low + high - taps) // step + 1
        least = max(size[axis] + max(low, high, 0), taps, outputs * step)
        lengths.append(-(-least // step) * step)
    symbol = np.fft.fft2(kernel, lengths, axes=(0, 1))
    (rows, columns), (down, right) = lengths, strides
    channels, features = kernel.shape[2:]
    # Frequencies a and a + N / s are the same one after the stride.
    symbol = symbol.reshape(down, rows // down, right, columns // right, -1, features)
    # A real kernel's symbol at -w is the conjugate: the same singular values.
    symbol = symbol[:, :, :, : columns // right // 2 + 1]
    symbol = symbol.transpose(1, 3, 0, 2, 4, 5).reshape(
        -1, down * right * channels, features
    )
    largest = max(
        float(np.linalg.norm(part, 2, axis=(1, 2)).max())
        for part in np.array_split(symbol, max(1, symbol.size // 2**22))
        if len(part)
    )
    return largest / np.sqrt(down * right) * OUTWARD


def folded(chain: Chain) -> Chain:
    """The same chain, with scales per channel folded into their neighbors.

    BatchNorm behind a convolution (or through the reshapes of a 1 x 1 one), and the
    division by the standard deviation before it, become part of its weights.

    >>> net = Op("dot", (1,), (2,), np.array([[3.0, 4.0]]))
    >>> scale = Op("scale", (2,), (2,), np.array([2.0, 1.0]))
    >>> folded((net, scale))[0].data.tolist()
    [[6.0, 4.0]]
    """
    ops = list(chain)
    place = 0
    while place < len(ops):
        values = _per_channel(ops[place])
        if values is None:
            place += 1
            continue
        for step in (-1, 1):
            other = place + step
            while 0 <= other < len(ops) and _keeps_channels(ops[other]):
                other += step
            if 0 <= other < len(ops) and ops[other].kind in ("conv", "dot"):
                ops[other] = _scaled(ops[other], values, before=step > 0)
                del ops[place]
                break
        else:
            place += 1
    return tuple(ops)


def _per_channel(op: Op) -> np.ndarray | None:
    """The scale `[C]` of a scale that depends on the last axis only."""
    if op.kind != "scale" or not op.source:
        return None
    rows = np.broadcast_to(op.data, op.source).reshape(-1, op.source[-1])
    return rows[0] if (rows == rows[0]).all() else None


def _keeps_channels(op: Op) -> bool:
    if op.kind == "reshape":
        same = bool(op.source) and bool(op.target)
        return same and op.source[-1] == op.target[-1]
    if op.kind == "pad":
        return op.data[-1] == (0, 0, 0)
    return op.kind == "slice" and op.data[-1] == (0, op.source[-1], 1)


def _scaled(op: Op, values: np.ndarray, before: bool) -> Op:
    if op.kind == "dot":
        matrix = op.data * (values[:, None] if before else values)
        return op._replace(data=matrix)
    kernel, strides, pads = op.data
    kernel = kernel * (values[:, None] if before else values)
    return op._replace(data=(kernel, strides, pads))
