import pytest

from vllm_kvcompress.bench.crossover import NEVER, Point, crossovers, pays_from, plot, tables
from vllm_kvcompress.bench.harness import Summary


def sure(ratio: float) -> Summary:
    return Summary(ratio, ratio - 0.01, ratio + 0.01)


@pytest.mark.parametrize(
    ("ratios", "smallest"),
    [({1: 0.9, 2: 0.98, 4: 1.2, 8: 2.0}, 4),
     ({1: 1.1, 2: 1.2}, 1),
     ({1: 0.8, 2: 0.9}, None),
     ({1: 0.8, 2: 1.5, 4: 0.95, 8: 1.6}, 8),  # what is lost again does not count
     ({1: 1.5, 2: 1.5, 4: 0.9}, None),
     ({4: 1.2, 1: 0.9, 2: 1.1}, 2),
     ({}, None)],
)  # fmt: skip
def test_it_pays_from_the_smallest_load_that_stays_ahead(ratios, smallest):
    assert pays_from({size: sure(ratio) for size, ratio in ratios.items()}) == smallest


def test_one_round_behind_plain_vllm_is_not_ahead():
    assert pays_from({4: Summary(1.3, 0.99, 1.5), 8: Summary(1.4, 1.01, 1.5)}) == 8
    assert pays_from({4: Summary(1.3, float("nan"), 1.5)}) is None


GRID = {
    Point(prompts, tokens): sure(0.6 + prompts * tokens / 4096)  # pays above 1,638 tokens in all
    for prompts in (1, 4, 16)
    for tokens in (128, 512, 2048)
}


def test_both_directions_of_the_grid_are_answered():
    by_tokens, by_prompts = crossovers(GRID)
    assert by_tokens == {128: 16, 512: 4, 2048: 1}
    assert by_prompts == {1: 2048, 4: 512, 16: 128}


def test_the_tables_have_a_column_per_row_and_a_dash_for_never():
    never = {point: sure(0.9) for point in GRID}
    fewest, shortest = tables({"rate 8": GRID, "rate 2": never})
    assert fewest.columns == ["prompt tokens", "rate 8", "rate 2"]
    assert fewest.rows[1] == ["512", "4", NEVER]
    assert shortest.rows[2] == ["16", "128", NEVER]
    assert "up to 16 requests" in fewest.note and "up to 2,048 tokens" in shortest.note


def test_a_row_that_died_on_the_way_is_judged_by_what_it_did():
    some = {point: ratio for point, ratio in GRID.items() if point.prompt_tokens > 128}
    fewest, shortest = tables({"rate 2": some, "rate 8": GRID})
    assert fewest.rows[0] == ["128", NEVER, "16"]
    assert shortest.rows[2] == ["16", "512", "128"]


def test_a_direction_of_one_size_has_no_table():
    line = {point: ratio for point, ratio in GRID.items() if point.prompts == 4}
    (shortest,) = tables({"rate 8": line})
    assert shortest.columns[0] == "requests at once"
    assert tables({}) == []


@pytest.mark.parametrize("prompts", [{1, 4, 16}, {4}])
def test_the_plot_is_a_small_picture(tmp_path, prompts):
    path = tmp_path / "new" / "crossover.png"
    ratios = {point: ratio for point, ratio in GRID.items() if point.prompts in prompts}
    plot({"rate 8": ratios, "refused": {}}, path, "a caption")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
