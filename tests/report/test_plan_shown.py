"""How the planner came to its choice is shown: budgets, the front, what is certain; and the front of `vlmopt plan`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.sample import full, trial
from vlmopt.report import read_report, render_markdown
from vlmopt.report.charts import chosen_trial, trial_front, trial_plot
from vlmopt.report.front import front_svg, front_table
from vlmopt.report.html import front_html, render_html
from vlmopt.report.summary import summarize


def front() -> dict[str, Any]:
    """Four cuts as `vlmopt plan --front` finds them."""
    points = [
        {
            "n_cut": n,
            "loss": 0.01 * n**2 - 0.01,
            "loss_error": 0.02 * n**0.5,
            "drop_points": 0.5 * n,
            "saves": {"macs": {"saved": 1e8 * n, "total": 1e9, "share": 0.1 * n}},
            "sites": [f"encoder/layers.{i}.<ffn>" for i in range(n)],
        }
        for n in range(4)
    ]
    return {"model": "models/dual", "tasks": ["style"], "unit": "loss", "resource": "macs", "points": points}


def with_trials(*trials: dict[str, Any]) -> dict[str, Any]:
    found = full()
    found["plan"]["trials"] = list(trials)
    return found


def test_the_front_holds_the_trials_that_none_beats_in_both() -> None:
    trials = [trial(1, drop=0.2), trial(2, drop=0.1), trial(3, drop=0.5), trial(3, drop=0.4), trial(4, drop=0.4)]
    assert trial_front(read_report(with_trials(*trials))) == [1, 4]
    assert trial_front(read_report(with_trials())) == []


def test_the_choice_of_the_planner_wins_over_the_cut_that_saves_most() -> None:
    trials = [trial(1, drop=0.1) | {"is_chosen": True}, trial(2, drop=0.1), trial(3, drop=0.1)]
    assert chosen_trial(read_report(with_trials(*trials))) == 0
    for one in trials:
        one.pop("is_chosen", None)
    assert chosen_trial(read_report(with_trials(*trials))) == 2


def test_the_plot_joins_the_front_and_draws_no_bound_where_none_was_set() -> None:
    found = with_trials(*(trial(n, drop=0.1 * n) for n in range(1, 5)))
    drawn = str(trial_plot(read_report(found)))
    assert drawn.count('class="front"') == 3
    assert "allowed 1" in drawn
    found["plan"]["max_drop_points"] = None
    assert "allowed" not in str(trial_plot(read_report(found)))


def test_budgets_and_what_did_not_go_straight_are_in_every_form() -> None:
    found = full()
    found["plan"] |= {"limits": ["macs 0.5x", "latency 5ms"], "max_drop_points": None}
    found["plan"]["notes"] = ["a plan that missed its budget was tightened: latency 6ms, 5ms allowed"]
    page, text = render_html(found), render_markdown(found)
    assert "It had to stay within macs 0.5x, latency 5ms" in page
    assert "On the items that no search looked at it dropped 0.6 ± 0.4 points" in page
    for shown in (page, text):
        assert "a plan that missed its budget was tightened" in shown
    assert "within macs 0.5x, latency 5ms" in text
    assert "On items that no search looked at it dropped 0.6 ± 0.4 points." in text
    asked = next(s for s in summarize(read_report(found)).statements if s.label == "What was asked")
    assert "The compiled model must stay within macs 0.5x and latency 5ms." in asked.sentences


def test_every_cut_says_whether_it_is_certain() -> None:
    found = full()
    text, page = render_markdown(found), render_html(found)
    assert text.count("| cut (certain) |") == 4
    assert text.count("| cut (uncertain) |") == 1
    assert page.count("cut: certain<") == 2 * 4  # in the title and in the drawn evidence
    assert page.count("cut: uncertain<") == 2
    (statement,) = [s for s in summarize(read_report(found)).statements if s.label == "What was cut"]
    assert any(sentence.startswith("4 of 5 cuts are certain") for sentence in statement.sentences)
    for row in found["branches"]:
        row.pop("certainty", None)
    assert "certain" not in render_markdown(found)


def test_a_front_is_a_table_a_page_and_a_picture() -> None:
    table = front_table(front())
    assert table.columns == ("sites cut", "MACs saved", "predicted loss", "predicted drop (points)")
    assert table.rows[2] == ("2", "200 M (20 %)", "0.0300 ± 0.0283", "1.00")
    picture, page = front_svg(front()), front_html(front())
    assert picture.count("<circle") == 4
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "encoder/layers.0.&lt;ffn&gt;" in page
    assert "<ffn>" not in page


def test_a_front_without_totals_is_drawn_in_millions() -> None:
    found = front()
    for point in found["points"]:
        point["saves"]["macs"] |= {"total": None, "share": None}
    assert "saved MACs (millions)" in front_svg(found)
    assert front_table(found).rows[1][1] == "100 M"


@pytest.mark.parametrize("field", ["limits", "notes", "kept_out_drop_points"])
def test_a_report_of_an_older_version_has_none_of_it_and_is_shown(field: str) -> None:
    found = full()
    found["plan"].pop(field, None)
    assert "What was tried before choosing" in render_html(found)
