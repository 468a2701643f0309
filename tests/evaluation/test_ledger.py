"""What a ledger keeps of a group. How a run goes on from it: test_resume.py."""

import numpy as np

from robustjax.evaluation.ledger import Ledger
from robustjax.evaluation.stage import Outcome, Passes


def test_a_ledger_keeps_the_points_that_the_last_pass_could_find_wrong(tmp_path):
    """It judges at another precision: what is almost broken is not forgotten."""
    index, x = np.arange(5), np.zeros((5, 2), np.float32)
    margin = np.array([0.5, -1.0, 0.1, 10.0, np.inf], np.float32)
    no = np.zeros(5, bool)
    outcome = Outcome(index == 0, x + 1, margin, no, np.zeros(0), no, Passes())
    for points, kept in ((False, [1, 1, 1, 0, 0]), (True, [1, 1, 1, 1, 1])):
        folder = tmp_path / str(points)
        Ledger(folder, {"model": "a"}, margin).put("0", "s", index, outcome, points)
        found = Ledger(folder, {"model": "a"}, margin).get("0", index, x)
        assert found is not None
        assert found.x_adv[:, 0].tolist() == kept
        np.testing.assert_array_equal(found.margin, margin)
