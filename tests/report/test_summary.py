"""The first page, sentence by sentence: the numbers come from the report, and the words fit them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.sample import branch, full, report
from vlmopt.report.schema import read_report
from vlmopt.report.summary import Status, Summary, summarize


def summary_of(found: dict[str, Any]) -> Summary:
    return summarize(read_report(found))


def answer(found: dict[str, Any], label: str) -> str:
    """What the summary says to a question; empty where it leaves the question out."""
    text = {statement.label: " ".join(statement.sentences) for statement in summary_of(found).statements}.get(label, "")
    return text.replace("\N{NO-BREAK SPACE}", " ")


def measured(
    before: float, after: float, interval: tuple[float, float], p: float | None = None, **more: Any
) -> dict[str, Any]:
    found = full()
    levels = {"original": before, "optimized": after, "drop_points": round(100 * (before - after), 6)}
    found["result"]["metric"] |= {**levels, "drop_interval95": interval, "p_value": p, **more}
    return found


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            measured(0.72, 0.70, (0.5, 3.5)),
            "Accuracy falls by 2.0 points, from 72.0 % to 70.0 % (95 % interval of the fall: 0.5 to 3.5 points).",
        ),
        (
            measured(0.70, 0.72, (-3.5, 0.5)),
            "Accuracy rises by 2.0 points, from 70.0 % to 72.0 % (95 % interval of the rise: −0.5 to 3.5 points).",
        ),
        (measured(0.7, 0.7, (0.0, 0.0)), "Accuracy stays at 70.0 %."),
        (
            measured(0.7, 0.7, (-1.0, 1.5)),
            "Accuracy stays at 70.0 % (95 % interval of the change: −1.5 to 1.0 points).",
        ),
        (
            measured(0.9999, 0.9996, (0.0, 0.06)),
            "Accuracy falls by 0.03 points, from 100.0 % to 100.0 % (95 % interval of the fall: 0.0 to 0.1 points).",
        ),
    ],
    ids=["loss", "gain", "same", "same with noise", "tiny"],
)
def test_it_says_how_far_the_metric_moves_and_which_way(found: dict[str, Any], expected: str) -> None:
    assert answer(found, "What it costs") == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (measured(0.72, 0.70, (0.5, 3.5), 0.01), "fall is more than chance: its interval is above zero (p = 0.01)."),
        (measured(0.70, 0.72, (-3.5, -0.5), 1e-5), "rise is more than chance: its interval is above zero (p < 0.001)."),
        (measured(0.72, 0.71, (-0.5, 2.5), 0.2), "The change may be chance: its interval includes zero (p = 0.2)."),
        (measured(0.72, 0.71, (0.1, 2.5), 0.06), "The change is on the border of chance"),
        (measured(0.7, 0.7, (0.0, 0.0), 1.0), "Every item scores as before."),
        (measured(0.72, 0.70, (0.5, 3.5)), "The fall is more than chance: its interval is above zero."),
    ],
    ids=["clear loss", "clear gain", "chance", "border", "same", "no test"],
)  # fmt: skip
def test_it_says_whether_the_change_can_be_chance(found: dict[str, Any], expected: str) -> None:
    assert expected in answer(found, "How sure this is")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (measured(0.72, 0.70, (0.5, 3.5)), "The fall is larger than the 1 point allowed."),
        (measured(0.72, 0.715, (-0.5, 1.5)), "is within the 1 point allowed, but the interval reaches 1.5"),
        (measured(0.72, 0.718, (-0.5, 0.9)), "Even the worst end of the interval, 0.9 points, is within the 1 point"),
        (measured(0.70, 0.75, (-7.0, -3.0)), "Even the worst end of the interval is within the 1 point"),
    ],
    ids=["beyond", "interval beyond", "within", "gain"],
)
def test_it_holds_the_interval_against_what_was_allowed(found: dict[str, Any], expected: str) -> None:
    assert expected in answer(found, "How sure this is")


def test_it_says_what_was_unseen_and_warns_of_few_items() -> None:
    text = answer(full(), "How sure this is")
    assert text.startswith("Both models answered the same 200 test items; no earlier step saw them (100 items for")
    assert "With only" not in text
    few = measured(0.72, 0.70, (-4.0, 8.0), n=40)
    assert "With only 40 items, changes below about 6.0 points cannot be seen." in answer(few, "How sure this is")


def test_a_failed_gate_makes_the_verdict_and_is_named_with_its_numbers() -> None:
    verdict = summary_of(report()).verdict
    assert verdict.status is Status.FAILED
    assert verdict.title == "Do not deploy: 1 of 2 checks failed"
    assert verdict.detail == "Failed: parity onnx (found 0.25, allowed 0.0001)."


def test_many_failures_and_long_names_do_not_flood_the_page() -> None:
    found = full()
    found["gates"] = [{"name": f"gate {i}", "passed": False, "found": 1.0, "allowed": 0.5} for i in range(9)]
    found["result"]["metric"]["groups"][0]["name"] = "long " * 100
    detail = summary_of(found).verdict.detail
    assert "gate 3 (found 1, allowed 0.5); and 5 more, listed below." in detail
    assert "gate 4" not in detail
    assert "long long" in answer(found, "What gets worse")
    assert len(answer(found, "What gets worse")) < 500


def test_passed_gates_make_the_verdict() -> None:
    verdict = summary_of(full()).verdict
    assert (verdict.status, verdict.title) == (Status.PASSED, "Passed: 1 check")
    assert "the loss on the test items is within what was allowed" in verdict.detail


def test_gates_without_one_on_the_metric_do_not_claim_a_bound() -> None:
    found = full()
    found["gates"] = [{"name": "model.onnx equals the program", "passed": True, "found": 0.0, "allowed": 1e-4}]
    assert "no loss bound was checked" in summary_of(found).verdict.detail


def test_without_a_gate_nothing_is_vouched_for() -> None:
    assert summary_of(full() | {"gates": []}).verdict.status is Status.UNCHECKED


def test_without_a_task_quality_is_said_to_be_unmeasured() -> None:
    found = full() | {"task": None, "plan": None}
    found["gates"] = [{"name": "model.onnx equals the program", "passed": True, "found": 0.0, "allowed": 1e-4}]
    found["result"]["metric"] = None
    assert answer(found, "What it costs") == "Not measured, since no task was given."
    assert "No task was given" in answer(found, "What was asked")
    assert answer(found, "How sure this is") == ""
    assert "not measured" in summary_of(found).verdict.detail
    assert "Accuracy" not in [figure.label for figure in summary_of(found).figures]


def test_what_was_cut_is_counted_for_every_component() -> None:
    found = full()
    found["branches"] += [branch("blocks.0.ffn", kept=False, score=0.1) | {"component": "decoder"}]
    assert answer(found, "What was cut").startswith(
        "5 of 12 branches of the image encoder (3 feed-forward, 2 attention) and 1 of 1 branch of the decoder (1 feed-"
    )
    figure = next(figure for figure in summary_of(found).figures if figure.label == "Branches cut")
    assert figure.value == "6 of 13"


def test_nothing_cut_is_said_so() -> None:
    found = full()
    found["branches"] = [row | {"kept": True} for row in found["branches"]]
    assert answer(found, "What was cut").startswith("Nothing: all 12 branches are still there.")


def test_a_component_that_is_gone_is_named_and_its_time_is_a_gain() -> None:
    assert "The text encoder is not needed any more when the model runs." in answer(full(), "What was cut")
    assert "The text encoder took 5 ms and is not run any more." in answer(full(), "What is gained")


def test_a_component_that_was_not_timed_is_not_called_gone() -> None:
    found = full()
    found["branches"] += [branch("blocks.0.ffn", kept=True, score=0.1) | {"component": "text_encoder"}]
    assert "text encoder is not needed" not in answer(found, "What was cut")
    assert "Faster" not in [figure.label for figure in summary_of(found).figures]


def test_what_gets_worse_names_lost_items_and_the_largest_drops_with_their_intervals() -> None:
    text = answer(full(), "What gets worse")
    assert text.startswith("3 of 200 test items were right before and are wrong now; 2 were wrong and are right now.")
    assert "(2 groups fall, of 3): “4” 95.0 % → 90.3 % (62 items, 95 % interval 0.5 to 9.7)" in text
    assert "“how many yellow crosses are there?” 100.0 % → 97.0 % (12 items, too few for an interval)" in text
    assert "“0”" not in text


def test_nothing_worse_is_said_so_and_nothing_recorded_is_not_called_nothing_worse() -> None:
    found = full()
    found["result"]["metric"]["changes"] |= {"n_lost": 0}
    found["result"]["metric"]["groups"] = found["result"]["metric"]["groups"][2:]
    expected = "No test item that was right is wrong now. None of the 1 group of test items falls."
    assert answer(found, "What gets worse") == expected
    assert answer(report(), "What gets worse") == "Which items and groups get worse was not recorded."


def test_slower_and_larger_is_among_what_gets_worse_and_not_among_the_gains() -> None:
    found = full()
    pair = found["result"]["latency_ms"]["image_encoder"]
    pair["original"], pair["optimized"], pair["ratio"] = pair["optimized"], pair["original"], 0.25
    found["result"]["size_bytes"] = {"original": 22_000_000, "optimized": 33_000_000}
    assert "The image encoder is 4.00 times slower: 32 ms instead of 8 ms (median)." in answer(found, "What gets worse")
    assert "Files are 1.50 times larger: 33 MB instead of 22 MB." in answer(found, "What gets worse")
    assert "slower" not in answer(found, "What is gained")
    tones = {figure.label: (figure.value, figure.tone) for figure in summary_of(found).figures}
    assert tones["Slower"] == ("2.46×", "bad")
    assert tones["Larger"] == ("1.50×", "bad")


def test_key_figures_hold_the_numbers_of_the_report() -> None:
    figures = {f.label: (f.value.replace("\N{NO-BREAK SPACE}", " "), f.tone) for f in summary_of(full()).figures}
    assert figures["Accuracy"] == ("71.5 %", "plain")
    assert figures["Faster"] == ("4.62×", "good")  # (32 + 5) / 8 ms
    assert figures["Smaller"] == ("4.00×", "good")
    assert figures["Branches cut"] == ("5 of 12", "plain")


def test_the_machine_is_named_or_said_to_be_unknown() -> None:
    expected = "Toy Processor 9, 4 cores, 1 thread used, 8 GB memory, Linux 6.1."
    assert answer(full(), "Where it was measured").startswith(expected)
    assert answer(report(), "Where it was measured") == "The machine was not recorded."


def test_times_that_vary_much_are_said_to_say_little() -> None:
    assert "quiet" not in answer(full(), "Limits")
    found = full()
    found["result"]["latency_ms"]["image_encoder"]["optimized"] |= {"p10_ms": 2.5, "p90_ms": 18.0}
    assert "The machine was busy, since times of one graph lie between 2.5 ms and 18 ms" in answer(found, "Limits")
