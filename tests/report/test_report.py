from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from tests.report.sample import branch, full, report
from vlmopt.core.errors import ArtifactError
from vlmopt.report import compare_markdown, compare_terminal, read_report, render_markdown, render_terminal


def terminal_text(renderable: object, width: int = 200) -> str:
    stream = StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def test_markdown_shows_before_and_after_with_intervals() -> None:
    text = render_markdown(report())
    assert text.startswith("# dual for style | drawing\n")
    assert "| accuracy (%) | 72.0 [65.0, 78.0] | 71.5 [64.0, 77.0] | -0.5 points |" in text
    assert "| macro_f1 (%) | 70.0 | 69.0 | -1.0 points |" in text
    assert "Drop 0.5 points (95 % interval -1.2 to 2.5, p = 0.61), n = 200." in text
    assert "| parameters | 22 M | 5.5 M | 4.00 times smaller |" in text
    assert "| MACs for one sample | 1.5 G | 500 M | 3.00 times smaller |" in text
    assert "| image_encoder latency (ms) | 32.00 | 8.00 | 4.00 times faster |" in text
    assert "| text_encoder latency (ms) | 5.00 | gone |  |" in text


def test_markdown_shows_what_was_cut_with_importance_and_standard_error() -> None:
    text = render_markdown(report())
    assert "| image_encoder | layers.0.ffn | ffn | cut | 1 k | 2 k | 0.0002 ± 0.0010 |" in text
    assert "| image_encoder | layers.1.ffn | ffn | kept | 1 k | 2 k | 0.3100 ± 0.0010 |" in text
    assert "1 of 2 branches are kept." in text


def test_markdown_shows_passes_predicted_beside_counted_and_refusals_by_reason() -> None:
    text = render_markdown(report())
    assert "| 1 skip-branches | lossy | judged on the task | 2 | 1 | 2 | 2 k | 2.01 k | 1 k | 1 k |" in text
    assert "| skip-branches | read behind it | image_encoder/x | 2 |" in text


def test_markdown_shows_gates_stages_warnings_and_how_to_repeat_it() -> None:
    text = render_markdown(report())
    assert "| parity onnx | FAILED | 0.25 | 0.0001 |" in text
    assert "| profile | 60.0 |" in text
    assert "64.2 s in all." in text
    assert "> **Warning:** the test split is small" in text
    assert "```sh\nvlmopt optimize --recipe out/recipe.yaml -o again\n```" in text


def test_words_of_the_user_cannot_break_a_table() -> None:
    spoiled = report()
    spoiled["branches"][0]["name"] = "a | b\nc"
    assert "| a \\| b c |" in render_markdown(spoiled)


def test_the_terminal_shows_the_same_numbers() -> None:
    text = terminal_text(render_terminal(report()))
    for part in (
        "72.0 [65.0, 78.0]",
        "0.3100 ± 0.0010",
        "FAILED",
        "2.01 k",
        "64.2 s in all.",
        "warning: the test split",
    ):
        assert part in text


def test_brackets_in_names_are_text_and_not_styles() -> None:
    spoiled = report()
    spoiled["branches"][0]["name"] = "layers[bold].ffn"
    assert "layers[bold].ffn" in terminal_text(render_terminal(spoiled))


def test_a_run_without_a_task_shows_costs_only() -> None:
    bare = report()
    bare |= {"task": None, "passes": [], "branches": [], "gates": [], "stages": [], "warnings": [], "reproduce": ""}
    bare["result"] |= {"metric": None, "size_bytes": None, "latency_ms": {}}
    text = render_markdown(bare)
    assert text.startswith("# dual\n")
    assert "| parameters | 22 M" in text
    assert "What was cut" not in text
    assert "Gates" not in text


def test_a_model_that_lost_nothing_shows_no_table_of_branches() -> None:
    whole = report()
    whole["branches"] = [branch("layers.0.ffn", kept=True, score=0.5)]
    assert "What was cut" not in render_markdown(whole)


def test_a_comparison_has_one_row_a_report() -> None:
    other = report()
    other["task"]["name"] = "meaning"
    text = compare_markdown([report(), other])
    assert (
        "| style \\| drawing | style \\| drawing | accuracy | 72.0 | 71.5 | 0.5 | 1 FAILED | 1 of 2 | 22 M → 5.5 M |"
        in text
    )
    assert "> **Warning:** The runs are for different tasks" in text
    assert text.count("image_encoder 4.00") == 2
    assert "meaning" in terminal_text(compare_terminal([report(), other]))


def test_groups_changes_and_the_choice_are_shown_where_they_were_measured() -> None:
    text = render_markdown(full())
    assert "| 4 | 62 | 95.0 | 90.3 | 4.7 | 0.5 to 9.7 |" in text
    assert "3 right answers became wrong, 2 wrong ones right." in text
    assert "Of 8 cuts tried, the chosen one dropped 0.4 ± 0.2 points on 150 items (1 allowed)." in text
    assert "By group" not in render_markdown(report())


def test_a_report_keeps_its_json_form() -> None:
    typed = read_report(report())
    assert read_report(json.loads(json.dumps(typed.as_dict()))) == typed


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("schema",), 2, "report.json: schema: input should be 1"),
        (("result", "metric", "n"), None, "result.metric.n"),
        (("result", "metric", "drop"), 1.0, "result.metric.drop: extra inputs are not permitted"),
        (("passes", 0, "promise"), "maybe", "passes.0.promise"),
    ],
)
def test_a_report_that_breaks_the_schema_names_the_field(
    path: tuple[str | int, ...], value: object, expected: str
) -> None:
    spoiled = report()
    section = spoiled
    for part in path[:-1]:
        section = section[part]  # type: ignore[index]
    section[path[-1]] = value  # type: ignore[index]
    with pytest.raises(ArtifactError) as caught:
        render_markdown(spoiled)
    assert expected in str(caught.value)


def test_a_report_that_is_no_object_is_refused_by_its_name() -> None:
    with pytest.raises(ArtifactError) as refused:
        read_report([], place="out/report.json")
    assert refused.value.one_line().startswith("out/report.json: input should be")
