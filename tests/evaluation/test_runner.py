"""The runner and the report on models whose truth is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax import testing
from robustjax.attacks.pgd import fgsm
from robustjax.evaluation.attack import PGD, _attack_batch
from robustjax.parallel import data_mesh

ORACLE = testing.linear_oracle("Linf", batch_size=10, box_active=True, seed=3)
QUIET = {"progress": False, "checks": "none"}
# Two attacks, each on everybody: cheaper to compile than a suite.
FGSM = fgsm()
SINGLE = {"suite": None, "attacks": {"FGSM": FGSM, "PGD-40": PGD}}
SINGLE |= {"individual": True, **QUIET}


def test_robust_accuracy_is_that_of_the_linear_oracle():
    report = rj.evaluate(ORACLE.logits_fn, ORACLE.x, ORACLE.y, ORACLE.threat, **SINGLE)
    np.testing.assert_array_equal(report.robust, ORACLE.worst_margin > 0)
    assert report.clean_accuracy == 1.0
    assert 0 < report.robust_accuracy < 1
    found = report.threats["threat"]
    broken = ~report.robust
    adversarial = found.x_adv[broken]
    assert (np.argmax(ORACLE.logits_fn(adversarial), -1) != ORACLE.y[broken]).all()
    inside = rj.is_feasible(ORACLE.threat, ORACLE.x, jnp.asarray(found.x_adv))
    assert bool(inside.all())


def test_misclassified_examples_are_not_robust_and_not_attacked():
    y = np.array(ORACLE.y)
    y[:3] = 1 - y[:3]
    report = rj.evaluate(ORACLE.logits_fn, ORACLE.x, y, ORACLE.threat, **SINGLE)
    assert report.clean_accuracy == pytest.approx(0.7)
    assert not report.robust[:3].any()
    np.testing.assert_array_equal(report.threats["threat"].x_adv[:3], ORACLE.x[:3])


def test_a_wrong_model_has_accuracy_zero():
    y = 1 - np.array(ORACLE.y)
    report = rj.evaluate(ORACLE.logits_fn, ORACLE.x, y, ORACLE.threat, **SINGLE)
    assert report.clean_accuracy == report.robust_accuracy == 0.0


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batch_size_and_padding_change_nothing(batch_size):
    whole = rj.attack(ORACLE.logits_fn, ORACLE.x, ORACLE.y, ORACLE.threat)
    cut = rj.attack(
        ORACLE.logits_fn, ORACLE.x, ORACLE.y, ORACLE.threat, batch_size=batch_size
    )
    assert cut.x_adv.shape == whole.x_adv.shape
    np.testing.assert_allclose(cut.x_adv, whole.x_adv, atol=1e-5)
    np.testing.assert_array_equal(cut.success, whole.success)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_four_devices_find_what_one_finds(batch_size):
    given = ORACLE.logits_fn, ORACLE.x, ORACLE.y
    each = rj.linf(np.linspace(0.5, 1.5, 10) * float(ORACLE.threat.epsilon))
    for threat in (ORACLE.threat, each):
        one = rj.attack(*given, threat)
        mesh = data_mesh(jax.devices()[:4])
        four = rj.attack(*given, threat, batch_size=batch_size, mesh=mesh)
        assert four.x_adv.shape == one.x_adv.shape  # 10 rows: padded, cut again
        np.testing.assert_allclose(four.x_adv, one.x_adv, atol=1e-5)
        np.testing.assert_array_equal(four.success, one.success)


def test_a_subset_with_its_index_gets_the_same_noise():
    attack_fn = rj.noise("uniform")
    whole = rj.attack(ORACLE.logits_fn, ORACLE.x, ORACLE.y, ORACLE.threat, attack_fn)
    rows = np.array([7, 2, 5])
    some = rj.attack(
        ORACLE.logits_fn,
        ORACLE.x[rows],
        ORACLE.y[rows],
        ORACLE.threat,
        attack_fn,
        index=rows,
    )
    np.testing.assert_array_equal(some.x_adv, whole.x_adv[rows])


def test_every_example_may_have_its_own_epsilon():
    epsilon = np.linspace(0, 0.3, 10).astype(np.float32)
    threat = rj.linf(epsilon)
    report = rj.evaluate(
        ORACLE.logits_fn, ORACLE.x, ORACLE.y, threat, batch_size=4, **SINGLE
    )
    worst = [
        testing._least(
            "Linf",
            (1 if y == 0 else -1) * np.asarray(ORACLE.logits_fn.args[0], np.float64),
            -np.asarray(x, np.float64),
            1 - np.asarray(x, np.float64),
            float(e),
        )
        for x, y, e in zip(ORACLE.x, ORACLE.y, epsilon, strict=True)
    ]
    np.testing.assert_array_equal(
        report.robust, ORACLE.clean_margin + 2 * np.array(worst) > 0
    )


def test_several_threats_and_their_union(tmp_path):
    threats = {"Linf": rj.linf(0.1), "L2": rj.l2(0.3)}
    report = rj.evaluate(ORACLE.logits_fn, ORACLE.x, ORACLE.y, threats, **SINGLE)
    both = report.threats["Linf"].robust & report.threats["L2"].robust
    np.testing.assert_array_equal(report.robust, both)
    folder = report.save(tmp_path / "aa")
    saved = json.loads((folder / "report.json").read_text())
    assert saved["robust_accuracy"] == report.robust_accuracy
    assert saved["threats"]["L2"]["accuracy"]["FGSM"] == report.accuracy("L2", "FGSM")
    with np.load(folder / "examples.npz") as arrays:
        np.testing.assert_array_equal(
            arrays["Linf/x_adv"], report.threats["Linf"].x_adv
        )
    table = str(report)
    assert f"{report.robust_accuracy:.3f}" in table
    assert "FGSM" in table


def test_a_lying_attack_is_not_believed():
    """Success counts only when the judge confirms it: here nothing is adversarial."""

    def liar(key, problem):
        yes = jnp.ones(problem.x.shape[0], bool)
        zero = jnp.zeros(problem.x.shape[0])
        return rj.Result(problem.x + 5.0, yes, zero, zero)

    def outside(key, problem):
        result = rj.pgd(5)(key, problem._replace(threat=rj.linf(0.9)))
        return result

    for attack_fn in (liar, outside):
        with pytest.warns(rj.ModelWarning, match="were refused"):
            report = rj.evaluate(
                ORACLE.logits_fn,
                ORACLE.x,
                ORACLE.y,
                rj.linf(1e-4),
                suite=None,
                attacks={"mine": attack_fn},
                **QUIET,
            )
        assert report.robust_accuracy == 1.0
        assert [flag.name for flag in report.flags] == [
            "points outside the threat model"
        ]


def test_what_is_found_under_one_threat_hides_no_finding_under_another():
    def outside(key, problem):
        """Every row a step further; the first ones are inside the ball."""
        result = rj.fgsm()(key, problem)
        rows = problem.x.shape[0]
        far = 0.02 * problem.index.astype(jnp.float32)[:, None]
        moved = jnp.clip(problem.x + far, 0, 1)
        return result._replace(x_adv=moved, success=jnp.ones(rows, bool))

    threats = {"small": rj.linf(0.01), "larger": rj.linf(0.1)}
    with pytest.warns(rj.ModelWarning, match="were refused") as warned:
        report = rj.evaluate(
            *(ORACLE.logits_fn, ORACLE.x, ORACLE.y, threats),
            suite=None,
            attacks={"mine": outside},
            **QUIET,
        )
    assert [flag.message.split(":")[0] for flag in report.flags] == list(threats)
    assert len(warned) == 2


def test_own_attacks_are_traced_as_they_run():
    """Epsilon is traced, and success is bool: found before the suite, by name."""

    def concrete(key, problem):
        return rj.fgsm()(
            key, problem._replace(threat=rj.linf(float(problem.threat.epsilon[0])))
        )

    def counting(key, problem):
        result = rj.fgsm()(key, problem)
        return result._replace(success=result.success.astype(jnp.float32))

    for attack_fn, kind, message in (
        (concrete, jax.errors.ConcretizationTypeError, "float"),
        (counting, TypeError, "returned success of float32: it must be bool"),
    ):
        with pytest.raises(kind, match=message) as raised:
            rj.evaluate(
                *(ORACLE.logits_fn, ORACLE.x, ORACLE.y, rj.linf(0.1)),
                suite="fast",
                attacks={"mine": attack_fn},
                **QUIET,
            )
        assert "attacks['mine']" in "".join(
            [str(raised.value), *getattr(raised.value, "__notes__", ())]
        )


@pytest.mark.parametrize("upper", [1.0, 255.0])
def test_the_judge_allows_for_rounding_in_any_box(upper):
    """In [0, 255] a rounded x_adv - x passes epsilon by more than 1e-6 of it."""

    def scaled(x):
        return ORACLE.logits_fn(x / upper)

    threat = rj.linf(0.1 * upper, 0, upper)
    report = rj.evaluate(scaled, upper * ORACLE.x, ORACLE.y, threat, **SINGLE)
    np.testing.assert_array_equal(report.robust, ORACLE.worst_margin > 0)
    far = np.asarray(ORACLE.x) * upper
    far[0, 0] = upper / 2 + 0.1001 * upper
    x = far.copy()
    x[0, 0] = upper / 2
    inside = rj.is_feasible(threat, jnp.asarray(x), jnp.asarray(far))
    assert inside.tolist() == [False] + [True] * 9


def test_two_checkpoints_share_one_program():
    def linear(w, x):
        return x @ w

    attack_fn = rj.pgd(3)
    before = _attack_batch._cache_size()
    for seed in range(3):
        w = jax.random.normal(jax.random.key(seed), (12, 2))
        f = jax.tree_util.Partial(linear, w)
        rj.attack(f, ORACLE.x, ORACLE.y, rj.linf(0.01 * (seed + 1)), attack_fn)
    assert _attack_batch._cache_size() == before + 1


LINEAR = jax.tree_util.Partial(
    lambda w, x: x.reshape(len(x), -1) @ w, jnp.array([[1.0, -1.0], [-1.0, 1.0]])
)
POINTS = np.array([[0.6, 0.5], [0.9, 0.1]], np.float32), np.array([0, 0])


def own(attacks, **more):
    options = {"suite": None, "checks": "none", "progress": False, "batch_size": 2}
    return rj.evaluate(
        LINEAR, *POINTS, rj.linf(0.1), attacks=attacks, **options, **more
    )


def test_a_resume_refuses_an_own_attack_that_computes_something_else(tmp_path):
    weak, strong = (rj.pgd(1, step_size=s, random_start=False) for s in (0.5, 1.0))
    first = own({"mine": weak}, resume=tmp_path)
    assert first.robust_accuracy == 1.0
    assert own({"mine": weak}, resume=tmp_path).robust_accuracy == 1.0
    with pytest.raises(ValueError, match="'attacks': an added attack computes"):
        own({"mine": strong}, resume=tmp_path)


def test_own_attacks_are_looked_at_before_anything_runs():
    """A mistake in an attack must not cost the suite that runs before it."""
    for attack_fn, message in (
        (lambda key, p: p.x, "returned a .*: return robustjax.Result"),
        (
            lambda key, p: rj.pgd(1)(key, p)._replace(x_adv=p.x[:1]),
            "returned x_adv of shape",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=r"attacks\['bad'\]") as error:
            own({"bad": attack_fn})
        assert error.match(message)
    with pytest.raises(ZeroDivisionError) as error:
        own({"bad": lambda key, p: 1 / 0})
    assert any("attacks['bad']" in note for note in error.value.__notes__)
    for name in (3, "", "last pass"):
        with pytest.raises(ValueError, match="attacks has the name"):
            own({name: rj.pgd(1)})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("key", jax.random.split(jax.random.key(0), 3), "one key"),
        ("key", np.random.default_rng(0), "no JAX key"),
        ("batch_size", None, "must be an integer"),
        ("batch_size", 2.5, "must be an integer"),
    ],
    ids=["three keys", "numpy", "None", "float"],
)
def test_wrong_kinds_of_arguments_are_named(argument, value, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        rj.evaluate(
            LINEAR,
            *(*POINTS, rj.linf(0.1)),
            **{"progress": False, argument: value},
        )
    assert str(error.value).startswith(argument)


def test_a_model_that_returns_more_than_logits_is_told():
    with pytest.raises(TypeError, match="returned a tuple"):
        rj.evaluate(lambda x: (LINEAR(x), {}), *POINTS, rj.linf(0.1))


def test_a_damaged_ledger_is_named(tmp_path):
    own({"mine": rj.pgd(1)}, resume=tmp_path)
    header = next(tmp_path.rglob("header.json"))
    group = next(tmp_path.rglob("*.npz"))
    group.write_bytes(group.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{group.name} is damaged"):
        own({"mine": rj.pgd(1)}, resume=tmp_path)
    header.write_text("{")
    with pytest.raises(ValueError, match=r"header.json is damaged"):
        own({"mine": rj.pgd(1)}, resume=tmp_path)


def test_a_warning_points_at_the_line_that_evaluates():
    def probabilities(x):
        return jax.nn.softmax(LINEAR(x))

    options = {"suite": None, "attacks": {"mine": rj.pgd(1)}, "progress": False}
    with pytest.warns(rj.ModelWarning, match="probabilities") as seen:
        rj.evaluate(probabilities, *POINTS, rj.linf(0.1), batch_size=2, **options)
    assert {warning.filename for warning in seen} == {__file__}


def test_weights_that_a_function_closes_over_are_read_anew_under_another_norm():
    """They should be data; but nobody must be attacked on old, judged on new ones."""
    x = np.full((4, 6), 0.5, np.float32)
    y = np.zeros(4, np.int32)
    weights = {"w": np.array([1, 1, 1, 1, 1, 1], np.float32)}

    def f(x):
        margin = (x - 0.5) @ weights["w"] + 0.1
        return jnp.stack([margin, -margin], 1)

    def robust(threat):
        found = rj.evaluate(
            *(f, x, y, threat),
            suite=("apgd-ce",),
            batch_size=4,
            checks="none",
            progress=False,
        )
        return found.robust_accuracy

    assert robust(rj.linf(0.01)) == 1  # moves the margin by 0.06 of 0.1
    # Another direction alone counts now: only a gradient of these weights finds it.
    weights["w"] = np.array([-9, 0, 0, 0, 0, 0], np.float32)
    assert robust(rj.l2(0.02)) == 0
