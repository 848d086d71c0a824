import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plotly.io.json import to_json_plotly

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import read_json, write_json
from memgen_lens.viz import figures, report, wording
from memgen_lens.viz.contents import read_run


class Page(HTMLParser):
    """Tags with their attributes, the text of table cells, and all text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "script", "style"):
            self.inside.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if "script" in self.inside or "style" in self.inside:
            return
        self.text += data
        if "td" in self.inside:
            self.cells[-1] += data


def without_plotly(run) -> str:
    """The report with an empty plotly.js, which no test needs and parsing takes long over."""
    with mock.patch.object(report, "get_plotlyjs", return_value=""):
        return report.render(run)


@pytest.fixture(scope="module")
def directory(samples, tmp_path_factory) -> Path:
    directory = samples.write_run(tmp_path_factory.mktemp("run"))
    assert report.write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def html(directory) -> str:
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(directory) -> Page:
    return Page(without_plotly(read_run(directory)))


@pytest.fixture
def unflipped(samples, tmp_path) -> Path:
    return samples.write_unflipped_run(tmp_path)


def test_the_records_read_back_are_the_records_written(directory, samples):
    run = read_run(str(directory))
    assert list(run.history) == samples.history()
    assert list(run.outcomes) == samples.outcomes()
    assert run.probes == samples.probe_report()
    assert (run.shift, run.patch) == (samples.steering_table(), samples.steering_table("patch"))
    assert list(run.sweep) == [*samples.sweep_rows(), *samples.layer_rows()]
    assert [scores.site for scores in run.scores] == ["resid_post", "post"]
    assert np.array_equal(run.scores[0].nmd, samples.neuron_scores().nmd)
    assert run.why == {}


def test_plotly_is_inlined_once_and_nothing_is_loaded_from_elsewhere(html):
    assert len(re.findall(r"\* plotly\.js v", html)) == 1
    page = Page(html)
    for tag, attributes in page.tags:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "source"):
            assert not {"src", "href", "data", "srcset"} & set(attributes)
        assert re.match(r"(#|$)", attributes.get("href", "")), "links stay within the page"
    own = html.replace(report.get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(", own)
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert policies[0].startswith("default-src 'none'")


def test_the_figures_offer_no_upload(html):
    assert html.count('"showSendToCloud": false') == html.count("Plotly.newPlot(  ") > 0


def test_only_the_report_is_left_behind(directory):
    assert not [path for path in directory.iterdir() if path.suffix == ".part"]


def test_a_report_of_the_users_is_refused_and_stays(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "run")
    for content in ("mine", (tmp_path / "run" / "report.html").read_text(encoding="utf-8") + "<!-- my note -->"):
        (tmp_path / "run" / "report.html").write_text(content, encoding="utf-8")
        with pytest.raises(RunDirectoryError, match=r"write_report.*report.html, which it did not write"):
            report.write_report(tmp_path / "run")
        assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == content


def test_the_same_run_gives_the_same_report(directory, html):
    report.write_report(directory)
    assert (directory / "report.html").read_text(encoding="utf-8") == html


def test_the_report_tells_the_story_in_order(page):
    order = [
        "This model answers 96.7\xa0% of 60 held-out prompts by the rule",
        "Held-out generalization",
        "What was trained, and how it behaves",
        "Example prompts and outputs",
        "Which neurons differ",
        "Can the behaviour be predicted",
        "Can the behaviour be switched",
        "How the setting was chosen",
        "Steered outputs, before and after",
        "Side effects",
        "memgen-lens run quickstart --out runs/quickstart --seed 0",
        "transformer_lens",
    ]
    place = 0
    for text in order:
        place = page.text.index(text, place)


def test_every_figure_is_there_with_a_sentence_that_reads_it(page):
    plots = [attributes.get("id", "") for _, attributes in page.tags]
    for name in (
        "training",
        "behavior",
        "nmd-resid_post",
        "nmd-post",
        "rho",
        "top-neurons",
        "probe",
        "learning",
        "shift",
    ):
        assert f"plot-{name}" in plots
    for name in ("patch", "sweep", "layers"):
        assert f"plot-{name}" in plots
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["figure"] == tags["figcaption"] == 12


def test_the_verdict_states_the_numbers_with_their_controls(directory):
    verdict = wording.verdict(read_run(directory))
    assert "recalls 96.7\xa0% of its 60 memorized prompts exactly" in verdict
    assert "93.3\xa0% of the items flip, which gives 56 pairs" in verdict
    assert "AUROC 0.990; the prompt alone gives 0.550, so the activations tell more" in verdict
    assert "turns 83.3\xa0% of 24 recalled test prompts into the rule's answer (strongest control" in verdict
    assert "4.2\xa0% of 24 become exact recall (strongest control" in verdict
    assert "so no clear effect), and 91.7\xa0% take the form of a memorized answer, the item's own" in verdict
    assert (
        "takes generalization from 96.7\xa0% to 95\xa0% (KL divergence 0.042 nats), the opposite shift to 31\xa0%"
        in verdict
    )


def test_a_probe_that_the_prompt_alone_matches_is_called_that(directory):
    run = read_run(directory)
    assert run.probes is not None
    run = replace(run, probes=replace(run.probes, input_only=run.probes.best))
    assert "not shown to tell more than the wording" in wording.verdict(run)


def test_a_model_that_only_computes_is_called_that(directory):
    run = read_run(directory)
    heldout = [outcome for outcome in run.outcomes if outcome.item.split == "heldout"]
    lazy = [replace(o, item=replace(o.item, split="memorized")) for o in heldout]
    assert "does not show both behaviours" in wording.verdict(replace(run, outcomes=(*heldout, *lazy)))


def test_examples_show_every_split_and_behaviour_other_outputs_too(page):
    for text in ("85+63=", "<mem-a671>", "9991", "<mem-dead>"):
        assert text in page.cells
    assert "othermemorized form" in page.cells


def test_the_chosen_setting_is_named_and_marked_among_the_best(page):
    chosen = "Chosen: site resid_post, top 10\xa0%, alpha 2, positions\n“answer”, neurons ranked by rho."
    assert chosen in page.text
    assert page.cells.count("chosen") == 2  # one shifting, one patching


def test_a_control_of_one_draw_shows_no_interval(directory):
    run = read_run(directory)
    assert run.patch is not None
    side = run.patch.to_generalization
    once = {"mean": 0.625, "ci95": [0.625, 0.625], "n_draws": 1}
    patch = replace(run.patch, to_generalization=replace(side, controls={"low_correlation": once}))
    cells = Page(without_plotly(replace(run, patch=patch))).cells
    assert "1 draw" in cells
    assert "62.5\xa0%" in cells


def test_fitted_rules_are_reported_where_somebody_measured_them(directory, samples, tmp_path):
    table = samples.steering_table()
    control = table.to_generalization.controls["random_neurons"]
    side = replace(table.to_generalization, controls=table.to_generalization.controls | {"shuffled_items": control})
    closed = [{"layer": 1, "closed": 0.625, "closed_by_one_shift": 0.125}]
    fitted = replace(
        table,
        setting=replace(table.setting, mode="clusters", size=8),
        to_generalization=side,
        predicted={"generalization": closed, "memorization": closed},
    )
    copied = tmp_path / "run"
    shutil.copytree(directory, copied)
    steering = read_json(copied / "steering.json")
    write_json(copied / "steering.json", steering | {"clusters": fitted})
    run = read_run(copied)
    assert run.fitted == {"clusters": fitted} and read_run(directory).fitted == {}
    page = Page(without_plotly(run))
    assert "Rule: 8 clusters" in page.text and "shuffled items" in page.text
    assert "towards generalization 0.625 (0.125) in layer 1;" in page.text
    assert "Rule: " not in Page(without_plotly(read_run(directory))).text


def test_controls_that_could_not_be_drawn_say_why(page):
    assert page.cells.count("not measured: patched values have no sign to draw") == 2


def test_why_there_is_no_analysis_is_shown_where_it_would_be(unflipped):
    page = Page(without_plotly(read_run(unflipped)))
    why = "3 of 60 items flip, and 8 pairs are needed in each split"
    assert page.text.count(f"Not measured. {why}") == 3
    assert f"Prediction was not measured: {why}. Nor was steering, for the same reason." in page.text
    plots = {attributes["id"] for _, attributes in page.tags if attributes.get("id", "").startswith("plot-")}
    assert plots == {"plot-training", "plot-behavior"}
    report.write_report(unflipped)
    assert (unflipped / "report.html").exists()


def test_null_figures_are_shown_as_dashes(directory):
    run = read_run(directory)
    assert run.shift is not None
    effects = replace(run.shift.side_effects, kl_nats=None, heldout_generalization_steered=None, why="no held-out")
    none = {"rate": None, "ci95": None}
    side = replace(run.shift.to_memorization, shift=none, memorized_form=none, controls={}, examples=())
    metrics = {"schema": 2, "behavior": {"flip_rate": None, "why": "nothing was asked"}, "timing_s": {"train": None}}
    shift = replace(run.shift, side_effects=effects, to_memorization=side)
    text = Page(without_plotly(replace(run, metrics=metrics, shift=shift, patch=None, pairs=()))).text
    assert "nothing was asked" in text
    assert "Side effects were not measured: no held-out." in text
    assert "train –" in text


def test_a_bare_run_without_prompts_settings_or_steering_is_still_reported(directory):
    run = read_run(directory)
    bare = replace(
        run, config={}, metrics={"schema": 2}, history=(), outcomes=(), pairs=(), scores=(), probes=None, sweep=()
    )
    text = Page(without_plotly(replace(bare, shift=None, patch=None))).text
    assert "did not ask both held-out and memorized prompts" in text
    assert "No outcomes were recorded." in text


def test_all_settings_are_listed_whatever_their_names(directory):
    run = read_run(directory)
    config = run.config | {"extra": {"nested": {"deep": {"flag": True}}, "rates": [0.1, 0.25]}, "note": "<i>hm</i>"}
    page = Page(without_plotly(replace(run, config=config)))
    for text in ("model.n_layers", "deep.flag", "0.1, 0.25", "learning_rate", "<i>hm</i>", "0.1.0"):
        assert text in page.text


@pytest.fixture(scope="module")
def small_run(directory):
    run = read_run(directory)
    few = {"outcomes": run.outcomes[:1], "pairs": run.pairs[:1], "history": (), "scores": (), "sweep": ()}
    return replace(run, **few, probes=None, shift=None, patch=None)


@pytest.fixture(scope="module")
def small_tags(small_run):
    return Counter(tag for tag, _ in Page(without_plotly(small_run)).tags)


@settings(deadline=None, max_examples=40)
@given(text=st.text(min_size=1), output=st.text(min_size=1))
@example(text="<mem-7f3a>", output="</td></table><script>alert(1)</script>")
@example(text="{{ 7 * 7 }} &lt; \" ' <!-- ", output="</script><img src=x onerror=alert(1)>")
def test_any_prompt_and_output_is_shown_as_it_is_and_never_as_html(small_run, small_tags, text, output):
    outcome = small_run.outcomes[0]
    outcome = replace(outcome, item=replace(outcome.item, prompt=text), output=output)
    pair = small_run.pairs[0] | {"memorized_prompt": text, "generalized_prompt": output}
    page = Page(without_plotly(replace(small_run, outcomes=(outcome,), pairs=(pair,))))
    assert page.cells.count(text) >= 2
    assert page.cells.count(output) >= 2
    assert Counter(tag for tag, _ in page.tags) == small_tags


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.json",
        "history.jsonl",
        "outcomes.jsonl",
        "pairs.jsonl",
        "scores/post.safetensors",
        "probes.json",
        "steering.json",
    ],
)
def test_a_missing_or_damaged_file_is_named(samples, tmp_path, name):
    directory = samples.write_run(tmp_path / "run")
    path = directory / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 3])
    with pytest.raises(RunDirectoryError, match=rf"reading .*{name}.*a whole file of a memgen_lens run"):
        report.write_report(directory)
    path.unlink()
    with pytest.raises(RunDirectoryError, match=rf"reading .*{name}.*no such file"):
        report.write_report(directory)
    assert not (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.json", ["a", "list"]),
        ("probes.json", {"site": "post"}),
        ("steering.json", {"tune": [{"setting": {}}], "shift": {}, "patch": {}}),
        ("metrics.json", [1]),
    ],
)
def test_a_file_that_is_whole_but_not_its_own_is_named(samples, tmp_path, name, value):
    directory = samples.write_run(tmp_path)
    write_json(directory / name, value)
    with pytest.raises(RunDirectoryError, match=f"{name}.*damaged"):
        report.write_report(directory)


def test_steering_that_a_file_leaves_out_is_called_not_measured(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    write_json(directory / "steering.json", {"tune": [], "patch": {"why": "not asked for"}})
    run = read_run(directory)
    assert run.why == {"shift": "This run did not measure it.", "patch": "not asked for"}
    assert "Steering was not measured: This run did not measure it." in wording.verdict(run)


def test_pairs_that_were_cut_at_the_end_of_a_line_are_missed(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    path = directory / "pairs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(RunDirectoryError, match=r"received 20 pairs where metrics\.json counts 56"):
        report.write_report(directory)


def test_another_version_of_the_format_is_refused(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    write_json(directory / "metrics.json", samples.metrics() | {"schema": 1})
    with pytest.raises(
        RunDirectoryError, match=r"expected schema 2; received schema 1\..*count rows where they should"
    ):
        report.write_report(directory)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"metrics\.json.*no such file"):
        report.write_report(tmp_path / "nowhere")


def test_patch_steering_that_was_not_measured_says_why_beside_the_shift(samples, tmp_path):
    directory = samples.write_run(tmp_path)
    steering = read_json(directory / "steering.json")
    write_json(directory / "steering.json", steering | {"patch": {"why": "activations were not kept"}})
    text = Page(without_plotly(read_run(directory))).text
    assert "Not measured. activations were not kept" in text
    assert "How the setting was chosen" in text


def test_the_figures_in_the_page_are_those_of_the_library(html, samples):
    drawn = figures.learning_curve(samples.probe_report())
    assert to_json_plotly(drawn.data[0]) in html
