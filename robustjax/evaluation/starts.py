"""Where an attack may begin: other examples' images, and noise.

Any choice among the evaluated examples is decided by `index`, never by position.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.evaluation.board import Board
from robustjax.problems import example_keys

CANDIDATES = 2000


def _keys(board: Board, places: np.ndarray, label: str):
    key = jax.random.fold_in(board.key, zlib.crc32(f"{label} start".encode()) >> 1)
    return example_keys(key, jnp.asarray(board.index[places]))


def other_image(board: Board, places: np.ndarray, label: str) -> np.ndarray:
    """`[n, ...]`: for each place a random image with another label.

    Among the correctly classified ones; where there is none, noise (`noisy`).
    """
    pool = board.ordered(np.flatnonzero(board.correct))
    draws = jax.vmap(jax.random.uniform)(_keys(board, places, label))
    chosen, alone = np.array(places), np.ones(len(places), bool)
    for number, (place, draw) in enumerate(zip(places, np.asarray(draws), strict=True)):
        others = pool[board.y[pool] != board.y[place]]
        if len(others):
            chosen[number] = others[int(draw * len(others))]
            alone[number] = False
    return _or_noise(board, places, label, board.x[chosen], alone)


def _or_noise(
    board: Board, places: np.ndarray, label: str, start: np.ndarray, alone: np.ndarray
) -> np.ndarray:
    start = np.array(start, np.float32)
    if alone.any():
        start[alone] = noisy(board, places[alone], label)
    return start


def near_image(board: Board, places: np.ndarray, label: str) -> np.ndarray:
    """`[n, ...]`: for each place the nearest (L2) such image among the first 2000."""
    pool = board.ordered(np.flatnonzero(board.correct))[:CANDIDATES]
    if not len(places):
        return board.x[places]
    flat = board.x.reshape(len(board.x), -1).astype(np.float64)
    squares = np.sum(flat[pool] ** 2, 1)
    chosen, alone = np.array(places), np.zeros(len(places), bool)
    for begin in range(0, len(places), 256):
        here = places[begin : begin + 256]
        distance = squares[None] - 2 * flat[here] @ flat[pool].T
        distance[board.y[here][:, None] == board.y[pool][None]] = np.inf
        best = np.argmin(distance, 1)
        usable = np.isfinite(distance[np.arange(len(here)), best])
        chosen[begin : begin + 256] = np.where(usable, pool[best], here)
        alone[begin : begin + 256] = ~usable
    return _or_noise(board, places, label, board.x[chosen], alone)


def normal(board: Board, places: np.ndarray, label: str) -> np.ndarray:
    """`[n, ...]`: `x + N(0, 1)`, also outside of the input box."""
    shape = board.x.shape[1:]
    keys = _keys(board, places, label)
    draws = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return (board.x[places] + np.asarray(draws)).astype(np.float32)


def noisy(board: Board, places: np.ndarray, label: str) -> np.ndarray:
    """`[n, ...]`: `clip(x + N(0, 1))` in the input box."""
    threat = board.driver.threat
    low, high = np.asarray(threat.lower), np.asarray(threat.upper)
    return np.clip(normal(board, places, label), low, high).astype(np.float32)
