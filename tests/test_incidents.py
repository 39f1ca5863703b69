"""What went wrong without ending a run stands in its report, each kind in a line."""

from qlora_suite.incidents import SCALE_SEARCH, incidents


def test_each_kind_has_a_line_with_its_steps_and_its_last_details() -> None:
    metrics = [
        {"step": 1, "attempt": 1, "loss": 2.0, "applied": False},
        {"step": 2, "attempt": 1, "loss": 2.0, "applied": True},
        *({"step": n, "attempt": 1, "event": "spike", "grad_norm": 91.34, "median_grad_norm": 2.0, "applied": True} for n in (3, 9)),
        {"step": 4, "attempt": 1, "event": "not finite", "grad_norm": None, "median_grad_norm": 2.0, "applied": False},
        {"step": 4, "attempt": 1, "loss": None, "applied": False},
        {"step": 4, "attempt": 2, "event": "not finite", "grad_norm": None, "median_grad_norm": 2.0, "applied": False},
        *(
            {"step": n, "attempt": 2, "event": "out of memory", "rows": 1, "tokens_at_once": 2048, "checkpointing": True}
            for n in range(5, 12)
        ),
        {"step": 5, "attempt": 2, "dev_loss": 1.0},
    ]
    assert incidents(metrics) == [
        {"what": SCALE_SEARCH, "count": 1, "steps": "step 1", "last": ""},
        {"what": "spike, clipped", "count": 2, "steps": "steps 3, 9", "last": "grad norm 91.3, median grad norm 2"},
        {"what": "not finite, not applied", "count": 1, "steps": "step 4", "last": "median grad norm 2"},
        {"what": "out of memory", "count": 7, "steps": "steps 5, 6, 7 ... 11", "last": "rows 1, tokens at once 2,048, checkpointing"},
    ]
    assert incidents(metrics[1:2]) == []
