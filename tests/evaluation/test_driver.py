"""The driver of a stage: groups, shapes, chunks, programs and the judge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.attacks.base import Attack, inform
from robustjax.evaluation import driver, judge, suites
from robustjax.evaluation import stage as stages
from robustjax.models.canonical import canonicalize
from tests.evaluation.small_net import (
    COUNT,
    NET,
    THREAT,
    X,
    Y,
    evaluate,
    make_net,
    with_suite,
)


def make_late(settings):
    """Claims to have won at x, which is no win; does win at its fourth point."""

    def init(key, problem):
        del key
        return (jnp.zeros_like(problem.x), jnp.zeros(len(problem.x), jnp.int32))

    def step(key, state, problem):
        delta, t = state
        score, logits = problem.score(problem.x + delta, key)
        info = inform(problem, delta, score, logits)
        info = info._replace(success=info.success | (t == 0))
        far = jnp.where(t[:, None, None, None] >= 2, settings, 0.0)
        return (jnp.broadcast_to(far, delta.shape), t + 1), info

    return Attack(init, step)


def test_what_the_judge_refuses_is_attacked_on():
    def threshold(x):
        bright = x.mean((1, 2, 3))
        return jnp.stack([0.5 - bright, bright - 0.5], -1)

    x = np.full((5, 6, 6, 1), 0.4, np.float32)
    x[3:] = 0.1
    late = stages.Stage("late", make_late, np.float32(0.2), 10, "margin", chunk=1)

    def suite(board):
        board.run(late)

    report = with_suite(suite, threshold, x, np.zeros(5, int), rj.linf(0.2))
    np.testing.assert_array_equal(report.robust, [False] * 3 + [True] * 2)


@pytest.mark.parametrize(("batch_size", "chunk"), [(16, 1), (4, 7), (24, 100)])
def test_shapes_and_chunks_change_no_verdict(batch_size, chunk):
    def suite(board):
        stage = suites.apgd_stage(board, "apgd", "cross_entropy", 30)
        board.run(stage._replace(chunk=chunk))

    found = with_suite(suite, NET, X, Y, THREAT, batch_size)
    reference = with_suite(suite, NET, X, Y, THREAT, 16)
    np.testing.assert_array_equal(found.robust, reference.robust)


def test_steps_from_the_host_are_those_of_the_loop():
    f = canonicalize(NET)
    rows = stages.Rows(X, Y, np.arange(COUNT), np.zeros_like(Y), np.full(COUNT, 0.03))
    rows = jax.tree.map(lambda a: a.astype("float32" if a.dtype == float else "int32"),
                        rows._replace(x=X))._replace(x=X)  # fmt: skip
    one = judge.Driver(
        judge.Model(f, jnp.float32(1)),
        dataclasses.replace(THREAT, epsilon=0.0),
        (16,),
        True,
        None,
        jax.random.split(jax.random.key(0), 1),
    )
    settings = suites.apgd.apgd_settings(20, rj.Linf())
    stage = stages.Stage("apgd", suites.apgd.kernel, settings, 21)
    looped = driver.drive(one, stage, rows, jax.random.key(3))
    hosted = driver.drive(one._replace(looped=False), stage, rows, jax.random.key(3))
    np.testing.assert_array_equal(looped.broken, hosted.broken)
    np.testing.assert_allclose(looped.margin, hosted.margin, rtol=1e-4, atol=1e-5)
    assert looped.passes == hosted.passes


@pytest.mark.parametrize("count", [1, 5, 16, 17, 40, 63, 64, 65, 178, 255, 300, 1000])
def test_a_plan_holds_all_rows_and_little_else(count):
    shapes = (16, 64, 256)
    parts = judge.plan(count, shapes)
    assert sum(parts) - parts[-1] < count <= sum(parts)
    assert set(parts) <= set(shapes)
    assert sum(parts) < count + 16 + 0.25 * count


def test_no_shape_is_compiled_twice():
    few = {"suite": ("apgd-ce", "apgd-t", "fab-t"), "batch_size": 4}  # one shape
    evaluate(**few)
    before = driver.programs(judge.compiler_options()).advance._cache_size()
    evaluate(**few)
    evaluate(make_net(7), threat=rj.linf(0.02), key=jax.random.key(1), **few)
    evaluate(x=X[:9], y=Y[:9], **few)
    assert driver.programs(judge.compiler_options()).advance._cache_size() == before


def test_with_a_compilation_cache_no_program_calls_onednn(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "convolution_options", lambda: {"onednn": True})
    cached = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert judge.compiler_options() == (("onednn", True),)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert judge.compiler_options() == ()
    finally:
        jax.config.update("jax_compilation_cache_dir", cached)


def test_what_the_last_pass_finds_wrong_is_broken(monkeypatch):
    """A judge that confirms nothing in the middle; at the end the truth counts."""
    blind = driver.judge

    def never(*arguments):
        verdict = blind(*arguments)
        return verdict._replace(wrong=np.zeros_like(verdict.wrong))

    monkeypatch.setattr(driver, "judge", never)
    found = evaluate(suite=("apgd-ce",), threat=rj.linf(0.3))
    monkeypatch.undo()
    assert found.robust_accuracy == 0
    assert found.threats["threat"].broken_by["last pass"].all()
